//! The ring of `host/src/channel/`, the shipping code, under loom: cursors, skips and the bell.
//!
//! Invariant: nothing of the protocol is written a second time here. `primitive` has loom's atomics and a futex made of
//! a mutex and a condition variable, which never times out: a wake-up that is lost is a deadlock, which loom reports.

#[allow(dead_code, reason = "the host uses all of it")]
#[path = "../../../host/src/channel/bell.rs"]
mod bell;
#[allow(dead_code, reason = "the host uses all of it")]
#[path = "../../../host/src/channel/consumer.rs"]
mod consumer;
#[allow(dead_code, reason = "the host uses all of it")]
#[path = "../../../host/src/channel/producer.rs"]
mod producer;
#[allow(dead_code, reason = "the host uses all of it")]
#[path = "../../../host/src/channel/ring.rs"]
mod ring;

use bell::Bell;
use consumer::Consumer;
use primitive::{AtomicU32, AtomicU64};
use producer::Producer;
use ring::{HEADER, Lane, Memory};
use std::num::NonZeroU32;
use std::time::Duration;

/// What `host/src/channel/primitive.rs` has, for loom.
mod primitive {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::sync::{Condvar, Mutex};
    use std::num::NonZeroU32;
    use std::time::Duration;

    /// A word that threads can sleep on.
    pub(super) struct AtomicU32 {
        word: loom::sync::atomic::AtomicU32,
        /// As the kernel's: it compares, and goes to sleep, in one step for those who wake.
        bucket: Mutex<()>,
        woken: Condvar,
    }

    impl AtomicU32 {
        pub(super) fn new() -> AtomicU32 {
            let word = loom::sync::atomic::AtomicU32::new(0);
            AtomicU32 { word, bucket: Mutex::new(()), woken: Condvar::new() }
        }

        pub(super) fn load(&self, order: Ordering) -> u32 {
            self.word.load(order)
        }

        pub(super) fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
            self.word.fetch_add(value, order)
        }

        pub(super) fn fetch_and(&self, value: u32, order: Ordering) -> u32 {
            self.word.fetch_and(value, order)
        }

        pub(super) fn fetch_or(&self, value: u32, order: Ordering) -> u32 {
            self.word.fetch_or(value, order)
        }
    }

    pub(super) fn fence(order: Ordering) {
        let left_out = order == Ordering::SeqCst && super::NO_FENCE.get();
        if !left_out {
            loom::sync::atomic::fence(order);
        }
    }

    pub(super) fn futex_wait(word: &AtomicU32, expected: u32, _: NonZeroU32, _: Duration) {
        let bucket = word.bucket.lock().unwrap();
        // An addition of nothing, which sees the newest value, as the kernel does.
        if word.word.fetch_add(0, Ordering::Relaxed) == expected {
            drop(word.woken.wait(bucket).unwrap());
        }
    }

    pub(super) fn futex_wake(word: &AtomicU32, _: NonZeroU32) {
        let _bucket = word.bucket.lock().unwrap();
        word.woken.notify_all();
    }
}

thread_local! {
    /// Leaves the fences of the bell out. Loom runs all threads of an execution in one.
    static NO_FENCE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    /// Has readers give space back before they have read it.
    static EARLY: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What is left out.
#[derive(Clone, Copy, PartialEq)]
pub enum Without {
    /// Nothing.
    Nothing,
    /// The fences between publishing and looking who is asleep.
    Fences,
    /// The order between the loads of a message and the store that gives its space back.
    Order,
}

impl Without {
    /// For the executions that follow on this thread.
    pub fn begin(self) {
        NO_FENCE.set(self == Without::Fences);
        EARLY.set(self == Without::Order);
    }
}

/// Two records' worth of data, and two readers.
pub struct Channel {
    lanes: [[AtomicU64; 4]; 2],
    data: Vec<AtomicU64>,
    bells: [[AtomicU32; 2]; 2],
}

impl Memory for Channel {
    fn capacity(&self) -> u64 {
        8 * self.data.len() as u64
    }

    fn lane(&self, reader: u32) -> Lane<'_> {
        let [skip, due, forgotten, tail] = &self.lanes[reader as usize];
        Lane { skip, due, forgotten, tail }
    }

    fn word(&self, position: u64) -> &AtomicU64 {
        &self.data[(position % self.capacity()) as usize / 8]
    }
}

impl Default for Channel {
    fn default() -> Channel {
        let zero = || AtomicU64::new(0);
        let bell = || [AtomicU32::new(), AtomicU32::new()];
        let lane = || [zero(), zero(), zero(), zero()];
        let data = (0..16).map(|_| zero()).collect();
        Channel { lanes: [lane(), lane()], data, bells: [bell(), bell()] }
    }
}

impl Channel {
    fn bell(&self, which: usize) -> Bell<'_> {
        let [rings, asleep] = &self.bells[which];
        Bell { rings, asleep }
    }
}

/// Sleeps until `poll` finds something, as the host's waits do when they do not spin.
fn wait<T>(bell: &Bell<'_>, bit: u32, mut poll: impl FnMut() -> Option<T>) -> T {
    let bit = NonZeroU32::new(bit).unwrap();
    loop {
        let mut found = None;
        bell.sleep(bit, Duration::ZERO, || {
            found = poll();
            found.is_some()
        });
        if let Some(found) = found {
            return found;
        }
    }
}

/// The writer's end.
pub struct Sender<'a>(&'a Channel, Producer);

impl Sender<'_> {
    /// For `readers` readers.
    pub fn new(channel: &Channel, readers: u32) -> Sender<'_> {
        Sender(channel, Producer::new(readers))
    }

    /// Puts `number` into a batch; waits for space.
    pub fn stage(&mut self, readers: u32, number: u64) {
        let Sender(channel, producer) = self;
        if producer.place(*channel, 8).unwrap().is_err() {
            self.publish();
        }
        let Sender(channel, producer) = self;
        let start = wait(&channel.bell(1), 1, || producer.place(*channel, 8).unwrap().ok());
        producer.stage(*channel, start, (0, 0), readers, &number.to_ne_bytes());
    }

    /// Publishes the batch.
    pub fn publish(&mut self) {
        let readers = self.1.publish(self.0);
        if readers != 0 {
            self.0.bell(0).ring(readers);
        }
    }
}

/// A reader's end.
pub struct Receiver<'a>(&'a Channel, Consumer, u32);

impl Receiver<'_> {
    /// Number `reader`.
    pub fn new(channel: &Channel, reader: u32) -> Receiver<'_> {
        Receiver(channel, Consumer::new(reader), reader)
    }

    /// The next number.
    pub fn receive(&mut self) -> u64 {
        let Receiver(channel, consumer, reader) = self;
        let record = wait(&channel.bell(0), 1 << *reader, || consumer.next(*channel).unwrap());
        assert_eq!(record.length, 8);
        let early = EARLY.get();
        if early {
            let end = consumer.payload() - HEADER + ring::Record::bytes(8);
            let tail = channel.lane(*reader).tail;
            tail.store(end, primitive::Ordering::Relaxed);
        }
        let mut number = [0; 8];
        consumer.copy(*channel, &mut number);
        consumer.accept(*channel);
        channel.bell(1).ring(1);
        u64::from_ne_bytes(number)
    }
}
