//! Peers that say what they should not, and processes of other users: every rank gets an error that says so, in time,
//! and nobody panics.

use super::processes::{Processes, Reply, Request, Seat, Terms};
use super::raw::{empty_file, pair, send};
use super::segment::{Presence, Segment, lost_rank};
use super::socket::{Claim, Connection, Listener};
use super::{PROTOCOL, host};
use crate::error::{Error, Result};
use rustix::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

fn meeting(name: &str, world: u32) -> Processes {
    let name = format!("hostile-{}-{name}", std::process::id());
    Processes { name, world, patience: LONG }
}

fn reason(result: Result<impl Sized>) -> String {
    match result {
        Err(Error::Rendezvous { reason, .. }) => {
            assert!(reason.len() < 4000, "{} bytes", reason.len());
            reason
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

fn text(message: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap()
}

fn seat_of(guest: Connection, world: u32) -> Result<Option<Seat>> {
    meeting("guest", world).take_seat((0, &Terms::default()), guest, Instant::now() + LONG)
}

/// What a guest of `world` ranks makes of a host that says this at first.
fn welcomed(world: u32, message: &[u8], files: &[BorrowedFd<'_>]) -> String {
    let (host, guest) = pair().unwrap();
    send(&host, message, files).unwrap();
    reason(seat_of(guest, world))
}

#[test]
fn a_host_whose_welcome_is_none_is_refused() {
    let segment = Segment::create(2).unwrap();
    let (good, empty) = (segment.as_fd(), empty_file().unwrap());
    let welcome = |host| text(&Reply::Welcome { host });
    let all = text(&Reply::All { values: vec![], has_file: vec![] });
    let cases: [(&[u8], Vec<BorrowedFd<'_>>, &str); 10] = [
        (b"nonsense", vec![], "rank 0:"),
        (b"{\"Welcome\":{\"host\":-1}}", vec![good], "rank 0:"),
        (&[b'['; 60_000], vec![], "rank 0:"),
        (&vec![b' '; 70_000], vec![good], "rank 0:"),
        (&welcome(0), vec![], "does not understand"),
        (&welcome(0), vec![good; 2], "does not understand"),
        (&welcome(0), vec![good; 20], "rank 0:"),
        (&welcome(2), vec![good], "does not understand"),
        (&welcome(0), vec![empty.as_fd()], "bytes"),
        (&all, vec![good], "does not understand"),
    ];
    for (index, (message, files, expected)) in cases.into_iter().enumerate() {
        let reason = welcomed(2, message, &files);
        assert!(reason.contains(expected), "case {index}: {reason}");
    }
    let long = welcomed(2, &text(&Reply::Failed("x\u{1b}[2J".repeat(10_000))), &[]);
    assert!(long.len() < 1100 && !long.contains('\u{1b}'), "{long}");
    let other = welcomed(3, &welcome(0), &[good]);
    assert!(other.contains("bytes"), "{other}");
}

/// What a guest of two ranks makes of a host that answers a round with this.
fn answered(message: &[u8], files: &[BorrowedFd<'_>]) -> Result<Vec<u32>> {
    let segment = Segment::create(2).unwrap();
    let (host, guest) = pair().unwrap();
    send(&host, &text(&Reply::Welcome { host: 1 }), &[segment.as_fd()]).unwrap();
    send(&host, message, files).unwrap();
    let seat = seat_of(guest, 2).unwrap().unwrap();
    Ok(seat.exchange(&7, None)?.into_iter().map(|(value, _)| value).collect())
}

#[test]
fn a_host_must_give_a_value_of_every_rank_and_their_files() {
    let all = |values: &[&str], has_file: &[bool]| {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        text(&Reply::All { values, has_file: has_file.to_vec() })
    };
    let file = empty_file().unwrap();
    let file = file.as_fd();
    assert_eq!(answered(&all(&["1", "2"], &[false, true]), &[file]), Ok(vec![1, 2]));
    let counts: [(&[&str], &[bool], usize); 8] = [
        (&[], &[], 0),
        (&["1"], &[false], 0),
        (&["1"; 3], &[false; 3], 0),
        (&["1"; 17], &[false; 17], 0),
        (&["1", "2"], &[false], 0),
        (&["1", "2"], &[false; 3], 0),
        (&["1", "2"], &[true, true], 1),
        (&["1", "2"], &[false, false], 1),
    ];
    for (values, has_file, files) in counts {
        let reason = reason(answered(&all(values, has_file), &vec![file; files]));
        assert!(reason.contains("expected the values of 2 ranks"), "{reason}");
    }
    for value in ["", "-1", "\"text\"", "[1]", "99999999999"] {
        let reason = reason(answered(&all(&["1", value], &[false; 2]), &[]));
        assert!(reason.starts_with("rank 0: "), "{reason}");
    }
    let welcome = reason(answered(&text(&Reply::Welcome { host: 0 }), &[]));
    assert!(welcome.contains("does not understand"), "{welcome}");
    assert!(reason(answered(b"\xff\xfe", &[])).starts_with("rank 0: "));
}

fn hello(world: u32, rank: u32, pid: u32) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    text(&Request::Hello {
        protocol: PROTOCOL,
        version,
        world,
        without: 0,
        rank,
        process: (pid, 0),
    })
}

/// A rank of two, which brings a value and waits; the meeting that it is the host of.
fn waiting(name: &str) -> (Processes, thread::JoinHandle<Result<usize>>) {
    let meeting = meeting(name, 2);
    let seat = meeting.enter(0).unwrap();
    (meeting, thread::spawn(move || seat.exchange(&0, None).map(|all| all.len())))
}

fn connected(meeting: &Processes) -> Connection {
    Connection::open(&meeting.name).unwrap().unwrap()
}

#[test]
fn strangers_who_make_no_sense_do_not_keep_the_ranks_apart() {
    let (meeting, first) = waiting("strangers");
    let nonsense: [Vec<u8>; 6] = [
        b"nonsense".to_vec(),
        vec![0; 60_000],
        vec![b'1'; 100_000],
        text(&Request::Joined),
        text(&Request::Bring("1".into())),
        hello(2, 7, 1),
    ];
    for message in &nonsense {
        send(&connected(&meeting), message, &[]).unwrap();
    }
    for pid in [0, 1 << 31, u32::MAX] {
        send(&connected(&meeting), &hello(2, 1, pid), &[]).unwrap();
    }
    let silent: Vec<_> = (0..2 * host::MOST_STRANGERS).map(|_| connected(&meeting)).collect();
    let second = meeting.enter(1).unwrap();
    assert_eq!(second.exchange(&1, None).unwrap().len(), 2);
    assert_eq!(first.join().unwrap(), Ok(2));
    drop(silent);
}

#[test]
fn a_rank_that_makes_no_sense_ends_the_meeting_for_all() {
    let file = empty_file().unwrap();
    let two = [file.as_fd(), file.as_fd()];
    let bring = text(&Request::Bring("1".into()));
    let again = hello(2, 1, 1);
    type Said<'a> = Vec<(&'a [u8], &'a [BorrowedFd<'a>])>;
    let cases: [(Said<'_>, &str); 5] = [
        (vec![(b"nonsense", &[])], "rank 1 says what nobody understands"),
        (vec![(&bring, &two)], "rank 1 brings 2 files"),
        (vec![(&[b' '; 70_000], &[])], "rank 1 says what nobody understands"),
        (vec![(b"\"Joined\"", &[]), (&bring, &[])], "rank 1 brings 0 files, or more than one"),
        (vec![(&again, &[])], "rank 1 came twice"),
    ];
    for (index, (said, expected)) in cases.into_iter().enumerate() {
        let (meeting, first) = waiting(&format!("sense-{index}"));
        let rank = connected(&meeting);
        send(&rank, &hello(2, 1, 1), &[]).unwrap();
        assert!(matches!(rank.receive::<Reply>(), Ok(Some((Reply::Welcome { host: 0 }, _)))));
        said.iter().for_each(|(message, files)| send(&rank, message, files).unwrap());
        let reason = reason(first.join().unwrap());
        assert!(reason.contains(expected), "case {index}: {reason}");
    }
}

#[test]
fn a_version_of_any_length_is_told_in_short() {
    let (meeting, first) = waiting("version");
    let rank = connected(&meeting);
    let version = "v".repeat(60_000);
    let hello =
        Request::Hello { protocol: 1, version, world: 2, without: 0, rank: 1, process: (1, 0) };
    send(&rank, &text(&hello), &[]).unwrap();
    assert!(reason(first.join().unwrap()).contains("has version vvv"));
}

#[test]
fn a_rank_that_never_reads_is_named() {
    let meeting = meeting("deaf", 2);
    let seat = meeting.enter(0).unwrap();
    let deaf = connected(&meeting);
    send(&deaf, &hello(2, 1, 1), &[]).unwrap();
    let long = text(&Request::Bring(format!("\"{}\"", "x".repeat(30_000))));
    let failed = (0..100).find_map(|_| {
        // The host refuses what comes before its round is over.
        let round = send(&deaf, &long, &[])
            .map_err(|error| Error::Rendezvous { world: 2, reason: error.to_string() });
        let got = seat.exchange(&serde_json::Value::Null, None);
        round.and(got).err()
    });
    let reason = reason(Err::<(), _>(failed.expect("the host never minds")));
    assert!(reason.contains("rank 1 does not read"), "{reason}");
}

#[test]
fn what_a_segment_says_of_processes_is_not_believed() {
    let segment = Segment::create(2).unwrap();
    for pid in [0, 1 << 31, u32::MAX] {
        segment.set_process(1, pid, 9);
        assert!(!segment.is_gone(1, 9), "process {pid}");
    }
    segment.set_presence(1, Presence::Joined);
    assert_eq!(segment.pid(2), 0);
    assert_eq!(segment.pid(u32::MAX), 0);
    let lost = [0x100, 0x10f, 0x110, u32::MAX, 1, 0].map(lost_rank);
    assert_eq!(lost, [Some(0), Some(15), None, None, None, None]);
}

#[test]
fn no_patience_is_too_long() {
    let patience = Duration::MAX;
    let endless = Processes { patience, ..meeting("endless", 1) };
    assert!(matches!(
        endless.enter(0).map(drop),
        Err(Error::InvalidArgument { argument: "patience", .. })
    ));
}

/// Runs `act` in a thread that belongs to another user; `None` where this process may not do that.
fn as_another_user<T: Send>(act: impl FnOnce() -> T + Send) -> Option<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the system call itself changes this thread's user only, and the thread ends soon.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65_534, -1) };
            (changed == 0).then(act)
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_name_that_another_user_has_taken_is_refused() {
    let meeting = meeting("squatted", 2);
    let squat = || match Listener::claim(&meeting.name) {
        Ok(Claim::Host(listener)) => listener,
        _ => panic!("nobody has it"),
    };
    let Some(_listener) = as_another_user(squat) else {
        eprintln!("skipped: only root can become another user");
        return;
    };
    let reason = reason(meeting.enter(0));
    assert!(reason.contains("is taken by another user"), "{reason}");
}

#[test]
fn another_user_is_not_let_in_and_the_ranks_meet() {
    let (meeting, first) = waiting("other-user");
    let knock = || {
        let stranger = connected(&meeting);
        // The host may have hung up already.
        let _ = send(&stranger, &hello(2, 1, 1), &[]);
        assert!(matches!(stranger.receive::<Reply>(), Ok(None) | Err(_)));
        meeting.enter(1).map(drop)
    };
    if let Some(entered) = as_another_user(knock) {
        assert!(reason(entered).contains("is taken by another user"));
    }
    let second = meeting.enter(1).unwrap();
    assert_eq!(second.exchange(&1, None).unwrap().len(), 2);
    assert_eq!(first.join().unwrap(), Ok(2));
}
