//! Counters that wrap, and seals that grow old.

use crate::{PAIR, Payload, Stream, join};
use loom::sync::atomic::Ordering;
use peerlane_device::abi::{Format, flags, lane_words};
use peerlane_loom::{Faults, Scene, Start, mailbox};

/// Where counting changes its sign, and where it begins again: both within the calls of a scene.
const STARTS: [u32; 2] = [(1 << 31) - 2, u32::MAX - 1];
/// Slots between two renewals of seals, and slots in which calls renew theirs (`SEAL_STRETCH` and
/// `SEAL_RENEWAL` in pipe.rs): so no seal is older than both together.
const STRETCH: u32 = 1 << 30;
const RENEWAL: u32 = 1 << 24;

fn scene(slots: u32, sealed_ago: u32) -> Scene {
    let start = Start { slots, sealed_ago };
    Scene { slot_units: 2, start, preemptions: 1, ..Scene::new(PAIR, 2) }
}

#[test]
fn counters_wrap() {
    for start in STARTS {
        let scene = scene(start, 0);
        for format in Format::ALL {
            let program = Stream::new(format, 3).program();
            scene.passes(&format!("{} from {start:#x}", format.name()), program, join);
            let broken = scene.with(flags::BREAK_CREDIT);
            broken.fails("the same without credits", program, join);
        }
        let program = Stream::new(Format::Full, 3).program();
        scene.with(flags::BREAK_CLEAN).fails("the same, not cleaned", program, join);
    }
}

#[test]
fn credits_within_a_call_wrap() {
    for start in STARTS {
        let program = Stream { chunks: 4, ..Stream::new(Format::Full, 1) }.program();
        let scene = scene(start, 0);
        scene.passes(&format!("credits from {start:#x}"), program, join);
        scene.with(flags::BREAK_CREDIT).fails("the same without credits", program, join);
    }
}

#[test]
fn seals_wrap() {
    let program = Stream { payload: Payload::Hidden, ..Stream::new(Format::Full, 3) }.program();
    for start in STARTS {
        let scene = scene(start, 0);
        scene.passes(&format!("seals from {start:#x}"), program, join);
        scene.with(flags::BREAK_SEAL).fails("the same without seals", program, join);
    }
}

#[test]
fn a_seal_that_is_as_old_as_seals_become_is_behind() {
    // Not in the part of the stretch where the calls would renew it.
    let oldest = STRETCH + RENEWAL;
    let program = Stream::new(Format::Full, 2).program();
    for start in [STRETCH, STARTS[0], STARTS[1]] {
        let scene = Scene { patience: 4, ..scene(start, oldest) };
        scene.passes(&format!("an old seal at {start:#x}"), program, join);
    }
    let ancient = Scene { patience: 4, ..scene(STRETCH, (1 << 31) + 1) };
    let reason = ancient.fails("a seal that nobody has renewed", program, join);
    assert!(reason.contains("call 0"), "{reason}");
}

#[test]
fn seals_are_renewed_after_what_they_speak_for() {
    // The second call begins in the part of a stretch where seals are renewed; the receiver may still wait for the
    // first one's data. No kernel's end helps the sender's fence.
    let program = Stream::new(Format::Full, 2).program();
    let late = Faults { no_boundary: true, ..Faults::default() };
    let start = STRETCH / 2 - 1;
    let scene = Scene { patience: 4, faults: late, ..scene(start, STRETCH) };
    let layout = scene.layout();
    scene.passes("a renewal", program, move |host| {
        let world = host.join();
        let at = mailbox(0) + u64::from(layout.words(0)) + (lane_words::SEALED + 4) as u64;
        let sealed = world.word_at(at).load(Ordering::Relaxed);
        assert_eq!(sealed, start + 1, "the seal was not renewed");
    });
    let broken = Scene { faults: Faults { no_fence: true, ..late }, ..scene };
    broken.fails("a renewal that overtakes its data", program, join);
}
