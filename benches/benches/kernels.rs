//! Each kernel by itself on a real GPU, and pairs of GPUs bouncing a message.
//!
//! Kernels run back to back inside a CUDA graph, between two events. Tensors stay where they are
//! from one launch to the next, so those that fit the L2 cache are measured in it: 50 MB on an
//! H100 or H200. The rate counts memory read and written; `copy` is the driver's copy within the
//! GPU, which no kernel of two streams can beat by much.
//!
//! `cargo bench -p peerlane-benches --bench kernels [-- PART]` times what has PART in its name.
//! PEERLANE_BENCH_JSON=FILE writes the rows to FILE as well.

use peerlane::gpu::{GpuRef, cuda};
use peerlane_benches::real_gpus;
use peerlane_benches::rig::{Rig, Timing};
use peerlane_benches::solo::{Pair, Solo, queue_barrier, queue_nothing};
use peerlane_benches::table::{
    PairRow, Report, SoloRow, pair_header, pair_line, solo_header, solo_line,
};
use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

/// Bytes of the tensors.
const SIZES: [usize; 6] = [16 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20];
/// Packets are for small messages; larger ones are no use case.
const PACKET_SIZES: usize = 2;
/// Bytes of all launches in a graph together, so that a sample of any size takes a similar time.
const GRAPH_BYTES: usize = 1 << 30;
/// Fewest and most launches in a graph.
const CALLS: (usize, usize) = (8, 100);
/// Graphs or probes timed, of which the median counts.
const REPEATS: u32 = 20;
/// Rounds of a probe.
const ROUNDS: u32 = 1000;
/// What a pair's rigs need besides mailboxes.
const PAIR_BYTES: usize = 4096;

fn main() -> ExitCode {
    // SAFETY: nothing else has started a thread yet.
    unsafe { cuda::prepare_environment() };
    let arguments: Vec<String> = env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("kernels: skipped: only cargo bench runs it");
        return ExitCode::SUCCESS;
    }
    let gpus = match real_gpus() {
        Ok(gpus) => gpus,
        Err(reason) => {
            println!("kernels: skipped: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    let part = arguments.into_iter().find(|argument| !argument.starts_with('-'));
    match run(&gpus, part.as_deref().unwrap_or("")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures everything with `part` in its name, prints it and writes it where it was asked for.
fn run(gpus: &[GpuRef], part: &str) -> Result<(), String> {
    let report = Report {
        command: "cargo bench -p peerlane-benches --bench kernels".into(),
        driver: cuda::version().map_err(|error| error.to_string())?,
        gpus: gpus.iter().map(|gpu| gpu.properties().clone()).collect(),
        solo: alone(&gpus[0], part).map_err(|error| error.to_string())?,
        pairs: pairs(gpus, part),
    };
    match env::var_os("PEERLANE_BENCH_JSON").map(PathBuf::from) {
        Some(path) => report.write(&path),
        None => Ok(()),
    }
}

/// Kernels alone on `gpu`.
fn alone(gpu: &GpuRef, part: &str) -> peerlane::Result<Vec<SoloRow>> {
    println!("{} (cuda)\n{}", gpu.properties().name, solo_header());
    let rig = Rig::new(gpu, SIZES[SIZES.len() - 1])?;
    let mut rows = Vec::new();
    let mut add = |row: SoloRow| {
        println!("{}", solo_line(&row));
        rows.push(row);
    };
    type Queue = fn(&Rig) -> peerlane::Result<()>;
    for (name, queue) in [("nothing", queue_nothing as Queue), ("barrier_of_one", queue_barrier)] {
        if name.contains(part) {
            let timing = rig.time(CALLS.1 as u32, REPEATS, || queue(&rig))?;
            let (name, bytes) = (name.into(), 0);
            add(SoloRow { name, bytes, blocks: 1, threads: 32, timing, gb_per_s: 0.0 });
        }
    }
    for bytes in SIZES.into_iter().filter(|_| "copy".contains(part)) {
        // SAFETY: the rig's tensors have the largest size.
        let timing = rig.time(calls(bytes), REPEATS, || unsafe { rig.copy(bytes) })?;
        let gb_per_s = SoloRow::rate(2 * bytes as u64, timing);
        add(SoloRow { name: "copy".into(), bytes, blocks: 0, threads: 0, timing, gb_per_s });
    }
    for solo in Solo::all().into_iter().filter(|solo| solo.kernel.symbol().contains(part)) {
        let packets = solo.format.payload() < peerlane::Format::Full.payload();
        for bytes in SIZES.into_iter().take(if packets { PACKET_SIZES } else { SIZES.len() }) {
            let grid = solo.grid(&rig, bytes);
            // SAFETY: the rig's tensors have the largest size.
            let timing = rig.time(calls(bytes), REPEATS, || unsafe { solo.queue(&rig, bytes) })?;
            add(SoloRow {
                name: solo.kernel.symbol().into(),
                bytes,
                blocks: grid.blocks,
                threads: grid.threads,
                timing,
                gb_per_s: SoloRow::rate(solo.traffic * bytes as u64, timing),
            });
        }
    }
    Ok(rows)
}

/// Launches in one graph.
fn calls(bytes: usize) -> u32 {
    (GRAPH_BYTES / bytes).clamp(CALLS.0, CALLS.1) as u32
}

/// Every two GPUs, and before them two ranks on the first one. What fails is a row too: one broken
/// link says nothing about the others.
fn pairs(gpus: &[GpuRef], part: &str) -> Vec<PairRow> {
    println!("{}", pair_header());
    let others = (0..gpus.len()).flat_map(|from| (from + 1..gpus.len()).map(move |to| (from, to)));
    let mut rows = Vec::new();
    for (from, to) in std::iter::once((0, 0)).chain(others) {
        let (from, to) = (&gpus[from], &gpus[to]);
        for (name, measure) in [("barrier_of_two", barrier as Measure), ("probe", probe)] {
            if !name.contains(part) {
                continue;
            }
            let timing = pair([from, to], measure).map_err(|error| error.to_string());
            let ordinals = [from, to].map(|gpu| gpu.properties().ordinal);
            let row = PairRow { gpus: ordinals, name, timing };
            println!("{}", pair_line(&row));
            rows.push(row);
        }
    }
    rows
}

type Measure = fn(&mut Pair<'_>) -> peerlane::Result<Timing>;

fn barrier(pair: &mut Pair<'_>) -> peerlane::Result<Timing> {
    pair.barrier(CALLS.1 as u32, REPEATS)
}

fn probe(pair: &mut Pair<'_>) -> peerlane::Result<Timing> {
    pair.probe(ROUNDS, REPEATS)
}

/// Measures two fresh rigs: a probe that failed leaves its mailboxes unusable.
fn pair(gpus: [&GpuRef; 2], measure: Measure) -> peerlane::Result<Timing> {
    let rigs = [Rig::new(gpus[0], PAIR_BYTES)?, Rig::new(gpus[1], PAIR_BYTES)?];
    measure(&mut Pair::new([&rigs[0], &rigs[1]])?)
}
