//! What a run does: operations of each rank, in the order in which they are queued.
//!
//! Invariant: a list that is recorded does not change, and a run of it allocates nothing.

use super::Worker;
use crate::error::Result;
use crate::gpu::{DevicePtr, HostMemory, Stream};
use crate::request::{AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
use std::fmt;
use std::sync::Arc;

type Function = dyn Fn(&mut Worker) -> Result<()> + Send + Sync;

/// Something that a rank's thread does or queues on the rank's stream.
#[derive(Clone)]
pub enum Operation {
    /// Copies from pinned host memory, which the GPU reads when the stream comes to it.
    Upload {
        /// Where to.
        dst: DevicePtr,
        /// What, of [`Gpu::alloc_host`](crate::gpu::Gpu::alloc_host) or `register_host`.
        src: HostMemory,
        /// Bytes, from the first on.
        bytes: usize,
    },
    /// Copies within the GPU, or from it to a peer that it reaches.
    Copy {
        /// Where to.
        dst: DevicePtr,
        /// From where.
        src: DevicePtr,
        /// How much.
        bytes: usize,
    },
    /// [`Communicator::all_reduce`](crate::Communicator::all_reduce).
    AllReduce(AllReduce),
    /// [`Communicator::reduce_scatter`](crate::Communicator::reduce_scatter).
    ReduceScatter(ReduceScatter),
    /// [`Communicator::all_gather`](crate::Communicator::all_gather).
    AllGather(AllGather),
    /// [`Communicator::broadcast`](crate::Communicator::broadcast).
    Broadcast(Broadcast),
    /// [`Communicator::gather`](crate::Communicator::gather).
    Gather {
        /// This rank's rows.
        src: DevicePtr,
        /// The joined tensor, on the root.
        dst: DevicePtr,
        /// Rows in every tensor.
        rows: usize,
        /// Bytes per row that each rank of the group brings.
        widths: Arc<[usize]>,
        /// The rank that receives.
        root: u32,
    },
    /// [`Communicator::barrier`](crate::Communicator::barrier).
    Barrier,
    /// Whatever else: launches of other kernels on the worker's stream, say. It runs on the rank's thread when everything before it has been
    /// queued, not done.
    Callback(Arc<Function>),
}

impl Operation {
    /// A [`Operation::Callback`].
    pub fn callback(
        action: impl Fn(&mut Worker) -> Result<()> + Send + Sync + 'static,
    ) -> Operation {
        Operation::Callback(Arc::new(action))
    }

    /// # Safety
    /// As [`Workers::run`](super::Workers::run).
    unsafe fn queue(&self, worker: &mut Worker) -> Result<()> {
        let stream: Stream = worker.stream;
        let rank = &mut worker.rank;
        // SAFETY: passed on to the caller, all of them.
        unsafe {
            match self {
                Operation::Upload { dst, src, bytes } => {
                    let (gpu, bytes, most) = (rank.gpu(), *bytes, src.bytes);
                    if bytes > most {
                        let expected = format!("at most {most}, which src has");
                        return Err(super::invalid("upload", "bytes", expected, bytes.to_string()));
                    }
                    gpu.copy(*dst, src.device, bytes, stream)
                }
                Operation::Copy { dst, src, bytes } => rank.gpu().copy(*dst, *src, *bytes, stream),
                Operation::AllReduce(call) => rank.all_reduce(call, stream),
                Operation::ReduceScatter(call) => rank.reduce_scatter(call, stream),
                Operation::AllGather(call) => rank.all_gather(call, stream),
                Operation::Broadcast(call) => rank.broadcast(call, stream),
                Operation::Gather { src, dst, rows, widths, root } => {
                    let (src, dst, rows, root) = (*src, *dst, *rows, *root);
                    rank.gather(&Gather { src, dst, rows, widths, root }, stream)
                }
                Operation::Barrier => rank.barrier(stream),
                Operation::Callback(action) => action(worker),
            }
        }
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operation::Upload { bytes, .. } => write!(f, "Upload of {bytes} bytes"),
            Operation::Copy { bytes, .. } => write!(f, "Copy of {bytes} bytes"),
            Operation::AllReduce(call) => call.fmt(f),
            Operation::ReduceScatter(call) => call.fmt(f),
            Operation::AllGather(call) => call.fmt(f),
            Operation::Broadcast(call) => call.fmt(f),
            Operation::Gather { rows, widths, root, .. } => {
                write!(f, "Gather of {rows} rows of {widths:?} to {root}")
            }
            Operation::Barrier => f.write_str("Barrier"),
            Operation::Callback(_) => f.write_str("Callback"),
        }
    }
}

/// A list while it is recorded.
#[derive(Clone, Debug)]
pub struct List {
    ranks: Vec<Vec<Operation>>,
}

impl List {
    /// An empty list for so many ranks.
    pub fn new(world_size: u32) -> List {
        List { ranks: vec![Vec::new(); world_size as usize] }
    }

    /// Adds an operation to every rank, by its index.
    pub fn on_all(&mut self, mut operation: impl FnMut(u32) -> Operation) -> &mut List {
        for (index, operations) in (0..).zip(&mut self.ranks) {
            operations.push(operation(index));
        }
        self
    }

    /// Adds an operation to one rank.
    ///
    /// # Errors
    /// There is no such rank.
    pub fn on(&mut self, index: u32, operation: Operation) -> Result<&mut List> {
        let world = self.ranks.len();
        let Some(operations) = self.ranks.get_mut(index as usize) else {
            let expected = format!("below {world}");
            return Err(super::invalid("list", "index", expected, index.to_string()));
        };
        operations.push(operation);
        Ok(self)
    }

    /// The list as it can be run.
    pub fn finish(self) -> Recorded {
        Recorded { ranks: self.ranks.into() }
    }
}

/// A list that can be run, as often as wanted. Clones are one list.
#[derive(Clone, Debug)]
pub struct Recorded {
    ranks: Arc<[Vec<Operation>]>,
}

impl Recorded {
    /// How many ranks it is for.
    pub fn world_size(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// How many operations a rank has; 0 if there is no such rank.
    pub fn len(&self, index: u32) -> usize {
        self.ranks.get(index as usize).map_or(0, Vec::len)
    }

    /// Whether no rank has any.
    pub fn is_empty(&self) -> bool {
        self.ranks.iter().all(Vec::is_empty)
    }

    /// # Safety
    /// As [`Workers::run`](super::Workers::run).
    pub(super) unsafe fn run(&self, index: u32, worker: &mut Worker) -> Result<()> {
        for operation in &self.ranks[index as usize] {
            // SAFETY: passed on to the caller.
            unsafe { operation.queue(worker)? };
        }
        Ok(())
    }
}
