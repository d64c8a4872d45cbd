//! Peerlane on registered tensors as a contender: every rank's output, in which it computes.
//!
//! Invariant: the outputs outlive the communicators, which map them.

use super::job::Job;
use super::rank::{Contender, Fail};
use peerlane::gpu::{DevicePtr, Stream};
use peerlane::{AllReduceRegistered, Communicator, Registration};

/// One rank of a communicator, and its output.
pub(crate) struct Registered {
    communicator: Communicator,
    registration: Registration,
}

impl Registered {
    /// All ranks of a communicator, with `bytes` bytes of output each.
    ///
    /// # Safety
    /// The outputs outlive what is returned.
    pub(crate) unsafe fn all(
        mut communicators: Vec<Communicator>,
        outputs: &[DevicePtr],
        bytes: usize,
    ) -> peerlane::Result<Vec<Registered>> {
        let tensors: Vec<_> = outputs.iter().map(|output| (*output, bytes)).collect();
        let mut ranks: Vec<_> = communicators.iter_mut().collect();
        // SAFETY: passed on to the caller.
        let registrations = unsafe { Communicator::register_all(&mut ranks, &tensors)? };
        let pairs = communicators.into_iter().zip(registrations);
        let ranks = pairs
            .map(|(communicator, registration)| Registered { communicator, registration })
            .collect();
        Ok(ranks)
    }
}

impl Contender for Registered {
    unsafe fn call(
        &mut self,
        job: &Job,
        _src: DevicePtr,
        _dst: DevicePtr,
        stream: Stream,
    ) -> Result<(), Fail> {
        let Job { dtype, wire, reduce: op, count, .. } = *job;
        let call = AllReduceRegistered { op, wire, ..AllReduceRegistered::new(count, dtype) };
        // SAFETY: the caller vouches for the output, which is what is registered.
        unsafe { self.communicator.all_reduce_registered(&self.registration, &call, stream)? };
        Ok(())
    }

    fn health(&self) -> Result<(), Fail> {
        Ok(self.communicator.health()?)
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        "peerlane"
    }

    fn is_in_place(&self) -> bool {
        true
    }
}
