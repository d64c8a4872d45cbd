//! Barriers, chance, time and speed.

use super::{Config, DEFAULT, Machine, SimLane};
use crate::error::Error;
use crate::gpu::Gpu;
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;
use std::time::{Duration, Instant};

#[test]
fn a_barrier_waits_for_the_block() {
    for seed in 0..100 {
        let machine = Machine::new(1, seed, 4096);
        machine
            .launch(0, (2, 32), |lane, args| {
                let own = |thread: u32| args.peers[0] + 4 * u64::from(32 * lane.block() + thread);
                for round in 1..5 {
                    // SAFETY: inside this rank's memory.
                    unsafe {
                        lane.store_u32(own(lane.thread()), round);
                        lane.sync_threads();
                        assert_eq!(lane.load_u32(own((lane.thread() + 7) % 32)), round);
                        lane.sync_threads();
                    }
                    let mine = lane.thread() == round && lane.block() == 1;
                    assert_eq!(lane.sync_threads_or(mine), lane.block() == 1);
                    assert!(!lane.sync_threads_or(false));
                }
            })
            .unwrap();
        machine.synchronize().unwrap();
    }
}

/// The reason that 8 lanes running `body` fail with.
fn failure(body: fn(SimLane, &Args)) -> String {
    let machine = Machine::new(1, 4, 64);
    machine.launch(0, (1, 8), body).unwrap();
    match machine.synchronize() {
        Err(Error::Simulated { reason, .. }) => reason,
        other => panic!("expected a simulated error, got {other:?}"),
    }
}

#[test]
fn divergent_barriers_are_found() {
    let left = failure(|lane, _| {
        if lane.thread() < 3 {
            lane.sync_threads();
        }
    });
    assert!(left.contains("3 threads wait in a block barrier, 5 have ended"), "{left}");
    let mixed = failure(|lane, _| {
        if lane.thread() < 3 {
            lane.sync_threads();
        } else {
            lane.sync_threads_or(true);
        }
    });
    assert!(mixed.contains("one kind of block barrier"), "{mixed}");
}

/// Every rank tells every other, each of its lanes a unit, and waits for all of theirs.
pub(super) fn exchange(lane: SimLane, args: &Args) {
    let index = u64::from(lane.block() * lane.threads() + lane.thread());
    let slot = |rank: u32| 16 * (index * u64::from(args.world) + u64::from(rank));
    // SAFETY: inside the ranks' memory.
    unsafe {
        for peer in (0..args.world).filter(|&peer| peer != args.rank) {
            lane.put_unit(lane.peer(peer) + slot(args.rank), [args.rank + 1; 4]);
        }
        for peer in (0..args.world).filter(|&peer| peer != args.rank) {
            while lane.poll_unit(lane.peer(args.rank) + slot(peer)) != [peer + 1; 4] {
                lane.pause();
            }
        }
    }
    lane.sync_threads();
}

fn trace(seed: u64) -> u64 {
    let machine = Machine::new(4, seed, 4 * 2 * 32 * 16);
    for rank in 0..4 {
        machine.launch(rank, (2, 32), exchange).unwrap();
    }
    machine.synchronize().unwrap();
    machine.world.statistics().trace
}

#[test]
fn a_seed_is_an_interleaving() {
    let traces: Vec<u64> = (0..8).map(trace).collect();
    assert_eq!(traces, (0..8).map(trace).collect::<Vec<_>>());
    for (index, one) in traces.iter().enumerate() {
        assert!(!traces[..index].contains(one));
    }
}

#[test]
fn a_deadline_comes_soon_when_all_wait() {
    let start = Instant::now();
    let machine = Machine::new(2, 1, 4096);
    for rank in 0..2 {
        machine
            .launch(rank, (4, 128), |lane, args| {
                let begin = lane.clock_ns();
                // SAFETY: inside this rank's memory.
                while unsafe { lane.poll_word(lane.peer(args.rank)) } == 0 {
                    if lane.clock_ns() - begin > 10_000_000_000 {
                        return;
                    }
                    if lane.block() == 0 { lane.sleep(100) } else { lane.pause() }
                }
            })
            .unwrap();
    }
    machine.synchronize().unwrap();
    assert!(machine.world.statistics().clock_ns > 10_000_000_000);
    // Half a second where nothing else runs.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn a_kernel_that_never_ends_is_found() {
    let reason = failure(|lane, _| {
        loop {
            lane.pause();
        }
    });
    assert!(reason.contains("nothing has happened for five minutes"), "{reason}");
}

#[test]
fn a_world_goes_while_kernels_run() {
    let machine = Machine::new(1, 1, 64);
    machine
        .launch(0, (4, 128), |lane, _| {
            loop {
                lane.pause();
            }
        })
        .unwrap();
    for _ in 0..3 {
        assert!(!machine.gpus[0].stream_query(DEFAULT).unwrap());
    }
}

#[test]
fn numbers_round_as_the_hardware_does() {
    let machine = Machine::new(1, 1, 64);
    machine
        .launch(0, (1, 1), |lane, _| {
            assert_eq!(lane.f16_from_f32(1.0 + f32::powi(2.0, -11)), 0x3c00);
            assert_eq!(lane.f16_from_f32(1.0 + 3.0 * f32::powi(2.0, -11)), 0x3c02);
            assert_eq!(lane.f16_to_f32(0x3c01), 1.0 + f32::powi(2.0, -10));
            let halves = lane.bf16x2_from_f32(1.0 + f32::powi(2.0, -8), -2.0);
            assert_eq!(halves, 0xc000_3f80);
            assert_eq!(lane.max_f32(f32::NAN, 1.0), 1.0);
            assert_eq!(lane.min_f32(1.0, f32::NAN), 1.0);
            assert_eq!(lane.max_f32(-0.0, 0.0).to_bits(), 0);
            assert_eq!(lane.min_f32(0.0, -0.0).to_bits(), 1 << 31);
        })
        .unwrap();
    machine.synchronize().unwrap();
}

#[test]
fn speed() {
    let (mut steps, mut worst, mut total) = (0, Duration::ZERO, Duration::ZERO);
    const CALLS: u32 = 20;
    for seed in 0..u64::from(CALLS) {
        let machine = Machine::with(&Config { seed, ..Config::default() }, 8 * 4 * 128 * 16);
        let call = Instant::now();
        for rank in 0..8 {
            machine.launch(rank, (4, 128), exchange).unwrap();
        }
        machine.synchronize().unwrap();
        worst = worst.max(call.elapsed());
        total += call.elapsed();
        steps += machine.world.statistics().steps;
    }
    println!(
        "{:.1} M turns/s; an exchange of 8 GPUs x 4 blocks x 128 lanes: {:?} on average, {worst:?} at worst",
        steps as f64 / total.as_secs_f64() / 1e6,
        total / CALLS,
    );
}
