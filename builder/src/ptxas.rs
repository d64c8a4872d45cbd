//! Asks NVIDIA's assembler what it makes of the PTX.
//!
//! Invariant: ptxas is optional, and what it says is never ignored where it is there. It knows what
//! the text cannot show: registers, stack frames and spills.

use crate::scratch::Scratch;
use crate::{Arch, BuildError, Defect, Finding};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The environment variable that names ptxas.
pub const PTXAS_VARIABLE: &str = "PEERLANE_PTXAS";

/// Prints where the python wheels nvidia-cuda-nvcc (`nvidia/cu13`) and nvidia-cuda-nvcc-cu12
/// (`nvidia/cuda_nvcc`) have put ptxas.
const WHEELS: &str = "import glob, os, sys
for folder in sys.path:
    for path in sorted(glob.glob(os.path.join(folder, 'nvidia', '*', 'bin', 'ptxas'))):
        print(path)";

/// NVIDIA's PTX assembler.
#[derive(Clone, Debug)]
pub struct Ptxas {
    path: PathBuf,
    version: String,
}

impl Ptxas {
    /// Looks in `PEERLANE_PTXAS`, `PATH`, `CUDA_HOME`, `CUDA_PATH`, the usual folder, and python's
    /// packages, in this order. `None`: it is nowhere.
    pub fn find() -> Result<Option<Ptxas>, BuildError> {
        if let Some(named) = env::var_os(PTXAS_VARIABLE).filter(|value| !value.is_empty()) {
            let path = PathBuf::from(named);
            return match Ptxas::at(&path) {
                Ok(ptxas) => Ok(Some(ptxas)),
                Err(reason) => Err(BuildError::NamedPtxas { path, reason }),
            };
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
        let mut candidates = vec![PathBuf::from("ptxas")];
        candidates.extend(homes.map(|home| Path::new(&home).join("bin/ptxas")));
        candidates.push("/usr/local/cuda/bin/ptxas".into());
        let here = candidates.iter().find_map(|path| Ptxas::at(path).ok());
        // Python is asked last: starting it takes longer than all the rest.
        Ok(here.or_else(|| wheels().iter().find_map(|path| Ptxas::at(path).ok())))
    }

    /// The assembler at `path`, or why it does not run.
    fn at(path: &Path) -> Result<Ptxas, String> {
        let output =
            Command::new(path).arg("--version").output().map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find_map(|line| line.split_once("release ")).map(|(_, v)| v);
        match version {
            Some(version) if output.status.success() => {
                Ok(Ptxas { path: path.to_owned(), version: version.to_owned() })
            }
            _ => Err("`--version` does not print a release".to_owned()),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its release, as it prints it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Assembles `ptx`, in a folder of its own under `cache`.
    pub(crate) fn assemble(
        &self,
        ptx: &str,
        arch: Arch,
        cache: &Path,
    ) -> Result<Assembled, BuildError> {
        let scratch = Scratch::new(cache)?;
        let input = scratch.file("kernels.ptx");
        fs::write(&input, ptx).map_err(BuildError::io("write", &input))?;
        let output = Command::new(&self.path)
            .arg("-v")
            .arg(format!("-arch={arch}"))
            .arg("-o")
            .arg(scratch.file("kernels.cubin"))
            .arg(&input)
            .output()
            .map_err(BuildError::io("start", &self.path))?;
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            return Ok(Assembled::Functions(parse(&said)));
        }
        // An assembler of another CUDA release says nothing about the PTX.
        if said.contains("is not defined for option 'gpu-name'")
            || said.contains("Unsupported .version")
        {
            return Ok(Assembled::OtherRelease(said.trim().to_owned()));
        }
        Err(BuildError::Ptxas { ptxas: self.path.clone(), arch, output: said })
    }
}

/// What ptxas made of a file.
#[derive(Debug)]
pub(crate) enum Assembled {
    /// The functions, entries among them.
    Functions(Vec<Usage>),
    /// This ptxas knows nothing of the architecture or of the PTX version: its words.
    OtherRelease(String),
}

/// What one function needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) symbol: String,
    /// ptxas says it for entries only.
    pub(crate) registers: Option<u32>,
    pub(crate) stack: u32,
    pub(crate) spills: u32,
}

impl Usage {
    /// The rules that this function breaks.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut defects = Vec::new();
        if self.stack > 0 {
            defects.push(Defect::StackFrame(self.stack));
        }
        if self.spills > 0 {
            defects.push(Defect::Spills(self.spills));
        }
        let finding = |defect| Finding { kernel: self.symbol.clone(), defect };
        defects.into_iter().map(finding).collect()
    }
}

/// Reads the output of `ptxas -v`.
fn parse(said: &str) -> Vec<Usage> {
    let mut functions: Vec<Usage> = Vec::new();
    for line in said.lines() {
        if let Some((_, symbol)) = line.split_once("Function properties for ") {
            functions.push(Usage { symbol: symbol.trim().to_owned(), ..Usage::default() });
        }
        let Some(function) = functions.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            function.stack = number_before(line, " bytes stack frame").unwrap_or(0);
            function.spills = number_before(line, " bytes spill stores").unwrap_or(0)
                + number_before(line, " bytes spill loads").unwrap_or(0);
        }
        if let Some(registers) = number_before(line, " registers") {
            function.registers = Some(registers);
        }
    }
    functions
}

/// The 14 of `Used 14 registers`.
fn number_before(line: &str, unit: &str) -> Option<u32> {
    line[..line.find(unit)?].rsplit([' ', ',']).next()?.parse().ok()
}

/// Where python's packages have ptxas.
fn wheels() -> Vec<PathBuf> {
    let output = Command::new("python3").arg("-c").arg(WHEELS).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default().lines().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
    144 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 144 bytes cumulative stack size, 376 bytes cmem[0]
";

    #[test]
    fn the_verbose_output_is_read() {
        let functions = parse(SAID);
        let a = Usage { symbol: "a".into(), registers: Some(14), stack: 0, spills: 0 };
        let b = Usage { symbol: "b".into(), registers: Some(30), stack: 144, spills: 24 };
        assert_eq!(functions, [a, b]);
    }

    #[test]
    fn stack_frames_and_spills_are_defects() {
        let [a, b] = parse(SAID).try_into().expect("two functions");
        assert_eq!(Usage::findings(&a), []);
        let defects: Vec<_> = b.findings().into_iter().map(|finding| finding.defect).collect();
        assert_eq!(defects, [Defect::StackFrame(144), Defect::Spills(24)]);
    }
}
