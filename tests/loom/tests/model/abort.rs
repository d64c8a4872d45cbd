//! Waits in vain: deadlines, abort words, records, and what is left of the data.

use crate::{PAIR, Stream, join};
use loom::sync::atomic::Ordering;
use peerlane_device::abi::{Format, Operation, Status, TICK_SHIFT, flags, phase, state};
use peerlane_device::kernels::{barrier, broadcast};
use peerlane_device::pipe::{Call, Full};
use peerlane_loom::{Faults, Host, Scene, Seat, Threads, World, dst, status};
use std::mem::offset_of;

/// Rank 1 has ended; the threads of the others wait for it.
const BEREFT: &[Threads] = &[
    Threads { numbers: &[1], count: 3 },
    Threads { numbers: &[], count: 3 },
    Threads { numbers: &[1], count: 3 },
];
/// Rank 0 waits for rank 1, which has ended.
const LEFT: &[Threads] = &[Threads { numbers: &[1], count: 2 }, Threads { numbers: &[], count: 2 }];
/// Rank 0 has two threads that wait for ranks 1 and 2, which have ended.
const TWO_WAIT: &[Threads] = &[
    Threads { numbers: &[1, 2], count: 3 },
    Threads { numbers: &[], count: 3 },
    Threads { numbers: &[], count: 3 },
];

fn call_barrier(seat: Seat<'_>) {
    let args = seat.args(Operation::Barrier, 0, 1);
    // SAFETY: the addresses are those of the scene's world, which panics at any other.
    seat.kernel(&args, |lane, args| unsafe { barrier(lane, args) });
}

/// What a record says: the state, and then peer, phase and operation.
fn record(world: &World, rank: u32) -> [u32; 4] {
    let word = |offset: usize| world.word_at(status(rank) + offset as u64).load(Ordering::Relaxed);
    let state = world.status_word(rank, offset_of!(Status, state));
    [
        state,
        word(offset_of!(Status, peer)),
        word(offset_of!(Status, phase)),
        word(offset_of!(Status, operation)),
    ]
}

#[test]
fn a_deadline_of_one_rank_stops_the_others() {
    // The clock of rank 2 stands still: only the abort word ends its wait.
    let scene = Scene { tick: [2 << TICK_SHIFT, 0, 0], turns: u32::MAX, ..Scene::new(BEREFT, 1) };
    let host = |host: Host| {
        let world = host.join();
        let expected = |state| [state, 1, phase::BARRIER, Operation::Barrier as u32];
        assert_eq!(record(&world, 0), expected(state::TIMED_OUT), "the record of rank 0");
        assert_eq!(record(&world, 2), expected(state::ABORTED), "the record of rank 2");
    };
    scene.passes("a deadline", call_barrier, host);
    // Without it nobody raises an abort word.
    let still = Scene { tick: [0; 3], ..scene };
    let reason = still.fails("no deadline", call_barrier, host);
    assert!(reason.contains("number of branches"), "{reason}");
}

#[test]
fn a_host_that_sees_the_state_sees_the_record() {
    // The rank waits without a pause, or the host would always have looked before its deadline.
    let (turns, patience) = (u32::MAX, u32::MAX);
    let scene = Scene { turns, patience, ..Scene::new(LEFT, 1) };
    let host = |host: Host| {
        while host.world.status_word(0, offset_of!(Status, state)) == state::OK {
            loom::thread::yield_now();
        }
        let expected = [state::TIMED_OUT, 1, phase::BARRIER, Operation::Barrier as u32];
        assert_eq!(record(&host.world, 0), expected, "the record");
        host.join();
    };
    scene.passes("a record", call_barrier, host);
    let broken = Scene { faults: Faults { no_fence: true, ..Faults::default() }, ..scene };
    broken.fails("a record without a fence", call_barrier, host);
}

#[test]
fn a_host_ends_the_waits_of_its_rank() {
    // A millisecond between two looks at the clock; the deadline is far away.
    let turns = u32::MAX;
    let scene = Scene { tick: [1 << 20; 3], deadline: u32::MAX, turns, ..Scene::new(LEFT, 1) };
    let host = |host: Host| {
        host.world.abort(0);
        let world = host.join();
        assert_eq!(record(&world, 0)[0], state::ABORTED, "the record");
    };
    scene.passes("an abort by the host", call_barrier, host);
    let reason = scene.fails("no abort", call_barrier, join);
    assert!(reason.contains("number of branches"), "{reason}");
}

/// Two threads that wait in vain, for different ranks in different phases.
fn two_waits(seat: Seat<'_>) {
    let args = seat.args(Operation::Broadcast, 1, 1);
    // SAFETY: the addresses are those of the scene's world, which panics at any other.
    seat.kernel(&args, |lane, args| unsafe {
        let mut call = Call::<_, Full>::begin(lane, args, 0b110);
        if seat.thread() == 1 {
            call.take::<1>(1, 0, 0, phase::DATA);
        } else {
            call.reserve(2, 1);
        }
        assert!(!call.ok(), "a wait in vain has succeeded");
        call.end(0, 0);
    });
}

#[test]
fn two_threads_leave_one_record() {
    let host = |host: Host| {
        let [state, peer, phase, _] = record(&host.join(), 0);
        assert_eq!(state, state::TIMED_OUT);
        let whole = [(1, phase::DATA), (2, phase::CREDIT)].contains(&(peer, phase));
        assert!(whole, "a record of two waits: peer {peer}, phase {phase}");
    };
    let scene = Scene { turns: u32::MAX, ..Scene::new(TWO_WAIT, 1) };
    scene.passes("two waits", two_waits, host);
    let broken = Scene { faults: Faults { no_claim: true, ..Faults::default() }, ..scene };
    broken.fails("two records in one place", two_waits, host);
}

#[test]
fn a_rank_that_ends_between_calls_leaves_what_it_sent() {
    // The sender makes one call and ends; the receiver makes two.
    let stream = Stream::new(Format::Full, 1);
    let program = move |seat: Seat<'_>| {
        stream.program()(seat);
        if seat.rank() == 0 {
            let args = stream.args(seat);
            let before: [u32; 4] = seat.world().load(dst(0) + 16);
            // SAFETY: the addresses are those of the scene's world, which panics at any other.
            seat.kernel(&args, |lane, args| unsafe { broadcast::<_, Full>(lane, args) });
            assert_eq!(seat.state(), state::TIMED_OUT, "the second call's wait");
            let after: [u32; 4] = seat.world().load(dst(0) + 16);
            assert_eq!(after, before, "a call that failed has written its result");
        }
    };
    let scene = Scene { slot_units: 2, ..Scene::new(PAIR, 2) };
    scene.passes("a rank that ends", program, join);
    let dirty = Scene { slots: 1, ..scene.with(flags::BREAK_CLEAN) };
    dirty.fails("old data for a rank that has ended", program, join);
}
