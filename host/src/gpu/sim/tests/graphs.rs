//! Captures become graphs that do again what was captured.

use super::{DEFAULT, Machine, SimLane, args};
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Gpu, Stream};
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;
use std::sync::Arc;

/// Queues a kernel that adds `value` to the word at `at`.
fn add(machine: &Machine, rank: usize, at: DevicePtr, value: u32, stream: Stream) {
    let body = move |lane: SimLane, args: &Args| {
        let at = args.dst;
        // SAFETY: inside a GPU's memory.
        unsafe { lane.store_u32(at, lane.load_u32(at) + value) };
    };
    let args = Args { dst: at.0, ..args() };
    machine.gpus[rank].launch_body("add", Arc::new(body), (1, 1), &args, stream).unwrap();
}

#[test]
fn a_graph_does_again_what_was_captured() {
    let machine = Machine::new(1, 1, 64);
    let (gpu, at) = (&machine.gpus[0], machine.memory[0]);
    let stream = gpu.stream_create().unwrap();
    machine.synchronize().unwrap();
    gpu.capture_begin(stream).unwrap();
    assert!(gpu.is_capturing(stream).unwrap());
    add(&machine, 0, at, 1, stream);
    // SAFETY: inside the memory.
    unsafe {
        gpu.copy(at.offset(4), at, 4, stream).unwrap();
        gpu.fill(at.offset(8), 7, 4, stream).unwrap();
        gpu.upload(at.offset(12), &[3; 4], stream).unwrap();
    }
    let graph = gpu.capture_end(stream).unwrap();
    assert!(!gpu.is_capturing(stream).unwrap());
    gpu.stream_synchronize(stream).unwrap();
    assert_eq!(machine.word(0, 0), 0, "capturing runs nothing");
    for _ in 0..3 {
        gpu.graph_launch(graph, stream).unwrap();
    }
    gpu.stream_synchronize(stream).unwrap();
    let words = [0, 4, 8, 12].map(|offset| machine.word(0, offset));
    assert_eq!(words, [3, 3, 0x0707_0707, 0x0303_0303]);
    // SAFETY: not used again.
    unsafe { gpu.graph_destroy(graph).unwrap() };
    assert!(gpu.graph_launch(graph, stream).is_err());
}

/// Captures `1` on one GPU, then `2` and `4` on two others at once, then a sum on the first.
fn fork_and_join(machine: &Machine) -> (Stream, crate::gpu::Graph) {
    let streams: Vec<_> = machine.gpus.iter().map(|gpu| gpu.stream_create().unwrap()).collect();
    let at = &machine.memory;
    let fork = machine.gpus[0].event_create().unwrap();
    machine.gpus[0].capture_begin(streams[0]).unwrap();
    add(machine, 0, at[0], 1, streams[0]);
    machine.gpus[0].event_record(fork, streams[0]).unwrap();
    for rank in 1..3 {
        let gpu = &machine.gpus[rank];
        gpu.stream_wait(streams[rank], fork).unwrap();
        assert!(gpu.is_capturing(streams[rank]).unwrap());
        let double = move |lane: SimLane, args: &Args| {
            let factor = 2 * rank as u32;
            // SAFETY: inside the GPUs' memory.
            unsafe { lane.store_u32(args.dst, lane.load_u32(args.src) * factor) };
        };
        let args = Args { src: at[0].0, dst: at[rank].0, ..args() };
        gpu.launch_body("double", Arc::new(double), (1, 1), &args, streams[rank]).unwrap();
        let join = gpu.event_create().unwrap();
        gpu.event_record(join, streams[rank]).unwrap();
        machine.gpus[0].stream_wait(streams[0], join).unwrap();
    }
    let sum = |lane: SimLane, args: &Args| {
        // SAFETY: inside the GPUs' memory.
        unsafe {
            let sum = lane.load_u32(args.peers[1]) + lane.load_u32(args.peers[2]);
            lane.store_u32(args.peers[0] + 4, sum);
        }
    };
    let gpu = &machine.gpus[0];
    gpu.launch_body("sum", Arc::new(sum), (1, 1), &machine.args(0), streams[0]).unwrap();
    let graph = gpu.capture_end(streams[0]).unwrap();
    assert!(!machine.gpus[1].is_capturing(streams[1]).unwrap());
    (streams[0], graph)
}

#[test]
fn a_capture_forks_and_joins_through_events() {
    for seed in 0..100 {
        let machine = Machine::new(3, seed, 64);
        let (stream, graph) = fork_and_join(&machine);
        for round in 1..=3 {
            machine.gpus[0].graph_launch(graph, stream).unwrap();
            machine.gpus[0].stream_synchronize(stream).unwrap();
            assert_eq!(machine.word(0, 4), 6 * round);
        }
        // Launched at once on two streams, one graph still runs once after the other.
        machine.gpus[0].graph_launch(graph, stream).unwrap();
        machine.gpus[0].graph_launch(graph, DEFAULT).unwrap();
        machine.gpus[0].stream_synchronize(stream).unwrap();
        assert_eq!(machine.word(0, 4), 30);
    }
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> u32 {
    match result {
        Err(Error::Driver { code, .. }) => code,
        other => panic!("expected a driver error, got {other:?}"),
    }
}

#[test]
fn captures_refuse_what_the_driver_refuses() {
    let machine = Machine::new(2, 1, 64);
    let (first, second) = (&machine.gpus[0], &machine.gpus[1]);
    let (mine, theirs) = (first.stream_create().unwrap(), second.stream_create().unwrap());
    let [fork, outside] = [(); 2].map(|()| first.event_create().unwrap());
    assert_eq!(code(first.capture_end(mine)), 401);
    assert_eq!(code(first.capture_begin(DEFAULT)), 900);
    first.event_record(outside, DEFAULT).unwrap();

    first.capture_begin(mine).unwrap();
    assert_eq!(code(first.capture_begin(mine)), 401);
    assert_eq!(code(first.stream_synchronize(mine)), 900);
    assert_eq!(code(first.capture_end(mine)), 901, "a wait in a capture spoils it");

    first.capture_begin(mine).unwrap();
    assert_eq!(code(first.stream_wait(mine, outside)), 905);
    assert_eq!(code(first.capture_end(mine)), 901);

    first.capture_begin(mine).unwrap();
    first.event_record(fork, mine).unwrap();
    second.stream_wait(theirs, fork).unwrap();
    assert_eq!(code(second.capture_end(theirs)), 903);
    add(&machine, 1, machine.memory[1], 1, theirs);
    assert_eq!(code(first.capture_end(mine)), 904, "the other stream was not waited for");
    assert!(!second.is_capturing(theirs).unwrap());
    assert_eq!(code(second.stream_wait(theirs, fork)), 907);
}
