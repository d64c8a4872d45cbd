//! Embeds the kernels: writes kernels_sm_75.ptx, kernels_sm_80.ptx, kernels_sm_90.ptx and
//! kernels_sm_75_checked.ptx to OUT_DIR.
//! Gives libpeerlane.so its name, and its place in memory for good.
//!
//! Invariant: what lands in OUT_DIR has passed every check of the builder. docs/building.md says
//! which toolchain compiles it.

use peerlane_builder::{BuildError, CudaBuilder, Flavor, Report};
use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let folder = |name| env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let builder = CudaBuilder::new(folder("CARGO_MANIFEST_DIR").join("../device"));
    println!("cargo::rerun-if-changed=build.rs");
    for line in builder.rerun_lines() {
        println!("{line}");
    }
    // Without a name in the library, programs linked to it by path would look for that path only.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libpeerlane.so");
    // Simulated machines and the driver have threads that would outlive a dlclose.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    let build = |flavor| builder.clone().flavor(flavor).build_all(&folder("OUT_DIR"), "kernels_");
    let reports: Result<Vec<_>, BuildError> = Flavor::SHIPPED.into_iter().map(build).collect();
    match reports {
        Ok(reports) => {
            let reports: Vec<Report> = reports.into_iter().flatten().collect();
            for line in Report::warnings(&reports).into_iter().flat_map(str::lines) {
                println!("cargo::warning={line}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}
