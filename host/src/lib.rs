//! Peer-to-peer collectives for the GPUs of one machine.

pub mod error;
pub mod gpu;

pub use error::{Error, Result};
pub use peerlane_device::abi::{DType, Format, Kernel, Operation, ReduceOp, Wire};
