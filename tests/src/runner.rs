//! Runs the conformance suite on real GPUs, and says aloud what it could not run.
//!
//! libtest has no word for a test that was skipped at run time and would count it as passed.

use crate::machine::Machine;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// A test of the suite.
pub type Test = (&'static str, fn(&Machine));

/// Runs the tests whose names contain one of the arguments, or all; options are for libtest and
/// mean nothing here, except `--list`.
pub fn run_on_cuda(tests: &[Test], arguments: &[String]) -> ExitCode {
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(*f));
    let chosen: Vec<&Test> = tests.iter().filter(|(name, _)| wanted(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    match Machine::cuda() {
        Ok(machine) => run_all(&chosen, &machine),
        Err(reason) => {
            for (name, _) in &chosen {
                eprintln!("test {name} ... cuda: skipped ({reason})");
            }
            eprintln!("\n{} GPU tests skipped: {reason}\n", chosen.len());
            ExitCode::SUCCESS
        }
    }
}

fn run_all(tests: &[&Test], machine: &Machine) -> ExitCode {
    let mut failed = Vec::new();
    for (name, test) in tests {
        let outcome = catch_unwind(AssertUnwindSafe(|| test(machine)));
        println!("test {name} ... cuda: {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    let passed = tests.len() - failed.len();
    println!("\n{passed} GPU tests passed, {} failed: {failed:?}\n", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
