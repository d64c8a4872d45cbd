//! What can go wrong, as one type.
//!
//! Invariant: an error names the argument or the call, what was expected and what came. An error
//! that a call returns before it launches has changed nothing: no tensor, no counter, no peer.

use crate::channel::Fault;
use peerlane_device::abi::{Operation, phase};
use std::time::Duration;

/// The result of everything in Peerlane that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// An argument is not what the operation can work with.
    #[error("{op}: {argument}: expected {expected}, got {got}")]
    InvalidArgument {
        /// The call.
        op: &'static str,
        /// The argument's name.
        argument: &'static str,
        /// What the call can work with.
        expected: String,
        /// What came.
        got: String,
    },

    /// Two ranks called different things.
    #[error(
        "{op}: rank {rank} and rank {peer} disagree in call {call}: rank {rank} brings {mine}, rank {peer} brings {theirs}"
    )]
    Mismatch {
        /// The call on this rank.
        op: &'static str,
        /// This rank.
        rank: u32,
        /// The rank that disagrees.
        peer: u32,
        /// The number of the call, counted from 0 on each rank.
        call: u64,
        /// What this rank brought.
        mine: String,
        /// What the peer brought.
        theirs: String,
    },

    /// The machine cannot do it.
    #[error("{op}: {reason}")]
    Unsupported {
        /// What was asked for.
        op: &'static str,
        /// Why it is not to be had.
        reason: String,
    },

    /// No driver library could be loaded.
    #[error("no NVIDIA driver: {reason}")]
    NoDriver {
        /// What the loader said.
        reason: String,
    },

    /// A driver call failed.
    #[error("{call} on GPU {device}: {name} ({code})")]
    Driver {
        /// The driver function.
        call: &'static str,
        /// The device's index.
        device: u32,
        /// The driver's number for the error.
        code: u32,
        /// The driver's name for the error.
        name: String,
    },

    /// Two GPUs cannot reach each other.
    #[error("GPU {from} cannot reach GPU {to}: {reason}")]
    Unreachable {
        /// The GPU that would write.
        from: u32,
        /// The GPU that would be written to.
        to: u32,
        /// Why not.
        reason: String,
    },

    /// A wait on the GPU reached its deadline.
    #[error(
        "{operation}: rank {rank} waited {waited:?} for rank {peer} ({phase}) in its call {epoch}"
    )]
    Timeout {
        /// The collective.
        operation: &'static str,
        /// The rank that waited.
        rank: u32,
        /// The rank that did not come.
        peer: u32,
        /// The call's number on this rank.
        epoch: u32,
        /// What was waited for.
        phase: &'static str,
        /// For how long.
        waited: Duration,
    },

    /// The communicator was aborted, by this rank or by another.
    #[error(
        "{operation}: rank {rank} was aborted in its call {epoch} while it waited for rank {peer} ({phase})"
    )]
    Aborted {
        /// The collective.
        operation: &'static str,
        /// The rank that stopped.
        rank: u32,
        /// The rank it was waiting for.
        peer: u32,
        /// The call's number on this rank.
        epoch: u32,
        /// What was waited for.
        phase: &'static str,
    },

    /// The process of a rank has ended without closing its communicator.
    #[error(
        "{operation}: rank {rank} lost rank {peer}: its process (pid {pid}) has ended{}",
        way_on(operation)
    )]
    PeerLost {
        /// The collective that was waiting, `recover` or `shrink`, or `health` if none was.
        operation: &'static str,
        /// The rank that noticed.
        rank: u32,
        /// The rank whose process ended.
        peer: u32,
        /// That process.
        pid: u32,
    },

    /// The communicator was aborted while this rank was waiting for nobody.
    #[error("the communicator of rank {rank} was aborted")]
    Stopped {
        /// The rank that noticed.
        rank: u32,
    },

    /// What a GPU read is not what its peer wrote: a probe or a checked call found out.
    #[error("{operation}: rank {rank} read data from rank {peer} that rank {peer} did not write")]
    Corrupt {
        /// The probe or the call that found out.
        operation: &'static str,
        /// The rank that read.
        rank: u32,
        /// The rank that wrote.
        peer: u32,
    },

    /// Ranks did not meet.
    #[error("rendezvous of {world} ranks: {reason}")]
    Rendezvous {
        /// Ranks expected.
        world: u32,
        /// What went wrong, with the ranks concerned.
        reason: String,
    },

    /// The communicator was closed.
    #[error("{op}: the communicator of rank {rank} is closed")]
    Closed {
        /// The call.
        op: &'static str,
        /// This rank.
        rank: u32,
    },

    /// Something is wrong between the ends of a channel.
    #[error("{op}: {fault}")]
    Channel {
        /// The call.
        op: &'static str,
        /// What it is.
        fault: Fault,
    },

    /// Something is wrong between who exports tensors and who imports them.
    #[error("transfer: {fault}")]
    Transfer {
        /// What it is.
        fault: crate::transfer::Fault,
    },

    /// The simulator found a kernel doing what hardware would not forgive.
    #[error("simulated GPU {device}: {reason} (seed {seed})")]
    Simulated {
        /// The simulated device.
        device: u32,
        /// What the kernel did.
        reason: String,
        /// The seed that replays it.
        seed: u64,
    },
}

/// Most characters of a reason that travels between ranks, or of a text that came from elsewhere, in an error.
pub(crate) const LONGEST_REASON: usize = 1000;

/// A text that this process did not write, fit for an error: not too long, and nothing that moves a
/// terminal's cursor.
pub(crate) fn clipped(text: &str) -> String {
    let plain = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    text.chars().take(LONGEST_REASON).map(plain).collect()
}

/// The name of an [`abi::phase`](peerlane_device::abi::phase) code.
pub(crate) fn phase_name(code: u32) -> &'static str {
    match code {
        phase::CREDIT => "a free slot",
        phase::DATA => "its data",
        phase::RESULT => "its result",
        phase::BARRIER => "the barrier",
        phase::PROBE => "the probe",
        phase::SIGNATURE => "its signature",
        phase::CHECKSUM => "its checksum",
        phase::VERDICT => "its verdict",
        _ => "an unknown phase",
    }
}

/// What is left to do where `operation` cannot go on without a rank that is gone.
fn way_on(operation: &str) -> &'static str {
    match operation {
        "recover" | "shrink" => "; shrink, naming every rank that is gone, goes on without it",
        _ => "",
    }
}

/// The name of an operation code that a kernel recorded.
pub(crate) fn operation_name(code: u32) -> &'static str {
    Operation::from_code(code).map_or("an unknown operation", Operation::name)
}
