//! Embeds the kernels: writes kernels_sm_75.ptx, kernels_sm_80.ptx and kernels_sm_90.ptx to OUT_DIR.
//!
//! Invariant: what lands in OUT_DIR has passed every check of the builder. docs/building.md says
//! which toolchain compiles it.

use peerlane_builder::{CudaBuilder, Report};
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
    match builder.build_all(&folder("OUT_DIR"), "kernels_") {
        Ok(reports) => {
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
