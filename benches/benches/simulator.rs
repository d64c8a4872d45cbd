//! How fast simulated GPUs run: what the tests' time is made of.
//!
//! A turn is one lane running from one pause to the next. The throughput is turns per second, so
//! cases of different sizes compare; the time is that of one collective of all ranks.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use peerlane::gpu::sim::{self, World};
use peerlane::{Config, Result};
use peerlane_benches::ranks::{Collective, Rank};
use peerlane_benches::rig::Rig;
use peerlane_benches::solo::Solo;
use std::time::Duration;

/// Blocks of each rank: with as many lanes each as the smallest block has, 128.
const BLOCKS: u32 = 4;
/// What fills these blocks in packets, 8 bytes a lane.
const BYTES: usize = 8 * 128 * BLOCKS as usize;
/// What needs a chunk or more of every block in every part of a two-shot call.
const LARGE_BYTES: usize = 1 << 20;
/// Collectives whose mean number of turns stands for all: it differs from one to the next.
const COUNTED: u64 = 4;

/// One collective on a simulated machine.
struct Case {
    name: &'static str,
    collective: Collective,
    devices: u32,
    bytes: usize,
    weak: bool,
}

const CASES: [Case; 7] = [
    case("all_reduce/packets", Collective::AllReduce, 2, BYTES, true),
    case("all_reduce/packets", Collective::AllReduce, 8, BYTES, true),
    case("all_reduce/packets_strong", Collective::AllReduce, 8, BYTES, false),
    case("all_reduce/two_shot", Collective::AllReduce, 4, LARGE_BYTES, true),
    case("broadcast/packets", Collective::Broadcast, 8, BYTES, true),
    case("gather/packets", Collective::Gather, 8, BYTES, true),
    case("barrier", Collective::Barrier, 8, BYTES, true),
];

const fn case(
    name: &'static str,
    collective: Collective,
    devices: u32,
    bytes: usize,
    weak: bool,
) -> Case {
    Case { name, collective, devices, bytes, weak }
}

/// Queues one collective on every rank and waits for all.
fn once(ranks: &mut [Rank], collective: Collective) -> Result<()> {
    ranks.iter_mut().try_for_each(|rank| rank.call(collective))?;
    ranks.iter().try_for_each(Rank::finish)
}

/// The mean number of turns that `work` takes.
fn turns(world: &World, mut work: impl FnMut()) -> u64 {
    let before = world.statistics().steps;
    (0..COUNTED).for_each(|_| work());
    (world.statistics().steps - before) / COUNTED
}

fn collectives(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("simulator");
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    group.sample_size(10);
    for case in &CASES {
        let machine =
            sim::Config { devices: case.devices, weak: case.weak, ..sim::Config::default() };
        let world = World::new(&machine);
        let config = Config { max_blocks: Some(BLOCKS), ..Config::default() };
        let mut ranks = Rank::connect(&world.devices(), &config, case.bytes)
            .expect("simulated GPUs reach each other");
        let mut work = || once(&mut ranks, case.collective).expect("the collective ends well");
        group.throughput(Throughput::Elements(turns(&world, &mut work)));
        group.bench_function(BenchmarkId::new(case.name, case.devices), |b| b.iter(&mut work));
    }
    group.finish();
}

/// Lanes that wait for nobody: the price of a turn itself.
fn lone_kernels(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("simulator_alone");
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(2));
    group.sample_size(10);
    let machine = sim::Config { devices: 1, multiprocessors: 2, ..sim::Config::default() };
    let world = World::new(&machine);
    let rig = Rig::new(&world.devices()[0], LARGE_BYTES).expect("a simulated GPU has the memory");
    for solo in Solo::all() {
        let mut work = || {
            // SAFETY: the rig's tensors have this size.
            unsafe { solo.queue(&rig, BYTES) }.expect("the simulator takes the kernel");
            rig.finish().expect("the kernel ends well");
        };
        group.throughput(Throughput::Elements(turns(&world, &mut work)));
        group.bench_function(solo.kernel.symbol(), |b| b.iter(&mut work));
    }
    group.finish();
}

criterion_group!(simulator, collectives, lone_kernels);
criterion_main!(simulator);
