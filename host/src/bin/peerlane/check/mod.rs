//! `peerlane check`: every collective against a CPU reference, on the GPUs or on simulated ones.
//!
//! Invariant: a case passes only if every byte of every tensor is what the reference says, ranks
//! and reruns agree bit for bit, the bytes around each tensor are untouched and no rank recorded an
//! error. A case that fails prints the command that runs it alone.

mod case;
mod list;
mod memory;
mod round;
mod run;

use crate::devices::Devices;
use crate::{Common, Outcome, output, parse};
use case::Case;
use list::Filter;
use peerlane::gpu::GpuRef;
use peerlane::plan::steps::LEAST_QUEUES;
use peerlane::{Config, DType, Operation, STAGING_BYTES, Transport};
pub(crate) use round::POISON;
use run::{Group, Verdict};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Failing cases that are printed in full.
const SHOWN: usize = 10;

/// Options of `peerlane check`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// World sizes; more ranks than GPUs share them round robin. Left out: sim 1,2,3,5,8, cuda the
    /// number of GPUs and 3,5,8,16.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: Vec<u32>,
    /// Sizes: elements of reductions, bytes of the rest.
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
    /// Collectives: all_reduce, reduce_scatter, all_gather, broadcast, gather, barrier.
    #[arg(long, value_delimiter = ',', value_parser = parse::operation)]
    ops: Vec<Operation>,
    /// Element types of reductions: f32, f16, bf16.
    #[arg(long, value_delimiter = ',', value_parser = parse::dtype)]
    dtypes: Vec<DType>,
    /// A few sizes and world sizes, and a share of the cases.
    #[arg(long)]
    quick: bool,
    /// Only cases whose names begin so, all of them.
    #[arg(long, value_name = "NAME")]
    case: Option<String>,
    /// Most bytes of device memory for one rank's mailbox.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    mailbox: Option<usize>,
    /// What carries data from rank to rank: auto, p2p or host. Left out: PEERLANE_TRANSPORT, else auto.
    #[arg(long, value_parser = parse::transport)]
    transport: Option<Transport>,
    /// Seconds that a rank waits for another before the case fails.
    #[arg(long, default_value_t = 10)]
    deadline: u64,
}

/// What became of the cases of one family.
#[derive(Default)]
struct Tally {
    cases: usize,
    failed: usize,
    error: f64,
    time: Duration,
}

/// Runs the cases and prints a line per family.
pub(crate) fn run(options: &Options) -> Outcome {
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let (worlds, sizes) = (worlds(options, &devices), sizes(options, &devices));
    let filter = filter(options, &devices, &sizes);
    let transport = match options.transport {
        Some(transport) => transport,
        None => Config::from_environment()?.transport,
    };
    println!("checking on {devices}, seed {}, transport {transport}", options.common.seed);
    let mut session =
        Session { options, devices, transport, rows: Vec::new(), failed: 0, cases: 0 };
    let started = Instant::now();
    for world in worlds {
        session.check_world(world, &filter.cases(world))?;
    }
    let Session { devices, rows, cases, failed, .. } = session;
    if cases == 0 {
        return Err("check: no case matches --case, --ops, --ranks and --sizes".into());
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = started.elapsed().as_secs_f64();
    println!("check: {cases} cases, {failed} failed, {seconds:.1} s on {devices}: {verdict}");
    if let Some(path) = &options.common.json {
        let mut value = output::provenance(&devices);
        value["seed"] = json!(options.common.seed);
        value["transport"] = json!({ "asked": transport });
        value["seconds"] = json!(seconds);
        value["families"] = json!(rows);
        output::write_json(path, &value)?;
    }
    Ok(failed == 0)
}

fn worlds(options: &Options, devices: &Devices) -> Vec<u32> {
    if !options.ranks.is_empty() {
        return options.ranks.clone();
    }
    let gpus = devices.gpus.len() as u32;
    let mut worlds = match (options.quick, devices.simulated_only()) {
        (true, true) => vec![2, 3],
        (true, false) => vec![gpus, 3],
        (false, true) => vec![1, 2, 3, 5, 8],
        (false, false) => vec![gpus, 3, 5, 8, 16],
    };
    worlds.sort_unstable();
    worlds.dedup();
    worlds
}

/// Sizes around every unit, slot and page boundary that the kernels know, and some beyond.
fn sizes(options: &Options, devices: &Devices) -> Vec<usize> {
    if !options.sizes.is_empty() {
        return options.sizes.clone();
    }
    let mut sizes = vec![0, 1, 2, 3, 7, 8, 33, 1023, 4096];
    match (options.quick, devices.simulated_only()) {
        (true, _) => sizes = vec![0, 1, 7, 1023],
        (false, true) => sizes.push(20_011),
        (false, false) => sizes.extend([5003, 65_536, 100_003, 1 << 20, 4_000_037]),
    }
    sizes
}

fn filter<'a>(options: &'a Options, devices: &Devices, sizes: &'a [usize]) -> Filter<'a> {
    let (plain_one_in, one_in) = match (options.quick, devices.simulated_only()) {
        (true, _) => (4, 400),
        (false, true) => (1, 60),
        (false, false) => (1, 30),
    };
    // A simulated rank moves half a million elements a second; a CPU checks tens of millions.
    let affordable = match (options.sizes.is_empty(), devices.simulated_only()) {
        (false, _) => u64::MAX,
        (true, true) => 60_000,
        (true, false) => 2_000_000,
    };
    let operations = if options.ops.is_empty() { &parse::OPERATIONS[..] } else { &options.ops[..] };
    let dtypes = if options.dtypes.is_empty() { &DType::ALL[..] } else { &options.dtypes[..] };
    let (name, seed) = (options.case.as_deref(), options.common.seed);
    let crowd = |gpu: &GpuRef| gpu.hardware_queues() / LEAST_QUEUES;
    let scheduled_ranks = devices.gpus.iter().map(crowd).sum::<usize>() as u32;
    Filter {
        operations,
        dtypes,
        sizes,
        name,
        one_in,
        plain_one_in,
        affordable,
        seed,
        scheduled_ranks,
    }
}

/// A run in progress.
struct Session<'a> {
    options: &'a Options,
    devices: Devices,
    transport: Transport,
    rows: Vec<Value>,
    cases: usize,
    failed: usize,
}

impl Session<'_> {
    /// Runs the cases of one world size, one after the other on the same ranks: what a call leaves
    /// behind in a mailbox is what the next one finds.
    fn check_world(&mut self, world: u32, cases: &[Case]) -> Result<(), peerlane::Error> {
        let progress = output::progress(cases.len());
        let mut group = None;
        for family in cases.chunk_by(|a, b| a.family() == b.family()) {
            let name = family[0].family();
            progress.set_message(name.clone());
            let (mut tally, started) = (Tally::default(), Instant::now());
            for case in family {
                let mut current = match group.take() {
                    Some(group) => group,
                    None => self.connect(world)?,
                };
                if !current.can_run(case) {
                    group = Some(current);
                    progress.inc(1);
                    continue;
                }
                let verdict = current.run(case, self.options.common.seed);
                // After an error ranks may still wait for each other: the next case gets new ones.
                if verdict.is_ok() {
                    group = Some(current);
                }
                tally.cases += 1;
                match verdict {
                    Ok(Verdict::Right(error)) if round::is_measurable(case) => {
                        tally.error = tally.error.max(error);
                    }
                    Ok(Verdict::Right(_)) => {}
                    Ok(Verdict::Wrong(reason)) => {
                        progress.suspend(|| self.complain(case, &reason, &mut tally));
                    }
                    Err(error) => {
                        progress.suspend(|| self.complain(case, &error.to_string(), &mut tally));
                    }
                }
                progress.inc(1);
            }
            tally.time = started.elapsed();
            if tally.cases != 0 {
                progress.suspend(|| self.report(&name, &tally));
            }
        }
        progress.finish_and_clear();
        group.map_or(Ok(()), Group::close)
    }

    /// New ranks, on simulated GPUs of a new machine: theirs may have ended with an error, and what
    /// happens next must not depend on what happened before.
    fn connect(&mut self, world: u32) -> Result<Group, peerlane::Error> {
        // Every connection clears the memory of simulated GPUs, which takes its time.
        let simulated = self.devices.simulated_only();
        let staging_bytes = if simulated { 1 << 20 } else { STAGING_BYTES };
        let mut config = Config {
            deadline: Duration::from_secs(self.options.deadline),
            transport: self.transport,
            staging_bytes: Some(staging_bytes),
            ..Config::default()
        };
        if let Some(bytes) = self.options.mailbox {
            config.mailbox_bytes = bytes;
        }
        if self.devices.simulated_only() {
            let selection = self.devices.selection.clone();
            self.devices = Devices::open(Some(&selection), self.options.common.seed)?;
        }
        Group::connect(&self.devices.for_ranks(world), &config)
    }

    /// Counts a failed case and says how to see it again.
    fn complain(&mut self, case: &Case, reason: &str, tally: &mut Tally) {
        tally.failed += 1;
        self.failed += 1;
        if self.failed > SHOWN {
            return;
        }
        println!("FAILED {}: {reason}", case.name());
        let alone =
            self.connect(case.world).and_then(|mut g| g.run(case, self.options.common.seed));
        if matches!(alone, Ok(Verdict::Right(_))) {
            println!(
                "  passes alone; after the cases before it: {}",
                self.replay_world(case.world)
            );
        } else {
            println!("  {}", self.replay(case));
        }
    }

    /// The command that runs one case alone.
    fn replay(&self, case: &Case) -> String {
        let (world, count, name) = (case.world, case.count, case.name());
        format!("{} --ranks {world} --sizes {count} --case {name}", self.replay_start())
    }

    /// The command that runs all cases of a world size.
    fn replay_world(&self, world: u32) -> String {
        let mut command = format!("{} --ranks {world}", self.replay_start());
        let Options { sizes, ops, dtypes, case, quick, .. } = self.options;
        let mut add = |option: &str, values: Vec<String>| {
            if !values.is_empty() {
                command += &format!(" --{option} {}", values.join(","));
            }
        };
        add("sizes", sizes.iter().map(usize::to_string).collect());
        add("ops", ops.iter().map(|op| op.name().into()).collect());
        add("dtypes", dtypes.iter().map(|dtype| dtype.name().into()).collect());
        add("case", case.iter().cloned().collect());
        if *quick {
            command += " --quick";
        }
        command
    }

    fn replay_start(&self) -> String {
        let (devices, seed) = (&self.devices.selection, self.options.common.seed);
        let mailbox = self.options.mailbox.map_or_else(String::new, |b| format!(" --mailbox {b}"));
        format!("peerlane check --devices {devices} --seed {seed}{mailbox}")
    }

    fn report(&mut self, name: &str, tally: &Tally) {
        let backend = self.devices.backend_name();
        let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
        let Tally { cases, failed, error, time } = tally;
        self.cases += cases;
        let seconds = time.as_secs_f64();
        println!(
            "{name:<36} {backend:<4} {cases:>5} cases  max error {error:>8.1e}  {seconds:>6.2} s  {verdict}"
        );
        self.rows.push(json!({
            "family": name,
            "cases": cases,
            "failed": failed,
            "max_error": error,
            "seconds": seconds,
        }));
    }
}
