//! Groups beside each other, on one GPU, and how they end.
#![allow(missing_docs, reason = "each function is a test, and its name says what must hold")]

use crate::job::{moves, random_jobs, reductions};
use crate::{Group, Job, Machine, Script, small};
use peerlane::cases::Rng;
use peerlane::{Communicator, Config, Sizing};
use std::time::Duration;

fn jobs(world: u32) -> Vec<Job> {
    let mut calls = reductions(900);
    calls.extend(moves(world, 900));
    calls.into_iter().map(Job::plain).collect()
}

pub fn two_communicators_share_gpus(machine: &Machine) {
    for world in [2, 3] {
        let mut groups = [0, 1].map(|_| Group::connect(machine, world, &small(world)));
        let scripts = [1, 2].map(|seed| {
            let jobs = random_jobs(world, 30, 4000, &mut Rng::new(seed, "two communicators"));
            Script::new(world, &jobs, seed)
        });
        let memories = [0, 1].map(|g| groups[g].load(&scripts[g]).expect("there is memory"));
        // Call by call in turn, so that kernels of both groups run at once.
        for call in 0..30 {
            for (group, (script, memory)) in groups.iter_mut().zip(scripts.iter().zip(&memories)) {
                for (r, rank) in group.ranks.iter_mut().enumerate() {
                    let (job, place) = (&script.jobs[call], script.places[call][r]);
                    rank.issue(job, place, memory[r].base).expect("the call is right");
                }
            }
        }
        for (group, (script, memory)) in groups.iter().zip(scripts.iter().zip(&memories)) {
            let found = group.collect(memory, script).expect("nobody waits in vain");
            script.verify(&found).unwrap_or_else(|reason| panic!("{world} ranks: {reason}"));
        }
    }
}

pub fn all_ranks_fit_on_one_gpu(machine: &Machine) {
    for world in [2, 5, 16] {
        let gpus = vec![machine.gpus(1)[0].clone(); world as usize];
        Group::on(&gpus, &small(world)).check(&jobs(world), 1);
        Group::on(&gpus, &Config { mailbox_bytes: 4 << 20, ..Config::default() })
            .check(&jobs(world), 2);
    }
}

pub fn a_barrier_holds_until_the_last_rank(machine: &Machine) {
    let world = 3;
    for last in 0..world as usize {
        let mut group = Group::connect(machine, world, &small(world));
        for rank in group.ranks.iter_mut().filter(|r| r.communicator.rank() as usize != last) {
            rank.communicator.barrier(rank.stream).expect("the call is right");
        }
        for _ in 0..50 {
            for rank in group.ranks.iter().filter(|r| r.communicator.rank() as usize != last) {
                let passed = rank.gpu.stream_query(rank.stream).expect("the stream exists");
                assert!(!passed, "a rank did not wait for rank {last}");
            }
            if !machine.is_simulated() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        let rank = &mut group.ranks[last];
        rank.communicator.barrier(rank.stream).expect("the call is right");
        group.ranks.iter().for_each(|rank| rank.finish().expect("all have come"));
    }
}

pub fn communicators_end_in_any_order(machine: &Machine) {
    let world = 3;
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        for closes in [true, false] {
            let mut group = Group::connect(machine, world, &small(world));
            let script = Script::new(world, &jobs(world), 1);
            let memory = group.load(&script).expect("there is memory");
            group.issue(&script, &memory).expect("the calls are right");
            // Calls are still queued: closing waits for them.
            let mut ranks: Vec<_> = group.ranks.drain(..).map(Some).collect();
            for rank in order {
                let mut rank = ranks[rank].take().expect("each rank ends once");
                if closes {
                    rank.communicator.close().expect("its calls go well");
                    rank.communicator.close().expect("a second close does nothing");
                }
            }
            let images = memory.iter().zip(&script.images);
            let found: Vec<_> =
                images.map(|(m, i)| m.read(i.before.len()).expect("it is there")).collect();
            script.verify(&found).unwrap_or_else(|reason| panic!("{order:?}: {reason}"));
        }
    }
}

pub fn a_closed_group_makes_room_for_another(machine: &Machine) {
    for round in 0..5 {
        for world in [2, 3] {
            let mut group = Group::connect(machine, world, &Config::default());
            group.check(&jobs(world), round);
            group.ranks.iter_mut().for_each(|r| r.communicator.close().expect("all went well"));
        }
    }
}

pub fn mailboxes_grow_and_shrink_between_calls(machine: &Machine) {
    for world in [2, 3] {
        let small = small(world);
        let least_mailbox_bytes = small.mailbox_bytes;
        let sizing = Sizing { least_mailbox_bytes, patience: 1, ..Sizing::default() };
        let mut group = Group::connect(machine, world, &Config { sizing: Some(sizing), ..small });
        let adapt = |group: &mut Group| {
            let mut ranks: Vec<_> = group.ranks.iter_mut().map(|r| &mut r.communicator).collect();
            Communicator::adapt_all(&mut ranks).expect("all ranks are there")
        };
        let large = random_jobs(world, 12, 20_000, &mut Rng::new(world.into(), "adapt"));
        for round in 0..3 {
            // The calls are still queued when the ranks adapt.
            let script = Script::new(world, &large, round);
            let memory = group.load(&script).expect("there is memory");
            group.issue(&script, &memory).expect("the calls are right");
            let grown = adapt(&mut group);
            assert!(grown.after.mailbox_bytes > grown.before.mailbox_bytes, "{grown:?}");
            let found = group.collect(&memory, &script).expect("nobody waits in vain");
            script.verify(&found).unwrap_or_else(|reason| panic!("{world} ranks: {reason}"));
            group.check(&jobs(world), round);
            let usage = group.ranks[0].communicator.usage();
            assert_eq!(usage.sizes, grown.after);
            adapt(&mut group);
            let idle = adapt(&mut group);
            assert!(idle.after.mailbox_bytes < grown.after.mailbox_bytes, "{idle:?}");
            group.check(&jobs(world), round);
        }
    }
}

/// Lets all ranks but the last wait in vain, for a moment.
fn wait_in_vain(group: &mut Group) {
    let last = group.ranks.len() - 1;
    for rank in &mut group.ranks[..last] {
        rank.communicator.set_deadline(Duration::from_millis(50));
        rank.communicator.barrier(rank.stream).expect("the call is right");
    }
    let outcomes: Vec<_> = group.ranks[..last].iter().map(|rank| rank.finish()).collect();
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    for rank in &mut group.ranks {
        rank.communicator.set_deadline(Duration::from_secs(10));
    }
}

pub fn groups_recover_and_their_graphs_too(machine: &Machine) {
    for world in [2, 3] {
        let mut group = Group::connect(machine, world, &small(world));
        group.check(&jobs(world), 1);
        let script = Script::new(world, &jobs(world), 2);
        let memory = group.load(&script).expect("there is memory");
        let graphs = group.capture(&script, &memory).expect("it can be captured");
        for round in 1..=3 {
            wait_in_vain(&mut group);
            let mut ranks: Vec<_> = group.ranks.iter_mut().map(|r| &mut r.communicator).collect();
            Communicator::recover_all(&mut ranks).expect("all ranks are there");
            for ((rank, memory), image) in group.ranks.iter().zip(&memory).zip(&script.images) {
                memory.write(&image.before, rank.stream).expect("it fits");
            }
            for (rank, graph) in group.ranks.iter().zip(&graphs) {
                rank.gpu.graph_launch(*graph, rank.stream).expect("it runs");
            }
            let found = group.collect(&memory, &script).expect("nobody waits in vain");
            script.verify(&found).unwrap_or_else(|reason| panic!("{world} ranks: {reason}"));
            group.check(&jobs(world), round);
        }
        for (rank, graph) in group.ranks.iter().zip(graphs) {
            // SAFETY: it has run, and does not again.
            unsafe { rank.gpu.graph_destroy(graph).expect("it is there") };
        }
    }
}

pub fn groups_shrink(machine: &Machine) {
    for (world, gone) in [(2, 0), (3, 1), (5, 4)] {
        let mut group = Group::connect(machine, world, &small(world));
        group.check(&jobs(world), 1);
        wait_in_vain(&mut group);
        let mut other = group.ranks.remove(gone);
        let mut ranks: Vec<_> = group.ranks.iter_mut().map(|r| &mut r.communicator).collect();
        Communicator::shrink_all(&mut ranks, &[gone as u32]).expect("all survivors are there");
        group.check(&jobs(world - 1), 2);
        assert!(other.communicator.barrier(other.stream).is_err());
        let _ = other.communicator.close();
        group.check(&jobs(world - 1), 3);
    }
}
