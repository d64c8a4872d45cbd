//! Millions of calls of all kinds, every result compared, while the GPUs compute, replay graphs and run short of
//! memory.
//!
//! Invariant: every byte of every rank's memory is compared after each pass over a script: with what the CPU reference
//! says the first time, and with the bits of that first time afterwards, since a rerun gives the same bits. On simulated
//! GPUs a few thousand calls; on real ones as many as `PEERLANE_SOAK_CALLS` says (20,000).

use peerlane::cases::Rng;
use peerlane::gpu::{DevicePtr, GpuRef, Graph, Stream};
use peerlane::{Config, Error};
use peerlane_device::abi::{Args, Kernel, Layout, MAX_THREADS, UNIT};
use peerlane_tests::{Group, Machine, Memory, Script, number_from_environment, random_jobs, small};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Passes over a script before there is another, with its own communicator now and then.
const PASSES: u64 = 200;
/// Bytes that are allocated and freed beside the calls.
const PRESSURE: usize = 256 << 20;

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { peerlane::gpu::cuda::prepare_environment() };
    let seed = number_from_environment("PEERLANE_SEED", 1);
    let calls = number_from_environment("PEERLANE_SIM_SOAK_CALLS", 3000);
    report("sim", calls, soak(&Machine::sim(3, seed), 3, calls, seed));
    match Machine::cuda() {
        Ok(machine) => {
            let calls = number_from_environment("PEERLANE_SOAK_CALLS", 20_000);
            let world = machine.count().max(2);
            report("cuda", calls, soak(&machine, world, calls, seed));
        }
        Err(reason) => eprintln!("soak on real GPUs skipped: {reason}"),
    }
    ExitCode::SUCCESS
}

/// What has been done.
struct Done {
    calls: u64,
    bytes_compared: u64,
    computations: u64,
    allocations: u64,
    elapsed: Duration,
}

fn report(kind: &str, asked: u64, done: Done) {
    let Done { calls, bytes_compared, computations, allocations, elapsed } = done;
    assert!(calls >= asked);
    println!(
        "{kind}: {calls} calls a rank, none wrong: {:.1} GB compared, beside {computations} kernels over \
         {PRESSURE} bytes and {allocations} allocations, in {:.0} s",
        bytes_compared as f64 / 1e9,
        elapsed.as_secs_f64()
    );
}

fn soak(machine: &Machine, world: u32, calls: u64, seed: u64) -> Done {
    let begin = Instant::now();
    let gpus = machine.gpus(world);
    let (stop, computations, allocations) =
        (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let mut done = Done {
        calls: 0,
        bytes_compared: 0,
        computations: 0,
        allocations: 0,
        elapsed: Duration::ZERO,
    };
    std::thread::scope(|scope| {
        if !machine.is_simulated() {
            for gpu in machine.gpus(machine.count()) {
                let (stop, computations, allocations) = (&stop, &computations, &allocations);
                // Freeing waits for the whole GPU, and launches wait for it: ranks that share one would wait for ever.
                let pressure = world <= machine.count();
                scope.spawn(move || {
                    disturb(&gpu, stop, computations, pressure.then_some(allocations))
                });
            }
        }
        let mut number = 0;
        while done.calls < calls {
            number += 1;
            let outcome = chapter(&gpus, seed.wrapping_mul(1 << 20) + number, &mut done);
            if let Err(reason) = outcome {
                stop.store(true, Ordering::Relaxed);
                panic!(
                    "script {number} (PEERLANE_SEED={seed}) after {} calls: {reason}",
                    done.calls
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    done.computations = computations.into_inner();
    done.allocations = allocations.into_inner();
    done.elapsed = begin.elapsed();
    done
}

/// A script, made again and again: call by call, and as graphs.
fn chapter(gpus: &[GpuRef], seed: u64, done: &mut Done) -> Result<(), String> {
    let world = gpus.len() as u32;
    let mut rng = Rng::new(seed, "soak");
    let simulated = gpus[0].backend() == peerlane::gpu::Backend::Sim;
    // Comparing takes as long as the bytes are many, so that most scripts are of small calls.
    let (calls, most) = match rng.below(8) {
        _ if simulated => (64, 3000),
        0 => (64, 200_000),
        1 => (128, 20_000),
        _ => (512, 1500),
    };
    let config = match rng.below(6) {
        0 => Config { deadline: Duration::from_secs(20), first_deadline: None, ..small(world) },
        n => Config { deadline: Duration::from_secs(20), checked: n == 1, ..Config::default() },
    };
    let mut group = Group::on(gpus, &config);
    let jobs = random_jobs(world, calls, most, &mut rng);
    let script = Script::new(world, &jobs, seed);
    let text = |error: Error| error.to_string();
    let memory = group.load(&script).map_err(text)?;
    wait(&group).map_err(text)?;
    let graphs = group.capture(&script, &memory).map_err(text)?;
    let passes = if simulated { 4 } else { PASSES };
    let mut first: Option<Vec<Vec<u8>>> = None;
    for pass in 0..passes {
        for ((rank, memory), image) in group.ranks.iter().zip(&memory).zip(&script.images) {
            memory.write(&image.before, rank.stream).map_err(text)?;
        }
        if pass % 8 == 0 {
            group.issue(&script, &memory).map_err(text)?;
        } else {
            for (rank, graph) in group.ranks.iter().zip(&graphs) {
                rank.gpu.graph_launch(*graph, rank.stream).map_err(text)?;
            }
        }
        let found = group.collect(&memory, &script).map_err(text)?;
        done.calls += calls as u64;
        done.bytes_compared += found.iter().map(|image| image.len() as u64).sum::<u64>();
        match &first {
            Some(first) if *first == found => {}
            Some(_) => {
                script.verify(&found)?;
                return Err(format!("pass {pass}: right, but in other bits than pass 0"));
            }
            None => {
                script.verify(&found)?;
                first = Some(found);
            }
        }
    }
    destroy(&group, &graphs, &memory)
}

fn wait(group: &Group) -> Result<(), Error> {
    group.ranks.iter().try_for_each(|rank| rank.gpu.stream_synchronize(rank.stream))
}

fn destroy(group: &Group, graphs: &[Graph], _until_here: &[Memory]) -> Result<(), String> {
    for (rank, graph) in group.ranks.iter().zip(graphs) {
        // SAFETY: all its launches have been waited for.
        unsafe { rank.gpu.graph_destroy(*graph).map_err(|error| error.to_string())? };
    }
    Ok(())
}

/// Runs kernels on a stream of its own, and allocates and frees if that is to be counted, until told to stop.
fn disturb(gpu: &GpuRef, stop: &AtomicBool, kernels: &AtomicU64, allocations: Option<&AtomicU64>) {
    let work = || -> Result<(), Error> {
        gpu.load_kernels()?;
        let stream = gpu.stream_create()?;
        let (from, to) = (gpu.alloc(PRESSURE)?, gpu.alloc(PRESSURE)?);
        while !stop.load(Ordering::Relaxed) {
            compute(gpu, from, to, stream)?;
            kernels.fetch_add(1, Ordering::Relaxed);
            if let Some(allocations) = allocations {
                let more = gpu.alloc(PRESSURE)?;
                allocations.fetch_add(1, Ordering::Relaxed);
                // SAFETY: nothing uses it.
                unsafe { gpu.free(more)? };
            }
        }
        // SAFETY: the kernels have been waited for.
        unsafe {
            gpu.free(from)?;
            gpu.free(to)?;
            gpu.stream_destroy(stream)
        }
    };
    work().expect("a GPU can run a kernel on its own memory");
}

/// A kernel that every multiprocessor has a part in.
fn compute(gpu: &GpuRef, from: DevicePtr, to: DevicePtr, stream: Stream) -> Result<(), Error> {
    let layout = Layout::new(1, 1, 1).expect("one slot fits");
    let units = (PRESSURE / UNIT) as u32;
    let args = Args { src: from.0, dst: to.0, units, ..Args::new(0, 1, layout) };
    let blocks = 2 * gpu.properties().multiprocessors;
    // SAFETY: both tensors have that many units.
    unsafe { gpu.launch(Kernel::Stream, blocks, MAX_THREADS, &args, stream)? };
    gpu.stream_synchronize(stream)
}
