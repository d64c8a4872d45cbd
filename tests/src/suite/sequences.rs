//! Calls one behind the other: mixed, late, captured, rerun, on counters that wrap.
#![allow(missing_docs, reason = "each function is a test, and its name says what must hold")]

use crate::job::{moves, random_jobs, reductions};
use crate::{Call, Group, Job, Machine, Rank, Script, small};
use peerlane::cases::{Rng, Values};
use peerlane::gpu::{DevicePtr, GpuRef, Stream};
use peerlane::{AllReduce, Config, DType, Error};

fn random_script(world: u32, count: usize, seed: u64) -> Script {
    let jobs = random_jobs(world, count, 6000, &mut Rng::new(seed, "sequence"));
    Script::new(world, &jobs, seed)
}

fn expect(outcome: Result<Vec<Vec<u8>>, String>, what: &str) -> Vec<Vec<u8>> {
    outcome.unwrap_or_else(|reason| panic!("{what}: {reason}"))
}

pub fn calls_of_all_kinds_follow_each_other_without_waiting(machine: &Machine) {
    for world in super::WORLDS {
        let mut group = Group::connect(machine, world, &small(world));
        for seed in 0..3 {
            let script = random_script(world, 40, seed);
            expect(group.run(&script), &format!("{world} ranks, seed {seed}"));
        }
    }
}

/// Work that keeps a stream busy for a while: about 10 ms on a real GPU.
struct Delay {
    gpu: GpuRef,
    memory: DevicePtr,
    stream: Stream,
}

impl Delay {
    const BYTES: usize = 64 << 20;

    fn new(rank: &Rank, simulated: bool) -> Result<Delay, Error> {
        let bytes = if simulated { 4096 } else { Delay::BYTES };
        let memory = rank.gpu.alloc(bytes)?;
        for value in 0..200 {
            // SAFETY: the memory is that large and lives until `drop` has waited for the stream.
            unsafe { rank.gpu.fill(memory, value, bytes, rank.stream)? };
        }
        Ok(Delay { gpu: rank.gpu.clone(), memory, stream: rank.stream })
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        // A failure was reported where the rank was waited for.
        let _ = self.gpu.stream_synchronize(self.stream);
        // SAFETY: the stream has passed the fills.
        let _ = unsafe { self.gpu.free(self.memory) };
    }
}

pub fn any_rank_may_come_late(machine: &Machine) {
    for world in [2, 3, 5] {
        for late in 0..world {
            let mut group = Group::connect(machine, world, &small(world));
            let script = random_script(world, 20, late.into());
            let memory = group.load(&script).expect("there is memory");
            let delay = Delay::new(&group.ranks[late as usize], machine.is_simulated());
            group.issue(&script, &memory).expect("the calls are right");
            let found = group.collect(&memory, &script).expect("nobody waits in vain");
            script.verify(&found).unwrap_or_else(|reason| panic!("rank {late} late: {reason}"));
            drop(delay.expect("there is memory for a delay"));
        }
    }
}

pub fn replayed_graphs_see_new_inputs(machine: &Machine) {
    for world in [1, 2, 3, 8] {
        let mut group = Group::connect(machine, world, &small(world));
        let mut calls = reductions(700);
        calls.extend(moves(world, 1500));
        let jobs: Vec<Job> = calls.into_iter().map(Job::plain).collect();
        let script = Script::new(world, &jobs, 1);
        let memory = group.load(&script).expect("there is memory");
        let graphs = group.capture(&script, &memory).expect("calls can be captured");
        for seed in 2..6 {
            let script = script.with_inputs(seed);
            for ((rank, memory), image) in group.ranks.iter().zip(&memory).zip(&script.images) {
                memory.write(&image.before, rank.stream).expect("the images are of one size");
            }
            for (rank, graph) in group.ranks.iter().zip(&graphs) {
                rank.gpu.graph_launch(*graph, rank.stream).expect("the graph launches");
            }
            let found = group.collect(&memory, &script).expect("nobody waits in vain");
            script.verify(&found).unwrap_or_else(|reason| panic!("replay {seed}: {reason}"));
        }
        for (rank, graph) in group.ranks.iter().zip(graphs) {
            // SAFETY: `collect` has waited for the graph.
            unsafe { rank.gpu.graph_destroy(graph) }.expect("the graph exists");
        }
    }
}

pub fn graphs_and_plain_calls_alternate(machine: &Machine) {
    let world = 3;
    let mut group = Group::connect(machine, world, &small(world));
    let (captured, plain) = (random_script(world, 8, 1), random_script(world, 8, 2));
    let memories = [&captured, &plain].map(|script| group.load(script).expect("there is memory"));
    let graphs = group.capture(&captured, &memories[0]).expect("calls can be captured");
    for _ in 0..4 {
        for (script, memory) in [&captured, &plain].into_iter().zip(&memories) {
            for ((rank, memory), image) in group.ranks.iter().zip(memory).zip(&script.images) {
                memory.write(&image.before, rank.stream).expect("the image fits");
            }
        }
        for (rank, graph) in group.ranks.iter().zip(&graphs) {
            rank.gpu.graph_launch(*graph, rank.stream).expect("the graph launches");
        }
        group.issue(&plain, &memories[1]).expect("the calls are right");
        for (script, memory) in [&captured, &plain].into_iter().zip(&memories) {
            let found = group.collect(memory, script).expect("nobody waits in vain");
            expect(script.verify(&found).map(|()| found), "graphs and calls");
        }
    }
    for (rank, graph) in group.ranks.iter().zip(graphs) {
        // SAFETY: `collect` has waited for the graph.
        unsafe { rank.gpu.graph_destroy(graph) }.expect("the graph exists");
    }
}

pub fn counters_wrap(machine: &Machine) {
    for world in [2, 3] {
        for before in [0, 3, 40] {
            let config = Config { first_slot: u32::MAX - before, ..small(world) };
            let mut group = Group::connect(machine, world, &config);
            for values in [Values::Ordinary, Values::Free] {
                let mut calls = reductions(3000);
                calls.extend(moves(world, 5000));
                let job = |call| Job { call, values, shift: 0 };
                group.check(&calls.into_iter().map(job).collect::<Vec<_>>(), before.into());
            }
        }
    }
}

pub fn calls_may_change_streams(machine: &Machine) {
    let world = 3;
    let mut group = Group::connect(machine, world, &small(world));
    let gpus: Vec<GpuRef> = group.ranks.iter().map(|rank| rank.gpu.clone()).collect();
    let first: Vec<Stream> = group.ranks.iter().map(|rank| rank.stream).collect();
    let second: Vec<Stream> =
        gpus.iter().map(|gpu| gpu.stream_create().expect("the GPU has streams")).collect();
    let script = random_script(world, 12, 5);
    let memory = group.load(&script).expect("there is memory");
    // The uploads are on the first streams.
    gpus.iter().zip(&first).for_each(|(gpu, s)| gpu.stream_synchronize(*s).expect("it uploads"));
    for (index, (job, places)) in script.jobs.iter().zip(&script.places).enumerate() {
        for (r, rank) in group.ranks.iter_mut().enumerate() {
            rank.stream = if (index + r) % 2 == 0 { first[r] } else { second[r] };
            rank.issue(job, places[r], memory[r].base).expect("the call is right");
        }
    }
    for (gpu, stream) in gpus.iter().zip(&first).chain(gpus.iter().zip(&second)) {
        gpu.stream_synchronize(*stream).expect("nobody waits in vain");
    }
    let found = group.collect(&memory, &script).expect("nobody waits in vain");
    expect(script.verify(&found).map(|()| found), "two streams");
    for (rank, stream) in group.ranks.iter_mut().zip(&first) {
        rank.stream = *stream;
        rank.communicator.close().expect("the calls went well");
    }
    for (gpu, stream) in gpus.iter().zip(second) {
        // SAFETY: made above, and the communicators that used it are closed.
        unsafe { gpu.stream_destroy(stream) }.expect("the stream exists");
    }
}

pub fn a_rerun_gives_the_same_bits(machine: &Machine) {
    for world in [2, 3, 8] {
        let script = random_script(world, 25, 7);
        let mut group = Group::connect(machine, world, &small(world));
        let first = expect(group.run(&script), "first run");
        assert_eq!(first, expect(group.run(&script), "second run"));
        let mut other = Group::connect(machine, world, &small(world));
        assert_eq!(first, expect(other.run(&script), "another group"));
    }
    let call = AllReduce::in_place(DevicePtr(0), 1000, DType::F16);
    let (dtype, wire, op) = (call.dtype, call.wire, call.op);
    let (count, algorithm, in_place, absent) = (call.count, call.algorithm, true, 0);
    let call = Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent };
    let mut group = Group::connect(machine, 5, &Config::default());
    let first = group.check(&[Job::plain(call.clone())], 8);
    assert_eq!(first, group.check(&[Job::plain(call)], 8));
}
