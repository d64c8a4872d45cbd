//! A span, and the lines of the file that a process writes.
//!
//! Invariant: a line is one JSON object, whole or, if the process was killed while it wrote, the last one and cut off.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// The version of the lines.
pub(super) const VERSION: u32 = 1;

/// Nanoseconds of the clock that all processes of a machine share, `CLOCK_MONOTONIC`.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// What it is; spans of one name are a stage.
    pub name: Cow<'static, str>,
    /// Where it was: a thread, or a stream of a GPU, by a number of its own in the process.
    pub lane: u32,
    /// When it began: [`now`].
    pub begin: u64,
    /// When it ended.
    pub end: u64,
    /// What is known of it. These mean something to [`Summary`](super::Summary): `pass` (the span is a pass of that kind),
    /// `sends` and `hears` (a message's name), `waited` (who hears had to), and what the GPU's spans have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<Cow<'static, str>, Value>,
}

impl Span {
    /// Its length in nanoseconds.
    pub fn length(&self) -> u64 {
        self.end.saturating_sub(self.begin)
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.args.get(name)? {
            Value::Number(number) => Some(*number),
            Value::Text(_) => None,
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.args.get(name)? {
            Value::Text(text) => Some(text),
            Value::Number(_) => None,
        }
    }
}

/// Something known of a span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A count, a size, a rank.
    Number(u64),
    /// A name.
    Text(Cow<'static, str>),
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Number(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Value {
        Value::Number(number.into())
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Value {
        Value::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(Cow::Owned(text))
    }
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line {
    /// The first.
    Process { version: u32, pid: u32, boot: String, command: String },
    /// Before the first span of a lane.
    Lane { lane: u32, name: String, gpu: bool },
    /// A span, once it has ended.
    Span(Span),
    /// So many spans were not recorded.
    Lost(u64),
}
