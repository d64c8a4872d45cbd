//! `peerlane tune`: measures every algorithm and every route that is one kernel on this machine and keeps a table of what
//! is fastest at each size (docs/tuning.md).
//!
//! Invariant: a table is written whole or not at all, and not if a result was wrong. Simulated times
//! mean nothing: their table goes only where it was told to go, and nobody finds it by himself.

mod candidate;
mod report;
mod sweep;
mod table;

use crate::bench::job::Job;
use crate::bench::measure::Ranks;
use crate::bench::rank::{Fail, Rank};
use crate::devices::Devices;
use crate::output::Carrier;
use crate::parse::{self, bytes_name};
use crate::{Common, Outcome, output};
use candidate::{Candidate, Way};
use peerlane::choice::{Choice, TuningTable};
use peerlane::gpu::GpuRef;
use peerlane::links::{Cache, Key};
use peerlane::{Communicator, Config, Transport, Tuning};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use sweep::Sweep;

/// Options of `peerlane tune`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Ranks to tune for. Left out: one per GPU. More ranks than GPUs share them round robin.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=16))]
    ranks: Option<u32>,
    /// How long it may take.
    #[arg(long, default_value = "60s", value_name = "SECONDS", value_parser = parse::seconds)]
    budget: Duration,
    /// Smallest size, with K, M or G.
    #[arg(long, default_value = "1K", value_parser = parse::bytes)]
    min: usize,
    /// Largest size. Left out: cuda 64M, sim 64K.
    #[arg(long, value_parser = parse::bytes)]
    max: Option<usize>,
    /// Write the table to this file instead of the cache.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a table of simulated GPUs to the cache too, where it is found by its name only.
    #[arg(long)]
    force: bool,
    /// Say what would be measured and where the table would go, and measure nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What is to be done.
struct Plan {
    world: u32,
    gpus: Vec<GpuRef>,
    sizes: Vec<usize>,
    key: Key,
    /// Where the table goes, if anywhere.
    place: Option<PathBuf>,
    /// Why it goes nowhere.
    nowhere: Option<String>,
}

/// Measures, prints and keeps.
pub(crate) fn run(options: &Options) -> Outcome {
    let begin = Instant::now();
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let plan = Plan::new(options, &devices)?;
    plan.print(&devices, options.budget);
    if options.dry_run {
        return Ok(true);
    }
    let ways = Way::all();
    let transport = Config::from_environment()?.transport;
    let (mut ranks, default, used) = connect(&plan, &ways, transport, !devices.simulated_only())?;
    println!("# transport: {} ({})", transport, used.name());
    let mut sweep = Sweep {
        ranks: &mut ranks,
        world: plan.world,
        sizes: &plan.sizes,
        calls: if devices.simulated_only() { 2 } else { 20 },
        seed: options.common.seed,
        begin,
        budget: options.budget,
        default: &default,
    };
    let series = sweep.run(&ways)?;
    drop(ranks);
    let took = begin.elapsed();
    let right = series.iter().all(|series| series.failures.is_empty());
    for series in &series {
        print!("{}", report::text(series, &ways));
    }
    println!("# {:.1} s of {:.0} s", took.as_secs_f64(), options.budget.as_secs_f64());
    let simulated = devices.simulated_only();
    let host = used != Carrier::P2p;
    let fate = match &plan.place {
        Some(_) if !right => Fate::Nowhere("a result was wrong".into()),
        Some(path) => {
            let table = table::of(&series, &ways, &default, &plan, (simulated, host));
            table.write(path).map_or_else(Fate::Failed, |()| Fate::Written(path))
        }
        None => Fate::Nowhere(plan.nowhere.clone().unwrap_or_default()),
    };
    if let Some(path) = &options.common.json {
        let mut value = output::provenance(&devices);
        value["tuning"] = report::json(&series, &ways);
        value["tuning"]["world"] = plan.world.into();
        value["tuning"]["seconds"] = took.as_secs_f64().into();
        value["tuning"]["budget"] = options.budget.as_secs_f64().into();
        value["tuning"]["table"] = fate.path().into();
        value["tuning"]["no_table"] = fate.reason().into();
        value["transport"] = json!({ "asked": transport, "used": used.name() });
        output::write_json(path, &value)?;
    }
    match fate {
        Fate::Written(path) => println!("# table: {}", path.display()),
        Fate::Nowhere(reason) => println!("# no table is written: {reason}"),
        Fate::Failed(reason) => return Err(reason.into()),
    }
    Ok(right)
}

/// What became of the table. Whatever it is, the results are written where `--json` says.
enum Fate<'a> {
    Written(&'a Path),
    /// Why it goes nowhere.
    Nowhere(String),
    /// Why it could not be written.
    Failed(String),
}

impl Fate<'_> {
    fn path(&self) -> Option<String> {
        match self {
            Fate::Written(path) => Some(path.display().to_string()),
            _ => None,
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Fate::Written(_) => None,
            Fate::Nowhere(reason) | Fate::Failed(reason) => Some(reason),
        }
    }
}

impl Plan {
    fn new(options: &Options, devices: &Devices) -> Result<Plan, Fail> {
        let sim = devices.simulated_only();
        let world = options.ranks.unwrap_or(devices.gpus.len() as u32);
        if world < 2 {
            return Err("--ranks: expected 2 or more: one rank has nothing to choose, got 1".into());
        }
        let max = options.max.unwrap_or(if sim { 64 << 10 } else { 64 << 20 });
        let factor = if sim { 4 } else { 2 };
        let sizes = parse::sizes(sweep::DTYPE.bytes(), options.min, max, factor)?;
        let gpus = devices.for_ranks(world);
        let (key, nowhere) = key(&gpus, devices);
        let cached = || -> Result<PathBuf, String> {
            if let Some(reason) = nowhere.filter(|_| !options.force) {
                return Err(reason);
            }
            Ok(TuningTable::place(&Cache::of_user()?, &key))
        };
        let place = options.output.clone().map_or_else(cached, Ok);
        let (place, nowhere) = match place {
            Ok(place) => (Some(place), None),
            Err(reason) => (None, Some(reason)),
        };
        Ok(Plan { world, gpus, sizes, key, place, nowhere })
    }

    fn print(&self, devices: &Devices, budget: Duration) {
        println!("# {} ranks on {devices}; at most {:.0} s", self.world, budget.as_secs_f64());
        let sizes: Vec<_> = self.sizes.iter().map(|size| bytes_name(*size)).collect();
        println!("# all_reduce bf16 sum and broadcast; {} sizes: {}", sizes.len(), sizes.join(" "));
        match (&self.place, &self.nowhere) {
            (Some(path), _) => println!("# the table goes to {}", path.display()),
            (None, reason) => println!("# no table: {}", reason.as_deref().unwrap_or_default()),
        }
        if devices.simulated_only() {
            println!("# simulated GPUs: the results are checked, but the times mean nothing");
        }
    }
}

/// The key of a table for these ranks, and why a table for it does not belong in the cache.
fn key(gpus: &[GpuRef], devices: &Devices) -> (Key, Option<String>) {
    let found = devices.driver().and_then(|driver| Key::of(gpus, &driver));
    let simulated = || {
        let identity = |gpu: &GpuRef| {
            let properties = gpu.properties();
            (properties.uuid.clone(), properties.pci_bus_id.clone())
        };
        Key::simulated(gpus.iter().map(identity).collect())
    };
    match found {
        Some(key) => (key, None),
        None => (simulated(), Some("the GPUs are simulated; --output FILE writes one".into())),
    }
}

/// Makes the ranks with buffers for the largest size and a contender for each way; and says what is
/// chosen without a table, and what carries their data.
fn connect(
    plan: &Plan,
    ways: &[Way],
    transport: Transport,
    threads: bool,
) -> Result<(Ranks, Choice, Carrier), Fail> {
    let config = Config { tuning: Tuning::Off, transport, ..Config::default() };
    let communicators = Communicator::connect(&plan.gpus, &config)?;
    let default = communicators[0].choice().clone();
    let used = Carrier::of(&communicators[0])?;
    let largest = plan.sizes.last().copied().unwrap_or_default();
    let jobs = sweep::OPERATIONS.map(|op| sweep::job(op, plan.world).sized(largest));
    let bytes = |of: fn(&Job) -> usize| jobs.iter().map(of).max().unwrap_or_default();
    let (src, dst) = (bytes(Job::src_bytes), bytes(Job::dst_bytes));
    let mut ranks = Vec::new();
    for communicator in communicators {
        let gpu = communicator.gpu().clone();
        let mut rank = Rank::new(communicator.rank(), gpu, src, dst)?;
        // Small numbers, whatever the element type: what is not checked is not to overflow either.
        rank.fill(0x3c, src, dst)?;
        let communicator = Arc::new(Mutex::new(communicator));
        for way in ways {
            let communicator = communicator.clone();
            rank.contenders.push(Box::new(Candidate { communicator, way: *way }));
        }
        ranks.push(rank);
    }
    Ok((Ranks { ranks, threads }, default, used))
}

#[cfg(test)]
mod tests;
