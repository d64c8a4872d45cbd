//! Litmus tests: what the memory model allows is seen for some seed, what it forbids for none.

use super::Machine;
use peerlane_device::lane::Lane;

/// Offsets in a rank's memory.
const DATA: u64 = 0;
const FLAG: u64 = 256;
const SEEN: u64 = 512;
const SEEDS: u64 = 200;

/// Runs message passing from rank 0 to rank 1 and returns whether rank 1 saw the flag without the
/// data. `publish` is what the sender does between its data and its flag, `lanes` how many send.
fn stale(seed: u64, lanes: u32, publish: fn(super::SimLane)) -> bool {
    let machine = Machine::new(2, seed, 4096);
    machine
        .launch(0, (1, lanes), move |lane, args| {
            let to = args.peers[1];
            // SAFETY: inside the peer's memory.
            unsafe {
                lane.put_unit(to + DATA + 16 * u64::from(lane.thread()), [7; 4]);
                publish(lane);
                if lane.thread() == 0 {
                    lane.put_word(to + FLAG, 1);
                }
            }
        })
        .unwrap();
    machine
        .launch(1, (1, lanes), |lane, args| {
            let own = args.peers[1];
            // SAFETY: inside this rank's memory.
            unsafe {
                while lane.poll_word(own + FLAG) == 0 {
                    lane.pause();
                }
                let unit = lane.poll_unit(own + DATA + 16 * u64::from(lane.thread()));
                if unit != [7; 4] {
                    lane.store_u32(own + SEEN, 1);
                }
            }
        })
        .unwrap();
    machine.word(1, SEEN as usize) == 1
}

fn seeds_that(mut fails: impl FnMut(u64) -> bool) -> usize {
    let count = (0..SEEDS).filter(|&seed| fails(seed)).count();
    println!("{count} of {SEEDS} seeds");
    count
}

#[test]
fn a_flag_may_overtake_its_data() {
    assert!(seeds_that(|seed| stale(seed, 1, |_| {})) > 0);
}

#[test]
fn a_fence_keeps_the_flag_behind_its_data() {
    assert_eq!(seeds_that(|seed| stale(seed, 1, |lane| lane.fence_system())), 0);
}

#[test]
fn a_barrier_alone_orders_nothing_for_a_peer() {
    assert!(seeds_that(|seed| stale(seed, 8, |lane| lane.sync_threads())) > 0);
}

#[test]
fn a_fence_without_the_barrier_covers_its_own_lane_only() {
    let fence = |lane: super::SimLane| lane.fence_system();
    assert!(seeds_that(|seed| stale(seed, 8, fence)) > 0);
}

#[test]
fn a_fence_after_the_barrier_covers_the_block() {
    let publish = |lane: super::SimLane| {
        lane.sync_threads();
        if lane.thread() == 0 {
            lane.fence_system();
        }
    };
    assert_eq!(seeds_that(|seed| stale(seed, 8, publish)), 0);
}

/// Whether rank 1 saw a part of a unit.
fn torn(seed: u64) -> bool {
    let machine = Machine::new(2, seed, 4096);
    // SAFETY: inside the peer's memory.
    machine
        .launch(0, (1, 1), |lane, args| unsafe { lane.put_unit(args.peers[1], [1; 4]) })
        .unwrap();
    machine
        .launch(1, (1, 1), |lane, args| {
            let own = args.peers[1];
            // SAFETY: inside this rank's memory.
            unsafe {
                loop {
                    let unit = lane.poll_unit(own);
                    if unit == [1; 4] {
                        return;
                    }
                    if unit != [0; 4] {
                        lane.store_u32(own + SEEN, 1);
                    }
                    lane.pause();
                }
            }
        })
        .unwrap();
    machine.word(1, SEEN as usize) == 1
}

#[test]
fn units_tear() {
    assert!(seeds_that(torn) > 0);
}

#[test]
fn without_the_weak_model_stores_are_in_order() {
    for seed in 0..50 {
        let config = super::Config { devices: 2, seed, weak: false, ..Default::default() };
        let machine = Machine::with(&config, 4096);
        machine
            .launch(0, (1, 1), |lane, args| {
                // SAFETY: inside the peer's memory.
                unsafe {
                    lane.put_unit(args.peers[1] + DATA, [7; 4]);
                    lane.put_word(args.peers[1] + FLAG, 1);
                }
            })
            .unwrap();
        machine
            .launch(1, (1, 1), |lane, args| {
                // SAFETY: inside this rank's memory.
                unsafe {
                    while lane.poll_word(args.peers[1] + FLAG) == 0 {
                        lane.pause();
                    }
                    lane.store_u32x4(args.peers[1] + SEEN, lane.poll_unit(args.peers[1] + DATA));
                }
            })
            .unwrap();
        assert_eq!(machine.word(1, SEEN as usize), 7);
    }
}

#[test]
fn a_lane_sees_its_own_stores_in_order() {
    for seed in 0..SEEDS {
        let machine = Machine::new(1, seed, 4096);
        machine
            .launch(0, (1, 4), |lane, args| {
                let at = args.peers[0] + 64 * u64::from(lane.thread());
                for value in 1..100 {
                    // SAFETY: inside this rank's memory.
                    unsafe {
                        lane.put_unit(at, [value; 4]);
                        assert_eq!(lane.poll_unit(at), [value; 4]);
                        assert_eq!(lane.poll_word(at + 8), value);
                    }
                }
            })
            .unwrap();
        machine.synchronize().unwrap();
        assert_eq!(machine.word(0, 64 + 12), 99);
    }
}

#[test]
fn stores_to_one_address_land_in_order() {
    for seed in 0..SEEDS {
        let machine = Machine::new(2, seed, 4096);
        machine
            .launch(0, (1, 1), |lane, args| {
                for value in 1..50 {
                    // SAFETY: inside the peer's memory.
                    unsafe { lane.put_word(args.peers[1] + FLAG, value) };
                    lane.sync_threads();
                }
            })
            .unwrap();
        machine
            .launch(1, (1, 1), |lane, args| {
                let mut last = 0;
                while last < 49 {
                    // SAFETY: inside this rank's memory.
                    let now = unsafe { lane.poll_word(args.peers[1] + FLAG) };
                    assert!(now >= last, "{now} after {last}");
                    last = now;
                    lane.pause();
                }
            })
            .unwrap();
        machine.synchronize().unwrap();
    }
}

/// Each lane puts a word into local memory, one reads another's. Returns whether it saw it.
fn neighbour_seen(seed: u64, barrier: bool) -> bool {
    let machine = Machine::new(1, seed, 4096);
    machine
        .launch(0, (1, 32), move |lane, args| {
            let at = |thread: u32| args.peers[0] + 4 * u64::from(thread);
            // SAFETY: inside this rank's memory.
            unsafe {
                lane.put_word(at(lane.thread()), 1);
                if barrier {
                    lane.sync_threads();
                }
                if lane.poll_word(at((lane.thread() + 1) % 32)) == 0 {
                    lane.store_u32(args.peers[0] + SEEN, 1);
                }
            }
        })
        .unwrap();
    machine.word(0, SEEN as usize) == 0
}

#[test]
fn a_barrier_shows_the_blocks_stores_to_the_block() {
    assert_eq!(seeds_that(|seed| !neighbour_seen(seed, true)), 0);
    assert!(seeds_that(|seed| !neighbour_seen(seed, false)) > 0);
}

#[test]
fn the_end_of_a_kernel_lands_everything() {
    for seed in 0..SEEDS {
        let machine = Machine::new(2, seed, 4096);
        machine
            .launch(0, (2, 32), |lane, args| {
                let index = u64::from(lane.block() * 32 + lane.thread());
                // SAFETY: inside the peer's memory.
                unsafe { lane.put_unit(args.peers[1] + 16 * index, [3; 4]) };
            })
            .unwrap();
        machine.synchronize().unwrap();
        for offset in (0..1024).step_by(4) {
            assert_eq!(machine.word(1, offset), 3);
        }
    }
}

#[test]
fn a_claim_has_one_winner() {
    for seed in 0..SEEDS {
        let machine = Machine::new(1, seed, 4096);
        machine
            .launch(0, (4, 8), |lane, args| {
                let winner = args.peers[0] + SEEN + 4 * u64::from(8 * lane.block() + lane.thread());
                // SAFETY: inside this rank's memory.
                unsafe {
                    if lane.claim_word(args.peers[0]) {
                        lane.store_u32(winner, 1);
                    }
                }
            })
            .unwrap();
        let winners: u32 = (0..32).map(|lane| machine.word(0, SEEN as usize + 4 * lane)).sum();
        assert_eq!(winners, 1);
    }
}
