//! One rank's device memory, with a guard before and after every tensor.
//!
//! Invariant: memory is allocated and freed between cases only, never while kernels wait for each
//! other: the driver's allocator may wait for the device, and so for a kernel whose peer has not
//! been launched yet.

use super::round::Tensor;
use peerlane::Result;
use peerlane::gpu::{DevicePtr, GpuRef, Stream};

/// Bytes of a guard.
const GUARD: usize = 256;
/// What guards hold.
const MARK: u8 = 0x5c;

/// A tensor's place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    base: DevicePtr,
    shift: usize,
    bytes: usize,
}

impl Region {
    /// The tensor's first byte.
    pub(crate) const fn data(self) -> DevicePtr {
        self.base.offset(GUARD + self.shift)
    }

    const fn total(self) -> usize {
        GUARD + self.shift + self.bytes + GUARD
    }
}

/// A rank's memory, handed out piece by piece and taken back as a whole.
pub(crate) struct Arena {
    gpu: GpuRef,
    base: DevicePtr,
    bytes: usize,
    used: usize,
}

impl Arena {
    /// An arena without memory; [`Arena::reserve`] gets some.
    pub(crate) fn new(gpu: GpuRef) -> Arena {
        Arena { gpu, base: DevicePtr(0), bytes: 0, used: 0 }
    }

    /// Forgets all regions and makes sure that tensors of these sizes and shifts fit.
    ///
    /// # Safety
    /// No queued work uses the arena's memory.
    pub(crate) unsafe fn reserve(
        &mut self,
        tensors: impl Iterator<Item = (usize, usize)>,
    ) -> Result<()> {
        let region = |(bytes, shift)| Region { base: self.base, shift, bytes }.total();
        let needed: usize = tensors.map(|tensor| region(tensor).next_multiple_of(GUARD)).sum();
        self.used = 0;
        if needed > self.bytes {
            // SAFETY: the caller says that the memory is idle.
            unsafe { self.release() };
            self.base = self.gpu.alloc(needed)?;
            self.bytes = needed;
        }
        Ok(())
    }

    /// The place of the next tensor.
    pub(crate) fn place(&mut self, tensor: &Tensor) -> Region {
        let (base, shift) = (self.base.offset(self.used), tensor.shift);
        let region = Region { base, shift, bytes: tensor.before.len() };
        self.used += region.total().next_multiple_of(GUARD);
        assert!(self.used <= self.bytes, "more tensors than were reserved");
        region
    }

    /// All that has been given out.
    pub(crate) const fn given(&self) -> (DevicePtr, usize) {
        (self.base, self.used)
    }

    /// Queues writing a tensor and its guards.
    pub(crate) fn upload(&self, region: Region, tensor: &Tensor, stream: Stream) -> Result<()> {
        let mut image = vec![MARK; region.total()];
        let start = GUARD + region.shift;
        image[start..start + region.bytes].copy_from_slice(&tensor.before);
        // SAFETY: `place` gave out `total` bytes at `base`.
        unsafe { self.gpu.upload(region.base, &image, stream) }
    }

    /// Waits for the stream and reads a tensor; the second value says which byte around it was
    /// overwritten, if one was.
    pub(crate) fn download(
        &self,
        region: Region,
        stream: Stream,
    ) -> Result<(Vec<u8>, Option<String>)> {
        let mut image = vec![0; region.total()];
        // SAFETY: `place` gave out `total` bytes at `base`.
        unsafe { self.gpu.download(&mut image, region.base, stream)? };
        let start = GUARD + region.shift;
        let damaged = |at: &usize| image[*at] != MARK;
        let damage = if let Some(at) = (0..start).rev().find(damaged) {
            Some(format!("the byte {} before the tensor was overwritten", start - at))
        } else {
            let end = start + region.bytes;
            let after = (end..image.len()).find(damaged);
            after.map(|at| format!("the byte {} after the tensor was overwritten", at - end + 1))
        };
        Ok((image[start..start + region.bytes].to_vec(), damage))
    }

    /// # Safety
    /// No queued work uses the arena's memory.
    unsafe fn release(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the caller says that the memory is idle. A failure leaks it, which is harmless
            // in a program about to end or to fail its next allocation.
            let _ = unsafe { self.gpu.free(self.base) };
            self.bytes = 0;
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: a rank waits for its stream before it drops its arena.
        unsafe { self.release() };
    }
}
