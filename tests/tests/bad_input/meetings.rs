//! Groups that cannot come about.

use peerlane::gpu::{cuda, sim};
use peerlane::{Communicator, Config, Error, Meeting, Transport};
use peerlane_tests::{Machine, small};
use std::time::Duration;

fn connect(machine: &Machine, world: u32, config: &Config) -> Error {
    let ranks = Communicator::connect(&machine.gpus(world), config);
    ranks.map(|ranks| ranks.len()).expect_err("they cannot connect")
}

/// What each rank says whose thread joins the meeting with its configuration.
fn join(meeting: &Meeting, ranks: &[(u32, Config)]) -> Vec<Option<String>> {
    let machine = Machine::sim(2, 1);
    std::thread::scope(|scope| {
        let join = |(rank, config): &(u32, Config)| {
            let (meeting, gpu) = (meeting.clone(), machine.gpus(2)[*rank as usize % 2].clone());
            let (rank, config) = (*rank, config.clone());
            let result = move || Communicator::join(&meeting, rank, &gpu, &config).err();
            scope.spawn(move || result().map(|error| error.to_string()))
        };
        let threads: Vec<_> = ranks.iter().map(join).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    })
}

fn assert_says(error: &Option<String>, fragments: &[&str]) {
    let text = error.as_deref().expect("the rank cannot join");
    assert!(fragments.iter().all(|fragment| text.contains(fragment)), "{text}");
}

#[test]
fn groups_of_none_and_of_seventeen_are_refused() {
    let machine = Machine::sim(4, 1);
    for world in [0, 17] {
        let error = connect(&machine, world, &Config::default());
        assert!(matches!(error, Error::Rendezvous { world: w, .. } if w == world), "{error:?}");
        let wanted = format!("expected 1 to 16 ranks, got {world}");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
}

#[test]
fn gpus_that_cannot_reach_each_other_are_named() {
    let unreachable = vec![(1, 2)];
    let config = sim::Config { devices: 3, unreachable, ..Default::default() };
    let machine = Machine::simulated(&config);
    let config = Config { transport: Transport::P2p, ..Config::default() };
    let error = connect(&machine, 3, &config);
    assert!(matches!(error, Error::Unreachable { from: 1, to: 2, .. }), "{error:?}");
    assert!(error.to_string().contains("GPU 1 cannot reach GPU 2"), "{error}");
    let pair = &machine.gpus(2);
    let mut ranks = Communicator::connect(pair, &config).expect("these two can");
    ranks.iter_mut().for_each(|rank| rank.close().expect("nothing has failed"));
}

#[test]
fn a_mailbox_too_small_for_one_lane_is_refused() {
    let machine = Machine::sim(2, 1);
    let least = small(2).mailbox_bytes;
    let error = connect(&machine, 2, &Config { mailbox_bytes: 1000, ..Config::default() });
    let Error::InvalidArgument { op, argument, expected, got } = &error else {
        panic!("{error:?}");
    };
    assert_eq!((*op, *argument, got.as_str()), ("connect", "mailbox_bytes", "1000"));
    assert!(expected.contains("2 ranks"), "{expected}");
    let config = Config { mailbox_bytes: least, ..Config::default() };
    assert!(Communicator::connect(&machine.gpus(2), &config).is_ok());
}

#[test]
fn different_configurations_are_told_apart() {
    let meeting = Meeting::new(2, Duration::from_secs(30));
    let other = Config { mailbox_bytes: 1 << 20, ..Config::default() };
    let errors = join(&meeting, &[(0, Config::default()), (1, other)]);
    for error in &errors {
        let numbers = ["33554432", "1048576"];
        assert_says(error, &["rank 0 and rank 1 bring different configurations"]);
        assert_says(error, &numbers);
    }
}

#[test]
fn a_rank_used_twice_is_refused_and_the_meeting_goes_on() {
    let meeting = Meeting::new(2, Duration::from_secs(30));
    let config = Config::default();
    let errors = join(&meeting, &[(0, config.clone()), (0, config.clone()), (1, config)]);
    let refused: Vec<_> = errors.iter().filter(|error| error.is_some()).collect();
    assert_eq!(refused.len(), 1, "{errors:?}");
    assert_says(refused[0], &["rendezvous of 2 ranks", "rank 0 is used twice"]);
    assert!(errors[2].is_none(), "{errors:?}");
}

#[test]
fn a_rank_beyond_the_world_is_refused() {
    let meeting = Meeting::new(2, Duration::from_millis(50));
    let errors = join(&meeting, &[(2, Config::default())]);
    assert_says(&errors[0], &["rank 2 does not exist; ranks go from 0 to 1"]);
}

#[test]
fn ranks_that_never_join_are_named() {
    let meeting = Meeting::new(4, Duration::from_millis(100));
    let config = Config::default();
    let errors = join(&meeting, &[(1, config.clone()), (3, config)]);
    for error in &errors {
        assert_says(error, &["rendezvous of 4 ranks", "in vain for ranks 0, 2"]);
    }
}

#[test]
fn real_gpus_that_are_not_there_are_typed_errors() {
    let Err(error) = cuda::device(99) else { panic!("nobody has a hundred GPUs") };
    match &error {
        Error::NoDriver { reason } => {
            assert!(!reason.is_empty());
            assert!(error.to_string().starts_with("no NVIDIA driver: "), "{error}");
        }
        Error::InvalidArgument { argument, expected, got, .. } => {
            assert_eq!((*argument, got.as_str()), ("ordinal", "99"));
            assert!(expected.contains("the driver shows"), "{expected}");
        }
        other => panic!("{other:?}"),
    }
}
