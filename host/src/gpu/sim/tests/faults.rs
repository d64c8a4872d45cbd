//! Faults: each strikes where its number says, once, and does what it is called.

use super::{Config, Machine};
use crate::error::Error;
use crate::gpu::sim::{Fault, Harm, Target};
use crate::gpu::{DevicePtr, Gpu, Stream};
use peerlane_device::lane::Lane;

/// Two GPUs with 1 KiB each.
fn machine(seed: u64, faults: &[Fault]) -> Machine {
    let faults = faults.to_vec();
    Machine::with(&Config { devices: 2, seed, faults, ..Config::default() }, 1024)
}

fn store(nth: u64, harm: Harm) -> Fault {
    Fault::Store { from: 0, to: 1, memory: Target::Device, nth, harm }
}

/// Puts ten words into GPU 1's memory, in order, with a fence between two.
fn put_ten(machine: &Machine) {
    let body = |lane: super::SimLane, _: &_| {
        for index in 0..10 {
            // SAFETY: inside GPU 1's memory.
            unsafe { lane.put_word(lane.peer(1) + 4 * index, 100 + index as u32) };
            lane.fence_system();
        }
    };
    machine.launch(0, (1, 1), body).unwrap();
    machine.synchronize().unwrap();
}

fn ten(machine: &Machine) -> Vec<u32> {
    (0..10).map(|index| machine.word(1, 4 * index)).collect()
}

#[test]
fn one_store_is_lost_and_no_other() {
    for seed in 0..20 {
        let machine = machine(seed, &[store(4, Harm::Lost)]);
        put_ten(&machine);
        assert_eq!(ten(&machine), [100, 101, 102, 0, 104, 105, 106, 107, 108, 109]);
        assert_eq!(machine.world.occasions(), [10]);
    }
}

#[test]
fn a_bit_is_flipped() {
    let machine = machine(1, &[store(2, Harm::Flipped(33)), store(10, Harm::Flipped(4))]);
    put_ten(&machine);
    assert_eq!(ten(&machine), [100, 101 ^ 2, 102, 103, 104, 105, 106, 107, 108, 109 ^ 16]);
}

#[test]
fn streams_store_too() {
    let machine = machine(1, &[store(1, Harm::Lost), store(3, Harm::Flipped(0))]);
    let (gpu, own, peer) = (&machine.gpus[0], machine.memory[0], machine.memory[1]);
    // SAFETY: inside both memories.
    unsafe {
        gpu.fill(own, 6, 64, Stream(0)).unwrap();
        for at in [0, 8, 16] {
            gpu.copy(DevicePtr(peer.0 + at), own, 8, Stream(0)).unwrap();
        }
    }
    machine.synchronize().unwrap();
    let word = 0x0606_0606;
    let found: Vec<u32> = (0..6).map(|index| machine.word(1, 4 * index)).collect();
    assert_eq!(found, [0, 0, word, word, word ^ 1, word]);
}

#[test]
fn a_late_store_is_overtaken_but_not_by_what_a_fence_orders() {
    const LATE: u64 = 1_000_000;
    for seed in 0..20 {
        let machine = machine(seed, &[store(1, Harm::Late(LATE))]);
        let body = |lane: super::SimLane, _: &_| {
            let (peer, index) = (lane.peer(1), u64::from(lane.thread()));
            // SAFETY: inside GPU 1's memory.
            unsafe {
                if index == 0 {
                    lane.put_word(peer, 1);
                    lane.put_word(peer + 4, 1);
                    lane.fence_system();
                    lane.put_word(peer + 8, 1);
                }
            }
        };
        // Notes what it finds of the first word once it sees the second, and once it sees the third.
        let look = |lane: super::SimLane, _: &_| {
            for (index, flag) in [(0, 4), (1, 8)] {
                // SAFETY: inside GPU 1's memory.
                unsafe {
                    while lane.poll_word(lane.peer(1) + flag) == 0 {
                        lane.pause();
                    }
                    let found = lane.poll_word(lane.peer(1));
                    lane.store_u32(lane.peer(1) + 64 + 4 * index, found);
                }
            }
        };
        let before = machine.world.statistics().clock_ns;
        machine.launch(1, (1, 1), look).unwrap();
        machine.launch(0, (1, 4), body).unwrap();
        machine.synchronize().unwrap();
        assert_eq!([machine.word(1, 64), machine.word(1, 68)], [0, 1], "seed {seed}");
        assert!(machine.world.statistics().clock_ns - before >= LATE);
    }
}

#[test]
fn a_late_store_keeps_its_kernel_and_its_order() {
    for seed in 0..20 {
        let machine = machine(seed, &[store(1, Harm::Late(50_000))]);
        let body = |value: u32| {
            move |lane: super::SimLane, _: &_| {
                // SAFETY: inside GPU 1's memory.
                unsafe { lane.put_word(lane.peer(1), value) };
            }
        };
        machine.launch(0, (1, 1), body(1)).unwrap();
        machine.launch(0, (1, 1), body(2)).unwrap();
        machine.synchronize().unwrap();
        assert_eq!(machine.word(1, 0), 2, "seed {seed}: an old store came last");
    }
}

/// Lanes that count to `turns` in their GPU's memory.
fn count(turns: u32) -> impl Fn(super::SimLane, &peerlane_device::abi::Args) + Send + Sync {
    move |lane, args| {
        for turn in 0..turns {
            // SAFETY: a word each inside the GPU's memory.
            unsafe { lane.store_u32(lane.peer(args.rank) + 4 * u64::from(lane.thread()), turn) };
            lane.pause();
        }
    }
}

#[test]
fn a_gpu_that_stops_fails_what_waits_for_it_and_nothing_else() {
    for seed in 0..20 {
        let machine = machine(seed, &[Fault::Stop { gpu: 0, turn: 70 }]);
        machine.launch(0, (1, 8), count(20)).unwrap();
        machine.launch(1, (1, 8), count(20)).unwrap();
        let [stopped, well] = &machine.gpus[..] else { panic!("two GPUs") };
        assert_eq!(well.stream_synchronize(Stream(0)), Ok(()));
        for _ in 0..2 {
            let error = stopped.stream_synchronize(Stream(0)).unwrap_err();
            assert!(matches!(error, Error::Simulated { device: 0, .. }), "{error}");
            assert!(error.to_string().contains("it has stopped"), "{error}");
        }
        assert_eq!(machine.world.occasions(), [70]);
        assert_eq!(machine.word(1, 0), 19);
        assert!(stopped.synchronize().is_err() && well.synchronize().is_ok());
    }
}

#[test]
fn nothing_starts_on_a_gpu_that_has_stopped() {
    let machine = machine(3, &[Fault::Stop { gpu: 0, turn: 1 }]);
    let [stopped, well] = &machine.gpus[..] else { panic!("two GPUs") };
    let other = stopped.stream_create().unwrap();
    // The other GPU keeps the machine moving.
    machine.launch(1, (1, 8), count(20_000)).unwrap();
    machine.launch(0, (1, 1), count(5)).unwrap();
    while machine.world.occasions() != [1] {
        assert_eq!(well.stream_query(Stream(0)), Ok(false));
    }
    // SAFETY: inside both memories.
    unsafe {
        let (own, peer) = (machine.memory[0], machine.memory[1].offset(512));
        stopped.fill(own, 7, 4, other).unwrap();
        stopped.copy(peer, own, 4, other).unwrap();
    }
    assert_eq!(well.stream_synchronize(Stream(0)), Ok(()));
    assert_eq!(machine.word(1, 512), 0, "a copy has started");
    assert!(stopped.stream_synchronize(other).is_err());
}

#[test]
fn a_slow_gpu_takes_long_and_comes_to_the_same_end() {
    let run = |faults: &[Fault]| {
        let machine = machine(5, faults);
        let before = machine.world.statistics().clock_ns;
        machine.launch(0, (1, 8), count(20)).unwrap();
        machine.synchronize().unwrap();
        assert_eq!(machine.word(0, 28), 19);
        machine.world.statistics().clock_ns - before
    };
    let slow = |lasts_ns| run(&[Fault::Slow { gpu: 0, turn: 9, turn_ns: 1000, lasts_ns }]);
    let (well, long, short) = (run(&[]), slow(u64::MAX), slow(5000));
    assert!(long > 17_000 && long > short && short > well, "{well} {short} {long}");
}

#[test]
fn a_fault_that_does_not_strike_changes_nothing() {
    let trace = |faults: &[Fault]| {
        let machine = machine(8, faults);
        put_ten(&machine);
        machine.launch(0, (2, 8), count(20)).unwrap();
        machine.synchronize().unwrap();
        machine.world.statistics()
    };
    let never = u64::MAX;
    let faults = [
        Fault::Stop { gpu: 0, turn: never },
        Fault::Slow { gpu: 1, turn: never, turn_ns: 1000, lasts_ns: never },
        store(never, Harm::Lost),
    ];
    assert_eq!(trace(&faults), trace(&[]));
}
