//! Streams and events keep CUDA's order, and no more than that.

use super::{DEFAULT, Machine, SimLane, args, read};
use crate::error::Error;
use crate::gpu::{DevicePtr, Gpu, Stream};
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;
use std::sync::Arc;

/// Queues a kernel that appends `value` to the decimal digits at `at`, slowly.
fn append(machine: &Machine, rank: usize, at: DevicePtr, value: u32, stream: Stream) {
    let body = move |lane: SimLane, args: &Args| {
        for _ in 0..value * 7 % 5 {
            lane.sync_threads();
        }
        if lane.thread() == 0 {
            // SAFETY: inside a GPU's memory.
            unsafe { lane.store_u32(args.dst, lane.load_u32(args.dst) * 10 + value) };
        }
    };
    let args = Args { dst: at.0, ..args() };
    machine.gpus[rank].launch_body("append", Arc::new(body), (1, 4), &args, stream).unwrap();
}

#[test]
fn a_stream_is_in_order() {
    for seed in 0..50 {
        let machine = Machine::new(1, seed, 64);
        let at = machine.memory[0];
        for value in 1..=5 {
            append(&machine, 0, at, value, DEFAULT);
        }
        // SAFETY: both lie in the memory.
        unsafe { machine.gpus[0].copy(at.offset(8), at, 4, DEFAULT).unwrap() };
        append(&machine, 0, at, 6, DEFAULT);
        assert_eq!(machine.word(0, 8), 12345);
        assert_eq!(machine.word(0, 0), 123_456);
    }
}

#[test]
fn streams_are_independent() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let machine = Machine::new(1, seed, 64);
        let streams = [(); 2].map(|()| machine.gpus[0].stream_create().unwrap());
        append(&machine, 0, machine.memory[0], 1, streams[0]);
        append(&machine, 0, machine.memory[0], 3, streams[1]);
        for stream in streams {
            machine.gpus[0].stream_synchronize(stream).unwrap();
            assert_eq!(machine.gpus[0].owner_of_stream(stream), Some(0));
            // SAFETY: not used again.
            unsafe { machine.gpus[0].stream_destroy(stream).unwrap() };
            assert_eq!(machine.gpus[0].owner_of_stream(stream), None);
        }
        orders.insert(machine.word(0, 0));
    }
    assert!(orders.contains(&13) && orders.contains(&31), "{orders:?}");
}

#[test]
fn a_wait_is_for_the_latest_record_at_its_call() {
    for seed in 0..100 {
        let machine = Machine::new(2, seed, 64);
        let at = machine.memory[0];
        let (first, second) = (&machine.gpus[0], &machine.gpus[1]);
        let event = first.event_create().unwrap();
        // Never recorded: no wait.
        second.stream_wait(DEFAULT, event).unwrap();
        append(&machine, 0, at, 1, DEFAULT);
        first.event_record(event, DEFAULT).unwrap();
        second.stream_wait(DEFAULT, event).unwrap();
        // A later record is not waited for: else this would never end.
        first.event_record(event, DEFAULT).unwrap();
        append(&machine, 1, at, 2, DEFAULT);
        let back = second.event_create().unwrap();
        second.event_record(back, DEFAULT).unwrap();
        first.stream_wait(DEFAULT, back).unwrap();
        append(&machine, 0, at, 3, DEFAULT);
        assert_eq!(machine.word(0, 0), 123);
    }
}

#[test]
fn events_time_what_lies_between() {
    let machine = Machine::new(1, 3, 64);
    let gpu = &machine.gpus[0];
    let [start, end, other] = [(); 3].map(|()| gpu.event_create_timed().unwrap());
    let untimed = gpu.event_create().unwrap();
    gpu.event_record(start, DEFAULT).unwrap();
    machine.launch(0, (1, 1), |lane, _| lane.sleep(2_000_000)).unwrap();
    gpu.event_record(end, DEFAULT).unwrap();
    let early = gpu.event_elapsed_ms(start, end);
    assert!(matches!(early, Err(Error::Driver { code: 600, .. })), "{early:?}");
    gpu.stream_synchronize(DEFAULT).unwrap();
    let elapsed = gpu.event_elapsed_ms(start, end).unwrap();
    assert!((2.0..2.1).contains(&elapsed), "{elapsed}");
    assert!(gpu.event_elapsed_ms(start, other).is_err());
    gpu.event_record(untimed, DEFAULT).unwrap();
    gpu.event_synchronize(untimed).unwrap();
    assert!(gpu.event_elapsed_ms(start, untimed).is_err(), "it keeps no time");
    // SAFETY: not used again.
    unsafe { gpu.event_destroy(other).unwrap() };
    assert!(gpu.event_record(other, DEFAULT).is_err());
}

#[test]
fn nothing_runs_until_somebody_waits() {
    let machine = Machine::new(1, 1, 64);
    machine.launch(0, (1, 32), |lane, _| lane.sync_threads()).unwrap();
    assert_eq!(machine.world.statistics().steps, 0);
    while !machine.gpus[0].stream_query(DEFAULT).unwrap() {}
    assert_eq!(machine.world.statistics().launches, 1);
    machine.gpus[0].stream_synchronize(DEFAULT).unwrap();
}

#[test]
fn handles_of_others_are_refused() {
    let machine = Machine::new(2, 1, 64);
    let stream = machine.gpus[0].stream_create().unwrap();
    assert!(machine.gpus[1].stream_synchronize(stream).is_err());
    assert!(machine.gpus[0].stream_synchronize(Stream(77)).is_err());
    assert_eq!(machine.gpus[0].owner_of_stream(Stream(77)), None);
    let event = machine.gpus[1].event_create().unwrap();
    assert!(machine.gpus[0].event_record(event, stream).is_err());
    let grids = [(0, 32), (1, 0), (1, 513)];
    assert!(grids.iter().all(|&grid| machine.launch(0, grid, |_, _| {}).is_err()));
}

#[test]
fn host_threads_each_drive_their_rank() {
    for seed in 0..20 {
        let machine = Machine::new(4, seed, 4096);
        std::thread::scope(|scope| {
            for rank in 0..4 {
                let machine = &machine;
                scope.spawn(move || {
                    for round in 1..=10 {
                        machine.launch(rank, (1, 32), move |lane, _| meet(lane, round)).unwrap();
                        machine.gpus[rank as usize].stream_synchronize(DEFAULT).unwrap();
                    }
                });
            }
        });
    }
}

/// A barrier between ranks: each puts `round` into every peer's memory and waits for theirs.
fn meet(lane: SimLane, round: u32) {
    let args = *lane.args();
    if lane.thread() >= args.world {
        return;
    }
    let peer = lane.thread();
    // SAFETY: inside the ranks' memory.
    unsafe {
        lane.put_word(lane.peer(peer) + 4 * u64::from(args.rank), round);
        while lane.poll_word(lane.peer(args.rank) + 4 * u64::from(peer)) < round {
            lane.pause();
        }
    }
}

#[test]
fn a_wait_for_a_late_host_thread_is_not_a_jump_in_time() {
    let machine = Machine::new(2, 1, 4096);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            machine.gpus[1].stream_synchronize(DEFAULT).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(30));
            machine.launch(1, (1, 2), |lane, _| meet(lane, 1)).unwrap();
            machine.gpus[1].stream_synchronize(DEFAULT).unwrap();
        });
        machine.launch(0, (1, 2), |lane, _| meet(lane, 1)).unwrap();
        machine.gpus[0].stream_synchronize(DEFAULT).unwrap();
        second.join().unwrap();
    });
    let waited = machine.world.statistics().clock_ns;
    assert!(waited < 1_000_000_000, "{waited} ns");
}

#[test]
fn copies_reach_peers() {
    let machine = Machine::new(2, 1, 64);
    let gpu = &machine.gpus[0];
    // SAFETY: all inside the 64 bytes.
    unsafe {
        gpu.upload(machine.memory[0], &[9; 16], DEFAULT).unwrap();
        gpu.copy(machine.memory[1], machine.memory[0], 16, DEFAULT).unwrap();
    }
    gpu.stream_synchronize(DEFAULT).unwrap();
    assert_eq!(read(&machine.gpus[1], machine.memory[1].offset(12), DEFAULT), 0x0909_0909);
}
