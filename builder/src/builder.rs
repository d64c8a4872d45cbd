//! [`CudaBuilder`]: from a device crate to verified PTX.
//!
//! Invariant: `build` writes its file last, so a file that is there has passed every check.

use crate::ptxas::{Assembled, Ptxas};
use crate::toolchain::{RUSTC_VARIABLE, Search, Toolchain};
use crate::verdict::{Inputs, Passed, Verdict};
use crate::{Arch, BuildError, Defect, Expected, Finding, Flavor, PTXAS_VARIABLE};
use crate::{compile, prebuilt, text, verify};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{env, fs, thread};

/// Compiles a device crate to PTX.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    device: PathBuf,
    arch: Arch,
    flavor: Flavor,
    copy_to: Option<PathBuf>,
    cache: Option<PathBuf>,
    search: Search,
    prebuilt: Option<PathBuf>,
    require_ptxas: bool,
    expected: Vec<Expected>,
}

/// Where PTX comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Compiled in this build, by the rustc of this version.
    Compiled(String),
    /// Checked in; compiled by the rustc of this version.
    Prebuilt(String),
}

/// What one kernel turned out to need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelReport {
    /// Its symbol.
    pub symbol: String,
    /// Block-wide barriers.
    pub barriers: usize,
    /// Places where a panic is left: the device crate is written so that there are none.
    pub traps: usize,
    /// Registers per thread; none where ptxas was not asked.
    pub registers: Option<u32>,
}

/// A finished build of one variant.
#[derive(Clone, Debug)]
pub struct Report {
    /// The variant.
    pub arch: Arch,
    /// What it was compiled to do.
    pub flavor: Flavor,
    /// Where the PTX comes from.
    pub origin: Origin,
    /// The hash of the sources.
    pub sources: String,
    /// The verified text.
    pub ptx: String,
    /// Every kernel, by symbol.
    pub kernels: Vec<KernelReport>,
    /// The assembler that accepted the PTX, if there was one.
    pub ptxas: Option<Ptxas>,
    /// What the user should know: prebuilt PTX in use, rustc's warnings, a ptxas that could not
    /// judge.
    pub warnings: Vec<String>,
}

impl Report {
    /// The warnings of all reports, each once: most concern every variant alike.
    pub fn warnings(reports: &[Report]) -> Vec<&str> {
        let mut seen = BTreeSet::new();
        let all = reports.iter().flat_map(|report| &report.warnings).map(String::as_str);
        all.filter(|warning| seen.insert(*warning)).collect()
    }
}

/// What all variants of one build share.
struct Shared {
    cache: PathBuf,
    sources: String,
    toolchain: Result<Toolchain, Vec<String>>,
    ptxas: Option<Ptxas>,
}

impl CudaBuilder {
    /// Builds the crate in the folder `device`, by default for [`Arch::Sm80`], with prebuilt PTX
    /// in its folder `ptx` where there is no toolchain, and expecting Peerlane's kernels.
    pub fn new(device: impl AsRef<Path>) -> CudaBuilder {
        let device = device.as_ref().to_path_buf();
        CudaBuilder {
            prebuilt: Some(device.join("ptx")),
            device,
            arch: Arch::Sm80,
            flavor: Flavor::Plain,
            copy_to: None,
            cache: None,
            search: Search::from_env(),
            require_ptxas: false,
            expected: Expected::peerlane(Flavor::Plain),
        }
    }

    /// Compiles Peerlane's kernels with this feature.
    pub fn flavor(mut self, flavor: Flavor) -> CudaBuilder {
        self.flavor = flavor;
        self.expect(Expected::peerlane(flavor))
    }

    /// The variant that [`CudaBuilder::build`] makes.
    pub fn arch(mut self, arch: Arch) -> CudaBuilder {
        self.arch = arch;
        self
    }

    /// Writes the PTX to this file. A file that holds the same text is left untouched.
    pub fn copy_to(mut self, path: impl AsRef<Path>) -> CudaBuilder {
        self.copy_to = Some(path.as_ref().to_path_buf());
        self
    }

    /// The folder for compiled `core`s; by default `peerlane-device` in cargo's target folder.
    pub fn cache(mut self, folder: impl AsRef<Path>) -> CudaBuilder {
        self.cache = Some(folder.as_ref().to_path_buf());
        self
    }

    /// Where to look for a toolchain; by default [`Search::from_env`].
    pub fn search(mut self, search: Search) -> CudaBuilder {
        self.search = search;
        self
    }

    /// The folder with prebuilt PTX, or none: then a missing toolchain is an error.
    pub fn prebuilt(mut self, folder: Option<PathBuf>) -> CudaBuilder {
        self.prebuilt = folder;
        self
    }

    /// Makes a missing ptxas an error.
    pub fn require_ptxas(mut self) -> CudaBuilder {
        self.require_ptxas = true;
        self
    }

    /// The kernels that the PTX must hold, for crates other than Peerlane's.
    pub fn expect(mut self, kernels: Vec<Expected>) -> CudaBuilder {
        self.expected = kernels;
        self
    }

    /// Builds one variant.
    pub fn build(self) -> Result<Report, BuildError> {
        let shared = self.shared()?;
        let report = self.build_variant(&shared, self.arch)?;
        if let Some(path) = &self.copy_to {
            write_if_changed(path, &report.ptx)?;
        }
        Ok(report)
    }

    /// Builds all variants of the flavor, at the same time, and writes each to `folder`/`prefix``arch`.ptx.
    pub fn build_all(self, folder: &Path, prefix: &str) -> Result<Vec<Report>, BuildError> {
        let reports = self.check_all()?;
        fs::create_dir_all(folder).map_err(BuildError::io("create", folder))?;
        for report in &reports {
            let name = self.flavor.file_name(prefix, report.arch);
            write_if_changed(&folder.join(name), &report.ptx)?;
        }
        Ok(reports)
    }

    /// Builds and verifies all variants and writes nothing.
    pub fn check_all(&self) -> Result<Vec<Report>, BuildError> {
        let shared = self.shared()?;
        thread::scope(|scope| {
            let build = |arch| {
                scope.spawn({
                    let shared = &shared;
                    move || self.build_variant(shared, arch)
                })
            };
            // Collected first, so that all threads run before the first is waited for.
            let threads: Vec<_> = self.flavor.archs().iter().copied().map(build).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            all_or_errors(threads.into_iter().map(join))
        })
    }

    /// The lines with which a build script tells cargo when to run it again.
    pub fn rerun_lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = [RUSTC_VARIABLE, PTXAS_VARIABLE, "CUDA_HOME", "CUDA_PATH"]
            .map(|name| format!("cargo::rerun-if-env-changed={name}"))
            .into();
        // Cargo takes a file that is not there for one that always changes.
        let sources = [self.device.join("src")].into_iter().chain(self.prebuilt.clone());
        let compilers = self.search.named.iter().chain(&self.search.candidates).map(PathBuf::from);
        let compilers = compilers.filter(|path| path.is_absolute());
        let there = sources.chain(compilers).filter(|path| path.exists());
        lines.extend(there.map(|path| format!("cargo::rerun-if-changed={}", path.display())));
        lines
    }

    fn shared(&self) -> Result<Shared, BuildError> {
        if !self.root().is_file() {
            return Err(BuildError::NotADeviceCrate(self.device.clone()));
        }
        let ptxas = Ptxas::find()?;
        if self.require_ptxas && ptxas.is_none() {
            return Err(BuildError::NoPtxas);
        }
        Ok(Shared {
            cache: self.cache.clone().unwrap_or_else(|| default_cache(&self.device)),
            sources: prebuilt::hash_sources(&self.device)?,
            toolchain: self.search.find()?,
            ptxas,
        })
    }

    fn root(&self) -> PathBuf {
        self.device.join("src/lib.rs")
    }

    fn build_variant(&self, shared: &Shared, arch: Arch) -> Result<Report, BuildError> {
        let mut warnings = Vec::new();
        let (passed, origin) = match &shared.toolchain {
            Ok(toolchain) => (
                self.compiled(shared, toolchain, arch, &mut warnings)?,
                Origin::Compiled(toolchain.version.clone()),
            ),
            Err(tried) => {
                let (ptx, origin) = self.load_prebuilt(shared, arch, tried, &mut warnings)?;
                (self.judge(shared, ptx, arch, &mut warnings)?, origin)
            }
        };
        let kernel = |tally: verify::Tally| KernelReport {
            registers: passed.registers.get(&tally.symbol).copied(),
            symbol: tally.symbol,
            barriers: tally.barriers,
            traps: tally.traps,
        };
        Ok(Report {
            arch,
            flavor: self.flavor,
            origin,
            sources: shared.sources.clone(),
            kernels: verify::tally(&passed.ptx).into_iter().map(kernel).collect(),
            ptx: passed.ptx,
            ptxas: shared.ptxas.clone(),
            warnings,
        })
    }

    /// The PTX of this build, or of an earlier one that had the same inputs.
    fn compiled(
        &self,
        shared: &Shared,
        toolchain: &Toolchain,
        arch: Arch,
        warnings: &mut Vec<String>,
    ) -> Result<Passed, BuildError> {
        let inputs = Inputs {
            arch,
            sources: &shared.sources,
            toolchain: &toolchain.identity,
            ptxas: shared.ptxas.as_ref(),
            expected: &self.expected,
            flavor: self.flavor,
        };
        let verdict = Verdict::on(&inputs, &shared.cache);
        if let Some(passed) = verdict.recall() {
            return Ok(passed);
        }
        let (ptx, said) =
            compile::device(toolchain, &shared.cache, (arch, self.flavor), &self.root())?;
        warnings.extend((!said.trim().is_empty()).then(|| said.trim().to_owned()));
        let ptx = text::finish(&ptx, &shared.sources, &toolchain.version);
        let passed = self.judge(shared, ptx, arch, warnings)?;
        // A warning is worth repeating until its cause is gone.
        if warnings.is_empty() {
            verdict.remember(&passed);
        }
        Ok(passed)
    }

    /// Makes every check.
    fn judge(
        &self,
        shared: &Shared,
        ptx: String,
        arch: Arch,
        warnings: &mut Vec<String>,
    ) -> Result<Passed, BuildError> {
        let mut findings = verify::verify(&ptx, &self.expected);
        let registers = assemble(shared, &ptx, arch, &mut findings, warnings)?;
        findings.sort_by(|a, b| a.kernel.cmp(&b.kernel));
        match findings.is_empty() {
            true => Ok(Passed { ptx, registers }),
            false => Err(BuildError::Verification { arch, findings }),
        }
    }

    fn load_prebuilt(
        &self,
        shared: &Shared,
        arch: Arch,
        tried: &[String],
        warnings: &mut Vec<String>,
    ) -> Result<(String, Origin), BuildError> {
        let Some(folder) = &self.prebuilt else {
            return Err(BuildError::NoToolchain { tried: tried.to_vec(), prebuilt: None });
        };
        let name = self.flavor.file_name("", arch);
        let ptx = prebuilt::load(&folder.join(name), &shared.sources, tried)?;
        let reasons = if tried.is_empty() { "as asked".to_owned() } else { tried.join("; ") };
        let path = folder.display();
        warnings.push(format!("using the prebuilt PTX in {path}, no compiler ran ({reasons})"));
        let compiler = text::compiler_of(&ptx).unwrap_or("an unknown rustc").to_owned();
        Ok((ptx, Origin::Prebuilt(compiler)))
    }
}

/// Lets ptxas judge, if there is one, and returns each entry's registers. Functions with a stack
/// frame are added to the findings; a ptxas that cannot judge is a warning.
fn assemble(
    shared: &Shared,
    ptx: &str,
    arch: Arch,
    findings: &mut Vec<Finding>,
    warnings: &mut Vec<String>,
) -> Result<BTreeMap<String, u32>, BuildError> {
    let Some(ptxas) = &shared.ptxas else { return Ok(BTreeMap::new()) };
    let functions = match ptxas.assemble(ptx, arch, &shared.cache) {
        Ok(Assembled::Functions(functions)) => functions,
        Ok(Assembled::OtherRelease(said)) => {
            let path = ptxas.path().display();
            warnings.push(format!("{path} is too old or too new to judge {arch}: {said}"));
            return Ok(BTreeMap::new());
        }
        // The text's own defects come with kernel names; ptxas only adds to them where there are
        // none. An undefined symbol is the usual case.
        Err(_) if !findings.is_empty() => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    // A kernel whose text has a local depot is in the findings already, with the depot's size.
    let known = |finding: &Finding| {
        matches!(finding.defect, Defect::StackFrame(_))
            && findings.iter().any(|other| {
                other.kernel == finding.kernel && matches!(other.defect, Defect::LocalMemory(_))
            })
    };
    let judged = functions.iter().flat_map(|function| function.findings());
    let new: Vec<Finding> = judged.filter(|finding| !known(finding)).collect();
    findings.extend(new);
    let registers = functions.into_iter().filter_map(|f| Some((f.symbol, f.registers?)));
    Ok(registers.collect())
}

/// All reports, or what is wrong with each variant that failed. What keeps rustc from compiling
/// keeps it from compiling any variant, and is said once.
fn all_or_errors(
    results: impl Iterator<Item = Result<Report, BuildError>>,
) -> Result<Vec<Report>, BuildError> {
    let (mut reports, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(report) => reports.push(report),
            Err(error @ BuildError::Verification { .. }) => errors.push(error),
            Err(error) => return Err(error),
        }
    }
    match errors.len() {
        0 => Ok(reports),
        1 => Err(errors.remove(0)),
        _ => Err(BuildError::Variants(errors)),
    }
}

/// `peerlane-device` in cargo's target folder: the one place that a debug build, a release build
/// and the command line share.
fn default_cache(device: &Path) -> PathBuf {
    let target = match env::var_os("OUT_DIR").map(PathBuf::from) {
        // Cargo puts this tag at the top of the target folder, whatever the layout below it.
        Some(out) => {
            let tagged = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
            tagged.unwrap_or(&out).to_path_buf()
        }
        None => env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| workspace(device).join("target"), PathBuf::from),
    };
    target.join("peerlane-device")
}

/// The folder above the device crate that holds cargo's lock file, or the crate's own.
fn workspace(device: &Path) -> PathBuf {
    let device = device.canonicalize().unwrap_or_else(|_| device.to_path_buf());
    let mut folders = device.ancestors();
    let found = folders.find(|folder| folder.join("Cargo.lock").is_file());
    found.unwrap_or(&device).to_path_buf()
}

/// Keeps the time stamp of a file that would not change: cargo rebuilds what is newer.
fn write_if_changed(path: &Path, text: &str) -> Result<(), BuildError> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(BuildError::io("write", path))
}
