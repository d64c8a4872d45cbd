//! Measuring, on simulated GPUs, and the cache.

use super::*;
use crate::gpu::{Stream, sim};
use crate::topology::Topology;
use peerlane_device::abi::{Args, Kernel, Layout, UNIT};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// The streaming kernel looks at no mailbox.
const LAYOUT: Layout = Layout::new(1, 1, 1).expect("one slot fits");

fn settings() -> Settings {
    Settings { bytes: 32 << 10, rounds: 4, repeats: 2, ..Settings::of(Backend::Sim) }
}

fn gpus(config: sim::Config) -> Vec<GpuRef> {
    sim::devices(&config)
}

fn machine(devices: u32, seed: u64) -> sim::Config {
    sim::Config { devices, seed, multiprocessors: 2, ..sim::Config::default() }
}

fn every_figure(measurement: &Measurement, from: u32, to: u32) -> Vec<Option<f64>> {
    let all = Traffic::ALL.into_iter().flat_map(|t| Quantity::ALL.map(|q| (q, t)));
    all.map(|(quantity, traffic)| measurement.figure(from, to, quantity, traffic)).collect()
}

#[test]
fn the_kernel_moves_every_unit_and_no_other() {
    const THREADS: u32 = 8;
    let gpus = gpus(machine(2, 1));
    gpus[0].enable_peer(1).unwrap();
    let stream = Stream::default();
    for (units, blocks) in [(0, 1), (1, 2), (31, 1), (64, 2), (65, 2), (200, 3)] {
        let bytes = units as usize * UNIT;
        let data: Vec<u8> = (0..bytes + UNIT).map(|i| (i * 7 % 251) as u8).collect();
        // Stores: from GPU 0 to the memory of GPU 1. Loads: the other way round.
        for (source, target) in [(0, 1), (1, 0)] {
            let [src, dst] =
                [source, target].map(|gpu: usize| gpus[gpu].alloc(bytes + UNIT).unwrap());
            let args = Args { units, src: src.0, dst: dst.0, ..Args::new(0, 1, LAYOUT) };
            let mut found = vec![0; bytes + UNIT];
            // SAFETY: both have room for one unit more.
            unsafe {
                gpus[source].upload(src, &data, stream).unwrap();
                gpus[target].fill(dst, 0xee, bytes + UNIT, stream).unwrap();
                gpus.iter().for_each(|gpu| gpu.synchronize().unwrap());
                gpus[0].launch(Kernel::Stream, blocks, THREADS, &args, stream).unwrap();
                gpus[0].synchronize().unwrap();
                gpus[target].download(&mut found, dst, stream).unwrap();
                gpus[source].free(src).unwrap();
                gpus[target].free(dst).unwrap();
            }
            assert!(found[..bytes] == data[..bytes], "{units} units, {blocks} blocks");
            assert!(found[bytes..] == [0xee; UNIT], "{units} units, {blocks} blocks");
        }
    }
}

#[test]
fn every_pair_is_measured() {
    for devices in [1, 2, 3, 5] {
        let gpus = gpus(machine(devices, u64::from(devices)));
        let measurement = measure(&gpus, &settings()).unwrap();
        assert!(measurement.is_sound(devices), "{measurement:?}");
        assert_eq!(measurement.message_bytes, 16 << 10);
        for pair in &measurement.pairs {
            assert_eq!(pair.reason, None);
            let figures = every_figure(&measurement, pair.from, pair.to);
            assert!(figures.iter().all(|f| f.is_some_and(|f| f > 0.0)), "{pair:?}");
            let latency = |a, b| measurement.figure(a, b, Quantity::Latency, Traffic::Alone);
            assert_eq!(latency(pair.from, pair.to), latency(pair.to, pair.from));
        }
        let everyone: Vec<u32> = (0..devices).collect();
        assert_eq!(measurement.islands().concat().len(), devices as usize);
        assert!(measurement.hub(&everyone).is_some());
    }
}

#[test]
fn no_gpus_are_measured_too() {
    let measurement = measure(&[], &settings()).unwrap();
    assert!(measurement.is_sound(0) && measurement.hub(&[]).is_none());
}

#[test]
fn ranks_that_share_a_gpu_are_a_pair() {
    let one = gpus(machine(1, 3));
    let both = [one[0].clone(), one[0].clone()];
    let measurement = measure(&both, &settings()).unwrap();
    assert!(measurement.is_sound(2) && measurement.pairs.iter().all(|p| p.figures.is_some()));
    let topology = Topology::discover(&both).unwrap();
    assert_eq!(transport(&topology, Some(&measurement), 0, 1), Some(Reach::SameGpu));
    assert_eq!(transport(&topology, Some(&measurement), 0, 0), None);
}

#[test]
fn a_pair_without_access_says_why_and_the_others_are_measured() {
    let gpus = gpus(sim::Config { unreachable: vec![(0, 2)], ..machine(3, 1) });
    let measurement = measure(&gpus, &settings()).unwrap();
    assert!(measurement.is_sound(3));
    let topology = Topology::discover(&gpus).unwrap();
    for pair in &measurement.pairs {
        let apart = pair.from + pair.to == 2;
        assert_eq!(pair.figures.is_none(), apart, "{pair:?}");
        let expected = if apart { Reach::Host } else { Reach::P2p };
        for known in [None, Some(&measurement)] {
            assert_eq!(transport(&topology, known, pair.from, pair.to), Some(expected));
        }
        let reason = pair.reason.as_deref();
        assert_eq!(reason, apart.then_some("the driver offers no peer access"));
    }
    assert_eq!(measurement.hub(&[0, 1, 2]), Some(1));
}

#[test]
fn a_pair_that_works_in_one_direction_has_a_way_for_each() {
    let gpus = gpus(sim::Config { one_way: vec![(2, 0)], ..machine(3, 1) });
    let measurement = measure(&gpus, &settings()).unwrap();
    assert!(measurement.is_sound(3));
    let topology = Topology::discover(&gpus).unwrap();
    for pair in &measurement.pairs {
        let closed = (pair.from, pair.to) == (2, 0);
        assert_eq!(pair.figures.is_none(), closed, "{pair:?}");
        let expected = if closed { Reach::Host } else { Reach::P2p };
        for known in [None, Some(&measurement)] {
            assert_eq!(transport(&topology, known, pair.from, pair.to), Some(expected));
        }
    }
    let open = measurement.pair(0, 2).unwrap().figures.unwrap();
    assert_eq!(open.alone.latency_us, None, "nothing comes back");
}

#[test]
fn a_pair_that_loses_stores_is_found_out() {
    let gpus = gpus(sim::Config { lossy: vec![(1, 0)], ..machine(3, 1) });
    let measurement = measure(&gpus, &settings()).unwrap();
    assert!(measurement.is_sound(3));
    let topology = Topology::discover(&gpus).unwrap();
    assert_eq!(transport(&topology, None, 0, 1), Some(Reach::P2p));
    for (from, to) in [(0, 1), (1, 0)] {
        let pair = measurement.pair(from, to).unwrap();
        assert_eq!(pair.figures, None);
        let reason = pair.reason.as_deref().unwrap();
        assert!(reason.contains("what GPU1 stores into GPU0 does not arrive"), "{reason}");
        let found = transport(&topology, Some(&measurement), from, to);
        assert_eq!(found, Some(Reach::Host));
    }
    assert!(measurement.pair(1, 2).unwrap().figures.is_some());
}

#[test]
fn short_memory_makes_messages_smaller() {
    let gpus = gpus(sim::Config { memory_bytes: 300 << 10, ..machine(2, 1) });
    let big = Settings { bytes: 1 << 20, ..settings() };
    assert_eq!(measure(&gpus, &big).unwrap().message_bytes, 128 << 10);
    // Everything is given back: it fits again.
    assert_eq!(measure(&gpus, &big).unwrap().message_bytes, 128 << 10);
    let full = sim::devices(&sim::Config { memory_bytes: 4096, ..machine(2, 1) });
    assert!(measure(&full, &big).is_err());
}

/// A directory that goes when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let directory =
            std::env::temp_dir().join(format!("peerlane-{}-{name}", std::process::id()));
        Scratch(directory)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn key(driver: &str) -> Key {
    let gpu = |n: u32| (format!("GPU-{n}"), format!("0000:{n:02x}:00.0"));
    Key::new(vec![gpu(0), gpu(1)], driver)
}

#[test]
fn the_cache_gives_back_what_it_was_given() {
    let scratch = Scratch::new("round-trip");
    let cache = Cache::at(scratch.0.join("deep/er"));
    let gpus = gpus(machine(2, 1));
    let find = |driver, refresh| {
        find(&gpus, &settings(), Some(&key(driver)), Some(&cache), refresh).unwrap()
    };
    let first = find("580.1", false);
    assert!(!first.cached && first.notes.is_empty(), "{:?}", first.notes);
    let again = find("580.1", false);
    assert!(again.cached && again.measurement == first.measurement);
    // Another driver, and a wish: measured anew.
    assert!(!find("580.2", false).cached);
    assert!(!find("580.1", true).cached);
    assert!(find("580.2", false).cached);
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(cache.file(&key("580.1"))), 0o600);
    assert_eq!(mode(scratch.0.join("deep/er")), 0o700);
    let files = std::fs::read_dir(scratch.0.join("deep/er")).unwrap().count();
    assert_eq!(files, 2, "no temporary file stays");
}

#[test]
fn a_file_that_cannot_be_believed_is_measured_anew() {
    let scratch = Scratch::new("disbelief");
    let cache = Cache::at(&scratch.0);
    let gpus = gpus(machine(2, 1));
    let find = || find(&gpus, &settings(), Some(&key("1")), Some(&cache), false).unwrap();
    let path = cache.file(&key("1"));
    find();
    let whole = std::fs::read_to_string(&path).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let spoiled = [
        whole[..whole.len() / 2].to_owned(),
        String::new(),
        "\u{0}".into(),
        "{\"name\": \"another program's\"}".into(),
        whole.replace(version, "0.0.0"),
        whole.replace("GPU-1", "GPU-7"),
        whole.replace("\"to\": 1", "\"to\": 0"),
        whole.replace("\"gpus\": 2", "\"gpus\": 3"),
        whole.replacen("_gbps\": ", "_gbps\": -", 1),
    ];
    for text in spoiled {
        assert_ne!(text, whole);
        std::fs::write(&path, &text).unwrap();
        let found = find();
        assert!(!found.cached && found.notes.len() == 1, "{text}: {:?}", found.notes);
        assert!(found.notes[0].contains("is ignored: "), "{:?}", found.notes);
        assert!(find().cached, "the new file replaced it");
    }
    // No file at all.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let found = find();
    assert!(!found.cached && found.notes.len() == 2, "{:?}", found.notes);
    assert!(found.notes[1].contains("cannot write"), "{:?}", found.notes);
}

#[test]
fn without_a_directory_there_is_a_note_and_a_measurement() {
    let scratch = Scratch::new("no-directory");
    std::fs::write(&scratch.0, "a file").unwrap();
    let gpus = gpus(machine(2, 1));
    let cache = Cache::at(scratch.0.join("below"));
    let found = find(&gpus, &settings(), Some(&key("1")), Some(&cache), false).unwrap();
    assert!(!found.cached && !found.notes.is_empty());
    std::fs::remove_file(&scratch.0).unwrap();
    assert_eq!(Key::of(&gpus, "1"), None);
    assert!(find(&gpus, &settings(), None, None, false).unwrap().notes.is_empty());
}
