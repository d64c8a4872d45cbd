//! Memory files that keep their size: what processes share, and map, must not shrink under them. Also how they are mapped, and how
//! a process opens one that another has.
//!
//! Invariant: a file that [`check`] lets pass has the size that was expected and can never have another, whoever
//! holds it: a page that was there when it was mapped is there as long as it is mapped.

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, fallocate};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A file of `bytes` zeros, without a name in any file system.
pub(crate) fn create(name: &str, bytes: usize) -> rustix::io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes as u64)?;
    fcntl_add_seals(&file, seals())?;
    Ok(file)
}

/// Gives `file` its pages: now, where having none is an error, and not when they are written to, where it would be a signal.
pub(crate) fn back(file: &OwnedFd, bytes: usize) -> Result<(), String> {
    // In pieces: a signal that is handled interrupts the call, which would begin anew each time.
    const PIECE: usize = 64 << 20;
    for at in (0..bytes).step_by(PIECE) {
        let (at, piece) = (at as u64, PIECE.min(bytes - at) as u64);
        rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::empty(), at, piece))
            .map_err(|error| format!("{bytes} bytes of shared memory: {error}"))?;
    }
    Ok(())
}

/// Opens what process `pid` has open as `descriptor`, if it is a file of this user.
pub(crate) fn open_of(pid: u32, descriptor: u32) -> Result<OwnedFd, String> {
    let path = format!("/proc/{pid}/fd/{descriptor}");
    let user = rustix::process::geteuid().as_raw();
    // Before it is opened, which may do something if it is a device.
    let found = rustix::fs::stat(path.as_str()).map_err(|error| format!("{path}: {error}"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || found.st_uid != user {
        return Err(format!("expected a memory file of user {user}, got something else"));
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(path.as_str(), flags, Mode::empty())
        .map_err(|error| format!("{path}: {error}"))
}

/// The size of a sealed file of this user.
pub(crate) fn size_of(file: &OwnedFd) -> Result<usize, String> {
    let found = fstat(file).map_err(|error| error.to_string())?;
    let user = rustix::process::geteuid().as_raw();
    if found.st_uid != user {
        return Err(format!("expected a file of user {user}, got one of user {}", found.st_uid));
    }
    let bytes = usize::try_from(found.st_size).unwrap_or_default();
    check(file, bytes).map(|()| bytes)
}

/// A file, mapped for reading and writing.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it gives out atomics and addresses; who follows an address answers for that.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first `bytes` bytes of `file`, which it has and keeps.
    pub(crate) fn new(file: &OwnedFd, bytes: usize) -> Result<Mapping, String> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses where; nothing is there.
        let base = unsafe { mmap(null_mut(), bytes, access, MapFlags::SHARED, file, 0) };
        let base = base.map_err(|error| error.to_string())?;
        let base = NonNull::new(base.cast()).ok_or("no memory")?;
        Ok(Mapping { base, bytes })
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of the byte at `offset`, or the end.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes, "a place in the mapping");
        // SAFETY: inside the mapping, or at its end.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// The word at `offset`, which is a multiple of 8. What other processes share is reached in no other way.
    pub(crate) fn wide(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.bytes, "a word of the mapping");
        // SAFETY: inside the mapping, which is as old as `self`, aligned, and accessed as an atomic by every process.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    /// As `wide`, of half the size.
    pub(crate) fn narrow(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "half a word of the mapping");
        // SAFETY: as in `wide`.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; whoever holds a reference into it holds the mapping.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// That `file`, which somebody else has made, keeps the size `bytes`; says what is wrong with it.
pub(crate) fn check(file: &impl AsFd, bytes: usize) -> Result<(), String> {
    let size = fstat(file).map_err(|error| error.to_string())?.st_size;
    // What is no memory file has no seals.
    let found = fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    if usize::try_from(size) != Ok(bytes) || !found.contains(seals()) {
        let kind = if found.contains(seals()) { "a sealed" } else { "an unsealed" };
        return Err(format!(
            "expected a sealed file of {bytes} bytes from another rank, got {kind} one of {size} bytes"
        ));
    }
    Ok(())
}

/// Neither smaller nor larger, nor ever otherwise.
fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn a_sealed_file_keeps_its_size() {
        let file = create("test", 8192).unwrap();
        assert_eq!(check(&file, 8192), Ok(()));
        for bytes in [0, 4096, 16384] {
            assert_eq!(ftruncate(&file, bytes), Err(Errno::PERM));
        }
        assert_eq!(check(&file, 8192), Ok(()));
    }

    #[test]
    fn other_files_are_refused() {
        let partly = |seals| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = memfd_create("test", flags).unwrap();
            ftruncate(&file, 4096).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            check(&file, 4096).unwrap_err()
        };
        let short = check(&create("test", 4096).unwrap(), 8192).unwrap_err();
        assert!(short.contains("8192") && short.contains("a sealed one of 4096"), "{short}");
        let unsealed = [
            SealFlags::empty(),
            SealFlags::SHRINK,
            SealFlags::GROW | SealFlags::SEAL,
            SealFlags::SHRINK | SealFlags::GROW,
        ];
        for reason in unsealed.map(partly) {
            assert!(reason.contains("an unsealed one of 4096"), "{reason}");
        }
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let size = file.metadata().unwrap().len() as usize;
        assert!(check(&file, size).unwrap_err().contains("unsealed"));
    }
}
