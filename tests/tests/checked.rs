//! Checked calls: right under every seed, and what would else be a wrong result or a wait in vain is an error
//! that says what happened.

use peerlane::cases::Rng;
use peerlane::gpu::Graph;
use peerlane::{Algorithm, Config, DType, Error, Format, Pattern, ReduceOp, Route, Spread};
use peerlane::{Transport, Wire};
use peerlane_device::abi::flags;
use peerlane_tests::{Call, Group, Job, Machine, Memory, Rank, Script, random_jobs, small};
use std::time::Duration;

/// Simulated time that a rank waits. Waits that succeed take a tenth of it at most.
const DEADLINE: Duration = Duration::from_millis(100);

fn checked(world: u32) -> Config {
    Config { checked: true, deadline: DEADLINE, ..small(world) }
}

fn all_reduce(count: usize, algorithm: Algorithm) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (algorithm, in_place, absent) = (Some(algorithm), false, 0);
    Job::plain(Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent })
}

const FULL: Algorithm = Algorithm::OneShot(Format::Full);

#[test]
fn calls_of_all_kinds_are_right() {
    for (world, seeds) in [(1, 4), (2, 30), (3, 20), (5, 8), (8, 4), (16, 1)] {
        for seed in 1..=seeds {
            let transport = [Transport::P2p, Transport::Host][seed as usize % 2];
            let config = Config { transport, ..checked(world) };
            let mut group = Group::connect(&Machine::sim(world, seed), world, &config);
            let jobs = random_jobs(world, 8, 6000, &mut Rng::new(seed, "checked"));
            group.check(&jobs, seed);
        }
    }
}

#[test]
fn counters_and_sums_wrap() {
    let config = Config { first_slot: u32::MAX - 3, ..checked(3) };
    let mut group = Group::connect(&Machine::sim(3, 1), 3, &config);
    let jobs: Vec<Job> = (1..12).map(|n| all_reduce(500 * n, Algorithm::TwoShot)).collect();
    group.check(&jobs, 1);
}

/// What comes of `jobs` with a part of the protocol left out, under a few seeds.
fn outcomes(switch: u32, checked: bool, jobs: &[Job]) -> Vec<Result<(), String>> {
    let run = |seed| {
        let config = Config { broken: switch, checked, ..self::checked(2) };
        let mut group = Group::connect(&Machine::sim(2, seed), 2, &config);
        group.run(&Script::new(2, jobs, seed)).map(drop)
    };
    (1..=12).map(run).collect()
}

/// That data which are not what was sent are reported as such, where unchecked calls end with a wrong result.
fn assert_noticed(switch: u32, jobs: &[Job]) {
    let wrong = |outcome: &&Result<(), String>| {
        outcome.as_ref().is_err_and(|reason| reason.contains("expected"))
    };
    let plain = outcomes(switch, false, jobs);
    assert!(plain.iter().any(|outcome| wrong(&outcome)), "nothing goes wrong: {plain:#?}");
    let checked = outcomes(switch, true, jobs);
    assert!(!checked.iter().any(|outcome| wrong(&outcome)), "not noticed: {checked:#?}");
    let corrupt = |outcome: &Result<(), String>| {
        outcome.as_ref().is_err_and(|reason| reason.contains("did not write"))
    };
    assert!(checked.iter().any(corrupt), "never named: {checked:#?}");
    assert!(outcomes(0, true, jobs).iter().all(Result::is_ok));
}

#[test]
fn old_data_taken_as_new_are_noticed() {
    let jobs: Vec<Job> = (1..20).map(|n| all_reduce(40 * n, FULL)).collect();
    assert_noticed(flags::BREAK_CLEAN, &jobs);
}

#[test]
fn half_a_unit_is_noticed() {
    let jobs: Vec<Job> = (1..20).map(|n| all_reduce(40 * n, FULL)).collect();
    assert_noticed(flags::BREAK_TEAR, &jobs);
}

/// Two graphs a rank, `[rank][call]`, of different calls.
fn graphs(group: &mut Group, counts: [usize; 2]) -> (Vec<[Graph; 2]>, Vec<Memory>) {
    let mut memories = Vec::new();
    let mut captured: Vec<Vec<Graph>> = Vec::new();
    for count in counts {
        let script = Script::new(2, &[all_reduce(count, FULL)], 1);
        let memory = group.load(&script).expect("there is memory");
        for rank in &group.ranks {
            rank.gpu.stream_synchronize(rank.stream).expect("uploads end");
        }
        captured.push(group.capture(&script, &memory).expect("calls can be captured"));
        memories.extend(memory);
    }
    let pairs = captured[0].iter().zip(&captured[1]).map(|(a, b)| [*a, *b]);
    (pairs.collect(), memories)
}

#[test]
fn graphs_launched_in_another_order_are_named_on_the_gpu() {
    for seed in 1..8 {
        let mut group = Group::connect(&Machine::sim(2, seed), 2, &checked(2));
        let (graphs, _memory) = graphs(&mut group, [100, 164]);
        // The host has compared the calls when they were captured; it does not see them run.
        for (rank, graph) in group.ranks.iter().zip([graphs[0][0], graphs[1][1]]) {
            rank.gpu.graph_launch(graph, rank.stream).expect("it can be launched");
        }
        let outcome = |rank: &Rank| {
            rank.gpu.stream_synchronize(rank.stream).expect("kernels end");
            rank.communicator.health().expect_err("the calls differ")
        };
        let errors: Vec<Error> = group.ranks.iter().map(outcome).collect();
        let named = |error: &Error| match error {
            Error::Mismatch { mine, theirs, .. } => {
                let both = format!("{mine} {theirs}");
                both.contains("400 bytes") && both.contains("656 bytes")
            }
            _ => false,
        };
        assert!(errors.iter().any(named), "{errors:?}");
        let told = |error: &Error| named(error) || matches!(error, Error::Aborted { .. });
        assert!(errors.iter().all(told), "{errors:?}");
        for (rank, graphs) in group.ranks.iter().zip(&graphs) {
            for graph in graphs {
                // SAFETY: it has ended and is not launched again.
                unsafe { rank.gpu.graph_destroy(*graph).expect("it can be destroyed") };
            }
        }
    }
}

#[test]
fn a_rank_that_does_not_call_is_waited_for_by_its_signature() {
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &checked(2));
    let script = Script::new(2, &[all_reduce(100, Algorithm::TwoShot)], 1);
    let memory = group.load(&script).expect("there is memory");
    group.ranks[0].issue_all(&script, memory[0].base).expect("the call is right");
    let error = group.ranks[0].finish().expect_err("rank 1 does not come");
    assert!(
        matches!(error, Error::Timeout { rank: 0, peer: 1, phase: "its signature", .. }),
        "{error:?}"
    );
}

#[test]
fn copies_become_kernels() {
    let config = Config { staging_bytes: Some(96 << 10), ..checked(4) };
    let mut group = Group::connect(&Machine::sim(4, 1), 4, &config);
    let reductions = Pattern::ALL.map(|pattern| all_reduce(3000, Algorithm::Scheduled(pattern)));
    let broadcasts = Spread::ALL.map(|spread| {
        let route = Some(Route::Scheduled(spread));
        Job::plain(Call::Broadcast { bytes: 9000, root: 1, route })
    });
    let jobs: Vec<Job> = reductions.into_iter().chain(broadcasts).collect();
    group.check(&jobs, 1);
}
