//! Meetings of processes, with threads in their place: what they say to each other is the same.

use super::processes::{Processes, Seat};
use super::segment::Presence;
use crate::error::{Error, Result};
use rustix::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

fn meeting(name: &str, world: u32, patience: Duration) -> Processes {
    Processes { name: format!("test-{}-{name}", std::process::id()), world, patience }
}

const LONG: Duration = Duration::from_secs(20);

/// Runs `each` for every rank, in a thread each, and returns what they return.
fn together<T: Send>(meeting: &Processes, each: impl Fn(Seat, u32) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let each = &each;
        let run = move |rank| move || each(meeting.enter(rank).unwrap(), rank);
        let threads: Vec<_> = (0..meeting.world).map(|rank| scope.spawn(run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn reason(result: Result<impl Sized>) -> String {
    match result {
        Err(Error::Rendezvous { reason, .. }) => reason,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn everybody_leaves_with_everything() {
    for world in [1, 2, 5, 16] {
        together(&meeting("all", world, LONG), |seat, rank| {
            for round in 0..3 {
                let all = seat.exchange(&format!("{round}:{rank}"), None).unwrap();
                let values: Vec<_> = all.into_iter().map(|(value, _)| value).collect();
                let expected: Vec<_> = (0..world).map(|rank| format!("{round}:{rank}")).collect();
                assert_eq!(values, expected);
            }
        });
    }
}

#[test]
fn files_arrive_with_their_values() {
    together(&meeting("files", 3, LONG), |seat, rank| {
        let file = (rank != 1).then(|| -> OwnedFd {
            let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&file, 100 + u64::from(rank)).unwrap();
            file
        });
        let all = seat.exchange(&rank, file).unwrap();
        let size = |file: &OwnedFd| rustix::fs::fstat(file).unwrap().st_size;
        let sizes: Vec<_> = all.iter().map(|(_, file)| file.as_ref().map(size)).collect();
        assert_eq!(sizes, [Some(100), None, Some(102)]);
    });
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let meeting = meeting("never", 3, Duration::from_millis(200));
    let wait = |rank| {
        let meeting = meeting.clone();
        thread::spawn(move || reason(meeting.enter(rank).and_then(|seat| seat.exchange(&0, None))))
    };
    let waiting = [wait(0), wait(2)];
    for thread in waiting {
        let reason = thread.join().unwrap();
        assert!(reason.contains("200ms in vain for rank 1"), "{reason}");
    }
}

#[test]
fn a_rank_that_ends_while_they_meet_is_named() {
    let meeting = meeting("ends", 2, LONG);
    let other = meeting.clone();
    let first = thread::spawn(move || reason(other.enter(0).unwrap().exchange(&0, None)));
    thread::sleep(Duration::from_millis(50));
    drop(meeting.enter(1).unwrap());
    let reason = first.join().unwrap();
    assert!(reason.contains("the process of rank 1 (pid"), "{reason}");
}

#[test]
fn a_rank_used_twice_is_refused_and_the_others_meet() {
    let meeting = meeting("twice", 2, LONG);
    let first = meeting.enter(0).unwrap();
    let refusal = reason(meeting.enter(0));
    assert!(refusal.contains("rank 0 is used twice, first by pid"), "{refusal}");
    let other = meeting.clone();
    let second = thread::spawn(move || other.enter(1).unwrap().exchange(&1, None).unwrap().len());
    assert_eq!(first.exchange(&0, None).unwrap().len(), 2);
    assert_eq!(second.join().unwrap(), 2);
}

#[test]
fn ranks_that_expect_different_worlds_are_both_told() {
    let two = meeting("worlds", 2, LONG);
    let three = Processes { world: 3, ..two.clone() };
    let first = thread::spawn(move || reason(two.enter(0).and_then(|s| s.exchange(&0, None))));
    thread::sleep(Duration::from_millis(50));
    for reason in [reason(three.enter(1)), first.join().unwrap()] {
        assert!(reason.contains("expects 2 ranks") && reason.contains("expects 3"), "{reason}");
    }
}

#[test]
fn one_that_comes_after_the_failure_is_told_at_once() {
    let meeting = meeting("late", 3, LONG);
    let other = meeting.clone();
    let first = thread::spawn(move || reason(other.enter(0).unwrap().exchange(&0, None)));
    thread::sleep(Duration::from_millis(50));
    drop(meeting.enter(1).unwrap());
    first.join().unwrap();
    let begin = Instant::now();
    let late = reason(meeting.enter(2));
    assert!(late.contains("the process of rank 1"), "{late}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_name_can_be_used_again() {
    let meeting = meeting("again", 2, LONG);
    for _ in 0..20 {
        together(&meeting, |seat, rank| {
            let membership = seat.exchange(&rank, None).and_then(|_| seat.join(Arc::new(())));
            drop(membership.unwrap());
        });
    }
}

#[test]
fn a_name_is_free_once_the_ranks_have_met() {
    let meeting = meeting("free", 2, LONG);
    let meet = || {
        together(&meeting, |seat, _| {
            seat.exchange(&0, None).and_then(|_| seat.join(Arc::new(()))).unwrap()
        })
    };
    let first = meet();
    // The host lets go of the name a moment after the last rank has joined.
    thread::sleep(Duration::from_millis(100));
    let second = meet();
    assert!(first.iter().chain(&second).all(|member| !member.segment.is_last(0)));
}

#[test]
fn a_rank_that_gives_its_seat_up_keeps_its_mailbox_for_the_others() {
    let alive = Arc::new(());
    let mut seats = together(&meeting("abandon", 2, LONG), |seat, rank| {
        seat.exchange(&rank, None).unwrap();
        seat
    });
    let other = seats.pop().unwrap();
    seats.pop().unwrap().abandon(alive.clone());
    thread::sleep(Duration::from_millis(50));
    assert_eq!(Arc::strong_count(&alive), 2, "freed while rank 1 may still write to it");
    other.abandon(Arc::new(()));
    let until = Instant::now() + Duration::from_secs(5);
    while Arc::strong_count(&alive) != 1 {
        assert!(Instant::now() < until, "never freed");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn bad_arguments_are_named() {
    let good = meeting("bad", 2, LONG);
    let bad = [
        (Processes { name: String::new(), ..good.clone() }, 0, "name"),
        (Processes { name: "x".repeat(91), ..good.clone() }, 0, "name"),
        (Processes { world: 0, ..good.clone() }, 0, "world"),
        (Processes { world: 17, ..good.clone() }, 0, "world"),
        (good, 2, "rank"),
    ];
    for (meeting, rank, name) in bad {
        match meeting.enter(rank).map(drop) {
            Err(Error::InvalidArgument { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn a_mailbox_stays_until_the_others_have_left() {
    let alive = [Arc::new(()), Arc::new(())];
    let mut members = together(&meeting("leave", 2, LONG), |seat, rank| {
        seat.exchange(&rank, None).unwrap();
        seat.join(alive[rank as usize].clone()).unwrap()
    });
    let segment = members[0].segment.clone();
    drop(members.remove(0));
    thread::sleep(Duration::from_millis(50));
    assert_eq!(segment.presence(0), Presence::Left);
    assert_eq!(Arc::strong_count(&alive[0]), 2, "freed while rank 1 may still write to it");
    drop(members);
    assert_eq!(Arc::strong_count(&alive[1]), 1, "the last to leave frees its memory at once");
    let until = Instant::now() + Duration::from_secs(5);
    while Arc::strong_count(&alive[0]) != 1 {
        assert!(Instant::now() < until, "never freed");
        thread::sleep(Duration::from_millis(1));
    }
}
