//! The end that sends.
//!
//! Invariant: a message is seen in whole or not at all, and a call that fails has sent nothing of its own.

use super::peer::{GONE, Process, Watch};
use super::primitive::Ordering;
use super::producer::{Producer, each};
use super::rhythm::Plan;
use super::ring::{HEADER, Memory};
use super::segment::Segment;
use super::wait::{Patience, wait};
use super::{CAPACITY, Fault, MAX_READERS, PANICKED, Poisoner, SPIN, Side, fault, invalid};
use crate::error::{Error, Result};
use crate::trace;
use std::cell::Cell;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use tracing::Span;
use tracing::field::Empty;

/// The writer's bit in the bell that rings for it: it is alone there.
const OWN: NonZeroU32 = NonZeroU32::MIN;

/// Sends messages to the readers of a channel, which is gone when all its ends are.
pub struct Writer {
    segment: Arc<Segment>,
    producer: Producer,
    watches: Vec<Option<Watch>>,
    spin: Duration,
}

impl Writer {
    /// Makes a channel of `capacity` bytes, rounded up to a power of two, for `readers` readers.
    pub fn create(capacity: u64, readers: u32) -> Result<Writer> {
        trace::start_from_environment();
        let op = "channel create";
        if !CAPACITY.contains(&capacity) {
            let expected = format!("{} to {} bytes", CAPACITY.start(), CAPACITY.end());
            return Err(invalid(op, "capacity", expected, capacity));
        }
        if !(1..=MAX_READERS).contains(&readers) {
            return Err(invalid(op, "readers", format!("1 to {MAX_READERS}"), readers));
        }
        let segment = Segment::create(capacity.next_power_of_two(), readers)
            .map_err(|reason| Error::Unsupported { op, reason })?;
        let watches = (0..readers).map(|_| None).collect();
        let producer = Producer::new(readers);
        Ok(Writer { segment: Arc::new(segment), producer, watches, spin: SPIN })
    }

    /// The text by which a reader opens it, in any process of this user, while this process lives and this writer is there.
    pub fn handle(&self) -> String {
        self.segment.handle().to_string()
    }

    /// Most bytes of a payload.
    pub fn max_payload(&self) -> u64 {
        self.segment.capacity() - HEADER
    }

    /// Number of readers.
    pub fn readers(&self) -> u32 {
        self.segment.readers
    }

    /// How long waits spin before they sleep.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    /// Ends the channel from other threads.
    pub fn poisoner(&self) -> Poisoner {
        Poisoner { segment: self.segment.clone(), side: Side::Writer }
    }

    /// Sends one message, and what was staged, to `readers`, a bit each. `what` is its kind and its flags, which mean
    /// what the caller wants. Returns its sequence number, counted from 1. Waits for space until the slowest addressed
    /// reader has made some, for `timeout` at most.
    pub fn send(
        &mut self,
        readers: u32,
        what: (u16, u16),
        payload: &[u8],
        timeout: Duration,
    ) -> Result<u64> {
        let span = trace::span!("send", bytes = payload.len() as u64, sends = Empty);
        let sequence = self.put(readers, what, payload, timeout)?;
        self.publish();
        self.traced(&span, sequence);
        Ok(sequence)
    }

    /// As [`send`](Writer::send), without a wait: `None` if there is no space.
    pub fn try_send(
        &mut self,
        readers: u32,
        what: (u16, u16),
        payload: &[u8],
    ) -> Result<Option<u64>> {
        match self.send(readers, what, payload, Duration::ZERO) {
            Err(Error::Channel { fault: Fault::Timeout { .. }, .. }) => Ok(None),
            sent => sent.map(Some),
        }
    }

    /// Puts a message into a batch: readers see it with the next [`publish`](Writer::publish) or
    /// [`send`](Writer::send). What does not fit the ring together is published before there is a wait for space.
    pub fn stage(
        &mut self,
        readers: u32,
        what: (u16, u16),
        payload: &[u8],
        timeout: Duration,
    ) -> Result<u64> {
        let span = trace::span!("send", bytes = payload.len() as u64, sends = Empty);
        let sequence = self.put(readers, what, payload, timeout)?;
        self.traced(&span, sequence);
        Ok(sequence)
    }

    /// What both do.
    fn put(
        &mut self,
        readers: u32,
        what: (u16, u16),
        payload: &[u8],
        timeout: Duration,
    ) -> Result<u64> {
        let op = "channel send";
        let readers = self.addressed(op, readers)?;
        if payload.len() as u64 > self.max_payload() {
            let expected = format!("at most {} bytes", self.max_payload());
            return Err(invalid(op, "payload", expected, format!("{} bytes", payload.len())));
        }
        let start = self.space(op, payload.len() as u64, timeout)?;
        self.producer.stage(&*self.segment, start, what, readers, payload);
        Ok(self.producer.sequence())
    }

    /// Says in a span what is sent in it.
    fn traced(&self, span: &Span, sequence: u64) {
        if !span.is_disabled() {
            span.record("sends", self.segment.message(sequence));
        }
    }

    /// Lets the readers see what was staged, with one wake-up at most, for all of them together.
    pub fn publish(&mut self) {
        let readers = self.producer.publish(&*self.segment);
        if readers != 0 {
            self.segment.data_bell().ring(readers);
        }
    }

    /// Goes on without `reader`, dead or alive: it holds nothing up any more. If it is alive, it is told.
    pub fn forget(&mut self, reader: u32) -> Result<()> {
        let op = "channel forget";
        if reader >= self.readers() {
            return Err(invalid(op, "reader", format!("below {}", self.readers()), reader));
        }
        self.producer.forget(&self.segment.lane(reader), reader);
        self.segment.data_bell().ring_all();
        Ok(())
    }

    /// Closes the channel, with what was staged: readers receive all that was sent, and then [`Fault::Closed`]. Dropping
    /// does the same, unless the thread panics, which poisons.
    pub fn close(self) {}

    /// Ends the channel at once: see [`Poisoner::poison`].
    pub fn poison(&self, reason: u32) {
        self.poisoner().poison(reason);
    }

    /// Whether everybody in `readers` has come, and is there: else who has not.
    pub fn attached(&self, readers: u32) -> std::result::Result<(), u32> {
        let word = |reader: u32| self.segment.process(reader).load(Ordering::Acquire);
        let all = each(readers & self.producer.active);
        let mut missing = all.filter(|reader| Process::unpack(word(*reader)).is_none());
        missing.next().map_or(Ok(()), Err)
    }

    /// Those of `readers` that it goes on with; an error if one of them has closed or there is none.
    fn addressed(&self, op: &'static str, readers: u32) -> Result<u32> {
        if let Some(end) = self.segment.state().ended() {
            return Err(fault(op, end.fault()));
        }
        let exist = u32::MAX >> (u32::BITS - self.readers());
        if readers == 0 || readers & !exist != 0 && readers != super::EVERYBODY {
            let expected = format!("EVERYBODY or bits below {}", self.readers());
            return Err(invalid(op, "readers", expected, format!("{readers:#x}")));
        }
        let readers = readers & self.producer.active;
        if readers == 0 {
            return Err(invalid(op, "readers", "one that is not forgotten", "none"));
        }
        each(readers).try_for_each(|reader| left(&self.segment, op, reader))?;
        Ok(readers)
    }

    /// Where a message goes; waits for space.
    fn space(&mut self, op: &'static str, length: u64, timeout: Duration) -> Result<u64> {
        if let Ok(start) = self.place(op, length)? {
            return Ok(start);
        }
        // Readers make space only of what they see.
        self.publish();
        let segment = self.segment.clone();
        let patience = Patience { limit: timeout, plan: Plan::spin(self.spin) };
        let Writer { producer, watches, .. } = self;
        let slow = Cell::new(0);
        let poll = || match producer.place(&*segment, length).map_err(|d| fault(op, d))? {
            Ok(start) => Ok(Some(start)),
            Err(reader) => {
                slow.set(reader);
                match segment.state().ended() {
                    Some(end) => Err(fault(op, end.fault())),
                    None => left(&segment, op, reader).map(|()| None),
                }
            }
        };
        let look = || alive(&segment, watches, op, slow.get());
        let (found, waited) = wait(&segment.space_bell(), OWN, patience, poll, look)?;
        let who = Side::Reader(slow.get());
        found.ok_or_else(|| fault(op, Fault::Timeout { who, waited }))
    }

    fn place(&mut self, op: &'static str, length: u64) -> Result<std::result::Result<u64, u32>> {
        self.producer.place(&*self.segment, length).map_err(|damage| fault(op, damage))
    }
}

/// An error if `reader` has closed its end.
fn left(segment: &Segment, op: &'static str, reader: u32) -> Result<()> {
    let gone = segment.process(reader).load(Ordering::Acquire) & GONE != 0;
    let who = Side::Reader(reader);
    if gone { Err(fault(op, Fault::Closed { who })) } else { Ok(()) }
}

/// An error if the process of `reader` has ended. One that has not come yet has not ended.
fn alive(
    segment: &Segment,
    watches: &mut [Option<Watch>],
    op: &'static str,
    reader: u32,
) -> Result<()> {
    let Some(process) = Process::unpack(segment.process(reader).load(Ordering::Acquire)) else {
        return Ok(());
    };
    let watch = &mut watches[reader as usize];
    if watch.as_ref().is_none_or(|watch| watch.process != process) {
        *watch = Some(Watch::new(process));
    }
    if watch.as_mut().is_some_and(Watch::is_gone) {
        let (who, pid) = (Side::Reader(reader), process.pid());
        return Err(fault(op, Fault::Died { who, pid }));
    }
    Ok(())
}

impl Drop for Writer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return self.poison(PANICKED);
        }
        self.publish();
        self.segment.state().close();
    }
}
