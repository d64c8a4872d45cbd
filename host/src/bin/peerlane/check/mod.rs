//! `peerlane check`: every collective against a CPU reference, on the GPUs or on simulated ones.
//!
//! Invariant: a case passes only if every byte of every tensor is what the reference says, ranks
//! and reruns agree bit for bit, the bytes around each tensor are untouched and no rank recorded an
//! error. A case that fails prints the command that runs it alone. What the ranks refuse before anything is
//! queued is left out and counted, never silently; where they can do everything, a refusal is a failure.

mod case;
mod list;
mod memory;
mod round;
mod run;

use crate::devices::Devices;
use crate::{Common, Outcome, output, parse};
use case::Case;
use list::Filter;
use peerlane::choice::Choice;
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
    /// Why the family's other cases were not run.
    left_out: Option<String>,
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
    let rows = Vec::new();
    let choices = serde_json::Map::new();
    let mut session =
        Session { options, devices, transport, rows, choices, failed: 0, cases: 0, left_out: 0 };
    let started = Instant::now();
    for world in worlds {
        session.check_world(world, &filter.cases(world))?;
    }
    let Session { devices, rows, choices, cases, failed, left_out, .. } = session;
    match (cases, left_out) {
        (0, 0) => return Err("check: no case matches --case, --ops, --ranks and --sizes".into()),
        (0, _) => return Err("check: nothing was checked: every family was left out".into()),
        _ => {}
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = started.elapsed().as_secs_f64();
    let without = if left_out == 0 { "".into() } else { format!(", {left_out} families left out") };
    println!(
        "check: {cases} cases, {failed} failed{without}, {seconds:.1} s on {devices}: {verdict}"
    );
    if let Some(path) = &options.common.json {
        let mut value = output::provenance(&devices);
        value["seed"] = json!(options.common.seed);
        value["transport"] = json!({ "asked": transport });
        value["choices"] = json!(choices);
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
    Filter { operations, dtypes, sizes, name, one_in, plain_one_in, affordable, seed }
}

/// A run in progress.
struct Session<'a> {
    options: &'a Options,
    devices: Devices,
    transport: Transport,
    rows: Vec<Value>,
    /// What calls take that do not choose for themselves, by number of ranks.
    choices: serde_json::Map<String, Value>,
    cases: usize,
    failed: usize,
    /// Families that the ranks refuse.
    left_out: usize,
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
            for (index, case) in family.iter().enumerate() {
                let mut current = match group.take() {
                    Some(group) => group,
                    None => {
                        let new = self.connect(world)?;
                        progress.suspend(|| self.show(world, new.choice()));
                        new
                    }
                };
                let verdict = current.run(case, self.options.common.seed);
                let allowed = self.may_refuse(case, &current);
                // After an error ranks may still wait for each other: the next case gets new ones.
                if verdict.is_ok() {
                    group = Some(current);
                }
                if let (Ok(Verdict::Refused(error)), true) = (&verdict, allowed) {
                    tally.left_out = Some(error.to_string());
                    progress.inc((family.len() - index) as u64);
                    break;
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
                    Ok(Verdict::Refused(error)) | Err(error) => {
                        progress.suspend(|| self.complain(case, &error.to_string(), &mut tally));
                    }
                }
                progress.inc(1);
            }
            tally.time = started.elapsed();
            progress.suspend(|| self.report(&name, &tally));
        }
        progress.finish_and_clear();
        group.map_or(Ok(()), Group::close)
    }

    /// Shows what calls take that do not choose for themselves, once for each number of ranks.
    fn show(&mut self, world: u32, choice: &Choice) {
        if self.choices.insert(format!("w{world}"), output::choices_json(choice)).is_none() {
            print!("# {world} ranks\n{}", output::choices(choice));
        }
    }

    /// Whether these ranks may refuse a case. Simulated ones that can do everything may not, or a library that
    /// refuses everything would pass.
    fn may_refuse(&self, case: &Case, group: &Group) -> bool {
        let all = self.devices.simulated_only() && group.is_able();
        case.is_demanding() && (case.is_impossible() || !all)
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
        let transport = match self.transport {
            Transport::Auto => String::new(),
            asked => format!(" --transport {asked}"),
        };
        format!("peerlane check --devices {devices} --seed {seed}{mailbox}{transport}")
    }

    fn report(&mut self, name: &str, tally: &Tally) {
        let backend = self.devices.backend_name();
        let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
        let Tally { cases, failed, error, time, left_out } = tally;
        self.cases += cases;
        self.left_out += usize::from(left_out.is_some());
        let seconds = time.as_secs_f64();
        let verdict = match left_out {
            Some(error) if *failed == 0 => format!("left out: {error}"),
            _ => verdict.to_owned(),
        };
        println!(
            "{name:<36} {backend:<4} {cases:>5} cases  max error {error:>8.1e}  {seconds:>6.2} s  {verdict}"
        );
        self.rows.push(json!({
            "family": name,
            "cases": cases,
            "failed": failed,
            "left_out": left_out,
            "max_error": error,
            "seconds": seconds,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Selection;

    fn options(transport: Transport) -> Options {
        Options {
            common: Common { devices: Some(Selection::Sim(2)), json: None, seed: 1 },
            ranks: vec![2],
            sizes: vec![7],
            ops: vec![Operation::AllReduce, Operation::Broadcast],
            dtypes: vec![DType::F32],
            quick: true,
            case: None,
            mailbox: None,
            transport: Some(transport),
            deadline: 10,
        }
    }

    fn session(options: &Options) -> Session<'_> {
        let devices = Devices::open(options.common.devices.as_ref(), 1).unwrap();
        let (transport, rows) = (options.transport.unwrap(), Vec::new());
        let choices = serde_json::Map::new();
        Session { options, devices, transport, rows, choices, cases: 0, failed: 0, left_out: 0 }
    }

    /// What became of the families whose names begin so.
    fn families(transport: Transport, name: &str) -> Vec<(usize, usize, bool)> {
        let options = Options { case: Some(name.into()), ..options(transport) };
        let mut session = session(&options);
        let sizes = options.sizes.clone();
        let cases = filter(&options, &session.devices, &sizes).cases(2);
        let plain: Vec<_> = cases.into_iter().filter(Case::is_plain).collect();
        session.check_world(2, &plain).unwrap();
        assert!(session.left_out == 0 || session.cases == 0);
        let row = |row: &Value| {
            let number = |key: &str| row[key].as_u64().unwrap() as usize;
            (number("cases"), number("failed"), row["left_out"].is_string())
        };
        session.rows.iter().map(row).collect()
    }

    #[test]
    fn copies_are_left_out_where_ranks_meet_in_host_memory_and_checked_elsewhere() {
        for (name, cases) in
            [("all_reduce/f32/native/copy-one-shot", 4), ("broadcast/bytes/copy-hub", 2)]
        {
            assert_eq!(families(Transport::Host, name), [(0, 0, true)], "{name}");
            assert_eq!(families(Transport::P2p, name), [(cases, 0, false)], "{name}");
        }
        // No transport lets copies round what they carry.
        assert_eq!(families(Transport::P2p, "all_reduce/f32/bf16/copy-ring"), [(0, 0, true)]);
        assert_eq!(families(Transport::Host, "broadcast/bytes/chain"), [(2, 0, false)]);
        assert_eq!(families(Transport::Host, "all_reduce/f32/native/registered"), [(0, 0, true)]);
    }

    #[test]
    fn only_ranks_that_cannot_may_refuse() {
        let case = |name: &str| {
            let options = Options { case: Some(name.into()), ..options(Transport::Auto) };
            let devices = Devices::open(options.common.devices.as_ref(), 1).unwrap();
            filter(&options, &devices, &[7]).cases(2)[0]
        };
        let (p2p, host) = (options(Transport::P2p), options(Transport::Host));
        let (mut p2p, mut host) = (session(&p2p), session(&host));
        let (able, unable) = (p2p.connect(2).unwrap(), host.connect(2).unwrap());
        for (name, demanding) in [
            ("all_reduce/f32/native/copy-ring", true),
            ("all_reduce/f32/native/registered", true),
            ("broadcast/bytes/copy-hub", true),
            ("all_reduce/f32/native/ring", false),
            ("broadcast/bytes/auto", false),
        ] {
            let case = case(name);
            assert_eq!(host.may_refuse(&case, &unable), demanding, "{name}");
            assert!(!p2p.may_refuse(&case, &able), "{name}");
        }
    }
}
