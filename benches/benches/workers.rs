//! What it takes to queue a pass of 64 all-reduces on all ranks of one process: one thread that drives them all, beside a thread for each.
//!
//! On a GPU that does nothing both are Peerlane's own share, and the second mostly waking the threads; on real GPUs each call is a launch besides, which one
//! thread makes for one rank after the other. Nothing is run to its end inside a measurement.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use peerlane::gpu::{DevicePtr, GpuRef, Stream};
use peerlane::workers::{List, Operation, Options, Workers};
use peerlane::{AllReduce, Communicator, Config, DType};
use peerlane_benches::null_gpu::NullGpu;
use peerlane_benches::real_gpus;
use std::time::{Duration, Instant};

/// One hidden state of 4096 bf16 elements.
const COUNT: usize = 4096;
/// All-reduces of a token: two a layer.
const CALLS: usize = 64;
/// Passes queued on real GPUs before they are waited for: far fewer than a driver's queue holds.
const BATCH: u64 = 4;

fn call(tensor: DevicePtr) -> AllReduce {
    AllReduce::in_place(tensor, COUNT, DType::Bf16)
}

fn tensors(gpus: &[GpuRef]) -> Vec<DevicePtr> {
    gpus.iter().map(|gpu| gpu.alloc(2 * COUNT).expect("there is room")).collect()
}

/// The time of `passes` passes, without waiting for the GPUs.
fn timed(passes: u64, mut queue: impl FnMut(), mut settle: impl FnMut()) -> Duration {
    let mut total = Duration::ZERO;
    for first in (0..passes).step_by(BATCH as usize) {
        let begin = Instant::now();
        (first..passes.min(first + BATCH)).for_each(|_| queue());
        total += begin.elapsed();
        settle();
    }
    total
}

fn one_thread(gpus: &[GpuRef], passes: u64) -> Duration {
    let mut ranks = Communicator::connect(gpus, &Config::default()).expect("they meet");
    let tensors = tensors(gpus);
    let streams: Vec<Stream> =
        gpus.iter().map(|gpu| gpu.stream_create().expect("it has streams")).collect();
    let queue = || {
        for _ in 0..CALLS {
            for ((rank, tensor), stream) in ranks.iter_mut().zip(&tensors).zip(&streams) {
                // SAFETY: the tensor is that large, and is not freed.
                unsafe { rank.all_reduce(&call(*tensor), *stream) }
                    .expect("all make the same calls");
            }
        }
    };
    let settle = || gpus.iter().for_each(|gpu| gpu.synchronize().expect("it goes well"));
    timed(passes, queue, settle)
}

fn workers(gpus: &[GpuRef], passes: u64) -> Duration {
    let ranks = Communicator::connect(gpus, &Config::default()).expect("they meet");
    let mut workers = Workers::start(ranks, Options::default()).expect("there are threads");
    let tensors = tensors(gpus);
    let mut list = List::new(workers.world_size());
    for _ in 0..CALLS {
        list.on_all(|rank| Operation::AllReduce(call(tensors[rank as usize])));
    }
    let list = list.finish();
    // SAFETY: the tensors are that large, and are not freed.
    let queue = || unsafe { workers.run(&list) }.expect("all make the same calls");
    let settle = || gpus.iter().for_each(|gpu| gpu.synchronize().expect("it goes well"));
    timed(passes, queue, settle)
}

fn passes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    group.warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    group.sample_size(20);
    let mut machines: Vec<(&str, Vec<GpuRef>)> =
        [2, 4, 8].map(|world| ("null", NullGpu::refs(&NullGpu::several(world)))).into();
    match real_gpus() {
        Ok(gpus) => machines.push(("gpu", gpus)),
        Err(reason) => println!("gpu: skipped: {reason}"),
    }
    for (name, gpus) in machines {
        let id = |way: &str| BenchmarkId::new(format!("{name}/{way}"), gpus.len());
        group.bench_function(id("one_thread"), |b| b.iter_custom(|n| one_thread(&gpus, n)));
        group.bench_function(id("workers"), |b| b.iter_custom(|n| workers(&gpus, n)));
    }
    group.finish();
}

criterion_group!(benches, passes);
criterion_main!(benches);
