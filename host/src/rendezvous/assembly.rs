//! How the ranks of a group meet again, for what they agree on after they have joined.
//!
//! Invariant: what the ranks meet for has a kind and a number, and the n-th of a kind of one rank is the n-th of
//! all. Each is a meeting of its own, so one that fails, because a rank is late, say, leaves nothing behind for
//! the next.

use super::segment::Segment;
use super::threads::Meeting;
use super::{Processes, Seat, Terms};
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
    /// To recover: all ranks come. What this and the next three are for is done as often as it takes, and ranks
    /// that were cut off at the end of one meeting may not agree on how many there have been; so they have no number.
    Recovery,
    /// To clear the memory, once all have come to recover.
    Restart,
    /// To go on without some ranks: the others come.
    Shrink,
    /// For a new group, once the survivors have come, who are as many as this.
    Survivors(u32),
}

/// Who comes to a meeting.
#[derive(Clone, Copy)]
struct Party {
    world: u32,
    /// Ranks that do not come, a bit each. All that come say the same.
    without: u32,
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
                let seat = meeting_of(segment, topic, patience).enter(rank)?;
                Ok(Table::Processes { seat, failed: false })
            }
        }
    }

    /// As `sit`, of ranks that may try again; those in `without` do not come, a bit each.
    pub(crate) fn sit_without(
        &self,
        rank: u32,
        topic: Topic,
        without: u32,
        patience: Duration,
    ) -> Result<Table> {
        match self {
            Assembly::Threads(meetings) => {
                let party = Party { without, ..meetings.party(topic) };
                let meeting = meetings.enter_party(rank, topic, party, patience)?;
                Ok(Table::Threads { meeting, rank, round: 0 })
            }
            Assembly::Processes(segment) => {
                let terms = Terms { without, watched: Some((segment.clone(), without)) };
                let seat = meeting_of(segment, topic, patience).enter_on(rank, &terms)?;
                Ok(Table::Processes { seat, failed: false })
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

/// Where processes meet. A rank may come to the next meeting of a name before all have left the last: it waits
/// until they have.
pub(crate) fn meeting_of(segment: &Segment, topic: Topic, patience: Duration) -> Processes {
    let (kind, number, world) = match topic {
        Topic::Registration(number) => ("register", number, segment.world()),
        Topic::Sizes(number) => ("adapt", number, segment.world()),
        Topic::Recovery => ("recover", 0, segment.world()),
        Topic::Restart => ("restart", 0, segment.world()),
        Topic::Shrink => ("shrink", 0, segment.world()),
        Topic::Survivors(count) => ("survivors", 0, count),
    };
    let name = format!("{kind}/{:016x}/{number}", segment.number());
    Processes { name, world, patience }
}

impl Meetings {
    /// Who comes for `topic` if all ranks do that there are then.
    fn party(&self, topic: Topic) -> Party {
        let world = if let Topic::Survivors(count) = topic { count } else { self.world };
        Party { world, without: 0 }
    }

    /// Enters the meeting that waits for `rank`, if there is one, or else a new one.
    pub(crate) fn enter(&self, rank: u32, topic: Topic, patience: Duration) -> Result<Meeting> {
        self.enter_party(rank, topic, self.party(topic), patience)
    }

    fn enter_party(
        &self,
        rank: u32,
        topic: Topic,
        Party { world, without }: Party,
        patience: Duration,
    ) -> Result<Meeting> {
        // Every change is one call, so a thread that panicked in here left none half made.
        let mut open = self.open.lock().unwrap_or_else(|poison| poison.into_inner());
        let again = !matches!(topic, Topic::Registration(_));
        let goes_on =
            |(of, meeting): &&(Topic, Meeting)| *of == topic && !(again && meeting.has_failed());
        let odd = open.iter().filter(goes_on).find(|(_, meeting)| meeting.party().0 != without);
        if let Some((_, meeting)) = odd {
            let (others, first) = meeting.party();
            let reason = other_party((first.unwrap_or_default(), others), (rank, without));
            // Whom the others do not expect takes nobody with it.
            return Err(match others >> rank & 1 {
                0 => meeting.fail(reason),
                _ => Error::Rendezvous { world, reason },
            });
        }
        let awaits = |at: &&(Topic, Meeting)| goes_on(at) && at.1.awaits(rank);
        let meeting = match open.iter().find(awaits) {
            Some((_, meeting)) => meeting.clone(),
            None => {
                let meeting = Meeting::without(world, without, patience);
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

/// What two ranks say that want to go on without different ones.
pub(super) fn other_party(first: (u32, u32), second: (u32, u32)) -> String {
    let [first, second] = [first, second]
        .map(|(rank, without)| format!("rank {rank} goes on without {}", super::ranks_in(without)));
    format!("{first}, {second}")
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
    Processes {
        /// The place.
        seat: Seat,
        /// A round has failed: whoever leaves then ends the meeting for all.
        failed: bool,
    },
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
            Table::Processes { seat, failed } => {
                seat.exchange(&value, file).inspect_err(|_| *failed = true)
            }
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if let Table::Processes { seat, failed: false } = self {
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
