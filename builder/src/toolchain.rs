//! Finds a rustc that can compile device code.
//!
//! Invariant: a toolchain that this file hands out is recent enough and carries Rust's library
//! sources of its own version. Order: `PEERLANE_DEVICE_RUSTC`, the active toolchain, the system's
//! `/usr/bin/rustc` (on Debian: rustc-web with rust-web-src). The first is the user's word, so a
//! fault there is an error; the others are tried in silence and their faults are kept for later.

use crate::BuildError;
use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

/// The environment variable that names the rustc for device code.
pub const RUSTC_VARIABLE: &str = "PEERLANE_DEVICE_RUSTC";

/// The oldest minor version of Rust 1 whose flags and PTX are known to be right.
const OLDEST_MINOR: u32 = 95;

/// What a compiler may see of this process's environment.
///
/// Everything else is dropped. Cargo gives a build script RUSTFLAGS, TARGET, CARGO_CFG_*, wrappers
/// and an LD_LIBRARY_PATH into its own toolchain: all of the host, all wrong for the device. What
/// stays is what a rustup proxy needs to pick the active toolchain.
const KEPT: [&str; 10] = [
    "PATH",
    "HOME",
    "USERPROFILE",
    "SystemRoot",
    "TMPDIR",
    "TEMP",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "RUSTUP_AUTO_INSTALL",
    "CARGO_HOME",
];

/// Where to look for a device toolchain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// The user's choice; nothing else is tried where it is set.
    pub named: Option<OsString>,
    /// Tried in this order where no choice was made.
    pub candidates: Vec<OsString>,
}

impl Search {
    /// The order of docs/building.md, from this process's environment.
    pub fn from_env() -> Search {
        let active = env::var_os("RUSTC").filter(|value| !value.is_empty());
        Search {
            named: env::var_os(RUSTC_VARIABLE).filter(|value| !value.is_empty()),
            candidates: vec![active.unwrap_or_else(|| "rustc".into()), "/usr/bin/rustc".into()],
        }
    }

    /// Looks nowhere: only prebuilt PTX is left.
    pub fn nowhere() -> Search {
        Search { named: None, candidates: Vec::new() }
    }

    /// The first usable toolchain, or each candidate with what is wrong with it.
    pub(crate) fn find(&self) -> Result<Result<Toolchain, Vec<String>>, BuildError> {
        if let Some(named) = &self.named {
            return match Toolchain::probe(named) {
                Ok(toolchain) => Ok(Ok(toolchain)),
                Err(reason) => Err(BuildError::NamedToolchain {
                    rustc: named.to_string_lossy().into_owned(),
                    reason,
                }),
            };
        }
        let mut tried = Vec::new();
        for candidate in &self.candidates {
            match Toolchain::probe(candidate) {
                Ok(toolchain) => return Ok(Ok(toolchain)),
                Err(reason) => tried.push(format!("{}: {reason}", candidate.to_string_lossy())),
            }
        }
        Ok(Err(tried))
    }
}

/// A rustc with its library sources.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    /// How to start it.
    pub(crate) rustc: OsString,
    /// `rustc 1.96.0 (ac68faa20 2026-05-25)`.
    pub(crate) version: String,
    /// Everything `rustc -vV` says: two toolchains that differ here share no cached file.
    pub(crate) identity: String,
    /// The folder that holds `core/src/lib.rs`.
    pub(crate) library: PathBuf,
}

impl Toolchain {
    /// The toolchain behind `rustc`, or what is wrong with it.
    pub(crate) fn probe(rustc: &OsStr) -> Result<Toolchain, String> {
        let identity = ask(rustc, &["-vV"])?;
        let version = identity.lines().next().unwrap_or_default().to_owned();
        match minor_version(&version) {
            None => return Err(format!("`{version}` is no version of rustc 1")),
            Some(minor) if minor < OLDEST_MINOR => {
                return Err(format!("{version} is older than 1.{OLDEST_MINOR}"));
            }
            Some(_) => {}
        }
        let sysroot = ask(rustc, &["--print", "sysroot"])?;
        let library = PathBuf::from(sysroot.trim()).join("lib/rustlib/src/rust/library");
        if !library.join("core/src/lib.rs").is_file() {
            return Err(format!("no Rust library sources (rust-src) in {}", library.display()));
        }
        Ok(Toolchain { rustc: rustc.to_owned(), version, identity, library })
    }

    /// A command that runs this rustc in an environment of its own.
    pub(crate) fn command(&self) -> Command {
        clean_command(&self.rustc)
    }
}

/// A rustc command that sees only [`KEPT`], with unstable features allowed.
fn clean_command(rustc: &OsStr) -> Command {
    let mut command = Command::new(rustc);
    command.env_clear().env("RUSTC_BOOTSTRAP", "1");
    for name in KEPT {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// What rustc prints for `arguments`, or why it prints nothing.
fn ask(rustc: &OsStr, arguments: &[&str]) -> Result<String, String> {
    let output = clean_command(rustc)
        .args(arguments)
        .output()
        .map_err(|error| format!("it does not start ({error})"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let first = stderr.lines().next().unwrap_or("it says nothing");
        return Err(format!("`rustc {}` fails: {first}", arguments.join(" ")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The 96 of `rustc 1.96.0 (...)`.
fn minor_version(version: &str) -> Option<u32> {
    let number = version.strip_prefix("rustc 1.")?;
    number.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(minor_version("rustc 1.96.0 (ac68faa20 2026-05-25)"), Some(96));
        assert_eq!(minor_version("rustc 1.97.0-nightly (x)"), Some(97));
        assert_eq!(minor_version("gcc 12"), None);
    }

    #[test]
    fn a_named_toolchain_that_does_not_start_is_an_error_that_says_so() {
        let search = Search { named: Some("/no/such/rustc".into()), ..Search::from_env() };
        let message = search.find().expect_err("nothing is there").to_string();
        assert!(message.contains("PEERLANE_DEVICE_RUSTC is /no/such/rustc"), "{message}");
        assert!(message.contains("does not start"), "{message}");
    }

    #[test]
    fn candidates_that_fail_are_remembered_with_their_reasons() {
        let candidates = vec!["/no/such/rustc".into(), "true".into()];
        let tried = Search { named: None, candidates }
            .find()
            .expect("no candidate is the user's word")
            .expect_err("none of them is a rustc");
        assert!(tried[0].starts_with("/no/such/rustc: it does not start"), "{tried:?}");
        assert!(tried[1].contains("is no version of rustc 1"), "{tried:?}");
    }

    #[test]
    fn host_flags_do_not_reach_the_device_compiler() {
        let command = clean_command(OsStr::new("rustc"));
        let names: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        assert!(
            names
                .iter()
                .all(|name| name == "RUSTC_BOOTSTRAP" || KEPT.iter().any(|kept| name == kept))
        );
    }
}
