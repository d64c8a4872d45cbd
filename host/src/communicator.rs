//! The public face: one [`Communicator`] per rank.

use crate::error::{Error, Result};
use crate::gpu::{GpuRef, Stream};
use crate::request::{Algorithm, AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
use std::time::Duration;

/// What all ranks of a communicator agree on when they meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// A wait on the GPU that lasts longer than this ends with an error.
    pub deadline: Duration,
    /// Most bytes of device memory for one rank's mailbox.
    pub mailbox_bytes: usize,
    /// Most blocks that one call may use. `None`: as many as the smallest GPU holds at once,
    /// divided by the ranks that share it.
    pub max_blocks: Option<u32>,
    /// Overrides the plan's choice of all-reduce for every call.
    pub algorithm: Option<Algorithm>,
    /// Test only: `abi::flags::BREAK_*` bits that break the protocol on purpose.
    #[doc(hidden)]
    pub broken: u32,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            deadline: Duration::from_secs(10),
            mailbox_bytes: 32 << 20,
            max_blocks: None,
            algorithm: None,
            broken: 0,
        }
    }
}

/// One rank's end of a group of GPUs.
pub struct Communicator {
    rank: u32,
    world: u32,
    gpu: GpuRef,
}

#[allow(missing_docs, unused_variables, clippy::missing_safety_doc)]
impl Communicator {
    /// Makes all ranks of a group at once, rank r on `gpus[r]`, for one thread to drive.
    pub fn connect(gpus: &[GpuRef], config: &Config) -> Result<Vec<Communicator>> {
        Err(Error::Unsupported { op: "connect", reason: "not built yet".into() })
    }
    pub fn rank(&self) -> u32 {
        self.rank
    }
    pub fn world_size(&self) -> u32 {
        self.world
    }
    pub fn gpu(&self) -> &GpuRef {
        &self.gpu
    }
    pub unsafe fn all_reduce(&mut self, call: &AllReduce, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "all_reduce", reason: "not built yet".into() })
    }
    pub unsafe fn reduce_scatter(&mut self, call: &ReduceScatter, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "reduce_scatter", reason: "not built yet".into() })
    }
    pub unsafe fn all_gather(&mut self, call: &AllGather, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "all_gather", reason: "not built yet".into() })
    }
    pub unsafe fn broadcast(&mut self, call: &Broadcast, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "broadcast", reason: "not built yet".into() })
    }
    pub unsafe fn gather(&mut self, call: &Gather<'_>, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "gather", reason: "not built yet".into() })
    }
    pub fn barrier(&mut self, stream: Stream) -> Result<()> {
        Err(Error::Unsupported { op: "barrier", reason: "not built yet".into() })
    }
    /// The first error that a kernel of this communicator recorded, if any.
    pub fn health(&self) -> Result<()> {
        Ok(())
    }
    /// Ends the communicator. Collective; waits for this rank's queued calls; a second call does nothing.
    pub fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
