//! Worlds with a thread of their own: they move while nobody waits, in real time, and end.

use super::super::work::{Entry, Mark};
use super::{Config, DEFAULT, SimGpu, SimLane, World, args};
use crate::error::Error;
use crate::gpu::{DevicePtr, Gpu};
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);

fn config(devices: u32, seed: u64) -> Config {
    Config { devices, seed, autonomous: true, ..Config::default() }
}

/// What rank `own` of a group of processes has: its GPU, and everybody's memory as its kernels find
/// it.
struct Process {
    gpu: SimGpu,
    args: Args,
}

impl Process {
    fn launch(&self, grid: (u32, u32), body: fn(SimLane, &Args)) {
        self.gpu.launch_body("body", Arc::new(body), grid, &self.args, DEFAULT).unwrap();
    }
}

/// A group of ranks with zeroed memory, each in a world of its own.
fn processes(world: u32, seed: u64, bytes: usize) -> Vec<Process> {
    let gpus: Vec<SimGpu> = (0..world)
        .map(|rank| World::new(&config(world, seed + u64::from(rank))).gpu(rank))
        .collect();
    let memory: Vec<DevicePtr> = gpus.iter().map(|gpu| gpu.alloc_shared(bytes).unwrap()).collect();
    for (gpu, memory) in gpus.iter().zip(&memory) {
        // SAFETY: the memory is of that size.
        unsafe { gpu.fill(*memory, 0, bytes, DEFAULT).unwrap() };
        gpu.stream_synchronize(DEFAULT).unwrap();
    }
    let mut ranks = Vec::new();
    for (rank, gpu) in (0..).zip(&gpus) {
        let mut args = Args { rank, world, ..args() };
        for (owner, peer) in (0..).zip(&gpus) {
            let own = memory[owner as usize];
            let imported = || gpu.import(peer.export(own).unwrap(), bytes, owner).unwrap();
            args.peers[owner as usize] = if owner == rank { own.0 } else { imported().0 };
        }
        ranks.push(args);
    }
    gpus.into_iter().zip(ranks).map(|(gpu, args)| Process { gpu, args }).collect()
}

#[test]
fn worlds_exchange_data() {
    for seed in 0..10 {
        let processes = processes(3, 10 * seed, 3 * 2 * 64 * 16);
        for process in &processes {
            process.launch((2, 64), super::schedule::exchange);
        }
        for process in &processes {
            process.gpu.stream_synchronize(DEFAULT).unwrap();
        }
    }
}

/// Two worlds, one of which writes ever new values into the other's memory. With words that land
/// one by one instead of by halves it failed in 8 of 8 runs.
#[test]
fn a_half_of_a_unit_is_never_torn_between_worlds() {
    const CHANGES: u32 = 1_000_000;
    const STOP: u64 = 1024;
    let processes = processes(2, 100, 4096);
    processes[0].launch((1, 1), |lane, args| {
        // SAFETY: inside the peer's memory, and in this rank's.
        unsafe {
            for value in 1.. {
                lane.put_unit(args.peers[1], [value; 4]);
                if lane.poll_word(args.peers[0] + STOP) != 0 {
                    break;
                }
            }
        }
    });
    processes[1].launch((1, 1), |lane, args| {
        let mut last = [0; 2];
        let mut changes = 0;
        while changes < CHANGES {
            // SAFETY: inside this rank's memory.
            let unit = unsafe { lane.poll_unit(args.peers[1]) };
            assert_eq!((unit[0], unit[2]), (unit[1], unit[3]), "torn after {changes} changes");
            assert!(unit[0] >= last[0] && unit[2] >= last[1], "{unit:?} after {last:?}");
            changes += u32::from(last != [unit[0], unit[2]]);
            last = [unit[0], unit[2]];
        }
        // SAFETY: inside the peer's memory.
        unsafe { lane.put_word(args.peers[0] + STOP, 1) };
    });
    // The reader first: if it fails, nobody stops the writer.
    for process in processes.iter().rev() {
        process.gpu.stream_synchronize(DEFAULT).unwrap();
    }
}

#[test]
fn kernels_run_while_nobody_waits() {
    let gpu = World::new(&config(1, 200)).gpu(0);
    let flag = gpu.alloc_host(64).unwrap();
    let args = Args { status: flag.device.0, ..args() };
    let put = |lane: SimLane, args: &Args| {
        let begin = lane.clock_ns();
        while lane.clock_ns() - begin < 3_000_000 {
            lane.pause();
        }
        // SAFETY: inside the pinned memory.
        unsafe { lane.put_word(args.status, 1) };
    };
    gpu.launch_body("body", Arc::new(put), (1, 1), &args, DEFAULT).unwrap();
    let start = Instant::now();
    // SAFETY: the memory lives; its words are written whole.
    while unsafe { flag.host.cast::<u32>().read_volatile() } == 0 {
        assert!(start.elapsed() < 5000 * MS, "the kernel does not get on");
        sleep(MS);
    }
    assert!(start.elapsed() >= 3 * MS, "time jumped");
}

#[test]
fn a_wait_for_nothing_is_an_error() {
    let gpu = World::new(&config(1, 300)).gpu(0);
    let (stuck, other) = (gpu.stream_create().unwrap(), gpu.stream_create().unwrap());
    // No sequence of calls leads there; the simulator must survive it all the same.
    gpu.world.enter().engine.push(stuck.0, Entry::Wait(Mark::default()));
    match gpu.stream_synchronize(stuck) {
        Err(Error::Simulated { reason, .. }) => assert!(reason.contains("nothing queued")),
        other => panic!("expected a simulated error, got {other:?}"),
    }
    let event = gpu.event_create().unwrap();
    gpu.event_record(event, other).unwrap();
    gpu.stream_synchronize(other).expect("the rest goes on");
}

/// The path and the CPU time of a world's thread, found by its seed.
fn thread_of(seed: u64) -> Option<(String, Duration)> {
    let name = format!("sim {seed}\n");
    std::fs::read_dir("/proc/self/task").unwrap().find_map(|task| {
        let path = task.ok()?.path();
        let found = std::fs::read_to_string(path.join("comm")).ok()? == name;
        let times = found.then(|| std::fs::read_to_string(path.join("schedstat")).ok())??;
        let ran = times.split(' ').next()?.parse().ok()?;
        Some((path.display().to_string(), Duration::from_nanos(ran)))
    })
}

/// Lets the world's thread do something: it has started when this returns.
fn run_something(gpu: &dyn Gpu) {
    let event = gpu.event_create().unwrap();
    gpu.event_record(event, DEFAULT).unwrap();
    gpu.synchronize().unwrap();
}

fn assert_thread_ends(seed: u64) {
    let start = Instant::now();
    while let Some((path, _)) = thread_of(seed) {
        assert!(start.elapsed() < 5000 * MS, "{path} is left");
        sleep(MS);
    }
}

#[test]
fn a_world_that_is_dropped_leaves_no_thread() {
    let world = World::new(&config(2, 400_001));
    let gpus = world.devices();
    drop(world);
    run_something(&*gpus[0]);
    assert!(thread_of(400_001).is_some());
    drop(gpus);
    assert_thread_ends(400_001);

    let gpu = World::new(&config(1, 400_002)).gpu(0);
    let forever = |lane: SimLane, _: &Args| {
        loop {
            lane.pause();
        }
    };
    gpu.launch_body("body", Arc::new(forever), (2, 64), &args(), DEFAULT).unwrap();
    sleep(5 * MS);
    drop(gpu);
    assert_thread_ends(400_002);
}

#[test]
fn a_world_that_waits_uses_little_cpu() {
    let gpu = World::new(&config(1, 500_001)).gpu(0);
    let spent = |rest: Duration| {
        let before = thread_of(500_001).unwrap().1;
        sleep(rest);
        thread_of(500_001).unwrap().1 - before
    };
    run_something(&gpu);
    assert!(spent(300 * MS) < 3 * MS, "an idle world is not idle");

    let forever = |lane: SimLane, _: &Args| {
        loop {
            lane.pause();
        }
    };
    gpu.launch_body("body", Arc::new(forever), (1, 32), &args(), DEFAULT).unwrap();
    sleep(100 * MS);
    let waiting = spent(300 * MS);
    println!("a block of 32 waiting lanes: {waiting:?} of 300 ms");
    assert!(waiting < 100 * MS, "waiting lanes used {waiting:?} of 300 ms");
}
