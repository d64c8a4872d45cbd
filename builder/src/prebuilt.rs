//! PTX that is checked in, for machines without a device toolchain.
//!
//! Invariant: prebuilt PTX is used only where it was made from exactly the sources and flags that
//! are here. The hash covers every file under `src/`, so a changed comment makes it stale too: a
//! rule that needs no judgement.

use crate::compile::{DEVICE_FLAGS, FLAGS};
use crate::{BuildError, text};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// The hash of the device crate's sources and of what the builder does with them.
pub(crate) fn hash_sources(device: &Path) -> Result<String, BuildError> {
    let src = device.join("src");
    let mut files = Vec::new();
    collect(&src, &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(&file).map_err(BuildError::io("read", &file))?;
        let name = file.strip_prefix(&src).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        // Lengths keep the end of one file from counting as the start of the next.
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    for flag in FLAGS.iter().chain(&DEVICE_FLAGS) {
        hash.update(flag);
    }
    hash.update(text::launch_bound());
    Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// All files under `folder`.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), BuildError> {
    for entry in fs::read_dir(folder).map_err(BuildError::io("read", folder))? {
        let path = entry.map_err(BuildError::io("read", folder))?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The prebuilt PTX in the file at `path`, made from `sources`. `tried` says why it is needed.
pub(crate) fn load(path: &Path, sources: &str, tried: &[String]) -> Result<String, BuildError> {
    let path = path.to_path_buf();
    if !path.is_file() {
        return Err(BuildError::NoToolchain { tried: tried.to_vec(), prebuilt: Some(path) });
    }
    let ptx = fs::read_to_string(&path).map_err(BuildError::io("read", &path))?;
    let found = text::sources_of(&ptx).unwrap_or("(no hash in the first line)");
    if found != sources {
        return Err(BuildError::StalePrebuilt {
            found: found.to_owned(),
            expected: sources.to_owned(),
            tried: tried.to_vec(),
            path,
        });
    }
    Ok(ptx)
}
