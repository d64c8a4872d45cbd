//! Tensors between processes through shared memory: one exporter, up to 32 importers, no copy on their side.
//!
//! An exporter copies a tensor into its arena and gets a [`Descriptor`] of some 100 bytes, which travels as the caller likes. An
//! importer turns that into a [`View`] of the payload where it lies. [`Exporter::clear`] gives up everything exported so
//! far; what somebody still looks at stays as it is, and its memory is used again when the last view is gone. The arena grows and
//! shrinks with what is exported between two clears. See docs/transfer.md.
//!
//! Invariant: a view never changes and never dangles, whatever the exporter does, its end included; a descriptor that comes too late is
//! [`Fault::Stale`]. Bytes from another process lead to a wrong payload or an error, never to an access elsewhere.
//!
//! ```
//! use peerlane::transfer::{Descriptor, Element, Exporter, Importer, Limits, Shape};
//!
//! let mut exporter = Exporter::create(Limits::default())?;
//! let importer = Importer::open(&exporter.handle(), 0)?; // in another process, with the same text
//! let (bf16, shape) = (Element { code: 4, bytes: 2 }, Shape::new(&[2, 3]).unwrap());
//! let mut message = Vec::new();
//! exporter.export(b"twelve bytes", bf16, shape)?.write(&mut message);
//! let view = importer.import(&Descriptor::read(&message)?)?;
//! assert_eq!(view.narrow(0, 1..2)?.to_vec(), b" bytes");
//! # Ok::<(), peerlane::Error>(())
//! ```

mod descriptor;
mod exporter;
mod importer;
mod lease;
mod mapped;
mod segment;
#[cfg(test)]
mod tests;

pub use descriptor::{Descriptor, Element, HEADER, MAX_DIMS, Shape};
pub use exporter::{Exporter, Limits, Usage};
pub use importer::{Importer, View};
pub use mapped::Mapped;

use crate::channel::primitive;
use crate::error::Error;

/// Most importers of one exporter.
pub const MAX_IMPORTERS: u32 = 32;

/// What went wrong between an exporter and an importer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The exporter has given the tensor up.
    #[error(
        "the tensor was given up: it is of generation {exported}, and the exporter is at {now}"
    )]
    Stale {
        /// When it was exported.
        exported: u64,
        /// When it was to be imported.
        now: u64,
    },

    /// The memory cannot be opened, since the exporter or that part of its arena is gone.
    #[error("the memory of process {pid} cannot be opened: {reason}")]
    Gone {
        /// The exporter's process.
        pid: u32,
        /// What the system says.
        reason: String,
    },

    /// The arena may not grow as far.
    #[error("an arena of {limit} bytes at most has no room for {bytes} more{}", borrowed(*borrower))]
    Full {
        /// What was to be exported.
        bytes: u64,
        /// The limit.
        limit: u64,
        /// An importer that holds views of what was given up, and how many, if that is the reason.
        borrower: Option<(u32, u64)>,
    },

    /// The system has no memory for it.
    #[error("{0}")]
    NoMemory(String),

    /// Bytes are not what an exporter could have written.
    #[error("{what}: expected {expected}, got {got}")]
    Corrupt {
        /// Which.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        Error::Transfer { fault }
    }
}

fn borrowed(borrower: Option<(u32, u64)>) -> String {
    borrower.map_or(String::new(), |(importer, views)| {
        format!(": importer {importer} holds {views} views of what was given up")
    })
}
