//! Peer-to-peer collectives for the GPUs of one machine.

pub mod algorithm;
mod call_log;
pub mod cases;
pub mod choice;
mod collectives;
pub mod communicator;
pub mod error;
pub mod ffi;
pub mod gpu;
mod group;
mod join;
pub mod layout;
pub mod links;
mod mailbox;
pub mod plan;
mod probe;
pub mod reference;
pub mod rendezvous;
pub mod request;
pub mod topology;

pub use algorithm::{Algorithm, Pattern, Route};
pub use choice::{Choice, Tuning};
pub use communicator::{Communicator, Config};
pub use error::{Error, Result};
pub use group::Aborter;
pub use peerlane_device::abi::{DType, Format, Kernel, Operation, ReduceOp, Wire};
pub use rendezvous::{Meeting, Processes};
pub use request::{AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
