//! Blocks of two threads: what one thread says for both.

use crate::{Payload, Stream, join};
use peerlane_device::abi::{Format, flags};
use peerlane_loom::{Scene, Threads};

/// Rank 1 sends with two threads, thread 0 keeps the books; rank 0 has the thread that takes what thread 1 sends.
const SENDERS: &[Threads] =
    &[Threads { numbers: &[1], count: 1 }, Threads { numbers: &[0, 1], count: 2 }];
/// Rank 1 sends with one thread; rank 0 takes with two, and thread 1 keeps the books.
const TAKERS: &[Threads] =
    &[Threads { numbers: &[0, 1], count: 2 }, Threads { numbers: &[0], count: 1 }];

#[test]
fn a_seal_speaks_for_all_threads_of_the_sender() {
    let scene = Scene { slot_units: 2, patience: 4, ..Scene::new(SENDERS, 1) };
    let program = Stream { payload: Payload::Hidden, ..Stream::new(Format::Full, 1) }.program();
    scene.passes("a block's seal", program, join);
    scene.with(flags::BREAK_SYNC).fails("a seal without the block", program, join);
    scene.with(flags::BREAK_FENCE).fails("a block's seal without a fence", program, join);
}

#[test]
fn a_credit_speaks_for_all_threads_of_the_receiver() {
    let scene = Scene { slot_units: 2, preemptions: 1, ..Scene::new(TAKERS, 1) };
    let program = Stream { chunks: 2, ..Stream::new(Format::Full, 1) }.program();
    scene.passes("a block's credit", program, join);
    scene.with(flags::BREAK_SYNC).fails("a credit without the block", program, join);
    scene.with(flags::BREAK_FENCE).fails("a block's credit without a fence", program, join);
}
