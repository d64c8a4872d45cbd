//! Everything that can go wrong in a build.
//!
//! Invariant: each message says what happened, to which file or kernel, and what to do next. It is
//! all that a user sees when `cargo build` stops.

use crate::Arch;
use crate::verify::Finding;
use std::io;
use std::path::{Path, PathBuf};

/// Why there is no PTX.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The folder has no `src/lib.rs`.
    #[error("{} is not a device crate: it has no src/lib.rs", .0.display())]
    NotADeviceCrate(PathBuf),

    /// `PEERLANE_DEVICE_RUSTC` names something that cannot compile device code.
    #[error(
        "PEERLANE_DEVICE_RUSTC is {rustc}, which cannot compile device code: {reason}\n\
         help: point it at a rustc that has Rust's library sources, or unset it"
    )]
    NamedToolchain {
        /// The variable's value.
        rustc: String,
        /// What is wrong with it.
        reason: String,
    },

    /// No toolchain, and no prebuilt PTX either.
    #[error(
        "no toolchain can compile device code, and there is no prebuilt PTX{}{}\n\
         help: run `rustup component add rust-src`, or on Debian `apt install rustc-web rust-web-src`, \
         or set PEERLANE_DEVICE_RUSTC",
        .prebuilt.as_ref().map(|path| format!(" at {}", path.display())).unwrap_or_default(),
        bullets(.tried)
    )]
    NoToolchain {
        /// Each candidate with what is wrong with it.
        tried: Vec<String>,
        /// Where prebuilt PTX was expected; none if the caller wanted none.
        prebuilt: Option<PathBuf>,
    },

    /// The prebuilt PTX came from other sources than the ones that are here.
    #[error(
        "the prebuilt {} is stale: it was built from sources {found}, these are {expected}{}\n\
         help: install a device toolchain (`rustup component add rust-src`, or on Debian \
         `apt install rustc-web rust-web-src`) and build again; if you changed the device crate, also \
         run `cargo run -p peerlane-builder -- update` and commit device/ptx",
        .path.display(), bullets(.tried)
    )]
    StalePrebuilt {
        /// The prebuilt file.
        path: PathBuf,
        /// The hash in its first line.
        found: String,
        /// The hash of the sources that are here.
        expected: String,
        /// Why the prebuilt file was needed: each toolchain with what is wrong with it.
        tried: Vec<String>,
    },

    /// rustc refused.
    #[error("{rustc} could not compile {what} for {arch}:\n{stderr}")]
    Compile {
        /// The compiler.
        rustc: String,
        /// `core`, or the device crate.
        what: String,
        /// The variant.
        arch: Arch,
        /// What rustc said.
        stderr: String,
    },

    /// The PTX breaks a rule.
    #[error(
        "the PTX for {arch} breaks the rules of docs/building.md:{}",
        bullets(&.findings.iter().map(Finding::to_string).collect::<Vec<_>>())
    )]
    Verification {
        /// The variant.
        arch: Arch,
        /// Each kernel with what is wrong with it.
        findings: Vec<Finding>,
    },

    /// More than one variant failed.
    #[error("{}", .0.iter().map(BuildError::to_string).collect::<Vec<_>>().join("\n"))]
    Variants(Vec<BuildError>),

    /// ptxas refused.
    #[error("{} refused the PTX for {arch}:\n{output}", .ptxas.display())]
    Ptxas {
        /// The assembler.
        ptxas: PathBuf,
        /// The variant.
        arch: Arch,
        /// What it said.
        output: String,
    },

    /// `PEERLANE_PTXAS` names something that does not run.
    #[error("PEERLANE_PTXAS is {}, which does not run: {reason}", .path.display())]
    NamedPtxas {
        /// The variable's value.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The caller wanted ptxas's verdict and there is no ptxas.
    #[error(
        "ptxas is on neither PATH nor CUDA_HOME, and python3 has no nvidia wheel that holds it\n\
         help: `pip install nvidia-cuda-nvcc`, or set PEERLANE_PTXAS"
    )]
    NoPtxas,

    /// A file could not be read or written, or a program not be started.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl BuildError {
    /// For `map_err`: an [`BuildError::Io`] about `path`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
        let path = path.to_path_buf();
        move |source| BuildError::Io { action, path, source }
    }
}

/// The lines as an indented list, each on a line of its own.
fn bullets(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  - {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_toolchain_names_every_candidate_and_a_way_out() {
        let tried = vec!["rustc: no rust-src".to_owned(), "/usr/bin/rustc: not there".to_owned()];
        let message = BuildError::NoToolchain { tried, prebuilt: None }.to_string();
        assert!(message.contains("\n  - rustc: no rust-src\n  - /usr/bin/rustc: not there\n"));
        assert!(message.contains("rustup component add rust-src"));
    }
}
