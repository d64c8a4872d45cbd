//! What a call costs the host.
//!
//! The claim: a call costs the driver's launch and 0.5 us at most. `call` and `call_threads` measure
//! Peerlane's share on a GPU that does nothing: checks, health, call log, plan, arguments, and a
//! virtual call in place of the driver. `gpu` measures the whole on real GPUs, and next to it the
//! bare launch of the smallest kernel. Nothing is run to its end inside a measurement.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group};
use peerlane::choice::{Choice, Links};
use peerlane::gpu::{Gpu, GpuRef, cuda};
use peerlane::plan::{self, Shape};
use peerlane::{Config, Kernel, Operation, layout};
use peerlane_benches::null_gpu::NullGpu;
use peerlane_benches::ranks::{Collective, Rank};
use peerlane_benches::rig::Rig;
use peerlane_benches::{for_ranks, real_gpus};
use peerlane_device::abi::UNIT;
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// One hidden state of 8192 bf16 elements: what decoding one token reduces.
const BYTES: usize = 16 << 10;
/// World sizes of the claim.
const WORLDS: [usize; 2] = [2, 8];
/// Rounds queued on real GPUs before they are waited for: far fewer than a driver's queue holds.
const BATCH: u64 = 64;

fn settings<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_millis(1000));
    group.sample_size(50);
    group
}

/// The pure part: which algorithm and which grid.
fn planning(criterion: &mut Criterion) {
    let mut group = settings(criterion, "plan");
    for world in WORLDS {
        let Some(layout) = layout::choose(world as u32, Config::default().mailbox_bytes) else {
            continue;
        };
        let shape = Shape::new(world as u32, layout, 132);
        let choice = Choice::modelled(&shape, &Links::of(shape.class), true);
        for (name, bytes) in [("16KiB", BYTES), ("16MiB", 16 << 20)] {
            let id = BenchmarkId::new(format!("grid/{name}"), world);
            group.bench_function(id, |b| {
                b.iter(|| plan::grid(black_box(&shape), black_box(bytes / UNIT)))
            });
            let id = BenchmarkId::new(format!("all_reduce/{name}"), world);
            group
                .bench_function(id, |b| b.iter(|| black_box(&choice).all_reduce(black_box(bytes))));
        }
    }
    group.finish();
}

fn null_ranks(world: usize) -> Vec<Rank> {
    let gpus = NullGpu::refs(&NullGpu::several(world as u32));
    Rank::connect(&gpus, &Config::default(), BYTES).expect("a null GPU refuses nothing")
}

/// What the null GPU itself costs: to be taken off the figures of `call`.
fn null_launch(criterion: &mut Criterion) {
    let mut group = settings(criterion, "null_launch");
    let gpu = NullGpu::several(1);
    let rig = Rig::new(&NullGpu::refs(&gpu)[0], BYTES).expect("a null GPU refuses nothing");
    let args = rig.args(Operation::LocalReduce);
    group.bench_function("launch", |b| {
        // SAFETY: the null GPU follows no address.
        b.iter(|| unsafe { rig.launch(Kernel::LocalReduceF32, 1, 32, black_box(&args)) })
    });
    group.finish();
}

/// One call, the ranks taking turns on one thread.
fn calls(criterion: &mut Criterion) {
    let mut group = settings(criterion, "call");
    for collective in Collective::ALL {
        for world in WORLDS {
            let mut ranks = null_ranks(world);
            let mut next = 0;
            group.bench_function(BenchmarkId::new(collective.name(), world), |b| {
                b.iter(|| {
                    let outcome = ranks[next].call(collective);
                    next = if next + 1 == world { 0 } else { next + 1 };
                    outcome
                })
            });
        }
    }
    group.finish();
}

/// One call, a thread for each rank, so that the call log moves between their caches.
fn calls_in_threads(criterion: &mut Criterion) {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    let mut group = settings(criterion, "call_threads");
    for world in WORLDS {
        if cores < world {
            println!("call_threads: {world} ranks skipped: {cores} cores");
            continue;
        }
        for collective in Collective::ALL {
            let mut ranks = null_ranks(world);
            group.bench_function(BenchmarkId::new(collective.name(), world), |b| {
                b.iter_custom(|calls| slowest_of(&mut ranks, collective, calls))
            });
        }
    }
    group.finish();
}

/// The slowest rank's time for `calls` calls that all ranks make at once.
fn slowest_of(ranks: &mut [Rank], collective: Collective, calls: u64) -> Duration {
    let gate = &Barrier::new(ranks.len());
    thread::scope(|scope| {
        let start = |rank: &mut Rank| {
            gate.wait();
            let since = Instant::now();
            for _ in 0..calls {
                rank.call(collective).expect("all ranks make the same calls");
            }
            since.elapsed()
        };
        let threads: Vec<_> =
            ranks.iter_mut().map(|rank| scope.spawn(move || start(rank))).collect();
        let times = threads.into_iter().map(|t| t.join().expect("a rank's thread panicked"));
        times.max().unwrap_or_default()
    })
}

/// The time to queue one kernel, from `rounds` rounds of one on each rank; waits are not counted.
fn enqueue_cost(
    ranks: &mut [Rank],
    rounds: u64,
    mut queue: impl FnMut(&mut Rank) -> peerlane::Result<()>,
) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = rounds;
    while left > 0 {
        let batch = left.min(BATCH);
        let since = Instant::now();
        for _ in 0..batch {
            for rank in &mut *ranks {
                queue(rank).expect("the GPU takes the kernel");
            }
        }
        spent += since.elapsed();
        for rank in &*ranks {
            rank.finish().expect("the kernels end well");
        }
        left -= batch;
    }
    spent / ranks.len() as u32
}

/// The whole call on real GPUs, eager, and the bare launch of the smallest kernel.
fn real(criterion: &mut Criterion) {
    let gpus: Vec<GpuRef> = match real_gpus() {
        Ok(gpus) => gpus,
        Err(reason) => return println!("gpu: skipped: {reason}"),
    };
    let mut group = settings(criterion, "gpu");
    for world in WORLDS {
        let mut ranks = match Rank::connect(&for_ranks(&gpus, world), &Config::default(), BYTES) {
            Ok(ranks) => ranks,
            Err(error) => {
                println!("gpu: {world} ranks skipped: {error}");
                continue;
            }
        };
        let rig = Rig::new(&gpus[0], BYTES).expect("a GPU that holds ranks holds a rig");
        let nothing = rig.args(Operation::LocalReduce);
        group.bench_function(BenchmarkId::new("bare_launch", world), |b| {
            b.iter_custom(|rounds| {
                enqueue_cost(&mut ranks, rounds, |rank| {
                    let (gpu, stream): (&dyn Gpu, _) = (&**rank.gpu(), rank.stream());
                    // SAFETY: with zero bytes no address is followed.
                    unsafe { gpu.launch(Kernel::LocalReduceF32, 1, 32, &nothing, stream) }
                })
            })
        });
        for collective in Collective::ALL {
            group.bench_function(BenchmarkId::new(collective.name(), world), |b| {
                b.iter_custom(|rounds| {
                    enqueue_cost(&mut ranks, rounds, |rank| rank.call(collective))
                })
            });
        }
    }
    group.finish();
}

criterion_group!(host_cost, planning, null_launch, calls, calls_in_threads, real);

fn main() {
    // SAFETY: nothing else has started a thread yet.
    unsafe { cuda::prepare_environment() };
    host_cost();
    Criterion::default().configure_from_args().final_summary();
}
