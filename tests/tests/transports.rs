//! What carries the data: each ordered pair of ranks its own, host memory for all, or an error.

use peerlane::gpu::sim;
use peerlane::{Communicator, Config, Error, Meeting, Transport};
use peerlane_tests::{Group, Job, Links, Machine, Script, moves, reductions, small};
use std::time::Duration;

/// All collectives in sizes of one chunk and of many.
fn jobs(world: u32) -> Vec<Job> {
    let sizes = [20, 7000];
    let calls = sizes.map(|size| [reductions(size / 4), moves(world, size)].concat());
    calls.into_iter().flatten().map(Job::plain).collect()
}

fn assert_used(rank: &Communicator, expected: impl Fn(u32, u32) -> Transport) {
    let world = rank.world_size();
    for (from, to) in (0..world).flat_map(|from| (0..world).map(move |to| (from, to))) {
        if from != to {
            let found = rank.transport(from, to).expect("both exist");
            assert_eq!(found, expected(from, to), "{from} to {to} of {world}");
        }
    }
}

#[test]
fn worlds_are_right_over_any_links() {
    for world in [2, 3, 4, 5, 9] {
        for links in Links::ALL {
            let seed = 100 + u64::from(world);
            let machine = Machine::linked(world, seed, links);
            let mut group = Group::connect(&machine, world, &small(world));
            let expected = |from, to| match links.reach(from, to) {
                true => Transport::P2p,
                false => Transport::Host,
            };
            group.ranks.iter().for_each(|rank| assert_used(&rank.communicator, expected));
            group.check(&jobs(world), seed);
        }
    }
}

#[test]
fn every_world_size_is_right_through_host_memory() {
    for world in 1..=16 {
        let config = Config { transport: Transport::Host, ..small(world) };
        let (devices, seed) = (world.div_ceil(2), u64::from(world));
        // Ranks that share a GPU use host memory too.
        let mut group = Group::connect(&Machine::sim(devices, seed), world, &config);
        group.ranks.iter().for_each(|rank| assert_used(&rank.communicator, |_, _| Transport::Host));
        group.check(&jobs(world), seed);
    }
}

#[test]
fn large_lanes_are_right_through_host_memory() {
    let config = Config { transport: Transport::Host, max_blocks: Some(3), ..Config::default() };
    let mut group = Group::connect(&Machine::sim(2, 3), 2, &config);
    let calls = [reductions(100_000), moves(2, 300_000)].concat();
    group.check(&calls.into_iter().map(Job::plain).collect::<Vec<_>>(), 3);
}

#[test]
fn graphs_replay_through_host_memory() {
    let config = Config { transport: Transport::Host, ..small(3) };
    let mut group = Group::connect(&Machine::sim(3, 5), 3, &config);
    let script = Script::new(3, &jobs(3), 5);
    let memory = group.load(&script).expect("there is room");
    let graphs = group.capture(&script, &memory).expect("they can be captured");
    for seed in 5..8 {
        let script = script.with_inputs(seed);
        for ((rank, memory), image) in group.ranks.iter().zip(&memory).zip(&script.images) {
            memory.write(&image.before, rank.stream).expect("there is room");
        }
        for (rank, graph) in group.ranks.iter().zip(&graphs) {
            rank.gpu.graph_launch(*graph, rank.stream).expect("it was captured");
        }
        let found = group.collect(&memory, &script).expect("nothing waits in vain");
        script.verify(&found).expect("every byte is right");
    }
}

#[test]
fn threads_agree_on_mixed_links() {
    let (world, links) = (5, Links::Pairs);
    let machine = Machine::linked(world, 2, links);
    let meeting = Meeting::new(world, Duration::from_secs(60));
    let gpus = machine.gpus(world);
    let config = small(world);
    std::thread::scope(|scope| {
        for (rank, gpu) in (0..).zip(&gpus) {
            let (meeting, config) = (meeting.clone(), &config);
            scope.spawn(move || {
                let mut own = Communicator::join(&meeting, rank, gpu, config).expect("they join");
                assert_used(&own, |from, to| match links.reach(from, to) {
                    true => Transport::P2p,
                    false => Transport::Host,
                });
                own.close().expect("nothing has failed");
            });
        }
    });
}

#[test]
fn configurations_with_different_transports_are_told_apart() {
    let machine = Machine::sim(2, 1);
    let meeting = Meeting::new(2, Duration::from_secs(60));
    let errors = std::thread::scope(|scope| {
        let join = |(rank, transport): (u32, Transport)| {
            let (meeting, gpu) = (meeting.clone(), machine.gpus(2)[rank as usize].clone());
            let config = Config { transport, ..small(2) };
            scope.spawn(move || Communicator::join(&meeting, rank, &gpu, &config).err())
        };
        [(0, Transport::Host), (1, Transport::P2p)]
            .map(join)
            .map(|thread| thread.join().expect("no thread panics"))
    });
    for error in errors {
        let error = error.expect("they cannot join").to_string();
        assert!(error.contains("transport: Host") && error.contains("transport: P2p"), "{error}");
    }
}

#[test]
fn questions_about_pairs_that_are_none_are_refused() {
    let group = Group::connect(&Machine::sim(2, 1), 2, &small(2));
    let rank = &group.ranks[0].communicator;
    for (from, to, got) in [(0, 2, "0 and 2"), (7, 0, "7 and 0"), (1, 1, "1")] {
        let Err(Error::InvalidArgument { got: found, .. }) = rank.transport(from, to) else {
            panic!("{from} and {to}");
        };
        assert_eq!(found, got);
    }
}

#[test]
fn one_direction_of_one_pair_may_use_host_memory() {
    let config = sim::Config { devices: 3, one_way: vec![(1, 0)], ..Default::default() };
    let mut group = Group::connect(&Machine::simulated(&config), 3, &small(3));
    assert_used(&group.ranks[2].communicator, |from, to| match (from, to) {
        (1, 0) => Transport::Host,
        _ => Transport::P2p,
    });
    group.check(&jobs(3), 9);
}
