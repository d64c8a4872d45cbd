//! The model's properties, the tables' errors, and what ranks agree on.

use super::*;
use crate::Communicator;
use crate::gpu::{Backend, GpuRef, sim};
use crate::layout;
use crate::links::{Cache, Figures, Key, Measurement, Pair, Quantities};
use crate::rendezvous::Meeting;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CLASSES: [LinkClass; 5] = [
    LinkClass::NvLink,
    LinkClass::Pcie(3),
    LinkClass::Pcie(4),
    LinkClass::Pcie(5),
    LinkClass::Host,
];

fn shape(world: u32) -> Shape {
    Shape::new(world, layout::choose(world, 32 << 20).unwrap(), 132)
}

fn modelled(world: u32, class: LinkClass, exact: bool) -> Choice {
    Choice::modelled(&shape(world), &Links::of(class), exact)
}

/// The largest size for which every rank sends its whole tensor.
fn last_one_shot(choice: &Choice) -> usize {
    let all = choice.all_reduces().entries().iter();
    all.filter(|(_, a)| matches!(a, Algorithm::OneShot(_))).map(|(limit, _)| *limit).max().unwrap()
}

#[test]
fn two_ranks_keep_what_was_measured() {
    for exact in [true, false] {
        let choice = modelled(2, LinkClass::NvLink, exact);
        assert_eq!(choice.all_reduces().entries(), [(1024, PACKET), (usize::MAX, FULL)]);
        assert_eq!(choice.broadcasts(), &Limits::always(Route::Direct));
    }
}

#[test]
fn crossovers_lie_where_one_more_step_costs_what_the_bytes_cost() {
    let close = |world: u32, class, expected: f64| {
        let found = last_one_shot(&modelled(world, class, true)) as f64;
        assert!((found / expected - 1.0).abs() < 0.05, "{world} {class:?}: {found}");
    };
    for world in 3..=16u32 {
        let n = f64::from(world);
        close(world, LinkClass::NvLink, 666_000.0 * n / ((n - 1.0) * (n - 2.0)));
    }
    // The anchors for PCIe: 2.5 us and 53 or 26.3 GB/s.
    close(4, LinkClass::Pcie(5), 88_000.0);
    close(8, LinkClass::Pcie(5), 25_000.0);
    close(4, LinkClass::Pcie(4), 43_000.0);
    close(8, LinkClass::Pcie(4), 12_500.0);
}

#[test]
fn every_world_has_an_answer_for_every_size() {
    for world in 1..=16 {
        for class in CLASSES {
            for exact in [true, false] {
                let choice = modelled(world, class, exact);
                for bytes in [0, 1, 1024, 1025, 1 << 20, 1 << 34, usize::MAX] {
                    let algorithm = choice.all_reduce(bytes);
                    assert!(!exact || is_exact(algorithm, world), "{world}: {algorithm}");
                    assert!(!matches!(algorithm, Algorithm::Scheduled(_)), "{world}");
                    choice.broadcast(bytes);
                }
                assert!(choice.all_reduces().entries().len() <= 4, "{choice:?}");
            }
        }
    }
}

#[test]
fn a_broadcast_to_many_leaves_the_root_once_where_that_pays() {
    for world in 3..=16 {
        let choice = modelled(world, LinkClass::NvLink, true);
        assert_eq!(choice.broadcast(64 << 10), Route::Direct, "{world}");
        assert_ne!(choice.broadcast(256 << 20), Route::Direct, "{world}");
    }
}

#[test]
fn links_that_share_a_way_up_are_used_one_at_a_time() {
    let pair = |from, to| {
        let rates = |gbps| Quantities {
            latency_us: Some(1.0),
            store_gbps: gbps,
            load_gbps: gbps,
            copy_gbps: 26.0,
        };
        let figures = Some(Figures { alone: rates(24.0), loaded: rates(1.0) });
        Pair { from, to, figures, reason: None }
    };
    let pairs = (0..4).flat_map(|from| (0..4).map(move |to| (from, to)));
    let pairs = pairs.filter(|(from, to)| from != to).map(|(from, to)| pair(from, to)).collect();
    let mut measured =
        Measurement { backend: Backend::Cuda, gpus: 4, message_bytes: 1 << 20, pairs };
    let links = Links::measured(LinkClass::Pcie(4), &measured).unwrap();
    let expected = Links { step_us: 2.5, store_gbps: 3.0, single_gbps: 24.0, copy_gbps: 26.0 };
    assert_eq!(links, expected);
    let choice = Choice::modelled(&shape(4), &links, true);
    assert_eq!(choice.all_reduce(16 << 20), Algorithm::Staged);
    assert!(matches!(choice.all_reduce(1 << 10), Algorithm::OneShot(_)));
    measured.pairs[3].figures = None;
    assert_eq!(Links::measured(LinkClass::Pcie(4), &measured), None);
}

proptest! {
    #[test]
    fn costs_rise_with_bytes(world in 2u32..=16, class in 0..CLASSES.len(), bytes in 0usize..1 << 30, more in 1usize..1 << 20) {
        let (shape, links) = (shape(world), Links::of(CLASSES[class]));
        for algorithm in Algorithm::ALL {
            let cost = Cost::of_all_reduce(algorithm, &shape, &links);
            prop_assert!(cost.us(bytes) < cost.us(bytes + more), "{algorithm}");
            prop_assert!(cost.us(0) > 0.0, "{algorithm}");
        }
        for route in Route::ALL {
            let cost = Cost::of_broadcast(route, &shape, &links);
            prop_assert!(cost.us(bytes) < cost.us(bytes + more), "{route}");
        }
    }

    #[test]
    fn slower_links_change_earlier(world in 3u32..=16) {
        let at = CLASSES.map(|class| last_one_shot(&modelled(world, class, true)));
        prop_assert!(at[0] > at[3] && at[3] > at[2] && at[2] > at[1], "{at:?}");
    }
}

#[test]
fn steps_and_bytes_are_those_of_the_literature() {
    // Between infinitely fast links only steps count, and between ones without latency only bytes.
    let steps = Links { step_us: 1.0, store_gbps: 1e9, single_gbps: 1e9, copy_gbps: 1e9 };
    let bytes = Links { step_us: 0.0, store_gbps: 1e-3, single_gbps: 1e-3, copy_gbps: 1e-3 };
    let world = 8;
    let cost = |algorithm, links| Cost::of_all_reduce(algorithm, &shape(world), links);
    for (algorithm, expected, tensors) in [
        (FULL, 1.0, 7.0),
        (Algorithm::TwoShot, 2.0, 1.75),
        (Algorithm::Staged, 14.0, 1.75),
        (Algorithm::Ring, 14.0, 1.75),
        (Algorithm::Tree, 6.0, 3.0),
        (Algorithm::Hierarchical, 4.0, 1.75),
    ] {
        let launch = 0.6;
        let found = cost(algorithm, &steps).us(0) - launch;
        assert!((found - expected).abs() < 1e-6, "{algorithm}: {found} steps");
        let large = cost(algorithm, &bytes);
        let slope = (large.us(2 << 30) - large.us(1 << 30)) / f64::from(1 << 30);
        assert!((slope - tensors).abs() < 1e-6, "{algorithm}: {slope} tensors");
    }
}

/// Names a file in the directory of tests that no other test uses.
fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("peerlane-choice-{}-{name}", std::process::id()))
}

fn gpus(count: u32) -> Vec<GpuRef> {
    sim::devices(&sim::Config { devices: count, multiprocessors: 2, ..sim::Config::default() })
}

fn key(gpus: &[GpuRef]) -> Key {
    let identity = |gpu: &GpuRef| {
        let properties = gpu.properties();
        (properties.uuid.clone(), properties.pci_bus_id.clone())
    };
    Key::simulated(gpus.iter().map(identity).collect())
}

fn table(gpus: &[GpuRef]) -> TuningTable {
    let entry = |up_to, choice: &str| Entry { up_to, choice: choice.into(), us: Some(2.5) };
    TuningTable {
        version: VERSION,
        world: gpus.len() as u32,
        host: false,
        simulated: true,
        key: key(gpus),
        all_reduce: vec![entry(Some(4096), "full"), entry(None, "staged")],
        all_reduce_any: vec![entry(Some(100), "packet"), entry(None, "ring")],
        broadcast: vec![entry(Some(4096), "chain"), entry(None, "tree")],
    }
}

#[test]
fn a_table_reads_back_and_is_followed() {
    let (gpus, path) = (gpus(3), file("followed.json"));
    let table = table(&gpus);
    table.write(&path).unwrap();
    assert_eq!(TuningTable::read(&path), Ok(table));
    let config = |exact| Config {
        tuning: Tuning::File(path.clone()),
        exact,
        mailbox_bytes: 1 << 20,
        ..Config::default()
    };
    let ranks = Communicator::connect(&gpus, &config(true)).unwrap();
    for rank in &ranks {
        let choice = rank.choice();
        assert_eq!(choice.source(), Source::Table);
        assert_eq!(choice.all_reduce(4096), FULL);
        assert_eq!(choice.all_reduce(4097), Algorithm::Staged);
        assert_eq!(
            [choice.broadcast(4096), choice.broadcast(1 << 30)],
            [Route::Chain, Route::Tree]
        );
    }
    let ranks = Communicator::connect(&gpus, &config(false)).unwrap();
    assert_eq!(ranks[2].choice().all_reduce(4096), Algorithm::Ring);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_table_that_is_not_sound_says_what_is_wrong() {
    let good = table(&gpus(3));
    let parse = |change: &dyn Fn(&mut TuningTable)| {
        let mut table = good.clone();
        change(&mut table);
        let text = serde_json::to_string(&table).unwrap();
        let (expected, got) = TuningTable::parse(&text).expect_err(&text);
        format!("expected {expected}, got {got}")
    };
    type Change<'a> = &'a dyn Fn(&mut TuningTable);
    let cases: [(Change<'_>, &str); 11] = [
        (&|t| t.version = 2, "expected a tuning table of version 1, got 2"),
        (&|t| t.world = 4, "expected a GPU for each of 4 ranks, got 3 GPUs"),
        (
            &|t| t.all_reduce[1].choice = "two_shot".into(),
            "all_reduce: a known name, got expected one of",
        ),
        (&|t| t.broadcast[0].choice = "ring".into(), "broadcast: a known name"),
        (&|t| t.broadcast.clear(), "broadcast: one entry or more, got none"),
        (
            &|t| t.all_reduce[0].up_to = None,
            "all_reduce: a limit in every entry but the last, got none",
        ),
        (&|t| t.all_reduce[0].up_to = Some(0), "all_reduce: a limit above 0, got 0"),
        (
            &|t| {
                let again = t.all_reduce_any[0].clone();
                t.all_reduce_any.insert(0, again);
            },
            "all_reduce_any: a limit above 100, got 100",
        ),
        (
            &|t| t.all_reduce_any[1].up_to = Some(9999),
            "a last entry without limit, got one up to 9999",
        ),
        (&|t| t.broadcast[0].us = Some(-1.0), "broadcast: microseconds above 0, got -1"),
        (&|t| t.all_reduce[1].choice = "ring".into(), "add in rank order and round once, got ring"),
    ];
    for (change, message) in cases {
        let found = parse(change);
        assert!(found.contains(message), "{found}");
    }
    let text = serde_json::to_string(&good).unwrap();
    assert!(TuningTable::parse(&text).is_ok());
    for length in [0, 1, text.len() / 2, text.len() - 1] {
        assert!(TuningTable::parse(&text[..length]).is_err(), "{length} of {}", text.len());
    }
    let unknown = text.replacen("\"world\"", "\"more\":1,\"world\"", 1);
    assert!(TuningTable::parse(&unknown).unwrap_err().1.contains("unknown field"));
}

#[test]
fn a_table_for_others_is_refused_by_name() {
    let three = gpus(3);
    let good = table(&three);
    let path = file("others.json");
    let connect = |gpus: &[GpuRef], table: &TuningTable| {
        table.write(&path).unwrap();
        let config = Config { tuning: Tuning::File(path.clone()), ..Config::default() };
        Communicator::connect(gpus, &config).err().map(|error| error.to_string())
    };
    let two = connect(&gpus(2), &good).unwrap();
    assert!(
        two.contains("connect: tuning: expected a tuning table for 2 GPUs (")
            && two.contains("one for 3 GPUs"),
        "{two}"
    );
    let text = serde_json::to_string(&good).unwrap();
    let changed = |from: &str, to: &str| TuningTable::parse(&text.replacen(from, to, 1)).unwrap();
    let version = format!("\"peerlane\":\"{}\"", env!("CARGO_PKG_VERSION"));
    let error = connect(&three, &changed(&version, "\"peerlane\":\"9.9\"")).unwrap();
    assert!(error.contains("one for Peerlane 9.9"), "{error}");
    let error = connect(&three, &changed("\"driver\":\"simulated\"", "\"driver\":\"1\"")).unwrap();
    assert!(error.contains("for driver simulated, got") && error.contains("driver 1"), "{error}");
    assert_eq!(connect(&three, &good), None);
    std::fs::write(&path, &text[..40]).unwrap();
    let config = Config { tuning: Tuning::File(path.clone()), ..Config::default() };
    let error = Communicator::connect(&three, &config).err().unwrap().to_string();
    assert!(
        error.contains("expected a tuning table, got") && error.contains("others.json"),
        "{error}"
    );
    std::fs::remove_file(&path).unwrap();
    let error = Communicator::connect(&three, &config).err().unwrap().to_string();
    assert!(error.contains("expected a file that can be read"), "{error}");
}

#[test]
fn the_cache_is_believed_only_for_its_own_key() {
    let directory = file("cache");
    let cache = Cache::at(&directory);
    let gpus = gpus(2);
    let key = key(&gpus);
    assert_eq!(TuningTable::load(&cache, &key), Ok(None));
    let place = TuningTable::place(&cache, &key);
    let mut real = table(&gpus);
    real.simulated = false;
    real.write(&place).unwrap();
    assert_eq!(TuningTable::load(&cache, &key), Ok(Some(real.clone())));
    table(&gpus).write(&place).unwrap();
    assert!(
        TuningTable::load(&cache, &key)
            .unwrap_err()
            .contains("is ignored: it was measured on simulated")
    );
    let mut other = real;
    other.key = Key::simulated(vec![("GPU-a".into(), "0".into()), ("GPU-b".into(), "1".into())]);
    other.write(&place).unwrap();
    assert!(
        TuningTable::load(&cache, &key)
            .unwrap_err()
            .contains("is ignored: expected a tuning table for 2 GPUs")
    );
    std::fs::write(&place, "{\"version\": 1").unwrap();
    assert!(
        TuningTable::load(&cache, &key)
            .unwrap_err()
            .contains("is ignored: expected a tuning table")
    );
    std::fs::remove_dir_all(directory).unwrap();
}

/// Two threads that join with these configurations; what each ends with.
fn join(configs: [Config; 2]) -> [std::result::Result<Choice, String>; 2] {
    let gpus = gpus(2);
    let meeting = Meeting::new(2, Duration::from_secs(20));
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|rank: usize| {
            let (meeting, gpu, config) = (&meeting, &gpus[rank], &configs[rank]);
            scope.spawn(move || {
                let joined = Communicator::join(meeting, rank as u32, gpu, config);
                joined.map(|rank| rank.choice().clone()).map_err(|error| error.to_string())
            })
        });
        threads.map(|thread| thread.join().unwrap())
    })
}

fn with_file(path: &Path) -> Config {
    let tuning = Tuning::File(path.into());
    Config { tuning, mailbox_bytes: 1 << 20, ..Config::default() }
}

#[test]
fn ranks_that_bring_different_tables_are_told_both_names() {
    let two = gpus(2);
    let (one, other, same) = (file("one.json"), file("other.json"), file("same.json"));
    let mut changed = table(&two);
    changed.broadcast[0].choice = "hub".into();
    table(&two).write(&one).unwrap();
    table(&two).write(&same).unwrap();
    changed.write(&other).unwrap();
    for answer in join([with_file(&one), with_file(&other)]) {
        let error = answer.unwrap_err();
        assert!(error.contains("bring different configurations: tuning tables"), "{error}");
        assert!(error.contains("one.json") && error.contains("other.json"), "{error}");
    }
    // The same table under another name is no contradiction.
    let [first, second] = join([with_file(&one), with_file(&same)]);
    assert_eq!(first.as_ref().unwrap().broadcast(1), Route::Chain);
    assert_eq!(first, second);
    for path in [one, other, same] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn contradictory_overrides_end_in_one_error_on_every_rank() {
    let base = || Config { mailbox_bytes: 1 << 20, ..Config::default() };
    let others = [
        Config { algorithm: Some(Algorithm::Ring), ..base() },
        Config { route: Some(Route::Tree), ..base() },
        Config { tuning: Tuning::Off, ..base() },
        Config { fixed: true, ..base() },
        Config { exact: false, ..base() },
    ];
    for other in others {
        for answer in join([base(), other.clone()]) {
            let error = answer.unwrap_err();
            assert!(error.contains("rank 0 and rank 1 bring different configurations"), "{error}");
        }
    }
}

#[test]
fn fixed_is_one_algorithm_and_refuses_those_whose_bits_depend_on_size() {
    for world in 1..=4 {
        let gpus = gpus(world);
        let fixed = |algorithm| {
            let config =
                Config { fixed: true, algorithm, mailbox_bytes: 1 << 20, ..Config::default() };
            let ranks = Communicator::connect(&gpus, &config);
            ranks.map(|ranks| ranks[0].choice().clone()).map_err(|error| error.to_string())
        };
        let usual = if world <= 2 { FULL } else { Algorithm::TwoShot };
        let choice = fixed(None).unwrap();
        assert_eq!(choice.source(), Source::Fixed);
        assert_eq!(choice.all_reduces(), &Limits::always(usual));
        assert_eq!(choice.broadcasts(), &Limits::always(Route::Direct));
        let tree = fixed(Some(Algorithm::Tree)).unwrap();
        assert_eq!(tree.all_reduces(), &Limits::always(Algorithm::Tree));
        let ring = fixed(Some(Algorithm::Ring));
        if world > 2 {
            let error = ring.unwrap_err();
            assert!(
                error.contains("algorithm: expected one whose sums are the same at any size"),
                "{error}"
            );
            assert!(error.ends_with("got ring"), "{error}");
        } else {
            assert!(ring.is_ok());
        }
    }
}

#[test]
fn what_was_measured_over_other_transports_is_not_used() {
    let gpus = gpus(3);
    let slow = Links { step_us: 1.0, store_gbps: 1.0, single_gbps: 1000.0, copy_gbps: 1.0 };
    let known = Known { table: Some(table(&gpus)), links: Some(slow), ..Known::default() };
    let host = Shape { host: true, class: LinkClass::Host, ..shape(3) };
    let auto = Config::default();
    let settled = Choice::settle(&auto, &host, &known).unwrap();
    assert_eq!(settled.source(), Source::Model);
    let expected = modelled(3, LinkClass::Host, true);
    assert_eq!(settled.all_reduces(), expected.all_reduces());
    assert_eq!(settled.broadcasts(), expected.broadcasts());
    assert!(settled.notes()[0].contains("expected a tuning table for host memory"));
    let file = Config { tuning: Tuning::File("x.json".into()), ..auto.clone() };
    let refused = Choice::settle(&file, &host, &known).unwrap_err().to_string();
    assert!(refused.contains("x.json: one for peer-to-peer access"), "{refused}");
    let table = TuningTable { host: true, ..table(&gpus) };
    let known = Known { table: Some(table), ..Known::default() };
    assert_eq!(Choice::settle(&file, &host, &known).unwrap().source(), Source::Table);
    let peer_to_peer = Choice::settle(&auto, &shape(3), &known).unwrap();
    assert_eq!(peer_to_peer.source(), Source::Model);
}

#[test]
fn ranks_that_meet_in_host_memory_choose_by_its_figures() {
    let config = Config {
        transport: crate::Transport::Host,
        mailbox_bytes: 1 << 20,
        max_blocks: Some(2),
        ..Config::default()
    };
    for rank in Communicator::connect(&gpus(4), &config).unwrap() {
        // 5 us and 20 GB/s: S = 100 kB x n / ((n-1)(n-2)).
        let limit = last_one_shot(rank.choice()) as f64;
        assert!((limit / 66_667.0 - 1.0).abs() < 0.05, "{limit}");
    }
}
