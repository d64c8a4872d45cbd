//! An end that receives.
//!
//! Invariant: a message that is handed out is what the writer sent, unless another process tampers with the memory: what
//! a reader that was forgotten may have copied while the writer went on is not handed out.

use super::consumer::Consumer;
use super::peer::{GONE, Process, Watch};
use super::primitive::Ordering;
use super::rhythm::Rhythm;
use super::ring::{Memory, Record};
use super::segment::{Handle, Segment, shown};
use super::state::End;
use super::wait::{Patience, wait};
use super::{FORGOTTEN, Fault, PANICKED, Poisoner, SPIN, Side, fault, invalid};
use crate::error::{Error, Result};
use crate::trace;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use tracing::Span;
use tracing::field::Empty;

const OP: &str = "channel receive";

/// What is known of a message besides its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// What the writer calls it.
    pub kind: u16,
    /// More of that.
    pub flags: u16,
    /// Bytes of payload.
    pub length: u64,
    /// Its number among all messages of the channel, those to others too, counted from 1.
    pub sequence: u64,
    /// The readers that it was sent to, a bit each.
    pub readers: u32,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its header.
    pub info: Info,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// Receives the messages to one index of a channel, in the order in which they were sent.
pub struct Reader {
    segment: Arc<Segment>,
    index: u32,
    consumer: Consumer,
    writer: Watch,
    spin: Duration,
    rhythm: Rhythm,
}

impl Reader {
    /// Opens the channel of `handle` as reader `index`, which nobody has done before.
    pub fn open(handle: &str, index: u32) -> Result<Reader> {
        trace::start_from_environment();
        let op = "channel open";
        let parsed: Handle = handle
            .parse()
            .map_err(|()| invalid(op, "handle", "the text of Writer::handle", shown(handle)))?;
        let segment = Segment::open(&parsed)
            .map_err(|reason| invalid(op, "handle", "an open channel of this user", reason))?;
        Reader::attach(Arc::new(segment), index)
    }

    /// Takes `index`.
    pub(super) fn attach(segment: Arc<Segment>, index: u32) -> Result<Reader> {
        let op = "channel open";
        if index >= segment.readers {
            return Err(invalid(op, "index", format!("below {}", segment.readers), index));
        }
        let own = Process::this().map_err(|reason| Error::Unsupported { op, reason })?.pack();
        let word = segment.process(index);
        if word.compare_exchange(0, own, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return Err(invalid(op, "index", "one that nobody has taken", index));
        }
        let writer = Watch::new(segment.writer);
        let (consumer, rhythm) = (Consumer::new(index), Rhythm::default());
        Ok(Reader { segment, index, consumer, writer, spin: SPIN, rhythm })
    }

    /// Its index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// For how long a wait spins: at its beginning, or, if that is 200 us or more and messages have kept coming after
    /// longer waits, around the time when the next one is to be expected. It sleeps for the rest.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    /// Ends the channel from other threads.
    pub fn poisoner(&self) -> Poisoner {
        Poisoner { segment: self.segment.clone(), side: Side::Reader(self.index) }
    }

    /// The next message; waits for it for `timeout` at most.
    pub fn recv(&mut self, timeout: Duration) -> Result<Message> {
        let mut payload = Vec::new();
        let info = self.recv_into(&mut payload, timeout)?;
        Ok(Message { info, payload })
    }

    /// As [`recv`](Reader::recv), with the payload in `payload`, whose memory is used again.
    pub fn recv_into(&mut self, payload: &mut Vec<u8>, timeout: Duration) -> Result<Info> {
        let peek = self.peek(timeout)?;
        let info = peek.info;
        // The length was checked against the capacity of the ring.
        payload.resize(info.length as usize, 0);
        peek.copy_to(payload)?;
        peek.accept();
        Ok(info)
    }

    /// As [`recv`](Reader::recv), without a wait: `None` if there is no message.
    pub fn try_recv(&mut self) -> Result<Option<Message>> {
        match self.recv(Duration::ZERO) {
            Err(Error::Channel { fault: Fault::Timeout { .. }, .. }) => Ok(None),
            received => received.map(Some),
        }
    }

    /// The next message where it is. It stays the next until it is accepted.
    pub fn peek(&mut self, timeout: Duration) -> Result<Peek<'_>> {
        let record = self.wait(timeout)?;
        let Record { kind, flags, length, sequence, readers, .. } = record;
        Ok(Peek { info: Info { kind, flags, length, sequence, readers }, reader: self })
    }

    /// Ends the channel at once: see [`Poisoner::poison`].
    pub fn poison(&self, reason: u32) {
        self.poisoner().poison(reason);
    }

    /// Closes this end: sending to it is an error from now on. Dropping does the same, unless the thread panics, which
    /// poisons.
    pub fn close(self) {}

    fn wait(&mut self, timeout: Duration) -> Result<Record> {
        // A look that does not wait is nothing to see in a trace.
        let span = if timeout.is_zero() {
            Span::none().entered()
        } else {
            trace::span!("recv", hears = Empty, waited = Empty)
        };
        let Reader { segment, consumer, writer, spin, rhythm, .. } = self;
        let poll = || next(segment, consumer);
        let look = || {
            if writer.is_gone() {
                segment.state().died();
            }
            Ok(())
        };
        let patience = Patience { limit: timeout, plan: rhythm.plan(*spin) };
        let bit = NonZeroU32::new(1 << self.index).unwrap_or(NonZeroU32::MIN);
        let (found, waited) = wait(&segment.data_bell(), bit, patience, poll, look)?;
        match found {
            Some(record) => {
                rhythm.came(record.sequence, waited);
                if !span.is_disabled() {
                    span.record("hears", segment.message(record.sequence));
                    span.record("waited", waited.as_nanos() as u64);
                }
                Ok(record)
            }
            None => {
                rhythm.missed(waited);
                Err(fault(OP, Fault::Timeout { who: Side::Writer, waited }))
            }
        }
    }
}

/// The next message, or why there will be none.
fn next(segment: &Segment, consumer: &mut Consumer) -> Result<Option<Record>> {
    // Before the ring is looked at: what was sent before an orderly end is received.
    let end = segment.state().ended();
    if let Some(End::Abrupt(why)) = end {
        return Err(fault(OP, why));
    }
    let found = consumer.next(segment);
    // Before what was found is believed.
    if consumer.is_forgotten(segment) {
        return Err(forgotten());
    }
    match (found.map_err(|damage| fault(OP, damage))?, end) {
        (None, Some(end)) => Err(fault(OP, end.fault())),
        (found, _) => Ok(found),
    }
}

fn forgotten() -> Error {
    fault(OP, Fault::Poisoned { by: Side::Writer, reason: FORGOTTEN })
}

/// A message that is still in the ring.
pub struct Peek<'a> {
    info: Info,
    reader: &'a mut Reader,
}

impl Peek<'_> {
    /// Its header.
    pub fn info(&self) -> Info {
        self.info
    }

    /// Copies the payload, which has as many bytes as `bytes`.
    pub fn copy_to(&self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 != self.info.length {
            let expected = format!("{} bytes", self.info.length);
            return Err(invalid(OP, "bytes", expected, bytes.len()));
        }
        let Reader { segment, consumer, .. } = &*self.reader;
        consumer.copy(&**segment, bytes);
        if consumer.is_forgotten(&**segment) { Err(forgotten()) } else { Ok(()) }
    }

    /// Where the payload is, for who does without a copy. Other processes may change it: read it as volatile, and believe
    /// nothing in it twice.
    pub fn as_ptr(&self) -> *const u8 {
        self.reader.segment.word(self.reader.consumer.payload()).as_ptr().cast_const().cast()
    }

    /// Is done with it: the writer may use its space, and the next message is another.
    pub fn accept(self) {
        let Reader { segment, consumer, .. } = self.reader;
        consumer.accept(&**segment);
        segment.space_bell().ring(1);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.poison(PANICKED);
        }
        self.segment.process(self.index).fetch_or(GONE, Ordering::AcqRel);
        self.segment.space_bell().ring_all();
    }
}
