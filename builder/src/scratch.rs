//! Folders for files that live as long as one call.
//!
//! Invariant: no two calls share one, in this process or in another. rustc names its intermediate
//! files after the crate alone, so the three variants must not meet in one folder.

use crate::BuildError;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

/// A folder that is removed with everything in it when it goes out of scope.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A new folder under `cache`.
    pub(crate) fn new(cache: &Path) -> Result<Scratch, BuildError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = cache.join(format!("scratch-{}-{number}", process::id()));
        fs::create_dir_all(&folder).map_err(BuildError::io("create", &folder))?;
        Ok(Scratch(folder))
    }

    /// The path of a file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed lies in cargo's target folder and goes with it.
        let _ = fs::remove_dir_all(&self.0);
    }
}
