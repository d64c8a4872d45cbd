//! Messages between processes, or threads, through shared memory: one writer, up to 32 readers, one ring.
//!
//! A message goes to the readers that its mask names, in the order in which it was sent. Who waits spins for a while and
//! then sleeps, and hears of the other side's end. See docs/channel.md.
//!
//! Invariant: whatever another process writes into the memory, this one gets a message or a typed error in time; it does not
//! panic, hang or touch memory that is not the channel's.
//!
//! ```
//! use peerlane::channel::{EVERYBODY, Reader, Writer};
//! use std::time::Duration;
//!
//! let second = Duration::from_secs(1);
//! let mut writer = Writer::create(1 << 16, 1)?;
//! let mut reader = Reader::open(&writer.handle(), 0)?; // in another process, with the same text
//! writer.send(EVERYBODY, (7, 0), b"hello", second)?;
//! let message = reader.recv(second)?;
//! assert_eq!((message.info.kind, &message.payload[..]), (7, &b"hello"[..]));
//! # Ok::<(), peerlane::Error>(())
//! ```

mod bell;
mod consumer;
mod peer;
pub(crate) mod primitive;
mod producer;
#[cfg(any(fuzzing, test))]
pub(crate) mod raw;
mod reader;
mod rhythm;
mod ring;
mod segment;
mod state;
#[cfg(test)]
mod tests;
mod wait;
mod writer;

pub use reader::{Info, Message, Peek, Reader};
pub use writer::Writer;

pub(crate) use peer::Process;

use crate::error::Error;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

/// Most readers of a channel: as many as a futex tells apart.
pub const MAX_READERS: u32 = 32;
/// The mask of all readers that the writer has not forgotten.
pub const EVERYBODY: u32 = u32::MAX;
/// Bytes that a channel may have.
pub const CAPACITY: RangeInclusive<u64> = 4096..=1 << 32;
/// How long waits spin before they sleep, unless told otherwise.
pub const SPIN: Duration = Duration::from_micros(20);
/// The reason of the poison that an end leaves which is dropped while its thread panics.
pub const PANICKED: u32 = u32::MAX;
/// The reason that a reader is given which the writer has forgotten.
pub const FORGOTTEN: u32 = u32::MAX - 1;

/// An end of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Who sends.
    Writer,
    /// Who receives, by its index.
    Reader(u32),
}

impl Side {
    fn code(self) -> u8 {
        match self {
            Side::Writer => 0,
            Side::Reader(reader) => reader as u8 + 1,
        }
    }

    fn from_code(code: u8, readers: u32) -> Option<Side> {
        match u32::from(code).checked_sub(1) {
            None => Some(Side::Writer),
            Some(reader) => (reader < readers).then_some(Side::Reader(reader)),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Side::Writer => f.write_str("the writer"),
            Side::Reader(reader) => write!(f, "reader {reader}"),
        }
    }
}

/// What went wrong between the ends of a channel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A wait reached its deadline. Nothing was lost: the call may be repeated.
    #[error("waited {waited:?} for {who}")]
    Timeout {
        /// Who did not come.
        who: Side,
        /// For how long.
        waited: Duration,
    },

    /// A process has ended without closing its end.
    #[error("the process of {who} (pid {pid}) has ended")]
    Died {
        /// Whose.
        who: Side,
        /// That process.
        pid: u32,
    },

    /// An end was closed. A reader has received all that was sent before.
    #[error("{who} has closed its end")]
    Closed {
        /// Which.
        who: Side,
    },

    /// Somebody has ended the channel at once, whatever was still in it.
    #[error("poisoned by {by} ({})", reason_text(*reason))]
    Poisoned {
        /// Who.
        by: Side,
        /// The number that they gave, [`PANICKED`] or [`FORGOTTEN`].
        reason: u32,
    },

    /// The shared memory holds what no end of a channel writes.
    #[error("the shared memory is corrupt: {what}: expected {expected}, got {got:#x}")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// What it could be.
        expected: String,
        /// What it is.
        got: u64,
    },
}

fn reason_text(reason: u32) -> String {
    match reason {
        PANICKED => "its thread panicked".into(),
        FORGOTTEN => "it goes on without this reader".into(),
        _ => format!("reason {reason}"),
    }
}

impl From<ring::Damage> for Fault {
    fn from(damage: ring::Damage) -> Fault {
        let ring::Damage { what, expected, got } = damage;
        Fault::Corrupt { what, expected, got }
    }
}

/// Poisons a channel from any thread, also while an end waits in another.
#[derive(Clone)]
pub struct Poisoner {
    segment: Arc<segment::Segment>,
    side: Side,
}

impl Poisoner {
    /// Ends the channel at once: every wait on every side ends with [`Fault::Poisoned`]. The first end of a channel counts:
    /// after a `close` or another poison this does nothing.
    pub fn poison(&self, reason: u32) {
        self.segment.state().poison(self.side, reason);
    }
}

fn invalid(
    op: &'static str,
    argument: &'static str,
    expected: impl Into<String>,
    got: impl fmt::Display,
) -> Error {
    Error::InvalidArgument { op, argument, expected: expected.into(), got: got.to_string() }
}

fn fault(op: &'static str, fault: impl Into<Fault>) -> Error {
    Error::Channel { op, fault: fault.into() }
}
