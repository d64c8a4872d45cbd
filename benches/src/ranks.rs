//! Ranks to call collectives on: a communicator, a stream and tensors each.
//!
//! Invariant: every collective is called with the same sizes on every rank, so the ranks may be
//! driven in turn by one thread or each by its own.

use peerlane::gpu::{DevicePtr, GpuRef, Stream};
use peerlane::{
    AllGather, AllReduce, Broadcast, Communicator, Config, DType, Gather, Operation, ReduceOp,
    ReduceScatter, Result, Wire,
};

/// A collective, for tables of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// bf16, summed in place.
    AllReduce,
    /// bf16, summed.
    ReduceScatter,
    /// Every rank to every rank.
    AllGather,
    /// From rank 0.
    Broadcast,
    /// To rank 0, every rank bringing two rows.
    Gather,
    /// No data.
    Barrier,
}

impl Collective {
    /// All of them.
    pub const ALL: [Collective; 6] = [
        Collective::AllReduce,
        Collective::ReduceScatter,
        Collective::AllGather,
        Collective::Broadcast,
        Collective::Gather,
        Collective::Barrier,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Collective::AllReduce => Operation::AllReduce,
            Collective::ReduceScatter => Operation::ReduceScatter,
            Collective::AllGather => Operation::AllGather,
            Collective::Broadcast => Operation::Broadcast,
            Collective::Gather => Operation::Gather,
            Collective::Barrier => Operation::Barrier,
        }
        .name()
    }
}

/// One rank and what its calls need.
pub struct Rank {
    communicator: Communicator,
    gpu: GpuRef,
    /// The stream of the calls, and one to change to.
    streams: [Stream; 2],
    src: DevicePtr,
    dst: DevicePtr,
    bytes: usize,
    widths: Vec<usize>,
}

impl Rank {
    /// Makes a rank on each of `gpus` for messages of `bytes` bytes, a multiple of 4.
    pub fn connect(gpus: &[GpuRef], config: &Config, bytes: usize) -> Result<Vec<Rank>> {
        let communicators = Communicator::connect(gpus, config)?;
        communicators.into_iter().map(|communicator| Rank::new(communicator, bytes)).collect()
    }

    fn new(communicator: Communicator, bytes: usize) -> Result<Rank> {
        let gpu = communicator.gpu().clone();
        let world = communicator.world_size() as usize;
        let streams = [gpu.stream_create()?, gpu.stream_create()?];
        let (src, dst) = (gpu.alloc(bytes * world)?, gpu.alloc(bytes * world)?);
        for tensor in [src, dst] {
            // SAFETY: the tensor has this size.
            unsafe { gpu.fill(tensor, 0, bytes * world, streams[0])? };
        }
        gpu.stream_synchronize(streams[0])?;
        Ok(Rank { communicator, gpu, streams, src, dst, bytes, widths: vec![bytes / 2; world] })
    }

    /// The rank's GPU.
    pub fn gpu(&self) -> &GpuRef {
        &self.gpu
    }

    /// The stream that [`Rank::call`] uses.
    pub fn stream(&self) -> Stream {
        self.streams[0]
    }

    /// Queues one call.
    #[inline]
    pub fn call(&mut self, collective: Collective) -> Result<()> {
        self.call_on(0, collective)
    }

    /// Queues one call on the rank's first or second stream.
    #[inline]
    pub fn call_on(&mut self, stream: usize, collective: Collective) -> Result<()> {
        let stream = self.streams[stream];
        let (src, dst, bytes) = (self.src, self.dst, self.bytes);
        let (count, dtype) = (bytes / DType::Bf16.bytes(), DType::Bf16);
        let (op, wire) = (ReduceOp::Sum, Wire::Native);
        let communicator = &mut self.communicator;
        // SAFETY: both tensors hold `world` messages, are this rank's alone, and live until `drop`
        // has closed the communicator, which waits for its calls. So does the stream.
        unsafe {
            match collective {
                Collective::AllReduce => {
                    communicator.all_reduce(&AllReduce::in_place(dst, count, dtype), stream)
                }
                Collective::ReduceScatter => {
                    let contribution = true;
                    let call = ReduceScatter { src, dst, count, dtype, op, wire, contribution };
                    communicator.reduce_scatter(&call, stream)
                }
                Collective::AllGather => {
                    communicator.all_gather(&AllGather { src, dst, bytes }, stream)
                }
                Collective::Broadcast => {
                    communicator.broadcast(&Broadcast::new(dst, bytes, 0), stream)
                }
                Collective::Gather => {
                    let call = Gather { src, dst, rows: 2, widths: &self.widths, root: 0 };
                    communicator.gather(&call, stream)
                }
                Collective::Barrier => communicator.barrier(stream),
            }
        }
    }

    /// Queues an all-reduce beside the rank's first stream, which then waits for it.
    pub fn call_beside(&mut self) -> Result<()> {
        let (dst, stream) = (self.dst, self.streams[0]);
        let call = AllReduce::in_place(dst, self.bytes / DType::Bf16.bytes(), DType::Bf16);
        // SAFETY: as for `call_on`.
        unsafe { self.communicator.all_reduce_async(&call, stream)? }.wait_on(stream)
    }

    /// Waits for this rank's calls and says whether they went well.
    pub fn finish(&self) -> Result<()> {
        self.streams.iter().try_for_each(|stream| self.gpu.stream_synchronize(*stream))?;
        self.communicator.health()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Nothing can be reported from here, and a bench is over anyway.
        let _ = self.communicator.close();
        // SAFETY: the communicator is closed, so no queued work uses the tensors.
        let _ = unsafe { self.gpu.free(self.src).and(self.gpu.free(self.dst)) };
        for stream in self.streams {
            // SAFETY: made in `new` and not used again.
            let _ = unsafe { self.gpu.stream_destroy(stream) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::null_gpu::NullGpu;

    #[test]
    fn every_call_launches_one_kernel() {
        let gpus = NullGpu::several(3);
        let mut ranks = Rank::connect(&NullGpu::refs(&gpus), &Config::default(), 4096).unwrap();
        for (calls, collective) in Collective::ALL.into_iter().enumerate() {
            ranks.iter_mut().try_for_each(|rank| rank.call(collective)).unwrap();
            for gpu in &gpus {
                assert_eq!(gpu.launches(), calls as u64 + 1, "{}", collective.name());
            }
        }
    }
}
