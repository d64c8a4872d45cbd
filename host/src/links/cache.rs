//! What is found out once per machine and outlives the process: one JSON file per set of GPUs and kind of
//! finding (measured links, tuning tables, self-tests) in the user's cache.
//!
//! Invariant: a file is believed only if it is the user's own and says in full what was asked for: the
//! same GPUs in the same order and slots, the same driver, the same Peerlane. Anything else in its
//! place is left out of account with a reason, and the next measurement replaces it. Readers see
//! an old file or a new one, never half of one.

use super::Measurement;
use crate::error::clipped;
use crate::gpu::{Backend, GpuRef};
use peerlane_device::abi::ABI_VERSION;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fmt::Debug;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The environment variable that names the cache directory in place of the user's.
pub const CACHE_VARIABLE: &str = "PEERLANE_CACHE_DIR";

/// What measurements of links are called.
pub(crate) const LINKS: &str = "links";
/// No measurement of 16 GPUs is larger than a fraction of this.
const MOST_BYTES: u64 = 4 << 20;

/// What a measurement holds for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// UUID and PCI address of every GPU, in order.
    gpus: Vec<(String, String)>,
    driver: String,
    peerlane: String,
    abi: u32,
}

impl Key {
    /// The key for `gpus` under a version of the driver. None for simulated GPUs: what such a
    /// machine is like does not follow from its identity.
    pub fn of(gpus: &[GpuRef], driver: &str) -> Option<Key> {
        if gpus.iter().any(|gpu| gpu.backend() == Backend::Sim) {
            return None;
        }
        let identity = |gpu: &GpuRef| {
            let properties = gpu.properties();
            (properties.uuid.clone(), properties.pci_bus_id.clone())
        };
        Some(Key::new(gpus.iter().map(identity).collect(), driver))
    }

    pub(crate) fn new(gpus: Vec<(String, String)>, driver: &str) -> Key {
        let (driver, peerlane) = (driver.to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        Key { gpus, driver, peerlane, abi: ABI_VERSION }
    }

    /// The key of simulated GPUs, for a file that is given by name. Nothing in the cache is found by it.
    pub fn simulated(gpus: Vec<(String, String)>) -> Key {
        Key::new(gpus, "simulated")
    }

    /// Number of GPUs, with each as often as it was named.
    pub fn ranks(&self) -> usize {
        self.gpus.len()
    }

    /// The first part in which `other` is different: what it says, and what this one says.
    pub fn differs(&self, other: &Key) -> Option<(String, String)> {
        let version = |key: &Key| format!("Peerlane {} (interface {})", key.peerlane, key.abi);
        let driver = |key: &Key| format!("driver {}", key.driver);
        let gpus = |key: &Key| {
            let names = key.gpus.iter().map(|(uuid, address)| format!("{uuid} at {address}"));
            format!("{} GPUs ({})", key.gpus.len(), names.collect::<Vec<_>>().join(", "))
        };
        let parts: [&dyn Fn(&Key) -> String; 3] = [&version, &driver, &gpus];
        let pairs = parts.into_iter().map(|part| (part(other), part(self)));
        pairs.into_iter().find(|(theirs, ours)| theirs != ours)
    }

    /// The name of its file: the key is in the file too, so a collision costs a measurement only.
    fn file_name(&self, kind: &str) -> String {
        format!("{kind}-{}.json", fingerprint(self))
    }
}

/// What tells values apart by all that they say: 128 bits in hexadecimal.
pub(crate) fn fingerprint(value: &impl Debug) -> String {
    let hash = Sha256::digest(format!("{value:?}"));
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// What a file holds.
#[derive(Serialize, Deserialize)]
struct Entry<T> {
    key: Key,
    value: T,
}

/// A directory of findings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// A cache in this directory, which need not exist.
    pub fn at(directory: impl Into<PathBuf>) -> Cache {
        Cache { directory: directory.into() }
    }

    /// The user's cache: `$PEERLANE_CACHE_DIR`, `$XDG_CACHE_HOME/peerlane` or `~/.cache/peerlane`.
    ///
    /// # Errors
    /// The environment names none; what to say about it.
    pub fn of_user() -> Result<Cache, String> {
        Cache::of(|variable| std::env::var_os(variable))
    }

    fn of(environment: impl Fn(&str) -> Option<OsString>) -> Result<Cache, String> {
        if let Some(directory) = environment(CACHE_VARIABLE).filter(|value| !value.is_empty()) {
            return Ok(Cache::at(directory));
        }
        // Relative paths are to be ignored, says the XDG specification.
        let absolute = |variable| {
            environment(variable).map(PathBuf::from).filter(|directory| directory.is_absolute())
        };
        let caches =
            absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        let none = format!("no cache: neither {CACHE_VARIABLE} nor XDG_CACHE_HOME nor HOME is set");
        caches.map(|caches| Cache::at(caches.join("peerlane"))).ok_or(none)
    }

    /// Where the measurement for `key` is kept.
    pub fn file(&self, key: &Key) -> PathBuf {
        self.file_of(LINKS, key)
    }

    /// Where what is of `kind` is kept for `key`.
    pub(crate) fn file_of(&self, kind: &str, key: &Key) -> PathBuf {
        self.directory.join(key.file_name(kind))
    }

    /// Whether there is anything of `kind` for whatever GPUs.
    pub(crate) fn holds(&self, kind: &str) -> bool {
        let Ok(files) = fs::read_dir(&self.directory) else { return false };
        files.flatten().any(|file| {
            let name = file.file_name();
            let name = name.to_string_lossy();
            name.starts_with(&format!("{kind}-")) && name.ends_with(".json")
        })
    }

    /// The measurement for `key`, if there is one.
    ///
    /// # Errors
    /// There is a file that cannot be believed: what is wrong with it.
    pub fn load(&self, key: &Key) -> Result<Option<Measurement>, String> {
        let sound = |measurement: &Measurement| measurement.is_sound(key.gpus.len() as u32);
        let expected = ("a measurement", "a figure or a reason for every pair of GPUs");
        self.load_kind(LINKS, key, expected, sound)
    }

    /// Keeps a measurement for `key`, in place of what was there.
    ///
    /// # Errors
    /// It cannot be written: why.
    pub fn store(&self, key: &Key, measurement: &Measurement) -> Result<(), String> {
        self.store_kind(LINKS, key, measurement)
    }

    /// What of `kind` is kept for `key`, if it is `sound`. `expected` says what it is, and what makes it sound.
    pub(crate) fn load_kind<T: DeserializeOwned>(
        &self,
        kind: &str,
        key: &Key,
        expected: (&str, &str),
        sound: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, String> {
        let path = self.file_of(kind, key);
        let ignored =
            |reason: String| format!("cache: {} is ignored: {}", path.display(), clipped(&reason));
        let text = match read_file(&path, true) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ignored(error.to_string())),
        };
        let entry: Entry<T> = serde_json::from_str(&text)
            .map_err(|error| ignored(format!("expected {}, got {error}", expected.0)))?;
        if entry.key != *key {
            return Err(ignored(format!("expected {key:?}, got {:?}", entry.key)));
        }
        if !sound(&entry.value) {
            return Err(ignored(format!("expected {}", expected.1)));
        }
        Ok(Some(entry.value))
    }

    /// Keeps what is of `kind` for `key`, in place of what was there.
    pub(crate) fn store_kind<T: Serialize>(
        &self,
        kind: &str,
        key: &Key,
        value: &T,
    ) -> Result<(), String> {
        let path = self.file_of(kind, key);
        let written = serde_json::to_string_pretty(&Entry { key: key.clone(), value })
            .map_err(io::Error::from)
            .and_then(|text| replace_file(&path, &text));
        written.map_err(|error| format!("cache: cannot write {}: {error}", path.display()))
    }
}

/// Writes a file beside `path` and gives it that name once it is whole.
pub(crate) fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    static FILES: AtomicU32 = AtomicU32::new(0);
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let aside = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&aside);
    }
    written
}

/// The text of a file; of one that the user owns, if it was not the user who named it.
pub(crate) fn read_file(path: &Path, own: bool) -> io::Result<String> {
    // A pipe in its place must not make anybody wait.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    if own && about.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("it is not a file of this user"));
    }
    if own && about.mode() & 0o022 != 0 {
        return Err(io::Error::other("other users may write to it"));
    }
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn environment(set: &[(&str, &str)]) -> Result<Cache, String> {
        let find = |name: &str| set.iter().find(|(key, _)| *key == name);
        Cache::of(|name| find(name).map(|(_, value)| OsString::from(value)))
    }

    #[test]
    fn the_environment_names_the_directory() {
        let home = ("HOME", "/home/u");
        let directory = |set: &[(&str, &str)]| environment(set).unwrap().directory;
        assert_eq!(directory(&[home]), Path::new("/home/u/.cache/peerlane"));
        assert_eq!(directory(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/peerlane"));
        let own = (CACHE_VARIABLE, "own");
        assert_eq!(directory(&[home, ("XDG_CACHE_HOME", "/x"), own]), Path::new("own"));
        let relative = [home, ("XDG_CACHE_HOME", "x"), (CACHE_VARIABLE, "")];
        assert_eq!(directory(&relative), Path::new("/home/u/.cache/peerlane"));
        for none in [&[][..], &[("HOME", "")], &[("XDG_CACHE_HOME", "relative")]] {
            assert!(environment(none).unwrap_err().contains("no cache"));
        }
    }

    #[test]
    fn every_part_of_the_key_names_another_file() {
        let gpu = |n: u32| (format!("GPU-{n}"), format!("0000:{n:02x}:00.0"));
        let key = Key::new(vec![gpu(0), gpu(1)], "580.1");
        let mut others = vec![
            Key::new(vec![gpu(1), gpu(0)], "580.1"),
            Key::new(vec![gpu(0)], "580.1"),
            Key::new(vec![gpu(0), gpu(1)], "580.2"),
            Key { peerlane: "9.9".into(), ..key.clone() },
            Key { abi: ABI_VERSION + 1, ..key.clone() },
            Key { gpus: vec![gpu(0), ("GPU-1".into(), "0000:ff:00.0".into())], ..key.clone() },
        ];
        assert_eq!(key.file_name(LINKS), key.clone().file_name(LINKS));
        others.push(key);
        let names: std::collections::BTreeSet<_> =
            others.iter().map(|key| key.file_name(LINKS)).collect();
        assert_eq!(names.len(), others.len());
    }

    #[test]
    fn what_others_may_write_or_nobody_can_read_is_left_out_of_account() {
        let directory = std::env::temp_dir().join(format!("peerlane-mode-{}", std::process::id()));
        let cache = Cache::at(&directory);
        let key = Key::new(vec![("GPU-0".into(), "0000:00:00.0".into())], "580.1");
        fs::create_dir_all(&directory).unwrap();
        let path = cache.file(&key);
        fs::write(&path, "{}").unwrap();
        for mode in [0o666, 0o620, 0o602] {
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let reason = cache.load(&key).unwrap_err();
            assert!(reason.contains("other users may write to it"), "{mode:o}: {reason}");
        }
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(cache.load(&key).unwrap_err().contains("expected a measurement"));
        fs::remove_file(&path).unwrap();
        // A pipe that nobody writes to: opening it must not wait.
        let fifo = rustix::fs::FileType::Fifo;
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
        assert!(cache.load(&key).unwrap_err().contains("it is not a file"));
        fs::remove_dir_all(&directory).unwrap();
    }
}
