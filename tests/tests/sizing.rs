//! Mailboxes and staging areas that follow the workload: ranks of one thread and ranks with a thread each.

use peerlane::cases::Rng;
use peerlane::gpu::sim;
use peerlane::{
    Adapted, Algorithm, BREAK_DRAIN, Communicator, Config, DType, Error, Family, Pattern, ReduceOp,
    Sizes, Sizing, Transport, Wire,
};
use peerlane_tests::{
    Call, Group, Job, Links, Machine, Memory, Script, random_jobs, run, small, threads,
};
use std::time::{Duration, Instant};

/// Mailboxes as small as there are, which may grow.
fn config(world: u32) -> Config {
    let small = small(world);
    let sizing = Sizing {
        least_mailbox_bytes: small.mailbox_bytes,
        most_mailbox_bytes: 16 << 20,
        least_staging_bytes: 96 << 10,
        most_staging_bytes: 32 << 20,
        patience: 2,
    };
    Config { sizing: Some(sizing), ..small }
}

fn all_reduce(count: usize, algorithm: Option<Algorithm>) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    Job::plain(Call::AllReduce { count, dtype, wire, op, algorithm, in_place: false, absent: 0 })
}

fn adapt(group: &mut Group) -> Result<Adapted, Error> {
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    Communicator::adapt_all(&mut ranks)
}

/// Random calls of all kinds, compared byte by byte.
fn check(group: &mut Group, calls: usize, most: usize, seed: u64) {
    let world = group.ranks.len() as u32;
    group.check(&random_jobs(world, calls, most, &mut Rng::new(seed, "sizing")), seed);
}

fn several_turns(group: &Group, family: Family) -> u64 {
    group.ranks[0].communicator.usage().of(family).several_turns
}

#[test]
fn mailboxes_grow_until_calls_fit_and_shrink_when_idle() {
    for (world, links) in
        [(1, Links::All), (2, Links::All), (3, Links::None), (5, Links::Pairs), (8, Links::All)]
    {
        let machine = Machine::linked(world, 7, links);
        let mut group = Group::connect(&machine, world, &config(world));
        let large = [all_reduce(6000, Some(Algorithm::TwoShot))];
        group.check(&large, 1);
        check(&mut group, 10, 3000, 2);
        let turns = several_turns(&group, Family::AllReduce);
        let before = group.ranks[0].communicator.mailbox_bytes();
        let adapted = adapt(&mut group).expect("it goes well");
        assert_eq!(turns > 0, world > 1);
        assert_eq!(adapted.changed(), world > 1, "{world} ranks: {adapted:?}");
        for rank in &group.ranks {
            let (communicator, bytes) = (&rank.communicator, adapted.after.mailbox_bytes);
            assert_eq!(communicator.config().mailbox_bytes, bytes);
            assert_eq!(communicator.usage().sizes, adapted.after);
            assert!(world == 1 || communicator.mailbox_bytes() > before, "{world} ranks");
            assert_eq!(communicator.usage().adapts, 1);
        }
        // What took several turns takes one, and is as right as before.
        let turns = several_turns(&group, Family::AllReduce);
        group.check(&large, 3);
        assert_eq!(several_turns(&group, Family::AllReduce), turns, "{world} ranks");
        let calls = 40 / world as usize;
        check(&mut group, calls, 20_000, 4);
        let grown = adapt(&mut group).expect("it goes well").after;
        // The last calls were as large. Two idle times let it shrink, not one.
        group.check(&[all_reduce(9, None)], 5);
        assert_eq!(adapt(&mut group).expect("it goes well").after, grown);
        let idle = adapt(&mut group).expect("it goes well").after;
        assert_eq!(idle.mailbox_bytes < grown.mailbox_bytes, world > 1, "{world}: {idle:?}");
        check(&mut group, calls, 20_000, 6);
    }
}

#[test]
fn staging_areas_grow_and_shrink() {
    let world = 3;
    let steps = all_reduce(90_000, Some(Algorithm::Scheduled(Pattern::TwoShot)));
    let config = Config { staging_bytes: Some(96 << 10), ..config(world) };
    let mut group = Group::connect(&Machine::sim(world, 1), world, &config);
    group.check(std::slice::from_ref(&steps), 1);
    assert_eq!(several_turns(&group, Family::Scheduled), 1);
    let adapted = adapt(&mut group).expect("it goes well");
    assert!(adapted.after.staging_bytes > 96 << 10, "{adapted:?}");
    group.check(&[steps.clone(), all_reduce(5000, None), steps], 2);
    assert_eq!(several_turns(&group, Family::Scheduled), 1, "one chunk a part is enough now");
    let last: Vec<Sizes> = (0..4).map(|_| adapt(&mut group).expect("it goes well").after).collect();
    assert_eq!(last[0].staging_bytes, adapted.after.staging_bytes);
    assert_eq!(last[3].staging_bytes, 96 << 10);
    group.check(&[all_reduce(9000, Some(Algorithm::Scheduled(Pattern::Ring)))], 3);
}

#[test]
fn works_and_aborters_outlive_the_memory_they_began_with() {
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &config(2));
    let aborter = group.ranks[0].communicator.aborter();
    let script = Script::new(2, &[all_reduce(6000, None)], 1);
    let memory = group.load(&script).expect("there is memory");
    let mut works = Vec::new();
    for (rank, memory) in group.ranks.iter_mut().zip(&memory) {
        let call = peerlane::AllReduce::in_place(memory.base, 6000, DType::F32);
        // SAFETY: the script's image is larger, and lives longer than the work.
        let work = unsafe { rank.communicator.all_reduce_async(&call, rank.stream) };
        works.push(work.expect("the call is right"));
    }
    assert!(adapt(&mut group).expect("it goes well").changed());
    assert!(works.iter().all(|work| work.query() == Ok(true) && work.wait() == Ok(())));
    check(&mut group, 5, 2000, 2);
    aborter.abort();
    for rank in &mut group.ranks {
        let number = rank.communicator.rank();
        assert_eq!(rank.communicator.health(), Err(Error::Stopped { rank: number }));
    }
    assert_eq!(adapt(&mut group), Err(Error::Stopped { rank: 0 }));
}

/// Under which seeds calls that are under way when the ranks adapt go wrong.
fn failures(broken: u32) -> Vec<String> {
    let attempt = |seed| {
        // Where calls lose their memory, ranks wait in vain.
        let deadline = Duration::from_millis(if broken == 0 { 60_000 } else { 100 });
        let config = Config { broken, deadline, ..config(3) };
        let mut group = Group::connect(&Machine::sim(3, seed), 3, &config);
        let jobs = random_jobs(3, 12, 9000, &mut Rng::new(seed, "drain"));
        let script = Script::new(3, &jobs, seed);
        let memory = group.load(&script)?;
        group.issue(&script, &memory)?;
        assert!(adapt(&mut group)?.changed());
        group.collect(&memory, &script)
    };
    let fails = |seed| {
        let jobs = random_jobs(3, 12, 9000, &mut Rng::new(seed, "drain"));
        let verdict = attempt(seed).map_err(|error| error.to_string());
        verdict.and_then(|found| Script::new(3, &jobs, seed).verify(&found)).err()
    };
    (1..=8).filter_map(fails).collect()
}

#[test]
fn calls_under_way_are_waited_for_before_their_memory_goes() {
    assert_eq!(failures(0), Vec::<String>::new());
    let broken = failures(BREAK_DRAIN);
    assert!(!broken.is_empty(), "8 seeds do not notice that calls are not waited for");
}

#[test]
fn calls_in_a_graph_keep_the_memory_as_it_is() {
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &config(2));
    let script = Script::new(2, &[all_reduce(6000, None)], 1);
    let memory = group.load(&script).expect("there is memory");
    let graphs = group.capture(&script, &memory).expect("it can be captured");
    let error = adapt(&mut group).expect_err("the graphs hold addresses").to_string();
    assert!(error.starts_with("adapt: rank 0 has captured 1 calls in CUDA graphs"), "{error}");
    for (rank, graph) in group.ranks.iter().zip(graphs) {
        rank.gpu.graph_launch(graph, rank.stream).expect("it runs");
    }
    let found = group.collect(&memory, &script).expect("it goes well");
    script.verify(&found).expect("it is right");
}

#[test]
fn mistakes_are_named() {
    let machine = Machine::sim(2, 1);
    let mut fixed = Group::connect(&machine, 2, &small(2));
    let error = adapt(&mut fixed).expect_err("there are no limits").to_string();
    assert_eq!(error, "adapt: sizing: expected a Config with limits for its sizes, got none");
    let mut groups = [0, 1].map(|_| Group::connect(&machine, 2, &config(2)));
    let [first, second] = &mut groups;
    let mut all = |which: &[(usize, usize)]| {
        let mut ranks: Vec<_> = [&mut *first, &mut *second]
            .into_iter()
            .enumerate()
            .flat_map(|(group, g)| {
                g.ranks.iter_mut().enumerate().map(move |(r, x)| ((group, r), x))
            })
            .filter(|(at, _)| which.contains(at))
            .map(|(_, rank)| &mut rank.communicator)
            .collect();
        Communicator::adapt_all(&mut ranks).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(all(&[(0, 0), (0, 1)]), Ok(()));
    for wrong in [&[(0, 0), (1, 1)][..], &[(0, 0)], &[], &[(0, 0), (0, 1), (1, 0)]] {
        let error = all(wrong).expect_err("they are not one group");
        assert!(error.starts_with("adapt: ranks: expected all ranks of one group"), "{error}");
    }
    groups[0].ranks[0].communicator.close().expect("it is idle");
    let closed = groups[0].ranks[0].communicator.adapt();
    assert_eq!(closed, Err(Error::Closed { op: "adapt", rank: 0 }));
}

#[test]
fn ranks_without_room_for_more_go_on_with_what_they_have() {
    let machine = sim::Config { devices: 2, memory_bytes: 3 << 20, ..Default::default() };
    let machine = Machine::simulated(&machine);
    let mut group = Group::connect(&machine, 2, &config(2));
    let large = [all_reduce(60_000, Some(Algorithm::TwoShot))];
    group.check(&large, 1);
    // So much is taken that the new mailboxes do not fit.
    let gpu = machine.gpus(2)[1].clone();
    let taken = Memory::with_image(&gpu, Default::default(), &vec![0; 2800 << 10]).unwrap();
    for _ in 0..2 {
        let error = adapt(&mut group).expect_err("there is no memory");
        assert!(matches!(error, Error::Driver { device: 1, .. }), "{error}");
    }
    check(&mut group, 10, 1000, 2);
    drop(taken);
    assert!(adapt(&mut group).expect("now there is").changed());
    group.check(&large, 3);
}

#[test]
fn threads_agree_on_sizes_over_many_seeds() {
    for (world, seed) in [(2, 1), (2, 2), (3, 3), (4, 4), (9, 5)] {
        let config = Config { deadline: Duration::from_secs(60), ..config(world) };
        let scripts: Vec<Script> = (0..6)
            .map(|part: u64| {
                let most = [1000, 30_000, 200][part as usize % 3];
                let jobs = random_jobs(world, 6, most, &mut Rng::new(10 * seed + part, "sizing"));
                Script::new(world, &jobs, seed)
            })
            .collect();
        let sizes = threads(&Machine::sim(world, seed), world, &config, |rank| {
            let each = scripts.iter().map(|script| {
                run(rank, script)?;
                Ok(rank.communicator.adapt()?.after)
            });
            each.collect::<Result<Vec<Sizes>, Error>>().expect("it goes well")
        });
        assert!(sizes.iter().all(|own| *own == sizes[0]), "{sizes:?}");
        assert!(sizes[0][1].mailbox_bytes > sizes[0][0].mailbox_bytes, "{sizes:?}");
    }
}

#[test]
fn ranks_with_other_high_water_marks_agree_on_the_largest() {
    // Only the root and one member take part in the large gathers.
    let world = 3;
    let widths = vec![0, 20_000, 0];
    let jobs = [Job::plain(Call::Gather { rows: 4, widths, root: 0, outsiders_call: false })];
    let script = Script::new(world, &jobs, 1);
    let config = Config { deadline: Duration::from_secs(60), ..config(world) };
    let seen = threads(&Machine::sim(world, 1), world, &config, |rank| {
        run(rank, &script).expect("it goes well");
        let usage = rank.communicator.usage();
        let adapted = rank.communicator.adapt().expect("it goes well");
        assert!(rank.communicator.usage().of(Family::Gather).largest_since == 0);
        run(rank, &script).expect("it goes well");
        (usage.of(Family::Gather).largest, adapted)
    });
    assert_eq!([seen[0].0, seen[1].0, seen[2].0], [80_000, 80_000, 0]);
    assert!(seen[0].1.changed() && seen.iter().all(|rank| rank.1 == seen[0].1), "{seen:?}");
}

#[test]
fn a_rank_that_never_adapts_is_named_and_the_group_goes_on() {
    let deadline = Duration::from_millis(700);
    let config = Config { deadline, ..config(3) };
    let script = Script::new(3, &[all_reduce(3000, None)], 1);
    let again = std::sync::Barrier::new(3);
    threads(&Machine::sim(3, 1), 3, &config, |rank| {
        rank.communicator.set_deadline(Duration::from_secs(30));
        run(rank, &script).expect("it goes well");
        rank.communicator.set_deadline(deadline);
        again.wait();
        if rank.communicator.rank() != 1 {
            let begin = Instant::now();
            let error = rank.communicator.adapt().expect_err("rank 1 does not").to_string();
            assert!(error.contains("in vain for rank 1"), "{error}");
            assert!(begin.elapsed() < 3 * deadline, "{:?}", begin.elapsed());
        }
        again.wait();
        rank.communicator.set_deadline(Duration::from_secs(30));
        run(rank, &script).expect("nothing has changed");
        assert!(rank.communicator.adapt().expect("now all do").changed());
        run(rank, &script).expect("it goes well");
    });
}

#[test]
fn one_rank_with_a_graph_refuses_for_all() {
    let config = Config { deadline: Duration::from_secs(60), ..config(2) };
    let script = Script::new(2, &[all_reduce(3000, None)], 1);
    threads(&Machine::sim(2, 1), 2, &config, |rank| {
        if rank.communicator.rank() == 1 {
            let image = &script.images[1].before;
            let memory = Memory::with_image(&rank.gpu, rank.stream, image).expect("memory");
            rank.gpu.stream_synchronize(rank.stream).expect("it is idle");
            rank.gpu.capture_begin(rank.stream).expect("it can be captured");
            rank.issue_all(&script, memory.base).expect("the call is right");
            let graph = rank.gpu.capture_end(rank.stream).expect("it can be captured");
            let error = rank.communicator.adapt().expect_err("a graph holds addresses");
            assert!(error.to_string().starts_with("adapt: rank 1 has captured 1"), "{error}");
            rank.gpu.graph_launch(graph, rank.stream).expect("it runs");
            rank.finish().expect("rank 0 calls too");
            assert_eq!(rank.communicator.usage().captured, 1);
        } else {
            let error = rank.communicator.adapt().expect_err("a graph holds addresses");
            assert!(error.to_string().starts_with("adapt: rank 1 has captured 1"), "{error}");
            run(rank, &script).expect("it goes well");
        }
    });
}

#[test]
fn host_mailboxes_grow_too() {
    let config = Config { transport: Transport::Host, ..config(2) };
    let mut group = Group::connect(&Machine::sim(2, 1), 2, &config);
    check(&mut group, 10, 30_000, 1);
    assert!(adapt(&mut group).expect("it goes well").changed());
    check(&mut group, 10, 30_000, 2);
}
