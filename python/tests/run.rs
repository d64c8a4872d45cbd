//! The Python tests, on the library as cargo has just built it: `cargo test` needs no maturin.
//!
//! Invariant: tests that could not run are reported as skipped, with the reason, and never counted
//! as passed. `PEERLANE_PYTHON` names the interpreter, `python3` otherwise. An argument selects
//! tests as pytest's `-k` does.

use std::env;
use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What the interpreter needs; it exits with the reason if something is missing.
const NEEDS: &str = "
import importlib.util, sys
if sys.version_info < (3, 10):
    sys.exit('it is older than 3.10')
missing = [name for name in ('numpy', 'pytest') if importlib.util.find_spec(name) is None]
if missing:
    sys.exit('it has no ' + ' and no '.join(missing))
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("pytest: test");
        return ExitCode::SUCCESS;
    }
    let python = env::var_os("PEERLANE_PYTHON").unwrap_or_else(|| "python3".into());
    let python = PathBuf::from(python);
    if let Err(reason) = check(&python) {
        println!("\nSKIPPED: the Python tests: {}: {reason}\n", python.display());
        return ExitCode::SUCCESS;
    }
    let filters = arguments.iter().filter(|argument| !argument.starts_with("--"));
    match run(&python, filters) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the Python tests did not start: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the interpreter can run the tests, or why not.
fn check(python: &Path) -> Result<(), String> {
    let asked = Command::new(python).args(["-c", NEEDS]).output().map_err(|e| e.to_string())?;
    if asked.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&asked.stderr).trim().to_owned())
}

fn run<'a>(
    python: &Path,
    filters: impl Iterator<Item = &'a String>,
) -> Result<bool, Box<dyn Error>> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    assemble(&sources.join("peerlane"), &place.join("peerlane"))?;
    let mut command = Command::new(python);
    command.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).arg(sources.join("tests"));
    for filter in filters {
        command.args(["-k", filter]);
    }
    // Not from the source folder, whose `peerlane` has no library beside it.
    command.current_dir(&place);
    command.env("PYTHONPATH", &place).env("PYTHONDONTWRITEBYTECODE", "1");
    // 5: no test matches. A filter of `cargo test --workspace` may mean another package's tests.
    Ok(matches!(command.status()?.code(), Some(0 | 5)))
}

/// Puts the package together: links to the Python files and packages, and to the library that cargo built.
fn assemble(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let wanted = path.join("__init__.py").exists()
            || path.extension().is_some_and(|e| e == "py" || e == "pyi" || e == "typed");
        if let Some(name) = path.file_name().filter(|_| wanted) {
            symlink(&path, to.join(name))?;
        }
    }
    let test = env::current_exe()?;
    let library = test.with_file_name("lib_peerlane.so");
    fs::metadata(&library).map_err(|e| format!("{}: {e}", library.display()))?;
    symlink(library, to.join("_peerlane.abi3.so"))?;
    Ok(())
}
