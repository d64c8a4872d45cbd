//! Scenes of a channel of two records, each with the part that it shows left out as its negative control.

use loom::thread;
use peerlane_loom::channel::{Channel, Receiver, Sender, Without};
use std::panic::{AssertUnwindSafe, catch_unwind};
// Not loom's, which takes turns when it is dropped, also while a deadlock is reported.
use std::sync::Arc;

/// Tries every execution of `scene` with at most `preemptions`.
fn model(without: Without, preemptions: usize, scene: fn()) {
    without.begin();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(scene);
}

fn fails(without: Without, preemptions: usize, scene: fn()) -> String {
    let failed = catch_unwind(AssertUnwindSafe(|| model(without, preemptions, scene)));
    let why = failed.expect_err("what was left out must show");
    why.downcast_ref::<String>().cloned().unwrap_or_default()
}

/// A reader in a thread of its own, which receives `expected`.
fn reader(channel: &Arc<Channel>, index: u32, expected: &'static [u64]) -> thread::JoinHandle<()> {
    let channel = channel.clone();
    thread::spawn(move || {
        let mut receiver = Receiver::new(&channel, index);
        for number in expected {
            assert_eq!(receiver.receive(), *number);
        }
    })
}

/// Two messages, the reader asleep or about to be.
fn wake() {
    let channel = Arc::new(Channel::default());
    let other = reader(&channel, 0, &[11, 12]);
    let mut sender = Sender::new(&channel, 1);
    for number in [11, 12] {
        sender.stage(1, number);
        sender.publish();
    }
    other.join().unwrap();
}

/// More than the ring holds: the writer waits, and uses space again.
fn space() {
    let channel = Arc::new(Channel::default());
    let other = reader(&channel, 0, &[11, 12, 13, 14]);
    let mut sender = Sender::new(&channel, 1);
    for number in [11, 12, 13, 14] {
        sender.stage(1, number);
    }
    sender.publish();
    other.join().unwrap();
}

/// Space that one reader does not need goes round while the other's last message waits for it.
fn masks() {
    let channel = Arc::new(Channel::default());
    let others = [reader(&channel, 0, &[11, 12, 13]), reader(&channel, 1, &[13])];
    let mut sender = Sender::new(&channel, 2);
    for (readers, number) in [(1, 11), (1, 12), (3, 13)] {
        sender.stage(readers, number);
        sender.publish();
    }
    for other in others {
        other.join().unwrap();
    }
}

#[test]
fn no_wake_up_is_lost() {
    model(Without::Nothing, 5, wake);
}

#[test]
fn without_the_fences_one_is() {
    let why = fails(Without::Fences, 3, wake);
    assert!(why.contains("deadlock"), "{why}");
}

#[test]
fn space_is_used_again_when_it_is_read() {
    model(Without::Nothing, 4, space);
}

#[test]
fn without_the_fences_the_writer_sleeps_for_ever() {
    let why = fails(Without::Fences, 2, space);
    assert!(why.contains("deadlock"), "{why}");
}

#[test]
fn without_the_order_a_message_is_overwritten() {
    fails(Without::Order, 2, space);
}

#[test]
fn readers_hold_up_only_who_addresses_them() {
    model(Without::Nothing, 2, masks);
}
