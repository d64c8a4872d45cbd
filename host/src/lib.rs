//! Peer-to-peer collectives for the GPUs of one machine.

pub mod cases;
pub mod communicator;
pub mod error;
pub mod gpu;
pub mod reference;
pub mod request;

pub use communicator::{Communicator, Config};
pub use error::{Error, Result};
pub use peerlane_device::abi::{DType, Format, Kernel, Operation, ReduceOp, Wire};
pub use request::{Algorithm, AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
