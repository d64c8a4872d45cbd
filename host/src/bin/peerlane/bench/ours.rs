//! Peerlane itself as a contender.
//!
//! Invariant: it calls the public interface and nothing below it.

use super::job::Job;
use super::rank::{Contender, Fail};
use peerlane::gpu::{DevicePtr, Stream};
use peerlane::{
    Algorithm, AllGather, AllReduce, Broadcast, Communicator, Gather, Operation, ReduceScatter,
    Route,
};

/// One rank of a communicator.
pub(crate) struct Ours(pub(crate) Communicator);

impl Contender for Ours {
    unsafe fn call(
        &mut self,
        job: &Job,
        src: DevicePtr,
        dst: DevicePtr,
        stream: Stream,
    ) -> Result<(), Fail> {
        let Job { dtype, wire, reduce: op, algorithm, route, root, count, .. } = *job;
        let (contribution, bytes) = (true, job.part_bytes());
        // SAFETY: the caller vouches for both buffers.
        unsafe {
            match job.op {
                Operation::AllReduce => {
                    let call =
                        AllReduce { src, dst, count, dtype, op, wire, contribution, algorithm };
                    self.0.all_reduce(&call, stream)?;
                }
                Operation::ReduceScatter => {
                    let call = ReduceScatter { src, dst, count, dtype, op, wire, contribution };
                    self.0.reduce_scatter(&call, stream)?;
                }
                Operation::AllGather => {
                    self.0.all_gather(&AllGather { src, dst, bytes }, stream)?;
                }
                Operation::Broadcast => {
                    let call = Broadcast { route, ..Broadcast::new(dst, bytes, root) };
                    self.0.broadcast(&call, stream)?;
                }
                Operation::Gather => {
                    let widths = &vec![bytes; job.world as usize][..];
                    self.0.gather(&Gather { src, dst, rows: 1, widths, root }, stream)?;
                }
                _ => self.0.barrier(stream)?,
            }
        }
        Ok(())
    }

    fn health(&self) -> Result<(), Fail> {
        Ok(self.0.health()?)
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        "peerlane"
    }

    fn algorithm(&self, job: &Job) -> Option<Algorithm> {
        let Job { dtype, wire, algorithm, count, .. } = *job;
        let call = AllReduce { wire, algorithm, ..AllReduce::in_place(DevicePtr(0), count, dtype) };
        Some(self.0.algorithm_for(&call))
    }

    fn route(&self, job: &Job) -> Option<Route> {
        let Job { route, root, .. } = *job;
        let call = Broadcast { route, ..Broadcast::new(DevicePtr(0), job.part_bytes(), root) };
        Some(self.0.route_for(&call))
    }
}
