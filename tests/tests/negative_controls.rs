//! Each part of the protocol, left out on purpose: the tests must notice.
//!
//! For every switch of docs/protocol.md a scene that fails under at least one of a few seeds when
//! the switch is on, and passes under all of them when it is off.

use peerlane::cases::Values;
use peerlane::{Algorithm, Config, DType, Format, ReduceOp, Route, Transport, Wire};
use peerlane_device::abi::flags;
use peerlane_tests::{Call, Group, Job, Machine, Script, small};
use std::time::Duration;

/// Seeds that each scene gets.
const SEEDS: u64 = 12;

/// Simulated time that a rank waits. Waits that succeed take a tenth of it at most.
const DEADLINE: Duration = Duration::from_millis(100);

/// Under which seeds `jobs` fail with the switches in `broken` on, and how.
fn failures(broken: u32, world: u32, jobs: &[Job], transport: Transport) -> Vec<String> {
    let fails = |seed| {
        let config = Config { broken, deadline: DEADLINE, transport, ..small(world) };
        let mut group = Group::connect(&Machine::sim(world, seed), world, &config);
        let outcome = group.run(&Script::new(world, jobs, seed));
        outcome.err().map(|reason| format!("seed {seed}: {reason}"))
    };
    (1..=SEEDS).filter_map(fails).collect()
}

/// That leaving out what `switch` names shows in `jobs`, over either transport; returns how.
fn assert_needed(switch: u32, world: u32, jobs: &[Job]) -> Vec<String> {
    let over = |transport| {
        let whole = failures(0, world, jobs, transport);
        assert!(whole.is_empty(), "the whole protocol fails over {transport}: {whole:#?}");
        let broken = failures(switch, world, jobs, transport);
        assert!(
            !broken.is_empty(),
            "{SEEDS} seeds do not notice switch {switch:#x} over {transport}"
        );
        broken
    };
    [Transport::P2p, Transport::Host].into_iter().flat_map(over).collect()
}

fn all_reduce(count: usize, algorithm: Algorithm, values: Values) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (algorithm, in_place, absent) = (Some(algorithm), false, 0);
    let call = Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent };
    Job { call, values, shift: 0 }
}

fn broadcast(bytes: usize, values: Values) -> Job {
    Job { call: Call::Broadcast { bytes, root: 0, route: None }, values, shift: 0 }
}

const FULL: Algorithm = Algorithm::OneShot(Format::Full);

#[test]
fn without_credits_a_slot_is_overwritten_before_it_is_taken() {
    let jobs = [broadcast(20_000, Values::Ordinary), broadcast(50_000, Values::Ordinary)];
    assert_needed(flags::BREAK_CREDIT, 3, &jobs);
}

#[test]
fn without_cleaning_old_data_are_taken_as_new() {
    let jobs: Vec<Job> = (1..20).map(|n| all_reduce(40 * n, FULL, Values::Ordinary)).collect();
    let broken = assert_needed(flags::BREAK_CLEAN, 2, &jobs);
    assert!(broken.iter().any(|reason| reason.contains("expected")), "{broken:#?}");
}

#[test]
fn without_seals_payload_that_looks_free_is_waited_for_in_vain() {
    let jobs = [broadcast(40_000, Values::Free)];
    let broken = assert_needed(flags::BREAK_SEAL, 2, &jobs);
    assert_eq!(broken.len(), 2 * SEEDS as usize, "{broken:#?}");
    assert!(broken.iter().all(|reason| reason.contains("waited 100ms")), "{broken:#?}");
}

#[test]
fn without_seals_streams_through_host_memory_are_waited_for_in_vain() {
    let jobs = [all_reduce(9000, FULL, Values::Ordinary)];
    assert!(failures(0, 2, &jobs, Transport::Host).is_empty());
    let broken = failures(flags::BREAK_SEAL, 2, &jobs, Transport::Host);
    assert_eq!(broken.len(), SEEDS as usize, "{broken:#?}");
}

/// Moves at full width whose payload looks free here and there, so that chunks are sealed.
fn sealed_calls() -> Vec<Job> {
    let call = |n: usize| {
        let bytes = 33_000 + 1000 * n;
        match n % 3 {
            0 => Job {
                call: Call::AllGather { bytes, in_place: false },
                values: Values::Special,
                shift: 0,
            },
            1 => broadcast(bytes, Values::Special),
            _ => broadcast(bytes, Values::Free),
        }
    };
    (1..8).map(call).collect()
}

#[test]
fn without_the_fence_a_seal_overtakes_its_data() {
    assert_needed(flags::BREAK_FENCE, 2, &sealed_calls());
}

#[test]
fn without_the_block_barrier_a_seal_overtakes_other_threads_data() {
    assert_needed(flags::BREAK_SYNC, 2, &sealed_calls());
}

#[test]
fn without_a_look_at_all_words_half_a_unit_is_taken() {
    let jobs: Vec<Job> = (1..20).map(|n| all_reduce(40 * n, FULL, Values::Ordinary)).collect();
    let broken = assert_needed(flags::BREAK_TEAR, 2, &jobs);
    assert!(broken.iter().any(|reason| reason.contains("expected")), "{broken:#?}");
}

/// Calls of many chunks without seals: what is broken shows in the credits.
fn streamed_calls() -> Vec<Job> {
    let moves = [50_000, 60_000].map(|bytes| broadcast(bytes, Values::Ordinary));
    [all_reduce(9000, FULL, Values::Ordinary)].into_iter().chain(moves).collect()
}

#[test]
fn without_the_fence_a_credit_overtakes_the_cleaning() {
    assert_needed(flags::BREAK_FENCE, 2, &streamed_calls());
}

#[test]
fn without_the_block_barrier_a_credit_overtakes_other_threads_cleaning() {
    assert_needed(flags::BREAK_SYNC, 2, &streamed_calls());
}

/// Calls of many chunks by `algorithm`, and some of one.
fn stepped_calls(algorithm: Algorithm) -> Vec<Job> {
    let counts = [9000, 300, 20_000, 40, 80];
    counts.map(|count| all_reduce(count, algorithm, Values::Ordinary)).into()
}

/// That every switch in `switches` shows in calls by `algorithm`.
fn assert_all_needed(algorithm: Algorithm, switches: &[u32]) {
    for switch in switches {
        assert_needed(*switch, 4, &stepped_calls(algorithm));
    }
}

/// Not those of the credits: sums wait for every rank, so that none runs ahead by the slots of a
/// lane, and a credit that comes too early is seldom used too early. Broadcasts show them.
const OF_REDUCTIONS: [u32; 2] = [flags::BREAK_CLEAN, flags::BREAK_TEAR];

#[test]
fn trees_need_cleaning_and_whole_units() {
    assert_all_needed(Algorithm::Tree, &OF_REDUCTIONS);
    assert_all_needed(Algorithm::DoubleTree, &OF_REDUCTIONS);
}

#[test]
fn islands_need_cleaning_and_whole_units() {
    assert_all_needed(Algorithm::Hierarchical, &OF_REDUCTIONS);
}

#[test]
fn rings_and_stages_need_cleaning_and_whole_units() {
    assert_all_needed(Algorithm::Ring, &OF_REDUCTIONS);
    assert_all_needed(Algorithm::Staged, &OF_REDUCTIONS);
}

#[test]
fn broadcasts_along_trees_need_their_seals_and_credits() {
    for route in [Route::Chain, Route::DoubleTree] {
        let along = |values| {
            let call = Call::Broadcast { bytes: 30_000, root: 1, route: Some(route) };
            Job { call, values, shift: 0 }
        };
        assert_needed(flags::BREAK_SEAL, 4, &[along(Values::Free)]);
        for switch in [flags::BREAK_FENCE, flags::BREAK_SYNC] {
            assert_needed(switch, 4, &[along(Values::Special), along(Values::Free)]);
        }
        assert_needed(flags::BREAK_CREDIT, 4, &[along(Values::Ordinary), along(Values::Ordinary)]);
    }
}
