//! Every rank sends and receives: barriers, reductions and meetings of two ranks, exchanges and broadcasts of three.

use crate::{PAIR, Payload, Program, Stream, join};
use peerlane_device::abi::{Format, Operation, flags, phase};
use peerlane_device::element::F32;
use peerlane_device::kernels::{barrier, one_shot};
use peerlane_device::lane::Lane;
use peerlane_device::pipe::{Call, Form, Full, Packet, everyone_else};
use peerlane_loom::{Faults, LoomLane, Scene, Seat, Threads, dst, mailbox, src};

#[test]
fn a_barrier_waits_for_every_rank() {
    let program = |seat: Seat<'_>| {
        for call in 1..=3 {
            let args = seat.args(Operation::Barrier, 0, 1);
            seat.world().begun[seat.rank() as usize].set(call);
            // SAFETY: the addresses are those of the scene's world, which panics at any other.
            seat.kernel(&args, |lane, args| unsafe { barrier(lane, args) });
            seat.assert_ok();
            let other = seat.world().begun[1 - seat.rank() as usize].get();
            assert!(other >= call, "a barrier did not wait");
        }
    };
    let scene = Scene::new(PAIR, 1);
    scene.passes("barriers", program, join);
    scene.with(flags::BREAK_CREDIT).fails("barriers without credits", program, join);
}

/// Rank 0 has a thread for the unit and one for the books, rank 1 one for both.
const REDUCERS: &[Threads] =
    &[Threads { numbers: &[0, 1], count: 2 }, Threads { numbers: &[0], count: 1 }];

fn reductions<F: Form + Send + Sync + 'static>() -> impl Program {
    |seat: Seat<'_>| {
        for call in 0..2 {
            let mut args = seat.args(Operation::AllReduce, 1, 1);
            args.tail = F::FORMAT.payload() as u32;
            let value = |rank: u32, word: u32| (10 * call + 3 * rank + word + 1) as f32;
            let words = if seat.thread() == 0 { F::WORDS as u32 } else { 0 };
            for word in 0..words {
                let bits = value(seat.rank(), word).to_bits();
                seat.world().store(src(seat.rank()) + 4 * u64::from(word), &[bits]);
            }
            // SAFETY: the addresses are those of the scene's world, which panics at any other.
            seat.kernel(&args, |lane, args| unsafe { one_shot::<_, F32, F>(lane, args) });
            seat.assert_ok();
            for word in 0..words {
                let [got] = seat.world().load(dst(seat.rank()) + 4 * u64::from(word));
                let expected = value(0, word) + value(1, word);
                assert_eq!(f32::from_bits(got), expected, "call {call}, word {word}");
            }
        }
    }
}

#[test]
fn reductions_see_both_ranks_values() {
    let scene = Scene { preemptions: 1, ..Scene::new(REDUCERS, 1) }.with(flags::SINGLE);
    scene.passes("reductions of packets", reductions::<Packet>(), join);
    let full = reductions::<Full>();
    scene.passes("reductions of full units", full, join);
    scene.with(flags::BREAK_CLEAN).fails("reductions, not cleaned", full, join);
    scene.with(flags::BREAK_TEAR).fails("reductions, seen by half", full, join);
    scene.with(flags::BREAK_CREDIT).fails("reductions without credits", full, join);
    // One thread adds to the counters at the end of a call that the other still reads.
    let drifting = Scene { faults: Faults { no_barrier: true, ..scene.faults }, ..scene };
    let reason = drifting.fails("counters without the block", full, join);
    assert!(reason.contains("Causality violation"), "{reason}");
}

/// Two meetings a call around what a direct all-reduce does: write, meet, read the other's, meet, write again. A
/// slot of the lane that nobody uses stands for each rank's tensor.
fn meetings(seat: Seat<'_>) {
    for call in 0..2 {
        let args = seat.args(Operation::AllReduce, 0, 1);
        let layout = args.layout;
        let tensor = |rank: u32| mailbox(rank) + u64::from(layout.slot(0, 1, 0));
        let other = 1 - seat.rank();
        let value = |rank: u32| 100 * (call + 1) + rank;
        // SAFETY: the addresses are those of the scene's world, which panics at any other.
        seat.kernel(&args, |lane, args| unsafe {
            let mut call = Call::<_, Packet>::begin(lane, args, everyone_else(2, seat.rank()));
            lane.put_unit(tensor(seat.rank()), [value(seat.rank()); 4]);
            call.meet(0, phase::BARRIER, flags::BREAK_READY);
            let got = lane.poll_unit(tensor(other));
            assert_eq!(got, [value(other); 4], "what rank {other} wrote before they met");
            call.meet(1, phase::RESULT, flags::BREAK_DONE);
            call.end(2, 2);
        });
        seat.assert_ok();
    }
}

#[test]
fn who_has_met_sees_what_was_written_before_and_not_what_comes_after() {
    let scene = Scene { preemptions: 1, ..Scene::new(PAIR, 2) };
    scene.passes("meetings", meetings, join);
    for (name, flag) in [
        ("before they are ready", flags::BREAK_READY),
        ("after they are done", flags::BREAK_DONE),
        ("meetings without fences", flags::BREAK_FENCE),
    ] {
        scene.with(flag).fails(name, meetings, join);
    }
}

/// Three ranks, each of which has both of its threads in one.
const TRIO: &[Threads] = &[
    Threads { numbers: &[1], count: 1 },
    Threads { numbers: &[0], count: 1 },
    Threads { numbers: &[0], count: 1 },
];

/// Exchanges of one unit a chunk, in the verbs, with everyone or around a ring: the threads of a block are one,
/// and take each step together.
fn exchanges(ring: bool, calls: u32, chunks: u32, payload: Payload) -> impl Program {
    move |seat: Seat<'_>| {
        // In a ring, who returns credits to the rank before must not come second: it would wait behind the first.
        let [before, after] = [2, 1].map(|step| (seat.rank() + step) % 3);
        let threads = [before, after];
        let (to, from) =
            if ring { (vec![after], vec![before]) } else { (threads.into(), threads.into()) };
        for call in 0..calls {
            let args = seat.args(Operation::AllGather, chunks, 1);
            let everyone = everyone_else(3, seat.rank());
            let value = |rank: u32, chunk: u32| -> [u32; 4] {
                std::array::from_fn(|word| payload.word(rank, call * chunks + chunk, word as u32))
            };
            let hidden = payload != Payload::Ordinary;
            // SAFETY: the addresses are those of the scene's world, which panics at any other.
            seat.kernel(&args, |lane, args| unsafe {
                let begin = |thread| {
                    Call::<LoomLane<'_>, Full>::begin(lane.as_thread(thread), args, everyone)
                };
                let mut block: Vec<_> = threads.into_iter().map(begin).collect();
                for turn in 0..=chunks {
                    for &peer in to.iter().filter(|_| turn < chunks) {
                        let number = block[0].sent(peer).wrapping_add(turn);
                        let slot = block[0].reserve(peer, number);
                        block[0].put_units(slot, 0, number, [value(seat.rank(), turn)]);
                    }
                    for &peer in from.iter().filter(|_| turn > 0) {
                        let number = block[0].received(peer).wrapping_add(turn - 1);
                        let [got] = block[0].take::<1>(peer, number, 0, phase::DATA);
                        assert_eq!(got, value(peer, turn - 1), "from {peer}, call {call}");
                    }
                    if turn < chunks {
                        for thread in &mut block {
                            thread.turn(everyone, turn + 1, hidden, everyone, turn);
                        }
                    }
                }
                block.into_iter().for_each(|thread| thread.end(chunks, chunks));
            });
            seat.assert_ok();
        }
    }
}

#[test]
fn three_ranks_exchange() {
    let scene = Scene { preemptions: 0, turns: 4, ..Scene::new(TRIO, 2) };
    let once = exchanges(false, 1, 1, Payload::Ordinary);
    scene.passes("an exchange of three", once, join);
    scene.with(flags::BREAK_TEAR).fails("an exchange of three, seen by half", once, join);
    let sealed = exchanges(false, 1, 1, Payload::Hidden);
    scene.passes("a sealed exchange of three", sealed, join);
    scene.with(flags::BREAK_SEAL).fails("an exchange of three without seals", sealed, join);
}

#[test]
fn three_ranks_pass_on_through_slots_that_are_used_again() {
    let scene = Scene { preemptions: 0, turns: 4, ..Scene::new(TRIO, 1) };
    let program = exchanges(true, 2, 1, Payload::Ordinary);
    scene.passes("a ring, twice", program, join);
    scene.with(flags::BREAK_CLEAN).fails("a ring, not cleaned", program, join);
    scene.with(flags::BREAK_CREDIT).fails("a ring without credits", program, join);
    let program = exchanges(true, 1, 3, Payload::Ordinary);
    let scene = Scene { slots: 2, ..scene };
    scene.passes("a ring of three chunks", program, join);
    scene.with(flags::BREAK_FENCE).fails("a ring without fences", program, join);
}

/// Rank 2 sends to two ranks, whose books its two threads keep; the others take the last of three units.
const STAR: &[Threads] = &[
    Threads { numbers: &[2], count: 1 },
    Threads { numbers: &[2], count: 1 },
    Threads { numbers: &[0, 1], count: 2 },
];

#[test]
fn one_of_three_ranks_sends_to_the_others() {
    let scene = Scene { slot_units: 3, preemptions: 0, turns: 4, ..Scene::new(STAR, 1) };
    let stream = Stream { root: 2, chunk_units: 3, ..Stream::new(Format::Full, 2) };
    scene.passes("a broadcast to two", stream.program(), join);
    scene.with(flags::BREAK_CREDIT).fails("the same without credits", stream.program(), join);
    scene.with(flags::BREAK_CLEAN).fails("the same, not cleaned", stream.program(), join);
    let sealed = Stream { payload: Payload::Hidden, calls: 1, ..stream }.program();
    let scene = Scene { preemptions: 1, patience: 4, ..scene };
    scene.passes("a sealed broadcast to two", sealed, join);
    scene.with(flags::BREAK_SEAL).fails("the same without seals", sealed, join);
}
