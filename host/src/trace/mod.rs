//! What happened when, in all processes of a program: spans of the host and of the GPUs on one clock.
//!
//! Spans of the host are [`tracing`](https://docs.rs/tracing)'s, of the target `peerlane` and the level TRACE; a program with a
//! subscriber of its own gets them too. [`start`] writes them, and the times of collectives on the GPU, to a file of this process;
//! [`Timeline`] reads the files of all processes. See docs/trace.md.
//!
//! Invariant: nothing is recorded, and a call costs one load more, unless somebody asked. What goes wrong while recording costs
//! records and never a call.

mod gpu;
mod layer;
mod line;
mod recorder;
mod summary;
#[cfg(test)]
mod tests;
mod timeline;

pub(crate) use gpu::{Subject, Timer};
pub use layer::Layer;
pub use line::{Span, Value, now};
pub(crate) use recorder::lose;
pub use recorder::{flush, is_recording, record};
pub use summary::{Stage, Summary};
pub use timeline::{Process, Timeline};

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Once;
use tracing::level_filters::LevelFilter;
use tracing::span::EnteredSpan;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer as _, SubscriberExt};

/// The variable that names the directory where processes of a traced program write their files.
pub const VARIABLE: &str = "PEERLANE_TRACE";
/// The target of all spans.
pub(crate) const TARGET: &str = "peerlane";

/// A span of the host until the value is dropped.
macro_rules! span {
    ($($of:tt)*) => {
        tracing::trace_span!(target: $crate::trace::TARGET, $($of)*).entered()
    };
}
pub(crate) use span;

/// Whether anybody wants spans.
#[inline]
pub(crate) fn is_on() -> bool {
    LevelFilter::current() == LevelFilter::TRACE
}

/// Records spans of this process into a new file in `directory`, which is made if it is not there, until the process ends.
///
/// # Errors
/// The file cannot be made, this process records already, or it has a subscriber of `tracing` that is not ours: [`start_beside`]
/// makes the layer to give to it.
pub fn start(directory: &Path) -> Result<()> {
    if tracing::dispatcher::has_been_set() && !is_recording() {
        return Err(refused(
            "this program has a subscriber of its own: start_beside makes a layer for it",
        ));
    }
    let wanted = Targets::new().with_target(TARGET, LevelFilter::TRACE);
    let subscriber =
        tracing_subscriber::registry().with(start_beside(directory)?.with_filter(wanted));
    tracing::subscriber::set_global_default(subscriber).map_err(|error| refused(error.to_string()))
}

/// As [`start`], for a program that gives what it returns to its own subscriber.
pub fn start_beside(directory: &Path) -> Result<Layer> {
    recorder::start(directory).map_err(refused)?;
    Ok(Layer::new())
}

/// Records if [`VARIABLE`] says so, which it does under `peerlane trace`. Says so on stderr if that does not work: what is traced
/// goes on without.
pub fn start_from_environment() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Some(directory) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
            return;
        };
        if is_recording() {
            return;
        }
        if let Err(error) = start(Path::new(&directory)) {
            eprintln!("peerlane: {VARIABLE}: nothing is recorded: {error}");
        }
    });
}

/// Records a span of the calling thread that began at `begin` and ends now.
pub fn finish(
    name: impl Into<Cow<'static, str>>,
    begin: u64,
    args: BTreeMap<Cow<'static, str>, Value>,
) {
    if is_recording() {
        record(Span { name: name.into(), lane: recorder::own_lane(), begin, end: now(), args });
    }
}

/// A pass of some kind, until the value is dropped: what happens meanwhile in this thread belongs to it. For programs that have
/// passes of their own.
#[must_use = "the pass ends when this is dropped"]
pub fn pass(kind: &str) -> Pass {
    Pass { _span: span!("pass", pass = kind) }
}

/// What [`pass`] returns.
#[derive(Debug)]
pub struct Pass {
    _span: EnteredSpan,
}

/// The calling thread's lane, and the time.
pub(crate) fn here() -> (u32, u64) {
    (recorder::own_lane(), now())
}

fn refused(reason: impl Into<String>) -> Error {
    Error::Unsupported { op: "trace", reason: reason.into() }
}
