//! A rank dies at any message of a meeting: every other has all values or an error that names it, in time, and the
//! name can be used again.

use super::life::Life;
use super::processes::Processes;
use super::ranks;
use super::segment::{LOST, Presence, Segment};
use crate::error::{Error, Result};
use peerlane_device::abi::Status;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How often a case is played in which a rank comes too late.
const TRIES: u32 = 5;
/// How often one has come too late.
static LATE: AtomicU64 = AtomicU64::new(0);
/// How long the ranks wait for each other: long enough for a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(2);
/// A rank's answer comes within this: its own patience, that for the host, and what a busy machine takes.
const BOUND: Duration = Duration::from_secs(15);
/// Between two looks at what another thread does.
const LOOK: Duration = Duration::from_millis(1);
/// Rounds of an exchange.
const ROUNDS: u32 = 2;

/// A meeting in which one rank dies.
#[derive(Clone, Copy, Debug)]
struct Case {
    world: u32,
    /// Who comes first, and so hosts it.
    host: u32,
    victim: u32,
    /// The message of the victim, or of its host thread, at which it dies.
    message: u64,
}

/// Everything that a rank does, from entering to leaving. The victim leaves at once, the others when it has left or died.
fn attend(meeting: &Processes, rank: u32, victim: u32) -> Result<()> {
    let seat = meeting.enter(rank)?;
    for round in 0..ROUNDS {
        let all = seat.exchange(&format!("{round}:{rank}"), None)?;
        let values: Vec<_> = all.into_iter().map(|(value, _)| value).collect();
        let expected: Vec<_> = (0..meeting.world).map(|rank| format!("{round}:{rank}")).collect();
        assert_eq!(values, expected);
    }
    let membership = seat.join(Arc::new(()))?;
    let segment = membership.segment.clone();
    let until = Instant::now() + BOUND;
    while rank != victim && segment.presence(victim) == Presence::Joined {
        assert!(Instant::now() < until, "rank {rank} never learns of the end of rank {victim}");
        thread::sleep(LOOK);
    }
    if rank != victim && segment.presence(victim) == Presence::Lost {
        assert_eq!(abort_word(&segment, rank, until), LOST + victim);
    }
    Ok(())
}

/// What stops the waits of `rank`: it is stored a moment after the presence.
fn abort_word(segment: &Segment, rank: u32, until: Instant) -> u32 {
    let status = segment.page(rank).cast::<Status>();
    loop {
        // SAFETY: the page is mapped as long as the segment is.
        let abort = unsafe { (&raw const (*status).abort).read_volatile() };
        if abort != 0 || Instant::now() >= until {
            return abort;
        }
        thread::sleep(LOOK);
    }
}

impl Case {
    fn meeting(self) -> Processes {
        let Case { world, host, victim, message } = self;
        let name = format!("death-{}-{world}-{host}-{victim}-{message}", std::process::id());
        Processes { name, world, patience: PATIENCE }
    }

    /// Starts `rank`. Its answer never comes if it dies.
    fn start(self, rank: u32, life: Arc<Life>) -> Receiver<(Result<()>, Duration)> {
        let (sender, answer) = channel();
        thread::spawn(move || {
            life.begin();
            let began = Instant::now();
            let result = attend(&self.meeting(), rank, self.victim);
            let _ = sender.send((result, began.elapsed()));
        });
        answer
    }

    /// Whether the victim died, and how many others had all values, and an error. On a busy machine a rank may come after it is all over,
    /// and find nobody who could name the victim: such a case says nothing, and is played again.
    fn play(self) -> (bool, [u64; 2]) {
        for _ in 0..TRIES {
            match self.try_once() {
                Some(ended) => return ended,
                None => LATE.fetch_add(1, Ordering::Relaxed),
            };
        }
        panic!("{self:?}: a rank came too late {TRIES} times")
    }

    fn try_once(self) -> Option<(bool, [u64; 2])> {
        let last = |rank| (rank == self.victim).then_some(self.message);
        let lives: Vec<_> = (0..self.world).map(|rank| Life::new(last(rank))).collect();
        let host = &lives[self.host as usize];
        let first = self.start(self.host, host.clone());
        let until = Instant::now() + BOUND;
        while !host.has_socket() && !host.has_ended() && Instant::now() < until {
            thread::sleep(LOOK);
        }
        let others = (0..self.world).filter(|rank| *rank != self.host);
        let others = others.map(|rank| (rank, self.start(rank, lives[rank as usize].clone())));
        let others: Vec<_> = others.collect();
        let answers = others.into_iter().chain([(self.host, first)]);
        let (victim, mut ends, mut late) = (&lives[self.victim as usize], [0; 2], false);
        for (rank, answer) in answers.filter(|(rank, _)| *rank != self.victim) {
            let answer = answer.recv_timeout(2 * BOUND);
            let (result, took) = answer.unwrap_or_else(|_| panic!("{self:?}: rank {rank} hangs"));
            assert!(took < BOUND, "{self:?}: rank {rank} took {took:?}");
            ends[usize::from(result.is_err())] += 1;
            if let Err(error) = result {
                assert!(victim.has_ended(), "{self:?}: rank {rank}: {error}");
                if error.to_string().contains("found no host") {
                    late = true;
                    continue;
                }
                assert!(self.names_victim(&error), "{self:?}: rank {rank}: {error}");
            }
        }
        // A victim that did not die has left before the others did.
        let died = victim.has_ended();
        self.meet_again();
        (!late).then_some((died, ends))
    }

    fn names_victim(self, error: &Error) -> bool {
        let Error::Rendezvous { reason, .. } = error else { return false };
        let after = |(at, word): (usize, &str)| -> Vec<u32> {
            let list = reason[at + word.len()..]
                .split(|c: char| !c.is_ascii_digit() && c != ',' && c != ' ');
            let list = list.take(1).flat_map(|list| list.split(", "));
            list.filter_map(|number| number.trim().parse().ok()).collect()
        };
        let mut named =
            reason.match_indices("rank ").chain(reason.match_indices("ranks ")).map(after);
        named.any(|list| list.contains(&self.victim))
    }

    /// The name can be used again, once the failed meeting's ranks would have come.
    fn meet_again(self) {
        thread::sleep(PATIENCE);
        let until = Instant::now() + BOUND;
        loop {
            let well: Vec<_> = (0..self.world)
                .map(|rank| {
                    let meeting = self.meeting();
                    thread::spawn(move || meeting.enter(rank)?.exchange(&rank, None).map(drop))
                })
                .collect();
            let met: Result<Vec<()>> = well.into_iter().map(|rank| rank.join().unwrap()).collect();
            match met {
                Ok(_) => return,
                Err(error) => assert!(Instant::now() < until, "{self:?}: not again: {error}"),
            }
        }
    }
}

/// Plays all messages of a victim, several at once; returns at how many it died, and what the others ended with.
fn all_messages(world: u32, host: u32, victim: u32) -> (u64, [u64; 2]) {
    // Most of a case is waiting, but more threads than that would keep each other from coming in time.
    const AT_ONCE: u64 = 2;
    let (mut deaths, mut ends) = (0, [0; 2]);
    for first in (1..).step_by(AT_ONCE as usize) {
        let play = |message| thread::spawn(move || Case { world, host, victim, message }.play());
        let died: Vec<_> = (first..first + AT_ONCE).map(play).collect();
        let mut died_at_once = 0;
        for (died, [well, ill]) in died.into_iter().map(|case| case.join().unwrap()) {
            died_at_once += u64::from(died);
            ends = [ends[0] + well, ends[1] + ill];
        }
        deaths += died_at_once;
        if died_at_once < AT_ONCE {
            return (deaths, ends);
        }
    }
    (deaths, ends)
}

#[test]
fn a_rank_may_die_at_any_message() {
    let worlds = [2, 3];
    let cases = worlds.into_iter().flat_map(|world| {
        (0..world).flat_map(move |host| (0..world).map(move |victim| (world, host, victim)))
    });
    let deaths = Mutex::new(0);
    thread::scope(|scope| {
        for (world, host, victim) in cases {
            let deaths = &deaths;
            scope.spawn(move || {
                let (found, [well, ill]) = all_messages(world, host, victim);
                // Hello, welcome, and two for each round; a host has those of all.
                let least =
                    u64::from(2 + 2 * ROUNDS) * if host == victim { u64::from(world) } else { 1 };
                let who = ranks([victim].into_iter());
                assert!(found >= least, "{who} of {world}, host {host}: {found} of {least}");
                assert!(
                    well > 0 && ill > 0,
                    "{who} of {world}, host {host}: {well} well, {ill} not"
                );
                *deaths.lock().unwrap() += found;
            });
        }
    });
    let (deaths, late) = (deaths.into_inner().unwrap(), LATE.load(Ordering::Relaxed));
    println!("{deaths} deaths; {late} played again, since a rank came too late");
    assert!(late <= deaths / 4, "{late} of {deaths}: no busy machine, but an error without a name");
}
