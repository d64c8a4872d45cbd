//! Memory files that keep their size: what processes share, and map, must not shrink under them.
//!
//! Invariant: a file that [`check`] lets pass has the size that was expected and can never have another, whoever
//! holds it: a page that was there when it was mapped is there as long as it is mapped.

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use std::os::fd::{AsFd, OwnedFd};

/// A file of `bytes` zeros, without a name in any file system.
pub(crate) fn create(name: &str, bytes: usize) -> rustix::io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes as u64)?;
    fcntl_add_seals(&file, seals())?;
    Ok(file)
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
