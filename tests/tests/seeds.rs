//! Random sequences of calls under random schedules: each seed makes a machine and a sequence.
//!
//! `PEERLANE_SEEDS` says how many seeds each world size gets (default 800, fewer for large worlds); `PEERLANE_SEED` runs one
//! only, as a failure tells.

use peerlane::cases::Rng;
use peerlane::{Config, Transport};
use peerlane_tests::{Group, Links, Machine, Script, number_from_environment, random_jobs, small};

/// The group that a seed describes, and what it is to do.
fn scene(world: u32, seed: u64) -> (Group, Script) {
    let mut rng = Rng::new(seed, "scene");
    // Two in three machines have a GPU for each rank.
    let devices = if rng.below(3) > 0 { world } else { 1 + rng.below(world.into()) as u32 };
    // Where counters wrap, and where seals begin to be renewed.
    let first_slot = match rng.below(8) {
        0 | 1 => u32::MAX - rng.below(12) as u32,
        2 => (1 << 29) - rng.below(12) as u32,
        _ => 0,
    };
    let max_blocks = Some(1 + rng.below(2) as u32);
    // Half the machines have all links.
    let links = Links::ALL[(rng.below(6) as usize).saturating_sub(2)];
    let transport = if rng.below(8) == 0 { Transport::Host } else { Transport::Auto };
    let config = Config { first_slot, max_blocks, transport, ..small(world) };
    let calls = 4 + rng.below(12) as usize;
    let most = 1 << (6 + rng.below(8));
    let jobs = random_jobs(world, calls, most, &mut rng);
    let group = Group::connect(&Machine::linked(devices, seed, links), world, &config);
    (group, Script::new(world, &jobs, seed))
}

fn sweep(world: u32, share: u64) {
    let one = std::env::var("PEERLANE_SEED").is_ok();
    let seeds = number_from_environment("PEERLANE_SEEDS", 800).div_ceil(share);
    let first = number_from_environment("PEERLANE_SEED", 1);
    let mut failures = Vec::new();
    for seed in first..first + if one { 1 } else { seeds } {
        let (mut group, script) = scene(world, seed);
        if let Err(reason) = group.run(&script) {
            failures.push(format!(
                "seed {seed}: {reason}\n  replay: PEERLANE_SEED={seed} cargo test -p peerlane-tests --test seeds world_{world}"
            ));
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {seeds} seeds failed\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn world_2_is_right_under_every_seed() {
    sweep(2, 1);
}

#[test]
fn world_3_is_right_under_every_seed() {
    sweep(3, 1);
}

#[test]
fn world_5_is_right_under_every_seed() {
    sweep(5, 1);
}

#[test]
fn world_8_is_right_under_every_seed() {
    sweep(8, 2);
}

#[test]
fn world_16_is_right_under_every_seed() {
    sweep(16, 4);
}

#[test]
fn a_seed_replays_to_the_same_turn() {
    let trace = |seed| {
        let config = peerlane::gpu::sim::Config { devices: 3, seed, ..Default::default() };
        let world = peerlane::gpu::sim::World::new(&config);
        let mut group = Group::on(&world.devices(), &small(3));
        let jobs = random_jobs(3, 10, 3000, &mut Rng::new(seed, "trace"));
        group.check(&jobs, seed);
        world.statistics()
    };
    assert_eq!(trace(5), trace(5));
    assert_ne!(trace(5).trace, trace(6).trace);
}
