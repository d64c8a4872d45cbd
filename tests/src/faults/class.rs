//! The classes of faults, and what is promised about each.
//!
//! Invariant: a class that keeps its promise never ends in a wrong result without an error.

use super::scene::Scene;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Nothing.
    None,
    /// A GPU hangs for good in one of its turns.
    GpuStops,
    /// A GPU is slow for a while, by a factor of a thousand and more.
    GpuCrawls,
    /// A store lands late.
    StoreLate,
    /// A unit or word that one GPU stores into another's memory never lands.
    StoreLost,
    /// A unit or word that a GPU stores into another's mailbox in host memory never lands.
    HostStoreLost,
    /// A bit is flipped on the way to another GPU.
    BitFlipped,
    /// A bit is flipped on the way to another GPU's mailbox in host memory.
    HostBitFlipped,
    /// A rank's host never makes a call.
    CallMissing,
    /// The process of a rank ends between two calls.
    ProcessDies,
    /// A rank gives up and aborts the others.
    Abort,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 11] = [
        Class::None,
        Class::GpuStops,
        Class::GpuCrawls,
        Class::StoreLate,
        Class::StoreLost,
        Class::HostStoreLost,
        Class::BitFlipped,
        Class::HostBitFlipped,
        Class::CallMissing,
        Class::ProcessDies,
        Class::Abort,
    ];

    /// The name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Class::None => "none",
            Class::GpuStops => "a GPU stops for good, at any turn",
            Class::GpuCrawls => "a GPU is slow, by 1000x and more, for a while",
            Class::StoreLate => "a store is late by up to 10 deadlines",
            Class::StoreLost => "a store into a GPU is lost",
            Class::HostStoreLost => "a store into host memory is lost",
            Class::BitFlipped => "a bit of a store into a GPU is flipped",
            Class::HostBitFlipped => "a bit of a store into host memory is flipped",
            Class::CallMissing => "a rank never makes its call",
            Class::ProcessDies => "a process dies between its calls",
            Class::Abort => "a rank aborts",
        }
    }

    /// Whether it takes two GPUs.
    pub const fn needs_peers(self) -> bool {
        use Class::*;
        matches!(self, StoreLost | HostStoreLost | BitFlipped | HostBitFlipped | StoreLate)
    }

    /// Whether what it changes travels through host memory.
    pub const fn by_host(self) -> bool {
        matches!(self, Class::HostStoreLost | Class::HostBitFlipped)
    }

    /// Whether what it changes travels from GPU to GPU.
    pub const fn by_link(self) -> bool {
        matches!(self, Class::StoreLost | Class::BitFlipped)
    }

    /// Whether a wrong result without an error is ruled out. Without checks it is not where data change on the way. Nor
    /// is it where a store is lost and something later says that all is there: a seal of that chunk or of a later one.
    /// And in registered tensors nothing says what has come.
    pub fn is_promised(self, scene: &Scene) -> bool {
        match self {
            _ if scene.config.checked => true,
            Class::BitFlipped | Class::HostBitFlipped => false,
            Class::StoreLost | Class::HostStoreLost => false,
            _ => true,
        }
    }
}
