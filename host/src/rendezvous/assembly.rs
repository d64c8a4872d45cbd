//! How the ranks of a group meet again, for what they agree on after they have joined.
//!
//! Invariant: what the ranks meet for has a kind and a number, and the n-th of a kind of one rank is the n-th of
//! all. Each is a meeting of its own, so one that fails, because a rank is late, say, leaves nothing behind for
//! the next.

use super::segment::Segment;
use super::threads::Meeting;
use super::{Processes, Seat};
use crate::error::{Error, Result};
use rustix::fd::OwnedFd;
use serde::{Serialize, de::DeserializeOwned};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What ranks meet for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Topic {
    /// A registration or its end. Every call counts, so a rank that comes after the others gave up is told so:
    /// their next call may be about another tensor.
    Registration(u64),
    /// Other sizes. Only meetings of all ranks count: after one that failed, whichever of them came, they may
    /// try again.
    Sizes(u64),
}

/// Where the ranks of a group meet again.
#[derive(Clone)]
pub(crate) enum Assembly {
    /// Ranks of this process, of which each has its own thread.
    Threads(Arc<Meetings>),
    /// Ranks that share a segment.
    Processes(Arc<Segment>),
}

/// The meetings that not all ranks have entered.
pub(crate) struct Meetings {
    world: u32,
    open: Mutex<Vec<(Topic, Meeting)>>,
}

impl Assembly {
    /// That of a group of ranks of this process.
    pub(crate) fn of_threads(world: u32) -> Assembly {
        Assembly::Threads(Arc::new(Meetings { world, open: Mutex::default() }))
    }

    /// Takes `rank`'s place. The first to come says how long the ranks wait for each other, in each round.
    pub(crate) fn sit(&self, rank: u32, topic: Topic, patience: Duration) -> Result<Table> {
        match self {
            Assembly::Threads(meetings) => {
                let meeting = meetings.enter(rank, topic, patience)?;
                Ok(Table::Threads { meeting, rank, round: 0 })
            }
            Assembly::Processes(segment) => {
                Ok(Table::Processes(meeting_of(segment, topic, patience).enter(rank)?))
            }
        }
    }

    /// Tells the others at once that `rank` does not come, and why. Processes know already: what stops the calls
    /// of one stops those of all.
    pub(crate) fn decline(&self, rank: u32, topic: Topic, patience: Duration, error: &Error) {
        if let Assembly::Threads(meetings) = self
            && let Ok(meeting) = meetings.enter(rank, topic, patience)
        {
            meeting.give_up(rank, error);
        }
    }
}

/// Where processes meet. A name is used for one meeting only: a rank may come to the next before all have left
/// the last.
pub(crate) fn meeting_of(segment: &Segment, topic: Topic, patience: Duration) -> Processes {
    let (kind, number) = match topic {
        Topic::Registration(number) => ("register", number),
        Topic::Sizes(number) => ("adapt", number),
    };
    let name = format!("{kind}/{:016x}/{number}", segment.number());
    Processes { name, world: segment.world(), patience }
}

impl Meetings {
    /// Enters the meeting that waits for `rank`, if there is one, or else a new one.
    pub(crate) fn enter(&self, rank: u32, topic: Topic, patience: Duration) -> Result<Meeting> {
        // Every change is one call, so a thread that panicked in here left none half made.
        let mut open = self.open.lock().unwrap_or_else(|poison| poison.into_inner());
        let again = matches!(topic, Topic::Sizes(_));
        let awaits = |(of, meeting): &&(Topic, Meeting)| {
            *of == topic && meeting.awaits(rank) && !(again && meeting.has_failed())
        };
        let meeting = match open.iter().find(awaits) {
            Some((_, meeting)) => meeting.clone(),
            None => {
                let meeting = Meeting::new(self.world, patience);
                // One that failed before is over for all.
                open.retain(|(of, _)| *of != topic);
                open.push((topic, meeting.clone()));
                meeting
            }
        };
        meeting.enter(rank)?;
        open.retain(|(_, meeting)| !meeting.is_complete());
        Ok(meeting)
    }
}

/// A rank's place in an assembly. Dropping it leaves.
pub(crate) enum Table {
    /// Among threads.
    Threads {
        /// The meeting.
        meeting: Meeting,
        /// Whose place it is.
        rank: u32,
        /// The next round.
        round: usize,
    },
    /// Among processes.
    Processes(Seat),
}

impl Table {
    /// Brings `value`, and a file with it if the ranks are processes, and waits for everybody else's, in rank order.
    pub(crate) fn exchange<T>(
        &mut self,
        value: T,
        file: Option<OwnedFd>,
    ) -> Result<Vec<(T, Option<OwnedFd>)>>
    where
        T: Serialize + DeserializeOwned + Clone + Send + 'static,
    {
        match self {
            Table::Threads { meeting, rank, round } => {
                let all = meeting.exchange(*rank, *round, value)?;
                *round += 1;
                Ok(all.into_iter().map(|value| (value, None)).collect())
            }
            Table::Processes(seat) => seat.exchange(&value, file),
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if let Table::Processes(seat) = self {
            seat.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    /// What becomes of `rank`, which brings its number.
    fn come(assembly: &Assembly, rank: u32, topic: Topic, patience: Duration) -> Result<Vec<u32>> {
        let all = assembly.sit(rank, topic, patience)?.exchange(rank, None)?;
        Ok(all.into_iter().map(|(value, _)| value).collect())
    }

    fn all_come(assembly: &Assembly, topic: Topic) {
        std::thread::scope(|scope| {
            for rank in [0, 1] {
                scope.spawn(move || {
                    let all = come(assembly, rank, topic, Duration::from_secs(10));
                    assert_eq!(all, Ok(vec![0, 1]));
                });
            }
        });
    }

    fn open(assembly: &Assembly) -> usize {
        match assembly {
            Assembly::Threads(meetings) => meetings.open.lock().unwrap().len(),
            Assembly::Processes(_) => 0,
        }
    }

    #[test]
    fn ranks_meet_again_whoever_failed_to_come() {
        let (assembly, topic) = (Assembly::of_threads(2), Topic::Sizes(0));
        for rank in [0, 0, 1, 0] {
            let error = come(&assembly, rank, topic, SOON).unwrap_err().to_string();
            assert!(error.contains("in vain for rank"), "{error}");
        }
        for number in 0..20 {
            all_come(&assembly, Topic::Sizes(number));
        }
        assert_eq!(open(&assembly), 0, "what all have entered is forgotten");
    }

    #[test]
    fn who_comes_late_to_a_registration_is_told() {
        let assembly = Assembly::of_threads(2);
        let first = come(&assembly, 0, Topic::Registration(1), SOON).unwrap_err();
        assert_eq!(come(&assembly, 1, Topic::Registration(1), SOON), Err(first));
        all_come(&assembly, Topic::Registration(2));
        assert_eq!(open(&assembly), 0);
    }

    #[test]
    fn who_declines_is_not_waited_for() {
        let (assembly, topic) = (Assembly::of_threads(2), Topic::Sizes(0));
        let waiting = std::thread::spawn({
            let assembly = assembly.clone();
            move || come(&assembly, 0, topic, Duration::from_secs(60))
        });
        while open(&assembly) == 0 {
            std::thread::yield_now();
        }
        assembly.decline(1, topic, SOON, &Error::Stopped { rank: 1 });
        let error = waiting.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("rank 1 failed: "), "{error}");
        // A topic of another kind is another meeting.
        assert_eq!(open(&assembly), 0);
        all_come(&assembly, topic);
    }
}
