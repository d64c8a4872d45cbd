//! The program that makes a self-test in a process of its own.
//!
//! Invariant: what is found here is started, or nothing is: a self-test never runs in the caller's process instead.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The environment variable that names the program.
pub const PROGRAM_VARIABLE: &str = "PEERLANE_SELF_TEST_PROGRAM";
/// What the `peerlane` program must be told. [`PROGRAM_VARIABLE`]'s is told the same.
const ARGUMENTS: [&str; 2] = ["self-test", "--child"];
/// The program's name.
const NAME: &str = "peerlane";

/// A program that calls [`serve`](super::serve).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file.
    pub path: PathBuf,
    /// What it is told.
    pub arguments: Vec<OsString>,
    /// Where it starts, if not where this process is.
    pub directory: Option<PathBuf>,
}

static CHOSEN: OnceLock<Program> = OnceLock::new();

/// Names the program for this process, as a language's package does that brings its own; the environment and a
/// running `peerlane` come before it. Only the first call counts.
pub fn set_program(program: Program) {
    let _ = CHOSEN.set(program);
}

impl Program {
    /// The `peerlane` program, or one that understands the same arguments.
    pub fn at(path: impl Into<PathBuf>) -> Program {
        let arguments = ARGUMENTS.map(OsString::from).to_vec();
        Program { path: path.into(), arguments, directory: None }
    }

    /// What [`PROGRAM_VARIABLE`] names; else the running program, if it is `peerlane`; else what
    /// [`set_program`] named; else `peerlane` beside the running program or in `PATH`.
    ///
    /// # Errors
    /// There is none: what to do about it.
    pub fn find() -> Result<Program, String> {
        let running = env::current_exe().ok();
        Program::of(|variable| env::var_os(variable), running.as_deref(), CHOSEN.get())
    }

    fn of(
        environment: impl Fn(&str) -> Option<OsString>,
        running: Option<&Path>,
        chosen: Option<&Program>,
    ) -> Result<Program, String> {
        if let Some(path) = environment(PROGRAM_VARIABLE).filter(|value| !value.is_empty()) {
            let program = Program::at(path);
            return if is_program(&program.path) {
                Ok(program)
            } else {
                Err(format!(
                    "{PROGRAM_VARIABLE}: expected a program, got {}",
                    program.path.display()
                ))
            };
        }
        if let Some(running) = running.filter(|path| path.file_name() == Some(OsStr::new(NAME))) {
            return Ok(Program::at(running));
        }
        if let Some(chosen) = chosen {
            return Ok(chosen.clone());
        }
        let beside = running.and_then(Path::parent).map(|directory| directory.join(NAME));
        let path = environment("PATH").unwrap_or_default();
        let listed: Vec<PathBuf> = env::split_paths(&path)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(NAME))
            .collect();
        let found = beside.into_iter().chain(listed).find(|path| is_program(path));
        found.map(Program::at).ok_or_else(|| {
            format!(
                "there is no program to run it: expected {NAME} beside the running program or in PATH, or {PROGRAM_VARIABLE}"
            )
        })
    }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_comes_first_then_what_runs_then_what_was_named() {
        let own = env::current_exe().unwrap();
        let set = |value: &'static str| {
            move |name: &str| (name == PROGRAM_VARIABLE).then(|| OsString::from(value))
        };
        let python = Program { path: "/usr/bin/python3".into(), ..Program::at("x") };
        let running = Path::new("/opt/bin/peerlane");
        let named = own.clone();
        let found = Program::of(move |_| Some(named.clone().into_os_string()), Some(running), None)
            .unwrap();
        assert_eq!(found, Program::at(&own));
        let error = Program::of(set("/no/such"), Some(running), Some(&python)).unwrap_err();
        assert_eq!(error, "PEERLANE_SELF_TEST_PROGRAM: expected a program, got /no/such");
        let found = Program::of(set(""), Some(running), Some(&python)).unwrap();
        assert_eq!((found.path.as_path(), found.arguments.len()), (running, 2));
        let found = Program::of(|_| None, Some(&own), Some(&python)).unwrap();
        assert_eq!(found, python);
    }

    #[test]
    fn nothing_is_found_where_there_is_nothing() {
        let none = Program::of(|_| None, Some(Path::new("/proc/x/y")), None).unwrap_err();
        assert!(none.contains("beside the running program or in PATH"), "{none}");
        // A directory of that name, and relative places, are no programs.
        let path = |name: &str| (name == "PATH").then(|| OsString::from(".:/proc"));
        assert!(Program::of(path, None, None).is_err());
    }
}
