//! Runs rustc: first over `core`, then over the device crate.
//!
//! Invariant: the PTX depends on the sources, the toolchain and the flags in this file, on nothing
//! else. No linker and no cargo take part. `core` is compiled to metadata that holds the code of
//! every function (`-Zalways-encode-mir`), so rustc generates what the kernels use into the
//! kernels' own module, and `--emit=asm` is the PTX.

use crate::scratch::Scratch;
use crate::toolchain::Toolchain;
use crate::{Arch, BuildError, Flavor};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Flags of every compilation.
///
/// - JumpThreading duplicates barriers into divergent branches (rust-lang/rust#137086).
/// - A panic becomes an inline `trap`, without the formatting code and its calls.
pub(crate) const FLAGS: [&str; 6] = [
    "--target=nvptx64-nvidia-cuda",
    "--crate-type=lib",
    "-Copt-level=3",
    "-Zunstable-options",
    "-Cpanic=immediate-abort",
    "-Zmir-enable-passes=-JumpThreading",
];

/// More flags for `core`, which is none of our code to warn about.
const CORE_FLAGS: [&str; 4] =
    ["--cap-lints=allow", "--emit=metadata", "-Zalways-encode-mir", "-Zforce-unstable-if-unmarked"];

/// More flags for the device crate. One codegen unit: a kernel and all it calls are one module.
/// LLVM's intrinsics are internal to rustc, and the only right way to a barrier.
pub(crate) const DEVICE_FLAGS: [&str; 5] = [
    "--edition=2024",
    "--crate-name=device",
    "-Ainternal_features",
    "-Ccodegen-units=1",
    "--emit=asm",
];

/// What LLVM would call from this crate it expands itself for this target, so nothing is in it.
const COMPILER_BUILTINS: &str =
    "#![feature(compiler_builtins, no_core)]\n#![compiler_builtins]\n#![no_core]\n";

/// Compiles the crate whose root is `root` and returns the PTX with rustc's warnings.
pub(crate) fn device(
    toolchain: &Toolchain,
    cache: &Path,
    (arch, flavor): (Arch, Flavor),
    root: &Path,
) -> Result<(String, String), BuildError> {
    let sysroot = sysroot(toolchain, cache, arch)?;
    let mut command = toolchain.command();
    command.args(FLAGS).args(DEVICE_FLAGS).arg(target_cpu(arch)).arg("--sysroot").arg(sysroot);
    command.args(flavor.feature().map(|feature| format!("--cfg=feature=\"{feature}\"")));
    let scratch = Scratch::new(cache)?;
    let output = scratch.file("device.ptx");
    command.arg(root).arg("-o").arg(&output);
    let warnings = run(toolchain, &mut command, "the device crate", arch)?;
    let ptx = fs::read_to_string(&output).map_err(BuildError::io("read", &output))?;
    Ok((ptx, warnings))
}

/// The folder with the compiled `core` for `arch`; compiles it where the cache has none.
fn sysroot(toolchain: &Toolchain, cache: &Path, arch: Arch) -> Result<PathBuf, BuildError> {
    let finished = cache.join(format!("sysroot-{arch}-{}", sysroot_key(toolchain)));
    fs::create_dir_all(cache).map_err(BuildError::io("create", cache))?;
    // Cargo may run two builds at once (an editor's check, a release build): the second waits.
    let lock_path = finished.with_extension("lock");
    let lock = File::create(&lock_path).map_err(BuildError::io("create", &lock_path))?;
    lock.lock().map_err(BuildError::io("lock", &lock_path))?;
    if finished.is_dir() {
        return Ok(finished);
    }
    // A build that is stopped half-way leaves only this folder, which is not looked at.
    let unfinished = finished.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(BuildError::io("remove", &unfinished))?;
    }
    compile_core(toolchain, &unfinished, arch)?;
    fs::rename(&unfinished, &finished).map_err(BuildError::io("write", &finished))?;
    Ok(finished)
}

/// Compiles `core` and an empty `compiler_builtins` into a new sysroot.
fn compile_core(toolchain: &Toolchain, sysroot: &Path, arch: Arch) -> Result<(), BuildError> {
    let lib = sysroot.join("lib/rustlib/nvptx64-nvidia-cuda/lib");
    fs::create_dir_all(&lib).map_err(BuildError::io("create", &lib))?;
    let stub = sysroot.join("compiler_builtins.rs");
    fs::write(&stub, COMPILER_BUILTINS).map_err(BuildError::io("write", &stub))?;
    let core = toolchain.library.join("core/src/lib.rs");
    for (name, edition, root) in
        [("core", "2024", core.as_path()), ("compiler_builtins", "2021", stub.as_path())]
    {
        let mut command = toolchain.command();
        command.args(FLAGS).args(CORE_FLAGS).arg(target_cpu(arch));
        command.args(["--crate-name", name, "--edition", edition]);
        command.arg("--out-dir").arg(&lib).arg("--sysroot").arg(sysroot).arg(root);
        run(toolchain, &mut command, name, arch)?;
    }
    Ok(())
}

/// Names the toolchain and the flags that a sysroot was made with.
fn sysroot_key(toolchain: &Toolchain) -> String {
    let mut hash = Sha256::new();
    hash.update(&toolchain.identity);
    hash.update(toolchain.library.as_os_str().as_encoded_bytes());
    for flag in FLAGS.iter().chain(&CORE_FLAGS) {
        hash.update(flag);
        hash.update([0]);
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Without it rustc compiles for the oldest GPU that LLVM knows.
fn target_cpu(arch: Arch) -> String {
    format!("-Ctarget-cpu={arch}")
}

/// Runs rustc and returns its warnings.
fn run(
    toolchain: &Toolchain,
    command: &mut Command,
    what: &str,
    arch: Arch,
) -> Result<String, BuildError> {
    let output = command.output().map_err(BuildError::io("start", Path::new(&toolchain.rustc)))?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let rustc = format!("{} ({})", toolchain.rustc.to_string_lossy(), toolchain.version);
        return Err(BuildError::Compile { rustc, what: what.to_owned(), arch, stderr });
    }
    Ok(stderr)
}
