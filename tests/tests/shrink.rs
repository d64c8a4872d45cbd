//! Groups that go on without some of their ranks: who is left, what follows them, and what becomes of the others.

use peerlane::cases::Rng;
use peerlane::gpu::DevicePtr;
use peerlane::{Algorithm, Communicator, Config, DType, Error, Meeting, Pattern, ReduceOp, Wire};
use peerlane_tests::registered::register_all;
use peerlane_tests::{
    Call, Group, Job, Links, Machine, Memory, Rank, Script, random_jobs, run, small,
};
use std::sync::Barrier;
use std::time::Duration;

/// Real time that no healthy run of threads takes.
const LONG: Duration = Duration::from_secs(60);

fn config(world: u32) -> Config {
    let staging_bytes = Some(96 << 10);
    let deadline = Duration::from_millis(100);
    Config { deadline, staging_bytes, chunk_bytes: Some(512), ..small(world) }
}

fn all_reduce(count: usize, algorithm: Algorithm) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (algorithm, in_place, absent) = (Some(algorithm), false, 0);
    Job::plain(Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent })
}

/// Random calls of all kinds, compared byte by byte.
fn check(group: &mut Group, seed: u64) {
    let world = group.ranks.len() as u32;
    group.check(&random_jobs(world, 8, 3000, &mut Rng::new(seed, "shrink")), seed);
    group.check(&[all_reduce(900, Algorithm::TwoShot)], seed);
}

fn shrink(group: &mut Group, without: &[u32]) -> Result<(), Error> {
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    Communicator::shrink_all(&mut ranks, without)
}

/// Takes ranks out of a group; what is left is not told.
fn take(group: &mut Group, gone: &[u32]) -> Vec<Rank> {
    let mut taken: Vec<Rank> = Vec::new();
    for rank in gone.iter().rev() {
        taken.push(group.ranks.remove(*rank as usize));
    }
    taken
}

#[test]
fn survivors_go_on_in_every_world() {
    for (world, gone, links) in [
        (2, vec![0], Links::All),
        (2, vec![1], Links::None),
        (3, vec![0], Links::All),
        (5, vec![1, 4], Links::Pairs),
        (8, vec![0, 3, 4], Links::OneWay),
        (8, vec![1, 2, 3, 4, 5, 6, 7], Links::All),
    ] {
        let machine = Machine::linked(world, 7, links);
        let mut group = Group::connect(&machine, world, &config(world));
        check(&mut group, 1);
        let aborter = group.ranks[0].communicator.aborter();
        let mut others = take(&mut group, &gone);
        // They wait for what the others do not call.
        let script = Script::new(world, &[all_reduce(5000, Algorithm::TwoShot)], 1);
        for rank in &mut group.ranks {
            let image = &script.images[rank.communicator.rank() as usize].before;
            let memory = Memory::with_image(&rank.gpu, rank.stream, image).expect("memory");
            rank.issue_all(&script, memory.base).expect("the call is right");
            assert!(rank.finish().is_err());
        }
        shrink(&mut group, &gone).expect("all survivors are here");
        let left = group.ranks.len() as u32;
        for (place, rank) in (0..).zip(&group.ranks) {
            let own = &rank.communicator;
            assert_eq!((own.rank(), own.world_size(), own.generation()), (place, left, 1));
            assert_eq!(own.health(), Ok(()));
        }
        check(&mut group, 2);
        // The others are stopped, and can only close.
        for rank in &mut others {
            let number = rank.communicator.rank();
            assert_eq!(rank.communicator.health(), Err(Error::Stopped { rank: number }));
            assert_eq!(rank.communicator.close(), Ok(()));
        }
        drop(others);
        check(&mut group, 3);
        if !gone.contains(&0) {
            aborter.abort();
            assert_eq!(group.ranks[0].communicator.health(), Err(Error::Stopped { rank: 0 }));
        }
        let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        Communicator::recover_all(&mut ranks).expect("all survivors are here");
        check(&mut group, 4);
    }
}

#[test]
fn groups_shrink_again_and_again() {
    let mut group = Group::connect(&Machine::sim(6, 3), 6, &config(6));
    for (turn, gone) in (1..).zip([[5], [0], [2], [1]]) {
        let _others = take(&mut group, &gone);
        shrink(&mut group, &gone).expect("all survivors are here");
        check(&mut group, turn);
        group.check(&[all_reduce(2000, Algorithm::Scheduled(Pattern::Ring))], turn);
        assert!(group.ranks.iter().all(|rank| rank.communicator.generation() == turn));
    }
}

#[test]
fn islands_and_hubs_follow_the_ranks() {
    let islands = Some(vec![0, 0, 1, 1, 1]);
    let config = Config { islands, hub: Some(4), ..config(5) };
    let mut group = Group::connect(&Machine::sim(5, 3), 5, &config);
    let _others = take(&mut group, &[1]);
    shrink(&mut group, &[1]).expect("all survivors are here");
    let found = group.ranks[0].communicator.config().clone();
    assert_eq!((found.islands, found.hub), (Some(vec![0, 1, 1, 1]), Some(3)));
    check(&mut group, 1);
    let _hub = take(&mut group, &[3]);
    shrink(&mut group, &[3]).expect("all survivors are here");
    assert_eq!(group.ranks[0].communicator.config().hub, None);
    check(&mut group, 2);
}

#[test]
fn what_belongs_to_the_old_memory_ends_with_it() {
    let mut group = Group::connect(&Machine::sim(3, 1), 3, &config(3));
    let (memory, registered) = register_all(&mut group, 4096);
    let call = peerlane::AllReduce::in_place(memory[0].base, 1000, DType::F32);
    let own = &mut group.ranks[0];
    // SAFETY: the memory outlives the group's calls.
    let cut = unsafe { own.communicator.all_reduce_async(&call, own.stream) }.expect("it is right");
    let _others = take(&mut group, &[2]);
    shrink(&mut group, &[2]).expect("all survivors are here");
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    let error = Communicator::deregister_all(&mut ranks, &registered[..2]).expect_err("it ended");
    assert!(error.to_string().contains("which has been deregistered"), "{error}");
    let tensors = [0, 1].map(|rank: usize| (memory[rank].base, 4096));
    // SAFETY: as above.
    let again = unsafe { Communicator::register_all(&mut ranks, &tensors) }.expect("it goes");
    Communicator::deregister_all(&mut ranks, &again).expect("they are in use");
    assert!(matches!(cut.wait(), Err(Error::Aborted { .. } | Error::Stopped { .. })));
    check(&mut group, 1);
}

#[test]
fn mistakes_are_named() {
    let mut group = Group::connect(&Machine::sim(3, 1), 3, &config(3));
    let alone = |group: &mut Group, without: &[u32]| {
        group.ranks[1].communicator.shrink(without).expect_err("it cannot be").to_string()
    };
    for (without, text) in [
        (&[][..], "at least one rank, got []"),
        (&[3], "ranks from 0 to 2, got [3]"),
        (&[0, 0], "each rank once, got [0, 0]"),
        (&[2, 1], "other ranks than 1, which calls, got [2, 1]"),
    ] {
        let error = alone(&mut group, without);
        assert_eq!(error, format!("shrink: without: expected {text}"));
    }
    let error = shrink(&mut group, &[2]).expect_err("rank 2 is among them").to_string();
    assert!(error.starts_with("shrink: ranks: expected all ranks"), "{error}");
    let error = shrink(&mut group, &[]).expect_err("nobody goes").to_string();
    assert!(error.ends_with("at least one rank, got []"), "{error}");
    // Nothing has happened.
    check(&mut group, 1);
    group.ranks[0].communicator.close().expect("it is idle");
    let closed = group.ranks[0].communicator.shrink(&[1]);
    assert_eq!(closed, Err(Error::Closed { op: "shrink", rank: 0 }));
}

/// Ranks with a thread each: what each rank's `shrink` says, and a check of the survivors who succeed together.
fn in_threads(
    world: u32,
    config: &Config,
    each: impl Fn(&mut Rank) -> Result<(), Error> + Sync,
) -> Vec<Result<(), Error>> {
    let machine = Machine::sim(world, 5);
    peerlane_tests::threads(&machine, world, config, |rank| each(rank))
}

#[test]
fn threads_shrink_and_the_rank_left_out_is_stopped() {
    for (world, gone) in [(2, vec![0]), (3, vec![0]), (5, vec![1, 3])] {
        let left = world - gone.len() as u32;
        let script = Script::new(left, &random_jobs(left, 6, 2000, &mut Rng::new(1, "left")), 1);
        let outcomes = in_threads(world, &Config { deadline: LONG, ..config(world) }, |rank| {
            if gone.contains(&rank.communicator.rank()) {
                while rank.communicator.health().is_ok() {
                    std::thread::yield_now();
                }
                return rank.communicator.health();
            }
            rank.communicator.shrink(&gone)?;
            run(rank, &script)?;
            assert_eq!(rank.communicator.world_size(), left);
            // In memory of its own it recovers as any group does. Nobody does so before all are done.
            let barrier = Script::new(left, &[Job::plain(Call::Barrier)], 1);
            run(rank, &barrier)?;
            Ok(())
        });
        for (rank, outcome) in (0..).zip(outcomes) {
            let stopped = Err(Error::Stopped { rank });
            assert_eq!(outcome, if gone.contains(&rank) { stopped } else { Ok(()) });
        }
    }
}

#[test]
fn a_rank_whose_gpu_is_gone_cannot_recover_and_is_left_out() {
    let script = Script::new(2, &[all_reduce(900, Algorithm::TwoShot)], 1);
    let together = Barrier::new(3);
    let outcomes = in_threads(3, &Config { deadline: LONG, ..config(3) }, |rank| {
        let number = rank.communicator.rank();
        if number == 1 {
            let nowhere = peerlane::AllReduce::in_place(DevicePtr(4096), 900, DType::F32);
            // SAFETY: it is not: the simulator finds out and gives the GPU up.
            unsafe { rank.communicator.all_reduce(&nowhere, rank.stream) }?;
            assert!(rank.finish().is_err());
        }
        together.wait();
        let error = rank.communicator.recover().expect_err("GPU 1 is gone").to_string();
        assert!(error.contains("rank 1: simulated GPU 1: "), "{error}");
        if number == 1 {
            return Ok(());
        }
        rank.communicator.shrink(&[1])?;
        run(rank, &script)
    });
    assert_eq!(outcomes, vec![Ok(()); 3]);
}

#[test]
fn ranks_that_leave_different_ranks_out_are_both_named() {
    let script = Script::new(3, &[all_reduce(900, Algorithm::TwoShot)], 1);
    let outcomes = in_threads(4, &Config { deadline: LONG, ..config(4) }, |rank| {
        match rank.communicator.rank() {
            3 => return Ok(()),
            2 => {
                std::thread::sleep(Duration::from_millis(200));
                let error = rank.communicator.shrink(&[3, 0]).expect_err("others do not");
                let text = error.to_string();
                assert!(text.contains("rank 2 goes on without ranks 0, 3"), "{text}");
                assert!(text.contains("goes on without rank 3, "), "{text}");
                // Those who agree are told too, and all try again.
            }
            0 => {}
            _ => {
                let error = rank.communicator.shrink(&[3]).expect_err("rank 2 does not");
                assert!(error.to_string().contains("rank 2 goes on without"), "{error}");
            }
        }
        if rank.communicator.rank() == 0 {
            std::thread::sleep(Duration::from_millis(400));
        }
        rank.communicator.shrink(&[3])?;
        run(rank, &script)
    });
    assert_eq!(outcomes, vec![Ok(()); 4]);
}

#[test]
fn a_survivor_that_never_comes_is_named_and_may_come_later() {
    let deadline = Duration::from_millis(300);
    let script = Script::new(2, &[all_reduce(900, Algorithm::TwoShot)], 1);
    let outcomes = in_threads(3, &Config { deadline, ..config(3) }, |rank| {
        match rank.communicator.rank() {
            0 => return Ok(()),
            1 => {
                let error = rank.communicator.shrink(&[0]).expect_err("rank 2 is late").to_string();
                assert!(error.contains("in vain for rank 2"), "{error}");
            }
            _ => std::thread::sleep(2 * deadline),
        }
        rank.communicator.set_deadline(LONG);
        rank.communicator.shrink(&[0])?;
        assert_eq!(rank.communicator.config().deadline, LONG);
        run(rank, &script)
    });
    assert_eq!(outcomes, vec![Ok(()); 3]);
}

#[test]
fn a_group_of_one_has_nobody_to_leave_out() {
    let machine = Machine::sim(1, 1);
    let meeting = Meeting::new(1, LONG);
    let gpu = &machine.gpus(1)[0];
    let mut alone = Communicator::join(&meeting, 0, gpu, &config(1)).expect("it joins");
    let error = alone.shrink(&[0]).expect_err("it is itself").to_string();
    assert!(error.contains("other ranks than 0"), "{error}");
    alone.recover().expect("it is all there is");
    assert_eq!(alone.generation(), 1);
}
