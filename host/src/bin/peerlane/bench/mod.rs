//! `peerlane bench`: how fast the collectives are, measured as nccl-tests measures, beside NCCL if
//! asked.
//!
//! Invariant: a size whose result is wrong is not timed, and fails the run. Every line says whether
//! it ran on real GPUs. Simulated times mean nothing: where the model knows a collective, its prediction
//! stands in their place, and the output says so.

pub(crate) mod job;
pub(crate) mod measure;
mod nccl;
mod ours;
pub(crate) mod plot;
mod predict;
pub(crate) mod rank;
mod registered;
pub(crate) mod report;
pub(crate) mod results;

use crate::devices::Devices;
use crate::output::Carrier;
use crate::parse::{self, Algorithms, Routes};
use crate::{Common, Outcome, drawing, output};
use clap::ValueEnum;
use job::Job;
use measure::Ranks;
use nccl::Nccl;
use ours::Ours;
use peerlane::choice::Choice;
use peerlane::model::Preset;
use peerlane::{
    Communicator, Config, DType, Operation, ReduceOp, STAGING_BYTES, Transport, Tuning, Wire,
};
use rank::{Fail, Rank, Timing};
use registered::Registered;
use results::{Results, Row, Series};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

/// Options of `peerlane bench`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// The collective: all_reduce, reduce_scatter, all_gather, broadcast, gather, barrier, or all. Dashes
    /// are as good as underscores.
    #[arg(value_name = "OP", value_parser = operations)]
    operations: Operations,
    /// Ranks. Left out: one per GPU. More ranks than GPUs share them round robin.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: Option<u32>,
    /// Smallest size, with K, M or G.
    #[arg(long, default_value = "1K", value_parser = parse::bytes)]
    min: usize,
    /// Largest size. Left out: cuda 64M, sim 64K, or 64M where times are predicted.
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
    /// How an all-reduce is carried out: auto, all, or one of packet, full, two-shot, staged, ring, tree,
    /// double-tree, hierarchical, and copy-two-shot to copy-one-shot.
    #[arg(long, default_value = "auto", value_parser = parse::algorithms)]
    algorithm: Algorithms,
    /// How a broadcast is carried out: auto, all, or one of direct, hub, chain, tree, double-tree, and
    /// copy-direct to copy-double-tree.
    #[arg(long, default_value = "auto", value_parser = parse::routes)]
    route: Routes,
    #[command(flatten)]
    choosing: Choosing,
    /// The machine that all-reduces and broadcasts on simulated GPUs are predicted for: nvswitch,
    /// nvlink-pairs, pcie or two-sockets.
    #[arg(long, default_value = "nvswitch", value_parser = parse::fabric)]
    fabric: Preset,
    /// Largest size that simulated GPUs carry out where times are predicted; larger ones are predicted only.
    #[arg(long, default_value = "64K", value_parser = parse::bytes)]
    check_max: usize,
    /// What carries data from rank to rank: auto, p2p or host. Left out: PEERLANE_TRANSPORT, else auto.
    #[arg(long, value_parser = parse::transport)]
    transport: Option<Transport>,
    /// Bytes of a rank's staging area, which algorithms and routes named copy-... need. Left out: 64M for those.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    staging: Option<usize>,
    /// Bytes that algorithms and routes named copy-... copy at once. Left out: half of a part, at least 4M.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    chunk: Option<usize>,
    /// All-reduce registered tensors, in place and without mailboxes, instead of by an algorithm.
    #[arg(long, conflicts_with = "algorithm")]
    registered: bool,
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
    let (mut ranks, used, choice) = plan.connect(&devices, rival.as_ref())?;
    println!("# transport: {} ({})", plan.config.transport, used.name());
    print!("{}", output::choices(&choice));
    let mut series = Vec::new();
    for job in plan.jobs() {
        match plan.measure(&job, &mut ranks, &devices) {
            // Of several ways, one that this communicator refuses does not stop the others.
            Err(error) if plan.has_more_ways(&job) && output::is_refusal(&error) => {
                println!("# not run: {error}");
            }
            measured => series.push(measured?),
        }
    }
    print!("{}", report::comparison(&series));
    let right = series.iter().flat_map(|s: &Series| &s.rows).all(|row| row.failure.is_none());
    let mut provenance = output::provenance(&devices).as_object().cloned().unwrap_or_default();
    let transport = json!({ "asked": plan.config.transport, "used": used.name() });
    provenance.insert("transport".into(), transport);
    provenance.insert("choices".into(), output::choices_json(&choice));
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
        let Options { fabric, check_max, .. } = plan.options;
        let checked = parse::bytes_name(*check_max);
        println!("# simulated GPUs: the results are checked, but the times mean nothing");
        println!(
            "# all-reduce and broadcast: times of a model of {fabric}; checked up to {checked}"
        );
    }
}

/// The options with their defaults filled in.
struct Plan<'a> {
    options: &'a Options,
    world: u32,
    sim: bool,
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
        let Operations(operations) = &options.operations;
        if options.registered && operations[..] != [Operation::AllReduce] {
            let names: Vec<_> = operations.iter().map(|op| op.name()).collect();
            return Err(
                format!("--registered: expected all_reduce, got {}", names.join(", ")).into()
            );
        }
        let shared = world as usize > devices.gpus.len();
        if options.compare.is_some() && (sim || shared) {
            return Err(format!(
                "--compare nccl: expected one real GPU per rank, got {world} ranks on {devices}"
            )
            .into());
        }
        let usual = if sim { 2 } else { 20 };
        let calls = options.calls.unwrap_or(usual) as usize;
        let replays = options.replays.unwrap_or(usual) as usize;
        let timing = Timing { calls, replays, eager: options.eager };
        let config = Plan::config(options, sim)?;
        let plan = Plan { options, world, sim, timing, config };
        plan.jobs().iter().try_for_each(|job| plan.sizes(job).map(|_| ()))?;
        Ok(plan)
    }

    /// What is asked for, without sizes.
    fn jobs(&self) -> Vec<Job> {
        let Options { dtype, wire, op_type: reduce, root, .. } = *self.options;
        let (Algorithms(algorithms), Routes(routes)) =
            (&self.options.algorithm, &self.options.route);
        let (algorithm, route, world, count) = (None, None, self.world, 0);
        let job = |op| Job { op, dtype, wire, reduce, algorithm, route, root, world, count };
        let ways = |op: &Operation| match op {
            Operation::AllReduce => {
                algorithms.iter().map(|way| Job { algorithm: *way, ..job(*op) }).collect()
            }
            Operation::Broadcast => {
                routes.iter().map(|way| Job { route: *way, ..job(*op) }).collect()
            }
            _ => vec![job(*op)],
        };
        self.options.operations.0.iter().flat_map(ways).collect()
    }

    /// Whether the job's algorithm or route is one of several.
    fn has_more_ways(&self, job: &Job) -> bool {
        match job.op {
            Operation::AllReduce => self.options.algorithm.0.len() > 1,
            Operation::Broadcast => self.options.route.0.len() > 1,
            _ => false,
        }
    }

    /// Whether the job's times are predicted.
    fn is_predicted(&self, job: &Job) -> bool {
        self.sim && !self.options.registered && predict::knows(job)
    }

    /// The largest size of a job.
    fn max(&self, job: &Job) -> usize {
        let usual = if self.sim && !self.is_predicted(job) { 64 << 10 } else { 64 << 20 };
        self.options.max.unwrap_or(usual)
    }

    /// The sizes of a job. A barrier has one: none.
    fn sizes(&self, job: &Job) -> Result<Vec<usize>, String> {
        if job.op == Operation::Barrier {
            return Ok(vec![0]);
        }
        let factor = self.options.factor.unwrap_or(if self.sim { 4 } else { 2 }) as usize;
        parse::sizes(1, self.options.min, self.max(job), factor)
    }

    /// Whether the job, with its size, is carried out.
    fn is_carried_out(&self, job: &Job) -> bool {
        !self.is_predicted(job) || job.bytes() <= self.options.check_max
    }

    fn config(options: &Options, sim: bool) -> peerlane::Result<Config> {
        let Options { staging, chunk: chunk_bytes, transport, .. } = *options;
        let mut algorithms = options.algorithm.0.iter().flatten();
        let mut routes = options.route.0.iter().flatten();
        let copies =
            algorithms.any(|way| way.is_scheduled()) || routes.any(|way| way.is_scheduled());
        let wanted = copies.then_some(if sim { 1 << 20 } else { STAGING_BYTES });
        let config = options.choosing.config()?;
        let transport = transport.unwrap_or(config.transport);
        Ok(Config { transport, staging_bytes: staging.or(wanted), chunk_bytes, ..config })
    }

    /// Makes the ranks, with buffers for the largest job; says what carries their data, and what they
    /// choose.
    fn connect(
        &self,
        devices: &Devices,
        rival: Option<&Arc<Nccl>>,
    ) -> Result<(Ranks, Carrier, Choice), Fail> {
        let gpus = devices.for_ranks(self.world);
        let mut sized = Vec::new();
        for job in self.jobs() {
            sized.extend(self.sizes(&job)?.into_iter().map(|size| job.sized(size)));
        }
        let (src, dst) = sized
            .iter()
            .filter(|job| self.is_carried_out(job))
            .fold((0, 0), |(src, dst), job| (src.max(job.src_bytes()), dst.max(job.dst_bytes())));
        let mut ranks = Vec::new();
        let communicators = Communicator::connect(&gpus, &self.config)?;
        let (used, choice) = (Carrier::of(&communicators[0])?, communicators[0].choice().clone());
        for communicator in &communicators {
            ranks.push(Rank::new(communicator.rank(), communicator.gpu().clone(), src, dst)?);
        }
        if self.options.registered {
            let outputs: Vec<_> = ranks.iter().map(Rank::output).collect();
            // SAFETY: a rank's buffers go when nothing is queued any more; within a process nothing else maps
            // them.
            let all = unsafe { Registered::all(communicators, &outputs, dst)? };
            for (rank, contender) in ranks.iter_mut().zip(all) {
                rank.contenders.push(Box::new(contender));
            }
        } else {
            for (rank, communicator) in ranks.iter_mut().zip(communicators) {
                rank.contenders.push(Box::new(Ours(communicator)));
            }
        }
        if let Some(nccl) = rival {
            let ordinals: Vec<_> = gpus.iter().map(|gpu| gpu.properties().ordinal).collect();
            for (rank, contender) in ranks.iter_mut().zip(nccl.connect(&ordinals)?) {
                rank.contenders.push(Box::new(contender));
            }
        }
        Ok((Ranks { ranks, threads: !devices.simulated_only() }, used, choice))
    }

    fn measure(&self, job: &Job, ranks: &mut Ranks, devices: &Devices) -> Result<Series, Fail> {
        let mut series = self.series(job);
        println!("#\n# {}", series.title());
        let compared = self.options.compare.is_some();
        let predicted = self.is_predicted(job);
        let head = if predicted { report::predicted_head() } else { report::line_head(compared) };
        println!("{head}");
        let sizes = self.sizes(job)?;
        let progress = output::progress(sizes.len());
        for size in sizes {
            progress.set_message(format!("{} {}", job.op.name(), parse::bytes_name(size)));
            let row = self.measure_size(&job.sized(size), ranks)?;
            progress.suspend(|| println!("{}", report::line(&row, devices.backend_name())));
            progress.inc(1);
            series.rows.push(row);
        }
        progress.finish_and_clear();
        Ok(series)
    }

    fn measure_size(&self, job: &Job, ranks: &mut Ranks) -> Result<Row, Fail> {
        let checked = self.is_carried_out(job);
        let verdict = match checked {
            true => ranks.verify(job, &job.inputs(self.options.common.seed))?,
            false => Ok(()),
        };
        let mut row = Row {
            bytes: job.bytes(),
            count: job.count,
            ours: None,
            nccl: None,
            predicted: None,
            checked,
            failure: verdict.err(),
        };
        if row.failure.is_some() {
            return Ok(row);
        }
        if self.is_predicted(job) {
            row.predicted = predict::predict(&ranks.settled(0, job), self.options.fabric);
        } else {
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
            algorithm: match job.op {
                _ if self.options.registered => "direct".into(),
                Operation::Broadcast => parse::route_name(job.route).into(),
                _ => parse::algorithm_name(job.algorithm).into(),
            },
            root: job.root,
            world: job.world,
            mode: if self.timing.eager { "eager" } else { "graph" }.into(),
            calls: self.timing.calls,
            replays: self.timing.replays,
            fabric: self.is_predicted(job).then(|| self.options.fabric.to_string()),
            rows: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
