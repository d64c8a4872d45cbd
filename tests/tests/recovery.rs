//! Groups that were aborted begin anew: ranks of one thread and ranks with a thread each, whatever cut their calls
//! short, and with what they had before: graphs, registrations, works, aborters.
//!
//! `PEERLANE_SEEDS` says how many seeds the late stores get, and how often somebody aborts meanwhile.

use peerlane::cases::Rng;
use peerlane::gpu::Stream;
use peerlane::{
    Algorithm, AllReduce, AllReduceRegistered, BREAK_DRAIN, Chunk, Communicator, Config, DType,
    Error, Format, Pattern, ReduceOp, Wire,
};
use peerlane_tests::registered::register_all;
use peerlane_tests::{
    Call, Group, Job, Links, Machine, Memory, Script, number_from_environment, random_jobs, run,
    small, threads,
};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Simulated time that a rank waits. Waits that succeed take a tenth of it at most.
const DEADLINE: Duration = Duration::from_millis(100);

/// Real time that no healthy run of threads takes.
const LONG: Duration = Duration::from_secs(60);

fn config(world: u32) -> Config {
    let staging_bytes = Some(96 << 10);
    Config { deadline: DEADLINE, staging_bytes, chunk_bytes: Some(512), ..small(world) }
}

fn all_reduce(count: usize, algorithm: Algorithm) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (algorithm, in_place, absent) = (Some(algorithm), false, 0);
    Job::plain(Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent })
}

fn recover(group: &mut Group) -> Result<(), Error> {
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    Communicator::recover_all(&mut ranks)
}

/// Random calls of all kinds, compared byte by byte.
fn check(group: &mut Group, seed: u64) {
    let world = group.ranks.len() as u32;
    group.check(&random_jobs(world, 8, 3000, &mut Rng::new(seed, "recovery")), seed);
}

fn healths(group: &Group) -> Vec<Result<(), Error>> {
    group.ranks.iter().map(|rank| rank.communicator.health()).collect()
}

/// Lets the ranks but the last `missing` call, and returns what becomes of that.
fn leave_alone(group: &mut Group, job: Job, missing: usize) -> Vec<Result<(), Error>> {
    let world = group.ranks.len();
    let script = Script::new(world as u32, &[job], 1);
    let memory = group.load(&script).expect("there is memory");
    for (rank, memory) in group.ranks[..world - missing].iter_mut().zip(&memory) {
        rank.issue_all(&script, memory.base).expect("the call is right");
    }
    group.ranks[..world - missing].iter().map(|rank| rank.finish()).collect()
}

#[test]
fn groups_recover_in_every_world_from_aborts_and_time_outs() {
    for (world, links) in [
        (1, Links::All),
        (2, Links::All),
        (3, Links::None),
        (3, Links::All),
        (5, Links::Pairs),
        (8, Links::OneWay),
    ] {
        let machine = Machine::linked(world, 7, links);
        let config = Config { first_slot: u32::MAX - 5, ..config(world) };
        let mut group = Group::connect(&machine, world, &config);
        check(&mut group, 1);
        group.ranks[0].communicator.abort();
        assert!(healths(&group).iter().all(Result::is_err));
        recover(&mut group).expect("all ranks are here");
        assert_eq!(healths(&group), vec![Ok(()); world as usize]);
        check(&mut group, 2);
        if world > 1 {
            let errors = leave_alone(&mut group, all_reduce(5000, Algorithm::TwoShot), 1);
            assert!(errors.iter().any(|e| matches!(e, Err(Error::Timeout { .. }))), "{errors:?}");
            recover(&mut group).expect("all ranks are here");
        }
        check(&mut group, 3);
        // Of what is healthy it is a reset.
        recover(&mut group).expect("all ranks are here");
        check(&mut group, 4);
        let generations = 2 + u64::from(world > 1);
        assert!(group.ranks.iter().all(|rank| rank.communicator.generation() == generations));
    }
}

#[test]
fn scheduled_calls_are_right_again() {
    for pattern in Pattern::ALL {
        let mut group = Group::connect(&Machine::sim(3, 2), 3, &config(3));
        let job = all_reduce(3000, Algorithm::Scheduled(pattern));
        for seed in 1..=2 {
            group.check(std::slice::from_ref(&job), seed);
            let errors = leave_alone(&mut group, job.clone(), 1);
            assert!(errors.iter().any(|e| matches!(e, Err(Error::Timeout { .. }))), "{errors:?}");
            recover(&mut group).expect("all ranks are here");
            check(&mut group, seed);
        }
        group.check(&[job], 3);
    }
}

/// Launches graphs that were captured before, and compares what they leave.
fn replay(group: &mut Group, graphs: &[peerlane::gpu::Graph], memory: &[Memory], script: &Script) {
    for ((rank, memory), image) in group.ranks.iter().zip(memory).zip(&script.images) {
        memory.write(&image.before, rank.stream).expect("it fits");
    }
    for (rank, graph) in group.ranks.iter().zip(graphs) {
        rank.gpu.graph_launch(*graph, rank.stream).expect("it runs");
    }
    let found = group.collect(memory, script).expect("it goes well");
    script.verify(&found).expect("it is right");
}

#[test]
fn graphs_captured_before_are_right_afterwards() {
    let scheduled = Algorithm::Scheduled(Pattern::TwoShot);
    for algorithm in [Algorithm::TwoShot, Algorithm::OneShot(Format::Packet), scheduled] {
        let mut group = Group::connect(&Machine::sim(3, 5), 3, &config(3));
        let jobs = [all_reduce(700, algorithm), all_reduce(2500, algorithm)];
        let script = Script::new(3, &jobs, 1);
        let memory = group.load(&script).expect("there is memory");
        let graphs = group.capture(&script, &memory).expect("it can be captured");
        for turn in 0..2 {
            replay(&mut group, &graphs, &memory, &script);
            replay(&mut group, &graphs, &memory, &script);
            // A replay that is left alone, with a deadline.
            let rank = &group.ranks[turn];
            rank.gpu.graph_launch(graphs[turn], rank.stream).expect("it runs");
            assert!(rank.finish().is_err());
            recover(&mut group).expect("all ranks are here");
        }
        replay(&mut group, &graphs, &memory, &script);
        let rank = &group.ranks[2];
        rank.gpu.graph_launch(graphs[2], rank.stream).expect("it runs");
        assert!(matches!(rank.finish(), Err(Error::Timeout { rank: 2, .. })));
    }
}

#[test]
fn works_say_what_cut_them_short_and_only_that() {
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &config(2));
    let memory: Vec<Memory> = (group.ranks.iter())
        .map(|rank| Memory::with_image(&rank.gpu, rank.stream, &[0; 4096]).expect("memory"))
        .collect();
    let algorithm = Some(Algorithm::OneShot(Format::Full));
    let call = |rank: usize| AllReduce {
        algorithm,
        ..AllReduce::in_place(memory[rank].base, 1024, DType::F32)
    };
    let begin = |group: &mut Group, rank: usize| {
        let own = &mut group.ranks[rank];
        // SAFETY: the memory has that size and outlives the group.
        unsafe { own.communicator.all_reduce_async(&call(rank), own.stream) }.expect("it is right")
    };
    let well = [begin(&mut group, 0), begin(&mut group, 1)];
    assert!(well.iter().all(|work| work.wait() == Ok(())));
    // Done, and nobody has asked.
    let done = [begin(&mut group, 0), begin(&mut group, 1)];
    group.ranks.iter().for_each(|rank| rank.gpu.synchronize().expect("it ends"));
    recover(&mut group).expect("all ranks are here");
    assert!(done.iter().all(|work| work.wait() == Ok(())), "it was done before the abort");
    // Rank 1 does not call: chunks too.
    let own = &mut group.ranks[0];
    let ready = own.gpu.event_create().expect("an event");
    own.gpu.event_record(ready, own.stream).expect("it is recorded");
    let chunks = [0, 512].map(|first| Chunk { first, count: 512, ready });
    // SAFETY: as above.
    let cut = unsafe { own.communicator.all_reduce_chunks(&call(0), &chunks) };
    let cut = cut.expect("the call is right");
    assert!(cut[0].wait().is_err());
    group.ranks[1].communicator.abort();
    recover(&mut group).expect("all ranks are here");
    let after = [begin(&mut group, 0), begin(&mut group, 1)];
    assert!(after.iter().all(|work| work.wait() == Ok(())));
    for work in &cut {
        assert!(matches!(work.wait(), Err(Error::Timeout { rank: 0, peer: 1, .. })));
        assert_eq!(work.query(), Ok(true));
    }
    assert!(well.iter().chain(&done).all(|work| work.wait() == Ok(())));
    // Nothing is in flight, so a capture may begin.
    let script = Script::new(2, &[all_reduce(700, Algorithm::TwoShot)], 1);
    let images = group.load(&script).expect("there is memory");
    group.capture(&script, &images).expect("it can be captured");
}

#[test]
fn registered_tensors_stay_registered() {
    let mut group = Group::connect(&Machine::sim(3, 4), 3, &config(3));
    let (memory, registered) = register_all(&mut group, 4096);
    let call = AllReduceRegistered::new(1024, DType::F32);
    for turn in 0..3 {
        for (number, (rank, memory)) in (1..).zip(group.ranks.iter_mut().zip(&memory)) {
            let image = (number as f32).to_le_bytes().repeat(1024);
            memory.write(&image, rank.stream).expect("it fits");
            let registration = &registered[number as usize - 1];
            // SAFETY: the memory outlives the group's calls.
            unsafe { rank.communicator.all_reduce_registered(registration, &call, rank.stream) }
                .expect("the call is right");
        }
        for (rank, memory) in group.ranks.iter().zip(&memory) {
            rank.finish().expect("it goes well");
            assert_eq!(memory.read(4096).expect("it is there"), 6f32.to_le_bytes().repeat(1024));
        }
        let own = &mut group.ranks[turn];
        // SAFETY: as above.
        unsafe { own.communicator.all_reduce_registered(&registered[turn], &call, own.stream) }
            .expect("the call is right");
        assert!(own.finish().is_err(), "nobody else calls");
        recover(&mut group).expect("all ranks are here");
    }
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    Communicator::deregister_all(&mut ranks, &registered).expect("they are in use");
}

/// Under which seeds a group that recovers while calls are under way goes wrong later.
fn failures(broken: u32) -> Vec<String> {
    let seeds = number_from_environment("PEERLANE_SEEDS", 8);
    let attempt = |seed| {
        let config = Config { broken, ..config(3) };
        let mut group = Group::connect(&Machine::sim(3, seed), 3, &config);
        let jobs = random_jobs(3, 6, 9000, &mut Rng::new(seed, "late"));
        let script = Script::new(3, &jobs, seed);
        let memory = group.load(&script)?;
        // Under every other seed one rank does not call, so the others' kernels are in the middle of their first.
        let callers = 3 - (seed % 2) as usize;
        for (rank, memory) in group.ranks.iter_mut().zip(&memory).take(callers) {
            rank.issue_all(&script, memory.base)?;
        }
        recover(&mut group)?;
        let next = Script::new(3, &random_jobs(3, 6, 3000, &mut Rng::new(seed, "next")), seed);
        group.run(&next).map(drop).map_err(|reason| Error::Rendezvous { world: 3, reason })
    };
    let fails = |seed| attempt(seed).err().map(|error| format!("seed {seed}: {error}"));
    (1..=seeds).filter_map(fails).collect()
}

#[test]
fn stores_of_the_last_generation_harm_nothing() {
    assert_eq!(failures(0), Vec::<String>::new());
    let broken = failures(BREAK_DRAIN);
    assert!(!broken.is_empty(), "no seed notices that kernels are not waited for");
}

#[test]
fn mistakes_are_named() {
    let machine = Machine::sim(2, 1);
    let mut groups = [0, 1].map(|_| Group::connect(&machine, 2, &config(2)));
    let [first, second] = &mut groups;
    let wrong = &mut [&mut first.ranks[0].communicator, &mut second.ranks[1].communicator];
    let error = Communicator::recover_all(wrong).expect_err("they are strangers").to_string();
    assert!(error.starts_with("recover: ranks: expected all ranks of one group"), "{error}");
    // Nothing has happened to either.
    groups.iter_mut().for_each(|group| check(group, 1));
    groups[0].ranks[0].communicator.close().expect("it is idle");
    let closed = groups[0].ranks[0].communicator.recover();
    assert_eq!(closed, Err(Error::Closed { op: "recover", rank: 0 }));
}

#[test]
fn threads_recover_over_many_seeds() {
    for (world, seed) in [(1, 1), (2, 2), (3, 3), (5, 4), (8, 5)] {
        let config = Config { deadline: LONG, ..config(world) };
        let scripts: Vec<Script> = (0..3)
            .map(|part: u64| {
                let jobs = random_jobs(world, 5, 3000, &mut Rng::new(10 * seed + part, "threads"));
                Script::new(world, &jobs, seed)
            })
            .collect();
        let together = Barrier::new(world as usize);
        threads(&Machine::sim(world, seed), world, &config, |rank| {
            for (turn, script) in (0..).zip(&scripts) {
                run(rank, script).expect("it goes well");
                together.wait();
                // One aborts at once, or calls what nobody else does; the others learn of it in a call.
                if rank.communicator.rank() == turn % world {
                    rank.communicator.abort();
                } else if turn % 2 == 0 {
                    let alone = Script::new(world, &[all_reduce(900, Algorithm::TwoShot)], seed);
                    assert!(run(rank, &alone).is_err());
                }
                rank.communicator.recover().expect("all ranks come");
                assert_eq!(rank.communicator.generation(), u64::from(turn) + 1);
                run(rank, script).expect("it goes well");
                together.wait();
            }
        });
    }
}

#[test]
fn a_rank_that_never_comes_is_named_and_may_come_later() {
    let deadline = Duration::from_millis(300);
    let together = Barrier::new(3);
    let script = Script::new(3, &[all_reduce(3000, Algorithm::TwoShot)], 1);
    threads(&Machine::sim(3, 1), 3, &Config { deadline, ..config(3) }, |rank| {
        if rank.communicator.rank() != 1 {
            let begin = Instant::now();
            let error = rank.communicator.recover().expect_err("rank 1 does not").to_string();
            assert!(error.contains("in vain for rank 1"), "{error}");
            assert!(begin.elapsed() < 4 * deadline, "{:?}", begin.elapsed());
        }
        together.wait();
        let stopped = Err(Error::Stopped { rank: rank.communicator.rank() });
        assert_eq!(rank.communicator.health(), stopped);
        assert_eq!(rank.communicator.generation(), 0);
        rank.communicator.set_deadline(LONG);
        // Rank 1 notices late.
        if rank.communicator.rank() == 1 {
            std::thread::sleep(deadline);
        }
        rank.communicator.recover().expect("all ranks come");
        run(rank, &script).expect("it goes well");
    });
}

#[test]
fn one_communicator_recovers_while_another_works() {
    let config = Config { deadline: LONG, ..config(2) };
    let machine = Machine::sim(2, 3);
    let script = |part| {
        let jobs = random_jobs(2, 5, 2000, &mut Rng::new(part, "two"));
        Script::new(2, &jobs, part)
    };
    let scripts: Vec<Script> = (0..8).map(script).collect();
    let together = Barrier::new(2);
    std::thread::scope(|scope| {
        let (machine, config, scripts, together) = (&machine, &config, &scripts, &together);
        scope.spawn(move || {
            threads(machine, 2, config, |rank| {
                scripts.iter().for_each(|script| run(rank, script).expect("nobody disturbs it"));
            });
        });
        scope.spawn(move || {
            threads(machine, 2, config, |rank| {
                for script in scripts {
                    rank.communicator.recover().expect("all ranks come");
                    run(rank, script).expect("it goes well");
                    together.wait();
                }
            });
        });
    });
}

#[test]
fn an_abort_meanwhile_stops_all_ranks_or_none() {
    let config = Config { deadline: LONG, ..config(3) };
    let (together, turns) = (Barrier::new(3), number_from_environment("PEERLANE_SEEDS", 60));
    let seen = threads(&Machine::sim(3, 1), 3, &config, |rank| {
        let mut rng = Rng::new(u64::from(rank.communicator.rank()), "meanwhile");
        let turn = |_| {
            let aborter = rank.communicator.aborter();
            let pause = Duration::from_micros(rng.below(400));
            let outcome = std::thread::scope(|scope| {
                if rank.communicator.rank() != 2 {
                    scope.spawn(move || {
                        std::thread::sleep(pause);
                        aborter.abort();
                    });
                }
                rank.communicator.recover().is_ok()
            });
            together.wait();
            let health = rank.communicator.health().is_ok();
            together.wait();
            (outcome, health)
        };
        (0..turns).map(turn).collect::<Vec<_>>()
    });
    assert!((1..3).all(|rank| seen[rank] == seen[0]), "{seen:?}");
    assert!(seen[0].iter().all(|(outcome, health)| *outcome || !health));
}

#[test]
fn aborters_last() {
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &config(2));
    let aborter = group.ranks[1].communicator.aborter();
    check(&mut group, 2);
    recover(&mut group).expect("all ranks are here");
    aborter.abort();
    assert_eq!(healths(&group), [0, 1].map(|rank| Err(Error::Stopped { rank })));
    // A stream that is gone since needs no order with later calls.
    recover(&mut group).expect("all ranks are here");
    let gone: Vec<Stream> = group.ranks.iter().map(|rank| rank.stream).collect();
    for (rank, stream) in group.ranks.iter_mut().zip(gone) {
        rank.stream = rank.gpu.stream_create().expect("a stream");
        // SAFETY: not used again.
        unsafe { rank.gpu.stream_destroy(stream).expect("it is there") };
    }
    check(&mut group, 1);
}
