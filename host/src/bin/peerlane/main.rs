//! The `peerlane` program: what the GPUs of this machine can do, whether the collectives are right,
//! and how fast they are.
//!
//! Invariant: the exit status is 0 only when everything that was asked for came out right; an error
//! is one line on stderr. Where nobody reads its output any more, it ends without a word.

mod bench;
mod check;
mod devices;
mod drawing;
mod model;
mod output;
mod parse;
mod selftest;
mod topo;
mod trace;
mod tune;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// What a command ends with: `Ok(false)` where it ran and found something wrong.
type Outcome = Result<bool, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser)]
#[command(
    name = "peerlane",
    version,
    about = "Peer-to-peer collectives for the GPUs of one machine"
)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the GPUs and how they reach each other, as the driver says and as measured.
    Topo(topo::Options),
    /// Tests every way in which kernels use the links between the GPUs.
    SelfTest(selftest::Options),
    /// Checks every collective against a CPU reference.
    Check(check::Options),
    /// Measures collectives the way nccl-tests does.
    Bench(bench::Options),
    /// Measures every algorithm that is one kernel and keeps a table of what is fastest at each size.
    Tune(tune::Options),
    /// Records when what happened, in a program that uses Peerlane or in passes of its own.
    Trace(trace::Options),
    /// Writes Markdown tables of results that `bench --json` wrote.
    Report(bench::report::Options),
    /// Writes what a model of other machines predicts, beside what was measured.
    Model(model::Options),
}

/// Options that every command has.
#[derive(Args, Clone, Debug)]
struct Common {
    /// GPUs to use: sim:N, cuda, or cuda:0,1. Left out: the GPUs that are there, else sim:8.
    #[arg(long, value_name = "DEVICES")]
    devices: Option<devices::Selection>,
    /// Write the results to this file too, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seed of all inputs, and of the simulator's schedule.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    // SAFETY: the first thing that the program does; no other thread runs yet.
    unsafe { peerlane::gpu::cuda::prepare_environment() };
    // SAFETY: as above; the default action runs no code of ours.
    unsafe {
        // Rust ignores it, and `println!` would panic once nobody reads.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let program = match Program::try_parse() {
        Ok(program) => program,
        Err(error) => return explain(&error),
    };
    let outcome = match program.command {
        Command::Topo(options) => topo::run(&options),
        Command::SelfTest(options) => selftest::run(&options),
        Command::Check(options) => check::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Tune(options) => tune::run(&options),
        Command::Trace(options) => trace::run(&options),
        Command::Report(options) => bench::report::run(&options),
        Command::Model(options) => model::run(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("peerlane: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints help where it was asked for, and one line where the command line is wrong.
fn explain(error: &clap::Error) -> ExitCode {
    let text = error.to_string();
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Whoever closed the pipe does not miss the rest.
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
    }
    // What is wrong comes first, then an empty line, then the usage.
    let lines = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
    let message = lines.collect::<Vec<_>>().join(" ");
    eprintln!("peerlane: {}", message.trim_start_matches("error: "));
    ExitCode::from(2)
}
