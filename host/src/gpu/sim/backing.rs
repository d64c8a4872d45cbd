//! What simulated memory is made of: the heap, a file that other processes map too, or memory that
//! somebody else owns.
//!
//! Invariant: a file is as long as the memory for ever: it is sealed before anybody else learns of
//! it, and one without the seal is not mapped. Else a process could end another with `SIGBUS`.

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::io;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::alloc::{Layout, alloc, dealloc};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::null_mut;

/// What every allocation is aligned to, at least.
const ALIGNMENT: usize = 256;

/// A range of memory; dropping it gives back what was taken for it.
pub(super) struct Backing {
    pub(super) base: u64,
    pub(super) bytes: usize,
    kind: Kind,
}

enum Kind {
    Heap(Layout),
    /// Mapped; with the file where this world made it.
    File(Option<OwnedFd>),
    Borrowed,
}

impl Backing {
    /// Memory of this process only; `None` if the machine that simulates has none left.
    pub(super) fn heap(bytes: usize, value: u8) -> Option<Backing> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok().filter(|l| l.size() > 0)?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return None;
        }
        // SAFETY: `memory` points to `bytes` fresh bytes.
        unsafe { memory.write_bytes(value, bytes) };
        Some(Backing { base: memory as u64, bytes, kind: Kind::Heap(layout) })
    }

    /// Memory that other processes can map.
    pub(super) fn file(bytes: usize, value: u8) -> io::Result<Backing> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("peerlane simulated memory", flags)?;
        ftruncate(&file, bytes as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let base = map(&file, bytes)?;
        // SAFETY: `bytes` fresh bytes are mapped there, and nobody else knows of them.
        unsafe { (base as *mut u8).write_bytes(value, bytes) };
        Ok(Backing { base, bytes, kind: Kind::File(Some(file)) })
    }

    /// What another world made with [`Backing::file`], or what is wrong with the file.
    pub(super) fn import(file: &OwnedFd, bytes: usize) -> Result<Backing, String> {
        match fcntl_get_seals(file) {
            Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
            _ => return Err("a file that no simulated GPU exported".into()),
        }
        let size = fstat(file).map_err(|error| error.to_string())?.st_size;
        if usize::try_from(size) != Ok(bytes) || bytes == 0 {
            return Err(format!("a file of {size} bytes"));
        }
        let base = map(file, bytes)
            .map_err(|error| format!("a file that cannot be mapped here: {error}"))?;
        Ok(Backing { base, bytes, kind: Kind::File(None) })
    }

    /// Memory that somebody else owns.
    pub(super) fn borrowed(base: u64, bytes: usize) -> Backing {
        Backing { base, bytes, kind: Kind::Borrowed }
    }

    /// The file, if this world made the memory with one.
    pub(super) fn exportable(&self) -> Option<&OwnedFd> {
        match &self.kind {
            Kind::File(file) => file.as_ref(),
            _ => None,
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        match self.kind {
            // SAFETY: `base` came from `alloc` with this layout and is freed here only.
            Kind::Heap(layout) => unsafe { dealloc(self.base as *mut u8, layout) },
            Kind::File(_) => {
                // SAFETY: `base` came from `map` with this size and is unmapped here only. That
                // cannot fail for such a range.
                let _ = unsafe { munmap(self.base as *mut _, self.bytes) };
            }
            Kind::Borrowed => {}
        }
    }
}

/// Maps the first `bytes` bytes of a file, for reading and writing, wherever there is room.
fn map(file: impl AsFd, bytes: usize) -> io::Result<u64> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the place, so no mapping is replaced.
    let base = unsafe { mmap(null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
    Ok(base as u64)
}
