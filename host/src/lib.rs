//! Peer-to-peer collectives for the GPUs of one machine.

mod adapt;
pub mod algorithm;
mod call_log;
pub mod cases;
pub mod channel;
pub mod choice;
mod collectives;
pub mod communicator;
#[cfg(test)]
mod corrupted;
pub mod error;
pub mod ffi;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gpu;
mod group;
mod host_mailbox;
mod join;
pub mod layout;
pub mod links;
mod mailbox;
pub mod model;
mod monitor;
mod neighbours;
pub mod plan;
pub mod pool;
mod probe;
mod recovery;
pub mod reference;
mod registration;
mod regroup;
pub mod rendezvous;
pub mod request;
mod scheduled;
mod sealed;
pub mod selftest;
mod shrink;
mod sizing;
pub mod topology;
pub mod trace;
mod traced;
pub mod transfer;
pub mod transport;
mod usage;
pub mod work;
pub mod workers;

pub use adapt::Adapted;
#[doc(hidden)]
pub use adapt::BREAK_DRAIN;
pub use algorithm::{Algorithm, Pattern, Route, Spread};
pub use choice::{Choice, Tuning};
pub use communicator::{Communicator, Config, STAGING_BYTES};
pub use error::{Error, Result};
pub use group::Aborter;
pub use peerlane_device::abi::{DType, Format, Kernel, Operation, ReduceOp, Wire};
pub use registration::{Registration, RegistrationStatistics};
pub use rendezvous::{Meeting, Processes};
pub use request::{
    AllGather, AllReduce, AllReduceRegistered, Broadcast, Chunk, Gather, ReduceScatter,
};
pub use selftest::SelfTest;
pub use sizing::{Sizes, Sizing};
pub use transport::Transport;
pub use usage::{Counts, Family, Usage};
pub use work::Work;
