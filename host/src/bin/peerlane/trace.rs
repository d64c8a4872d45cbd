//! `peerlane trace`: runs a program, or passes of its own, and shows when what happened in all its processes.
//!
//! Invariant: what was recorded is kept until it has been written where it was asked for; if the program that was traced failed, so
//! does this one, after it has written what there is.

use crate::devices::Devices;
use crate::{Common, Outcome, output};
use peerlane::gpu::{DevicePtr, GpuRef};
use peerlane::trace::{self, Summary, Timeline, VARIABLE};
use peerlane::{AllReduce, Communicator, Config, DType};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Longer than simulated GPUs take for a call.
const DEADLINE: Duration = Duration::from_secs(60);

type Fail = Box<dyn std::error::Error + Send + Sync>;

/// Options of `peerlane trace`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// The timeline, as JSON for ui.perfetto.dev or chrome://tracing.
    #[arg(long, value_name = "FILE", default_value = "peerlane-trace.json")]
    out: PathBuf,
    /// Keep what the processes record in this directory.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Trace nothing: read what was kept.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep", "program"])]
    from: Option<PathBuf>,
    /// Ranks of passes without a program. Left out: one per GPU. More ranks than GPUs share them round robin.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: Option<u32>,
    /// Passes without a program: this many.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    passes: u32,
    /// All-reduces of such a pass.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    calls: u32,
    /// Elements of each, bf16.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    count: u32,
    /// The program to trace, with its arguments, after `--`. Left out: passes of a token each, on --devices.
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Traces, writes the timeline and prints the table.
pub(crate) fn run(options: &Options) -> Outcome {
    if let Some(directory) = &options.from {
        return show(options, directory, Value::Null).map(|()| true);
    }
    let mut records = Records::new(options.keep.as_deref())?;
    record(options, &records.path).map_err(|error| records.keep(error))
}

/// Records and shows it; whether what was traced ended well.
fn record(options: &Options, records: &Path) -> Outcome {
    let (good, about) = match options.program.split_first() {
        Some((program, arguments)) => (traced(program, arguments, records)?, Value::Null),
        None => (true, passes(options, records)?),
    };
    show(options, records, about)?;
    Ok(good)
}

/// Where processes record: a directory that is asked for, or one that goes at the end.
struct Records {
    path: PathBuf,
    kept: bool,
}

impl Records {
    fn new(keep: Option<&Path>) -> Result<Records, Fail> {
        let named = format!("peerlane-trace-{}-{}", std::process::id(), trace::now());
        let path = keep.map_or_else(|| std::env::temp_dir().join(named), Path::to_owned);
        let failed = |reason: String| format!("--keep: {}: {reason}", path.display());
        fs::create_dir_all(&path).map_err(|error| failed(error.to_string()))?;
        if fs::read_dir(&path).map_err(|error| failed(error.to_string()))?.next().is_some() {
            return Err(failed("expected an empty directory, got one with files".into()).into());
        }
        // The program may go elsewhere.
        let path = fs::canonicalize(&path)?;
        Ok(Records { path, kept: keep.is_some() })
    }

    /// Keeps what there is: it could not be shown.
    fn keep(&mut self, error: Fail) -> Fail {
        let any = fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_some());
        if self.kept || !any {
            return error;
        }
        self.kept = true;
        format!("{error}; what was recorded is kept, for --from {}", self.path.display()).into()
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing is left to say it to.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Runs a program whose processes record; whether it ended well.
fn traced(program: &OsString, arguments: &[OsString], records: &Path) -> Result<bool, Fail> {
    let mut command = Command::new(program);
    command.args(arguments).env(VARIABLE, records);
    // SAFETY: nothing but a call that is allowed between fork and exec; ends and does not allocate.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        });
        // Ctrl-C ends the program; what it recorded is still to be shown.
        libc::signal(libc::SIGINT, libc::SIG_IGN);
    }
    let status = command.status();
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
    let status = status.map_err(|error| format!("{}: {error}", program.display()))?;
    if !status.success() {
        eprintln!("peerlane: {} ended with {status}", program.display());
    }
    Ok(status.success())
}

/// Passes as of decoding, a thread for each rank; what they ran on.
fn passes(options: &Options, records: &Path) -> Result<Value, Fail> {
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let world = options.ranks.unwrap_or(devices.gpus.len() as u32);
    println!("# {world} ranks on {devices}");
    trace::start(records)?;
    let config = Config { deadline: DEADLINE, ..Config::default() };
    let ranks = Communicator::connect(&devices.for_ranks(world), &config)?;
    let outcomes: Vec<Result<(), Fail>> = thread::scope(|scope| {
        let named =
            |rank: &Communicator| thread::Builder::new().name(format!("rank {}", rank.rank()));
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| named(&rank).spawn_scoped(scope, move || decode(&mut rank, options)))
            .collect();
        let joined = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("a rank's thread panicked".into()))
        };
        threads.into_iter().map(|thread| joined(thread?)).collect()
    });
    outcomes.into_iter().collect::<Result<Vec<()>, Fail>>()?;
    trace::flush();
    Ok(output::provenance(&devices))
}

/// All passes of one rank.
fn decode(rank: &mut Communicator, options: &Options) -> Result<(), Fail> {
    let gpu: GpuRef = rank.gpu().clone();
    let count = options.count as usize;
    let tensor: DevicePtr = gpu.alloc(count * DType::Bf16.bytes())?;
    let stream = gpu.stream_create()?;
    // SAFETY: the tensor has that size.
    unsafe { gpu.fill(tensor, 0, count * DType::Bf16.bytes(), stream)? };
    for _ in 0..options.passes {
        let pass = trace::pass("decode");
        for _ in 0..options.calls {
            // SAFETY: the tensor has that size, and goes after all is done.
            unsafe { rank.all_reduce(&AllReduce::in_place(tensor, count, DType::Bf16), stream)? };
        }
        rank.synchronize(stream)?;
        drop(pass);
    }
    rank.close()?;
    // SAFETY: closing has waited for everything; neither is used again.
    unsafe {
        gpu.stream_destroy(stream)?;
        gpu.free(tensor)?;
    }
    Ok(())
}

/// Writes and prints what was recorded.
fn show(options: &Options, records: &Path, about: Value) -> Result<(), Fail> {
    let timeline = Timeline::read(records)?;
    let Some((begin, end)) = timeline.bounds() else {
        let expected = "expected a program that uses Peerlane's collectives, channels or tensors";
        return Err(format!("trace: {expected}, got no records").into());
    };
    let failed =
        |error: std::io::Error| format!("--out: cannot write {}: {error}", options.out.display());
    let mut file = BufWriter::new(File::create(&options.out).map_err(failed)?);
    timeline.write_chrome(&mut file).and_then(|()| file.flush()).map_err(failed)?;
    let summary = Summary::of(&timeline);
    print!("{summary}");
    let seconds = end.saturating_sub(begin) as f64 / 1e9;
    let (spans, processes) = (timeline.len(), timeline.processes.len());
    println!(
        "# {spans} spans of {processes} processes in {seconds:.3} s: {}",
        options.out.display()
    );
    let lost: u64 = timeline.processes.iter().map(|process| process.lost).sum();
    if lost != 0 {
        println!("# {lost} spans more were not recorded: too many at a time");
    }
    if let Some(path) = &options.common.json {
        let mut value = if about.is_null() { json!({}) } else { about };
        value["trace"] = serde_json::to_value(&summary)?;
        value["lost"] = lost.into();
        output::write_json(path, &value)?;
    }
    Ok(())
}
