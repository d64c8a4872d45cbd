//! `peerlane bench`: how fast the collectives are, measured as nccl-tests measures, beside NCCL if
//! asked.
//!
//! Invariant: a size whose result is wrong is not timed, and fails the run. Every line says whether
//! it ran on real GPUs; simulated times mean nothing and the output says so.

pub(crate) mod job;
pub(crate) mod measure;
mod nccl;
mod ours;
mod plot;
pub(crate) mod rank;
pub(crate) mod report;
mod results;

use crate::devices::Devices;
use crate::parse::{self, Choice};
use crate::{Common, Outcome, drawing, output};
use clap::ValueEnum;
use job::Job;
use measure::Ranks;
use nccl::Nccl;
use ours::Ours;
use peerlane::{Communicator, Config, DType, Operation, ReduceOp, Tuning, Wire};
use rank::{Fail, Rank, Timing};
use results::{Results, Row, Series};
use std::path::PathBuf;
use std::sync::Arc;

/// Options of `peerlane bench`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// The collective: all_reduce, reduce_scatter, all_gather, broadcast, gather, barrier, or all.
    #[arg(value_name = "OP", value_parser = operations)]
    operations: Operations,
    /// Ranks. Left out: one per GPU. More ranks than GPUs share them round robin.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: Option<u32>,
    /// Smallest size, with K, M or G.
    #[arg(long, default_value = "1K", value_parser = parse::bytes)]
    min: usize,
    /// Largest size. Left out: cuda 64M, sim 64K.
    #[arg(long, value_parser = parse::bytes)]
    max: Option<usize>,
    /// Each size is this many times the one before. Left out: cuda 2, sim 4.
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..))]
    factor: Option<u64>,
    /// Element type: f32, f16 or bf16.
    #[arg(long, default_value = "bf16", value_parser = parse::dtype)]
    dtype: DType,
    /// How f32 travels: native or bf16. (NCCL always moves f32 as it is.)
    #[arg(long, default_value = "native", value_parser = parse::wire)]
    wire: Wire,
    /// How values are combined: sum, max, min or avg.
    #[arg(long, default_value = "sum", value_parser = parse::reduce_op)]
    op_type: ReduceOp,
    /// How an all-reduce is carried out: auto, or the name of an algorithm.
    #[arg(long, default_value = "auto", value_parser = parse::algorithm)]
    algorithm: Choice,
    #[command(flatten)]
    choosing: Choosing,
    /// Root of broadcast and gather.
    #[arg(long, default_value_t = 0)]
    root: u32,
    /// Issue calls one by one instead of replaying a graph.
    #[arg(long)]
    eager: bool,
    /// Calls in a sample. Left out: cuda 20, sim 2.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    calls: Option<u64>,
    /// Samples. Left out: cuda 20, sim 2.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    replays: Option<u64>,
    /// Measure this library too, in turns with Peerlane, on the same buffers.
    #[arg(long)]
    compare: Option<Rival>,
    /// Draw time against size into this file, .svg or .png.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write the results to this file as a Markdown table.
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
}

/// What `auto` means. Left out, the environment says (docs/tuning.md).
#[derive(clap::Args, Clone, Debug)]
struct Choosing {
    /// The table of measured choices: auto for the one in the cache, off for none, or a file.
    #[arg(long, value_name = "FILE")]
    tuning: Option<Tuning>,
    /// One algorithm for all sizes.
    #[arg(long)]
    fixed: bool,
}

impl Choosing {
    fn config(&self) -> peerlane::Result<Config> {
        let mut config = Config::from_environment()?;
        if let Some(tuning) = &self.tuning {
            config.tuning = tuning.clone();
        }
        config.fixed |= self.fixed;
        Ok(config)
    }
}

/// What Peerlane can be compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rival {
    /// NVIDIA's NCCL, found at run time.
    Nccl,
}

/// The value of `OP`.
#[derive(Clone, Debug)]
struct Operations(Vec<Operation>);

fn operations(text: &str) -> Result<Operations, String> {
    if text == "all" {
        return Ok(Operations(parse::OPERATIONS.into()));
    }
    let one = parse::operation(text).map_err(|error| format!("{error}; or all"))?;
    Ok(Operations(vec![one]))
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Outcome {
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let plan = Plan::new(options, &devices)?;
    // A plot that cannot be drawn should be known before, not after, the measurement.
    options.plot.as_deref().map_or(Ok(()), drawing::prepare)?;
    let rival = options.compare.map(|Rival::Nccl| Nccl::load()).transpose()?;
    let nccl_version = rival.as_ref().map(|nccl| nccl.version()).transpose()?;
    print_head(&plan, &devices, nccl_version.as_deref());
    let mut ranks = plan.connect(&devices, rival.as_ref())?;
    let mut series = Vec::new();
    for operation in &options.operations.0 {
        series.push(plan.measure(*operation, &mut ranks, &devices)?);
    }
    let right = series.iter().flat_map(|s: &Series| &s.rows).all(|row| row.failure.is_none());
    let provenance = output::provenance(&devices).as_object().cloned().unwrap_or_default();
    let results = Results { provenance, nccl_version, series };
    if let Some(path) = &options.common.json {
        output::write_json(path, &serde_json::to_value(&results)?)?;
    }
    if let Some(path) = &options.table {
        report::write(path, &report::markdown(&results))?;
    }
    if let Some(path) = &options.plot {
        plot::draw(path, &results)?;
    }
    Ok(right)
}

fn print_head(plan: &Plan<'_>, devices: &Devices, nccl: Option<&str>) {
    let Timing { calls, replays, eager } = plan.timing;
    let how = if eager { "issued one by one" } else { "in a graph" };
    println!("# {} ranks on {devices}; {calls} calls {how}, {replays} samples", plan.world);
    println!("# time: microseconds per call of the slowest rank, median and 99th percentile");
    if let Some(version) = nccl {
        println!(
            "# NCCL {version}, in turns with Peerlane (A B B A) on the same buffers and streams"
        );
    }
    if devices.simulated_only() {
        println!("# simulated GPUs: the results are checked, but the times mean nothing");
    }
}

/// The options with their defaults filled in.
struct Plan<'a> {
    options: &'a Options,
    world: u32,
    sizes: Vec<usize>,
    timing: Timing,
    config: Config,
}

impl Plan<'_> {
    fn new<'a>(options: &'a Options, devices: &Devices) -> Result<Plan<'a>, Fail> {
        let sim = devices.simulated_only();
        let world = options.ranks.unwrap_or(devices.gpus.len() as u32);
        if options.root >= world {
            return Err(
                format!("--root: expected a rank below {world}, got {}", options.root).into()
            );
        }
        let (min, max) =
            (options.min, options.max.unwrap_or(if sim { 64 << 10 } else { 64 << 20 }));
        if min == 0 || min > max {
            return Err(format!("--min: expected 1 to {max}, got {min}").into());
        }
        let shared = world as usize > devices.gpus.len();
        if options.compare.is_some() && (sim || shared) {
            return Err(format!(
                "--compare nccl: expected one real GPU per rank, got {world} ranks on {devices}"
            )
            .into());
        }
        let factor = options.factor.unwrap_or(if sim { 4 } else { 2 }) as usize;
        let next = |size: &usize| size.checked_mul(factor).filter(|next| *next <= max);
        let sizes = std::iter::successors(Some(min), next).collect();
        let usual = if sim { 2 } else { 20 };
        let calls = options.calls.unwrap_or(usual) as usize;
        let replays = options.replays.unwrap_or(usual) as usize;
        let timing = Timing { calls, replays, eager: options.eager };
        Ok(Plan { options, world, sizes, timing, config: options.choosing.config()? })
    }

    fn job(&self, op: Operation) -> Job {
        let Options { dtype, wire, op_type: reduce, algorithm, root, .. } = *self.options;
        let Choice(algorithm) = algorithm;
        Job { op, dtype, wire, reduce, algorithm, root, world: self.world, count: 0 }
    }

    /// Makes the ranks, with buffers for the largest job.
    fn connect(&self, devices: &Devices, rival: Option<&Arc<Nccl>>) -> Result<Ranks, Fail> {
        let gpus = devices.for_ranks(self.world);
        let largest = *self.sizes.last().unwrap_or(&0);
        let jobs = self.options.operations.0.iter().map(|op| self.job(*op).sized(largest));
        let (src, dst) = jobs
            .fold((0, 0), |(src, dst), job| (src.max(job.src_bytes()), dst.max(job.dst_bytes())));
        let mut ranks = Vec::new();
        for communicator in Communicator::connect(&gpus, &self.config)? {
            let mut rank = Rank::new(communicator.rank(), communicator.gpu().clone(), src, dst)?;
            rank.contenders.push(Box::new(Ours(communicator)));
            ranks.push(rank);
        }
        if let Some(nccl) = rival {
            let ordinals: Vec<_> = gpus.iter().map(|gpu| gpu.properties().ordinal).collect();
            for (rank, contender) in ranks.iter_mut().zip(nccl.connect(&ordinals)?) {
                rank.contenders.push(Box::new(contender));
            }
        }
        Ok(Ranks { ranks, threads: !devices.simulated_only() })
    }

    fn measure(&self, op: Operation, ranks: &mut Ranks, devices: &Devices) -> Result<Series, Fail> {
        let job = self.job(op);
        let mut series = self.series(&job);
        println!("#\n# {}", series.title());
        println!("{}", report::line_head(self.options.compare.is_some()));
        // A barrier has one size: none.
        let sizes = if op == Operation::Barrier { &[0] } else { &self.sizes[..] };
        let progress = output::progress(sizes.len());
        for size in sizes {
            progress.set_message(format!("{} {}", op.name(), parse::bytes_name(*size)));
            let row = self.measure_size(&job.sized(*size), ranks)?;
            progress.suspend(|| println!("{}", report::line(&row, devices.backend_name())));
            progress.inc(1);
            series.rows.push(row);
        }
        progress.finish_and_clear();
        Ok(series)
    }

    fn measure_size(&self, job: &Job, ranks: &mut Ranks) -> Result<Row, Fail> {
        let inputs = job.inputs(self.options.common.seed);
        let mut row = Row {
            bytes: job.bytes(),
            count: job.count,
            ours: None,
            nccl: None,
            failure: ranks.verify(job, &inputs)?.err(),
        };
        if row.failure.is_none() {
            let times = ranks.time(job, &self.timing)?;
            let sum_up = |samples| results::Timing::new(samples, job.bytes(), job.bus_factor());
            let mut times = times.into_iter().map(sum_up);
            (row.ours, row.nccl) = (times.next(), times.next());
        }
        Ok(row)
    }

    fn series(&self, job: &Job) -> Series {
        Series {
            op: job.op.name().into(),
            dtype: job.dtype.name().into(),
            wire: parse::wire_name(job.wire).into(),
            reduce: job.reduce.name().into(),
            algorithm: parse::algorithm_name(job.algorithm).into(),
            root: job.root,
            world: job.world,
            mode: if self.timing.eager { "eager" } else { "graph" }.into(),
            calls: self.timing.calls,
            replays: self.timing.replays,
            rows: Vec::new(),
        }
    }
}
