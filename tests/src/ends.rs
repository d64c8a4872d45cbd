//! Test programs that start themselves as the other ends of what they test, and kill them.
//!
//! Invariant: no process is left when its [`End`] is dropped. Such a program has a `main` of its own, since libtest's cannot do that.

use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

/// Runs the tests whose names contain one of `words`, or all; options are for libtest and mean nothing here.
pub fn run_named(tests: &[(&str, fn())], words: &[&str]) -> ExitCode {
    let filters: Vec<_> = words.iter().filter(|word| !word.starts_with("--")).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(**f));
    let failed = tests.iter().filter(|(name, _)| wanted(name)).filter(|(name, test)| {
        let good = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
        !good
    });
    if failed.count() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// This program as another end.
pub struct End {
    child: Child,
    input: ChildStdin,
    lines: BufReader<ChildStdout>,
}

impl End {
    /// Starts it with these arguments.
    pub fn start(arguments: &[&str]) -> End {
        let program = std::env::current_exe().expect("this program has a file");
        let mut command = Command::new(program);
        let command = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let input = child.stdin.take().expect("it has an input");
        let lines = BufReader::new(child.stdout.take().expect("it has an output"));
        End { child, input, lines }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says next.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("it speaks");
        line.trim_end().to_owned()
    }

    /// Tells it something.
    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("it listens");
    }

    /// Kills it, without a wait for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is there");
    }

    /// Waits for its end.
    pub fn wait(&mut self) {
        self.child.wait().expect("it ends");
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
