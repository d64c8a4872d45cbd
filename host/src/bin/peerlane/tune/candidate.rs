//! What competes: every algorithm and every route that is one kernel. Copies are asked for by name: no table
//! may name them (`choice/table.rs`).
//!
//! Invariant: all candidates of a rank are calls of one communicator, which differ in nothing but the
//! algorithm or route that they name.

use crate::bench::job::Job;
use crate::bench::rank::{Contender, Fail};
use peerlane::gpu::{DevicePtr, Stream};
use peerlane::{Algorithm, AllReduce, Broadcast, Communicator, Operation, Route};
use std::sync::{Arc, Mutex, PoisonError};

/// One way to carry out one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    AllReduce(Algorithm),
    Broadcast(Route),
}

impl Way {
    /// Every way, in the order in which contenders are numbered.
    pub(super) fn all() -> Vec<Way> {
        let reductions = Algorithm::FUSED.into_iter().map(Way::AllReduce);
        reductions.chain(Route::FUSED.into_iter().map(Way::Broadcast)).collect()
    }

    pub(super) fn operation(self) -> Operation {
        match self {
            Way::AllReduce(_) => Operation::AllReduce,
            Way::Broadcast(_) => Operation::Broadcast,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Way::AllReduce(algorithm) => algorithm.name(),
            Way::Broadcast(route) => route.name(),
        }
    }
}

/// A rank's communicator, called one way.
pub(super) struct Candidate {
    pub(super) communicator: Arc<Mutex<Communicator>>,
    pub(super) way: Way,
}

impl Contender for Candidate {
    unsafe fn call(
        &mut self,
        job: &Job,
        src: DevicePtr,
        dst: DevicePtr,
        stream: Stream,
    ) -> Result<(), Fail> {
        let mut rank = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller vouches for both buffers.
        unsafe {
            match self.way {
                Way::AllReduce(algorithm) => {
                    let call = AllReduce {
                        src,
                        op: job.reduce,
                        wire: job.wire,
                        algorithm: Some(algorithm),
                        ..AllReduce::in_place(dst, job.count, job.dtype)
                    };
                    rank.all_reduce(&call, stream)?;
                }
                Way::Broadcast(route) => {
                    let route = Some(route);
                    let call =
                        Broadcast { route, ..Broadcast::new(dst, job.part_bytes(), job.root) };
                    rank.broadcast(&call, stream)?;
                }
            }
        }
        Ok(())
    }

    fn health(&self) -> Result<(), Fail> {
        Ok(self.communicator.lock().unwrap_or_else(PoisonError::into_inner).health()?)
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        self.way.name()
    }

    fn algorithm(&self, _job: &Job) -> Option<Algorithm> {
        match self.way {
            Way::AllReduce(algorithm) => Some(algorithm),
            Way::Broadcast(_) => None,
        }
    }
}
