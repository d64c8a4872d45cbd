//! One rank sends to another, one thread each: slots, credits, units, seals.

use crate::{PAIR, Payload, Stream, join};
use peerlane_device::abi::{Format, flags};
use peerlane_loom::{Faults, Scene};

/// Lanes of two slots, so that the third chunk is the first to need one again.
const SCENE: Scene = Scene { slot_units: 2, ..Scene::new(PAIR, 2) };
/// On a machine where a kernel's stores may be under way when the next begins.
const LATE: Faults = Faults { no_boundary: true, ..SCENE.faults };

#[test]
fn packets_go_through_slots_that_are_used_again() {
    let program = Stream::new(Format::Packet, 3).program();
    SCENE.passes("packets", program, join);
    let broken = SCENE.with(flags::BREAK_CREDIT);
    broken.fails("packets without credits", program, join);
}

#[test]
fn full_units_go_through_slots_that_are_used_again() {
    let program = Stream::new(Format::Full, 3).program();
    SCENE.passes("full units", program, join);
    SCENE.with(flags::BREAK_CREDIT).fails("full units without credits", program, join);
    let reason = SCENE.with(flags::BREAK_CLEAN).fails("full units, not cleaned", program, join);
    assert!(reason.contains("call 2"), "{reason}");
    SCENE.with(flags::BREAK_TEAR).fails("full units, seen by half", program, join);
}

#[test]
fn credits_come_back_within_a_call() {
    let program = Stream { chunks: 3, ..Stream::new(Format::Full, 1) }.program();
    SCENE.passes("credits within a call", program, join);
    let broken = SCENE.with(flags::BREAK_CREDIT);
    broken.fails("a call without credits", program, join);
    let broken = SCENE.with(flags::BREAK_FENCE);
    broken.fails("credits that overtake the cleaning", program, join);
    let broken = Scene { faults: Faults { no_dependency: true, ..SCENE.faults }, ..SCENE };
    broken.fails("stores that overtake the credit they wait for", program, join);
}

#[test]
fn credits_of_earlier_calls_need_the_end_of_the_kernel() {
    // One slot: every call needs the one before it.
    let program = Stream::new(Format::Full, 3).program();
    let scene = Scene { slots: 1, ..SCENE };
    scene.passes("credits of earlier calls", program, join);
    let late = Scene { faults: LATE, ..scene };
    late.fails("credits of kernels that are not over", program, join);
}

#[test]
fn credits_of_earlier_calls_through_host_memory_need_a_fence() {
    let program = Stream::new(Format::Full, 3).program();
    let scene = Scene { slots: 1, by_host: true, faults: LATE, ..SCENE };
    scene.passes("credits through host memory", program, join);
    let broken = Scene { faults: Faults { no_fence: true, ..LATE }, ..scene };
    broken.fails("credits through host memory without a fence", program, join);
}

#[test]
fn payload_that_looks_free_is_sealed() {
    for payload in [Payload::Hidden, Payload::Free] {
        let program = Stream { payload, ..Stream::new(Format::Full, 3) }.program();
        SCENE.passes("seals", program, join);
        SCENE.with(flags::BREAK_SEAL).fails("no seals", program, join);
    }
}

#[test]
fn seals_come_after_their_data() {
    // Every fourth turn of a wait looks at the seal, after turns that have looked for the data.
    let scene = Scene { patience: 4, slots: 1, ..SCENE };
    let program = Stream { payload: Payload::Hidden, ..Stream::new(Format::Full, 2) }.program();
    scene.passes("seals after their data", program, join);
    scene.with(flags::BREAK_FENCE).fails("seals that overtake their data", program, join);
    let relaxed = Scene { faults: Faults { no_acquire: true, ..SCENE.faults }, ..scene };
    relaxed.fails("data that are loaded before their seal", program, join);
}

#[test]
fn streams_through_host_memory_are_sealed() {
    let scene = Scene { by_host: true, faults: LATE, ..SCENE }.with(flags::SEAL_ALL);
    let program = Stream { chunks: 3, ..Stream::new(Format::Full, 1) }.program();
    scene.passes("a sealed stream", program, join);
    scene.with(flags::BREAK_SEAL).fails("a stream without seals", program, join);
    scene.with(flags::BREAK_CREDIT).fails("a sealed stream without credits", program, join);
    scene.with(flags::BREAK_FENCE).fails("a stream whose seals overtake it", program, join);
}
