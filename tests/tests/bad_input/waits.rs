//! Ranks that wait for somebody who does not come.

use peerlane::{Config, Error};
use peerlane_tests::{Call, Group, Job, Machine, Memory, Rank, Script, reductions, small};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_millis(500);

/// A group of `world` ranks, and one call of which nothing is queued yet.
struct Scene {
    group: Group,
    script: Script,
    memory: Vec<Memory>,
}

impl Scene {
    fn new(world: u32, seed: u64, call: Call) -> Scene {
        let config = Config { deadline: DEADLINE, ..small(world) };
        let group = Group::connect(&Machine::sim(world, seed), world, &config);
        let script = Script::new(world, &[Job::plain(call)], 1);
        let memory = group.load(&script).expect("there is memory");
        Scene { group, script, memory }
    }

    fn issue(&mut self, rank: usize) -> Result<(), Error> {
        self.group.ranks[rank].issue_all(&self.script, self.memory[rank].base)
    }

    /// What `rank` says once its stream has ended.
    fn outcome(&self, rank: usize) -> Error {
        let Rank { gpu, stream, communicator, .. } = &self.group.ranks[rank];
        gpu.stream_synchronize(*stream).expect("kernels end");
        communicator.health().expect_err("it has waited in vain")
    }
}

fn is_timeout_for(error: &Error, wanted: (&str, u32, u32)) -> bool {
    match error {
        Error::Timeout { operation, rank, peer, waited, .. } => {
            (*operation, *rank, *peer) == wanted && *waited == DEADLINE
        }
        _ => false,
    }
}

#[test]
fn a_rank_that_never_calls_is_named_by_those_who_wait() {
    for call in reductions(100) {
        for seed in 1..6 {
            let name = if matches!(call, Call::AllReduce { .. }) {
                "all_reduce"
            } else {
                "reduce_scatter"
            };
            let mut scene = Scene::new(3, seed, call.clone());
            (0..2).for_each(|rank| scene.issue(rank).expect("the call is right"));
            let errors = [scene.outcome(0), scene.outcome(1)];
            let timed_out = |(rank, e)| is_timeout_for(e, (name, rank, 2));
            assert!((0..).zip(&errors).any(timed_out), "nobody names rank 2: {errors:?}");
            // Who did not reach the deadline was told by one who did, and waited for rank 2 too, or
            // for the result of a rank that did.
            for (rank, error) in (0..).zip(&errors) {
                let told = matches!(error, Error::Aborted { operation, rank: r, .. } if (*operation, *r) == (name, rank));
                assert!(
                    told || matches!(error, Error::Timeout { rank: r, .. } if *r == rank),
                    "{error:?}"
                );
                assert!(error.to_string().starts_with(name), "{error}");
            }
        }
    }
}

#[test]
fn after_a_deadline_every_call_and_close_say_so() {
    let mut scene = Scene::new(2, 1, reductions(10).remove(1));
    scene.issue(0).expect("the call is right");
    let error = scene.outcome(0);
    assert!(is_timeout_for(&error, ("all_reduce", 0, 1)), "{error:?}");
    assert_eq!(scene.issue(0), Err(error.clone()));
    let rank = &mut scene.group.ranks[0];
    assert_eq!(rank.communicator.barrier(rank.stream), Err(error.clone()));
    assert_eq!(rank.communicator.health(), Err(error.clone()));
    let image = &scene.script.images[0].before;
    let found = scene.memory[0].read(image.len()).expect("the GPU is fine");
    assert!(&found == image, "a call that failed has written");
    let rank = &mut scene.group.ranks[0];
    assert_eq!(rank.communicator.close(), Err(error));
    assert_eq!(rank.communicator.close(), Ok(()));
    // The one who never called is not waited for, and a new group works on the same GPUs.
    scene.group.ranks[1].communicator.close().expect("it has queued nothing");
    let gpus: Vec<_> = scene.group.ranks.iter().map(|rank| rank.gpu.clone()).collect();
    Group::on(&gpus, &small(2)).check(&[Job::plain(reductions(10).remove(1))], 1);
}

#[test]
fn a_late_rank_learns_that_the_others_gave_up() {
    let mut scene = Scene::new(2, 2, reductions(10).remove(2));
    scene.issue(0).expect("the call is right");
    assert!(is_timeout_for(&scene.outcome(0), ("all_reduce", 0, 1)));
    // Rank 0's data are there, so rank 1's first call may end well; no later one does.
    let _ = scene.issue(1);
    let _ = scene.group.ranks[1].finish();
    let _ = scene.issue(1);
    let error = scene.outcome(1);
    assert!(matches!(error, Error::Aborted { rank: 1, peer: 0, .. }), "{error:?}");
}

#[test]
fn an_abort_ends_every_wait() {
    for call in reductions(100) {
        let mut scene = Scene::new(3, 1, call);
        (1..3).for_each(|rank| scene.issue(rank).expect("the call is right"));
        scene.group.ranks[0].communicator.abort();
        for rank in 1..3 {
            let error = scene.outcome(rank);
            assert!(
                matches!(error, Error::Aborted { rank: r, .. } if r as usize == rank),
                "{error:?}"
            );
            assert_eq!(scene.issue(rank), Err(error.clone()));
            assert!(error.to_string().contains("was aborted in its call"), "{error}");
        }
    }
}

#[test]
fn an_abort_is_heard_by_ranks_that_wait_for_nobody() {
    let mut scene = Scene::new(2, 1, reductions(100).remove(0));
    (0..2).for_each(|rank| scene.issue(rank).expect("the call is right"));
    (0..2).for_each(|rank| scene.group.ranks[rank].finish().expect("both came"));
    scene.group.ranks[0].communicator.abort();
    for rank in 0..2 {
        let stopped = Error::Stopped { rank: rank as u32 };
        assert_eq!(scene.group.ranks[rank].communicator.health(), Err(stopped.clone()));
        assert_eq!(scene.issue(rank), Err(stopped));
        assert_eq!(scene.group.ranks[rank].communicator.close(), Ok(()), "no wait was cut short");
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_close_that_waits() {
    let mut scene = Scene::new(2, 3, reductions(100).remove(0));
    // Far beyond what the test waits for.
    scene.group.ranks[0].communicator.set_deadline(Duration::from_secs(3600));
    scene.issue(0).expect("the call is right");
    let aborter = scene.group.ranks[0].communicator.aborter();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            aborter.abort();
        });
        scene.group.ranks[0].communicator.close().expect_err("rank 1 never came")
    });
    assert!(matches!(error, Error::Aborted { rank: 0, peer: 1, .. }), "{error:?}");
    aborter.abort(); // Of a closed communicator: nothing happens.
}
