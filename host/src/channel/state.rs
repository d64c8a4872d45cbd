//! Whether a channel is open, and who ended it.
//!
//! Invariant: the first end is the one that everybody reports; it is never taken back. Every end wakes everybody.

use super::primitive::{AtomicU64, Ordering};
use super::segment::Segment;
use super::{Fault, Side};

const CLOSED: u64 = 1;
const POISONED: u64 = 2;
const DIED: u64 = 3;

/// The word that says so: kind, by whom (8 bits each), and 32 bits of reason.
pub(super) struct State<'a> {
    pub(super) word: &'a AtomicU64,
    pub(super) segment: &'a Segment,
}

/// How a channel ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    /// What was sent before is still received.
    Orderly(Fault),
    /// At once.
    Abrupt(Fault),
}

impl End {
    pub(super) fn fault(self) -> Fault {
        let (End::Orderly(fault) | End::Abrupt(fault)) = self;
        fault
    }
}

impl State<'_> {
    /// `None` while it is open.
    pub(super) fn ended(&self) -> Option<End> {
        // Acquire: who sees the end sees what was published before it.
        let word = self.word.load(Ordering::Acquire);
        let (by, reason) = (word >> 8 & 0xff, (word >> 32) as u32);
        let side = Side::from_code(by as u8, self.segment.readers);
        match (word & 0xff, side) {
            (0, _) if word == 0 => None,
            (CLOSED, Some(who)) => Some(End::Orderly(Fault::Closed { who })),
            (POISONED, Some(by)) => Some(End::Abrupt(Fault::Poisoned { by, reason })),
            (DIED, Some(who)) => {
                Some(End::Orderly(Fault::Died { who, pid: self.segment.writer.pid() }))
            }
            _ => Some(End::Abrupt(Fault::Corrupt {
                what: "the channel's state",
                expected: "open, closed, poisoned or dead".into(),
                got: word,
            })),
        }
    }

    fn end(&self, kind: u64, by: Side, reason: u32) {
        let word = kind | u64::from(by.code()) << 8 | u64::from(reason) << 32;
        if self.word.compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.segment.data_bell().ring_all();
            self.segment.space_bell().ring_all();
        }
    }

    /// The writer has sent all that it will send.
    pub(super) fn close(&self) {
        self.end(CLOSED, Side::Writer, 0);
    }

    /// Ends everything at once.
    pub(super) fn poison(&self, by: Side, reason: u32) {
        self.end(POISONED, by, reason);
    }

    /// The writer's process has ended.
    pub(super) fn died(&self) {
        self.end(DIED, Side::Writer, 0);
    }
}
