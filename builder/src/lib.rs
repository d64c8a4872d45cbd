//! Compiles the device crate to PTX and checks what came out.
//!
//! Invariant: no PTX leaves this crate unverified, whether it was compiled a moment ago or checked
//! in ([`verify`] says what is checked). The face follows rust-cuda's `cuda_builder`:
//!
//! ```no_run
//! use peerlane_builder::{Arch, CudaBuilder};
//!
//! let report = CudaBuilder::new("../device").arch(Arch::Sm80).copy_to("kernels.ptx").build()?;
//! for kernel in &report.kernels {
//!     println!("{} {:?} registers", kernel.symbol, kernel.registers);
//! }
//! # Ok::<(), peerlane_builder::BuildError>(())
//! ```
//!
//! docs/building.md is the manual: toolchains, environment variables, what a failed check means.

mod builder;
mod compile;
mod error;
mod prebuilt;
mod ptx;
mod ptxas;
mod scratch;
mod text;
mod toolchain;
mod verdict;
pub mod verify;

pub use builder::{CudaBuilder, KernelReport, Origin, Report};
pub use error::BuildError;
pub use ptxas::{PTXAS_VARIABLE, Ptxas};
pub use toolchain::{RUSTC_VARIABLE, Search};
pub use verify::{Defect, Expected, Finding};

use std::fmt;

/// A GPU generation that device code is compiled for.
///
/// A GPU runs the variant with the highest number that is not above its own compute capability;
/// the driver translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Turing and later: the oldest that the current CUDA tools accept.
    Sm75,
    /// Ampere and later: bf16 conversion in one instruction.
    Sm80,
    /// Hopper and later.
    Sm90,
}

impl Arch {
    /// Every variant that Peerlane ships, oldest first.
    pub const ALL: [Arch; 3] = [Arch::Sm75, Arch::Sm80, Arch::Sm90];

    /// The name that rustc, ptxas and file names use.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Sm75 => "sm_75",
            Arch::Sm80 => "sm_80",
            Arch::Sm90 => "sm_90",
        }
    }

    /// The compute capability, as major and minor.
    pub const fn capability(self) -> (u32, u32) {
        match self {
            Arch::Sm75 => (7, 5),
            Arch::Sm80 => (8, 0),
            Arch::Sm90 => (9, 0),
        }
    }
}

/// What the kernels are compiled to do beside their work: a feature of the device crate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavor {
    /// Nothing.
    #[default]
    Plain,
    /// Ranks compare what they call and checksums of what travelled. For the oldest GPUs only, whose PTX
    /// runs on all: these kernels are for finding faults, and each variant takes 3 MB.
    Checked,
    /// Waits have no deadline, so that what deadlines cost can be measured. Not shipped.
    Unbounded,
}

impl Flavor {
    /// What Peerlane ships.
    pub const SHIPPED: [Flavor; 2] = [Flavor::Plain, Flavor::Checked];
    /// All of them.
    pub const ALL: [Flavor; 3] = [Flavor::Plain, Flavor::Checked, Flavor::Unbounded];

    /// The variants that it is compiled for.
    pub const fn archs(self) -> &'static [Arch] {
        match self {
            Flavor::Plain | Flavor::Unbounded => &Arch::ALL,
            Flavor::Checked => &[Arch::Sm75],
        }
    }

    /// The device crate's feature.
    pub const fn feature(self) -> Option<&'static str> {
        match self {
            Flavor::Plain => None,
            Flavor::Checked => Some("checked"),
            Flavor::Unbounded => Some("unbounded"),
        }
    }

    /// The name of the file for `arch`.
    pub fn file_name(self, prefix: &str, arch: Arch) -> String {
        let feature = self.feature().map(|feature| format!("_{feature}")).unwrap_or_default();
        format!("{prefix}{arch}{feature}.ptx")
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_capabilities_agree() {
        for arch in Arch::ALL {
            let (major, minor) = arch.capability();
            assert_eq!(arch.name(), format!("sm_{major}{minor}"));
        }
        assert!(Arch::ALL.is_sorted());
    }
}
