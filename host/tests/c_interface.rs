//! C and C++ programs against `peerlane.h` and `libpeerlane.so`, on simulated GPUs.
//!
//! Invariant: the library is the one that cargo has built for this very run. Integration tests of a
//! package depend on its library, and cargo builds that in all its crate types into the folder
//! where the tests lie. Where there is no compiler, each test says that it was skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

/// What every program is compiled with.
const FLAGS: [&str; 5] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"];

/// A compiler of one language.
struct Compiler {
    program: String,
    standard: &'static str,
}

impl Compiler {
    /// What `variable` names, or `default`; the reason if there is no such program.
    fn find(variable: &str, default: &str, standard: &'static str) -> Result<Compiler, String> {
        let program = std::env::var(variable).unwrap_or(default.into());
        match Command::new(&program).arg("--version").output() {
            Ok(output) if output.status.success() => Ok(Compiler { program, standard }),
            Ok(output) => Err(format!("{program} --version: {}", output.status)),
            Err(error) => Err(format!("no compiler {program}: {error}")),
        }
    }

    fn c() -> Result<Compiler, String> {
        Compiler::find("CC", "cc", "-std=c99")
    }

    fn cpp() -> Result<Compiler, String> {
        Compiler::find("CXX", "c++", "-std=c++17")
    }

    /// Compiles `source` and runs what comes out.
    fn run(&self, source: &Path) -> Output {
        let library = library_folder();
        let stem = source.file_stem().expect("a source has a name");
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(stem);
        let mut compile = Command::new(&self.program);
        compile.arg(self.standard).args(FLAGS).arg("-I").arg(host().join("include"));
        compile.arg(source).arg("-o").arg(&program).arg("-L").arg(&library).arg("-lpeerlane");
        let compiled = compile.output().expect("the compiler starts");
        assert!(compiled.status.success() && compiled.stderr.is_empty(), "{}", said(&compiled));
        // The variable rather than a path in the program: it comes before every other place.
        let mut run = Command::new(&program);
        run.env("LD_LIBRARY_PATH", &library).output().expect("the program starts")
    }
}

fn host() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo has put `libpeerlane.so`: beside this test, whatever the profile and target folder.
fn library_folder() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let folder = test.parent().expect("it lies in a folder").to_owned();
    assert!(folder.join("libpeerlane.so").exists(), "{} has no library", folder.display());
    folder
}

fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

fn the_c_program_is_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/all_reduce.c"));
    assert!(ran.status.success() && ran.stdout == b"all is right\n", "{}", said(&ran));
    Ok(())
}

fn the_cpp_program_is_right() -> Result<(), String> {
    let ran = Compiler::cpp()?.run(&host().join("../tests/c/threads.cpp"));
    assert!(ran.status.success(), "{}", said(&ran));
    Ok(())
}

fn ranks_that_are_processes_are_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/processes.c"));
    assert!(ran.status.success(), "{}", said(&ran));
    Ok(())
}

fn works_are_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/work.c"));
    assert!(ran.status.success() && ran.stdout == b"all is right\n", "{}", said(&ran));
    Ok(())
}

fn registered_tensors_are_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/registered.c"));
    assert!(ran.status.success() && ran.stdout == b"all is right\n", "{}", said(&ran));
    Ok(())
}

fn recovery_is_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/recovery.c"));
    assert!(ran.status.success() && ran.stdout == b"all is right\n", "{}", said(&ran));
    Ok(())
}

fn channels_are_right() -> Result<(), String> {
    let ran = Compiler::c()?.run(&host().join("../tests/c/channel.c"));
    assert!(ran.status.success() && ran.stdout == b"all is right\n", "{}", said(&ran));
    Ok(())
}

fn the_program_in_the_documentation_is_right() -> Result<(), String> {
    let compiler = Compiler::c()?;
    let page = std::fs::read_to_string(host().join("../docs/c.md")).expect("the page is there");
    let program = page.split("```c\n").nth(1).and_then(|rest| rest.split("```").next());
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sum.c");
    std::fs::write(&source, program.expect("the page has a program")).expect("it can be written");
    let ran = compiler.run(&source);
    let wanted = b"rank 0: 2 4 6 8\nrank 1: 2 4 6 8\n";
    assert!(ran.status.success() && ran.stdout == wanted, "{}", said(&ran));
    Ok(())
}

/// A test, or why it could not run.
type Test = (&'static str, fn() -> Result<(), String>);

const TESTS: [Test; 8] = [
    ("the_c_program_is_right", the_c_program_is_right),
    ("the_cpp_program_is_right", the_cpp_program_is_right),
    ("ranks_that_are_processes_are_right", ranks_that_are_processes_are_right),
    ("works_are_right", works_are_right),
    ("registered_tensors_are_right", registered_tensors_are_right),
    ("recovery_is_right", recovery_is_right),
    ("channels_are_right", channels_are_right),
    ("the_program_in_the_documentation_is_right", the_program_in_the_documentation_is_right),
];

/// Its own `main`, since libtest would count what it could not run as passed.
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(*f));
    for (name, test) in TESTS.iter().filter(|(name, _)| wanted(name)) {
        if arguments.iter().any(|argument| argument == "--list") {
            println!("{name}: test");
            continue;
        }
        // A test that fails panics, and ends the program with a status that says so.
        match test() {
            Ok(()) => println!("test {name} ... ok"),
            Err(reason) => println!("test {name} ... SKIPPED: {reason}"),
        }
    }
    ExitCode::SUCCESS
}
