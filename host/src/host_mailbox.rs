//! A rank's mailbox in host memory, for the peers that cannot write into its GPU.
//!
//! Invariant: it has the layout of a mailbox in GPU memory and is as empty at first. Ranks of one
//! process share one allocation, which every GPU maps. Processes share a file without a name, sealed
//! so that nobody can shrink it, and each pins its own mapping: no process waits for another to let
//! go.

use crate::error::{Error, Result};
use crate::gpu::{GpuRef, HostMemory};
use crate::rendezvous::PAGE;
use crate::sealed;
use peerlane_device::abi::{CONTROL_BYTES, FREE, Layout};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::OwnedFd;
use std::ptr::null_mut;

/// A host mailbox, as this process has it.
pub(crate) struct HostMailbox {
    gpu: GpuRef,
    pub(crate) memory: HostMemory,
    /// The mapping and its file, if processes share it.
    shared: Option<(Mapping, OwnedFd)>,
}

impl HostMailbox {
    /// The mailbox of a rank on `gpu`, for peers of this process.
    pub(crate) fn new(gpu: &GpuRef, layout: Layout, world: u32, first: u32) -> Result<HostMailbox> {
        let memory = gpu.alloc_host(bytes(layout, world))?;
        let mailbox = HostMailbox { gpu: gpu.clone(), memory, shared: None };
        mailbox.empty(layout, first);
        Ok(mailbox)
    }

    /// The mailbox of a rank on `gpu`, which is a process of its own.
    pub(crate) fn create(
        gpu: &GpuRef,
        layout: Layout,
        world: u32,
        first: u32,
    ) -> Result<HostMailbox> {
        let file = sealed_file(bytes(layout, world))?;
        let mailbox = HostMailbox::pin(gpu, file, bytes(layout, world))?;
        mailbox.empty(layout, first);
        Ok(mailbox)
    }

    /// Another process's mailbox, for a rank on `gpu` to write to.
    pub(crate) fn open(
        gpu: &GpuRef,
        layout: Layout,
        world: u32,
        file: OwnedFd,
    ) -> Result<HostMailbox> {
        let bytes = bytes(layout, world);
        sealed::check(&file, bytes).map_err(unsupported)?;
        HostMailbox::pin(gpu, file, bytes)
    }

    /// Maps the file and pins what is mapped.
    fn pin(gpu: &GpuRef, file: OwnedFd, bytes: usize) -> Result<HostMailbox> {
        let mapping = Mapping::of(&file, bytes)?;
        // SAFETY: whole pages, mapped until `drop` has unregistered them.
        let memory = unsafe { gpu.register_host(mapping.base, bytes)? };
        Ok(HostMailbox { gpu: gpu.clone(), memory, shared: Some((mapping, file)) })
    }

    /// The file once more, for the other processes.
    pub(crate) fn file(&self) -> Result<Option<OwnedFd>> {
        let file = self.shared.as_ref().map(|(_, file)| file.try_clone());
        file.transpose().map_err(|error| unsupported(error.to_string()))
    }

    /// Makes all slots free and lets all counters begin at `first`. Only while nobody else uses it.
    pub(crate) fn empty(&self, layout: Layout, first: u32) {
        let (counters, slots) = (layout.words(0) as usize, layout.first_slot as usize);
        let base = self.memory.host;
        let words = first.to_ne_bytes().repeat((slots - counters) / 4);
        // SAFETY: all inside the memory, which nobody else uses meanwhile.
        unsafe {
            base.write_bytes(0, counters);
            base.add(counters).copy_from_nonoverlapping(words.as_ptr(), words.len());
            base.add(slots).write_bytes(FREE as u8, self.memory.bytes - slots);
        }
    }

    /// Takes back what a failed probe has left in the control block. Only while no kernel runs.
    pub(crate) fn forget_failures(&self) {
        // SAFETY: inside the memory; no kernel of any rank runs.
        unsafe { self.memory.host.write_bytes(0, CONTROL_BYTES) };
    }
}

impl Drop for HostMailbox {
    fn drop(&mut self) {
        // Failing to free cannot be reported from here, and there is nothing else to do about it.
        // SAFETY: who drops it has waited for this process's kernels; other processes' kernels have
        // mappings of their own. The mapping is dropped after this.
        let _ = unsafe {
            match self.shared {
                None => self.gpu.free_host(self.memory),
                Some(_) => self.gpu.unregister_host(self.memory),
            }
        };
    }
}

/// A file mapped for reading and writing.
struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: it is an address, not an access.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &OwnedFd, bytes: usize) -> Result<Mapping> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so no mapping is replaced.
        let base = unsafe { mmap(null_mut(), bytes, access, MapFlags::SHARED, file, 0) };
        let base =
            base.map_err(|error| unsupported(format!("cannot map {bytes} bytes: {error}")))?;
        Ok(Mapping { base: base.cast(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of` with this size; the mailbox that held it is gone.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// Pinned memory is a whole number of pages.
fn bytes(layout: Layout, world: u32) -> usize {
    layout.mailbox_bytes(world).next_multiple_of(PAGE)
}

/// A file of `bytes` bytes that keeps its size, without a name.
fn sealed_file(bytes: usize) -> Result<OwnedFd> {
    sealed::create("peerlane mailbox", bytes).map_err(|error| {
        unsupported(format!("cannot make a memory file of {bytes} bytes: {error}"))
    })
}

fn unsupported(reason: String) -> Error {
    Error::Unsupported { op: "host mailbox", reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::sim;
    use peerlane_device::abi::lane_words;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn gpus() -> Vec<GpuRef> {
        sim::devices(&sim::Config { devices: 2, ..Default::default() })
    }

    fn layout() -> Layout {
        Layout::new(2, 4, 64).unwrap()
    }

    /// A word of a mailbox.
    fn word(mailbox: &HostMailbox, offset: u32) -> u32 {
        assert!(offset as usize + 4 <= mailbox.memory.bytes);
        // SAFETY: inside the memory, and nobody writes to it.
        unsafe { mailbox.memory.host.add(offset as usize).cast::<u32>().read() }
    }

    #[test]
    fn both_kinds_are_empty_at_first() {
        let (gpu, layout) = (&gpus()[0], layout());
        let kinds = [HostMailbox::new(gpu, layout, 3, 7), HostMailbox::create(gpu, layout, 3, 7)];
        for mailbox in kinds.map(Result::unwrap) {
            assert_eq!([word(&mailbox, 0), word(&mailbox, layout.words(0) - 4)], [0, 0]);
            assert_eq!(word(&mailbox, layout.words(1) + lane_words::SEALED as u32), 7);
            assert_eq!(word(&mailbox, layout.first_slot - 4), 7);
            assert_eq!(word(&mailbox, layout.first_slot), FREE);
            assert_eq!(word(&mailbox, layout.mailbox_bytes(3) as u32 - 4), FREE);
        }
    }

    #[test]
    fn processes_see_what_either_writes() {
        let (gpus, layout) = (gpus(), layout());
        let own = HostMailbox::create(&gpus[0], layout, 2, 0).unwrap();
        let file = own.file().unwrap().unwrap();
        let theirs = HostMailbox::open(&gpus[1], layout, 2, file).unwrap();
        // SAFETY: inside the memory, and no kernel runs.
        unsafe { theirs.memory.host.cast::<u32>().write(9) };
        assert_eq!(word(&own, 0), 9);
        own.forget_failures();
        assert_eq!(word(&theirs, 0), 0);
    }

    #[test]
    fn files_that_are_no_mailbox_are_refused() {
        let (gpus, layout) = (gpus(), layout());
        let refused = |file| match HostMailbox::open(&gpus[1], layout, 2, file) {
            Err(Error::Unsupported { reason, .. }) => {
                assert!(reason.contains("sealed"), "{reason}")
            }
            _ => panic!("it was taken"),
        };
        refused(sealed_file(bytes(layout, 2) + PAGE).unwrap());
        let unsealed = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&unsealed, bytes(layout, 2) as u64).unwrap();
        refused(unsealed);
    }
}
