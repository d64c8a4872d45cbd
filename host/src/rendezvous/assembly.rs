//! How the ranks of a group meet again, for what they agree on after they have joined.
//!
//! Invariant: ranks count their assemblies, and the n-th of one rank is the n-th of all. Each is a meeting of
//! its own, so one that fails, because a rank is late, say, leaves nothing behind for the next.

use super::segment::Segment;
use super::threads::Meeting;
use super::{Processes, Seat};
use crate::error::Result;
use rustix::fd::OwnedFd;
use serde::{Serialize, de::DeserializeOwned};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where the ranks of a group meet again.
#[derive(Clone)]
pub(crate) enum Assembly {
    /// Ranks of this process, of which each has its own thread.
    Threads(Arc<Rounds>),
    /// Ranks that share a segment.
    Processes(Arc<Segment>),
}

/// The meetings that not all ranks have left.
pub(crate) struct Rounds {
    world: u32,
    open: Mutex<Vec<Open>>,
}

/// A meeting under way.
struct Open {
    number: u64,
    meeting: Meeting,
    /// Ranks that have not left it.
    staying: u32,
}

impl Assembly {
    /// That of a group of ranks of this process.
    pub(crate) fn of_threads(world: u32) -> Assembly {
        Assembly::Threads(Arc::new(Rounds { world, open: Mutex::default() }))
    }

    /// Takes `rank`'s place in assembly number `number`. Every rank waits `patience` for the others, in each round.
    pub(crate) fn sit(&self, rank: u32, number: u64, patience: Duration) -> Result<Table> {
        match self {
            Assembly::Threads(rounds) => {
                let meeting = rounds.meeting(number, patience);
                Ok(Table::Threads { rounds: rounds.clone(), meeting, number, rank, round: 0 })
            }
            Assembly::Processes(segment) => {
                let name = format!("peerlane-{:016x}-{number}", segment.number());
                let seat = Processes { name, world: segment.world(), patience }.enter(rank)?;
                Ok(Table::Processes(seat))
            }
        }
    }
}

impl Rounds {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Open>> {
        // Every change is one assignment, so a thread that panicked in here left none half made.
        self.open.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn meeting(&self, number: u64, patience: Duration) -> Meeting {
        let mut open = self.lock();
        if let Some(open) = open.iter().find(|open| open.number == number) {
            return open.meeting.clone();
        }
        let meeting = Meeting::new(self.world, patience);
        open.push(Open { number, meeting: meeting.clone(), staying: self.world });
        meeting
    }

    fn leave(&self, number: u64) {
        let mut open = self.lock();
        if let Some(open) = open.iter_mut().find(|open| open.number == number) {
            open.staying -= 1;
        }
        open.retain(|open| open.staying != 0);
    }
}

/// A rank's place in an assembly. Dropping it leaves.
pub(crate) enum Table {
    /// Among threads.
    Threads {
        /// What the meeting is one of.
        rounds: Arc<Rounds>,
        /// The meeting.
        meeting: Meeting,
        /// Its number.
        number: u64,
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
            Table::Threads { meeting, rank, round, .. } => {
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
        match self {
            Table::Threads { rounds, number, .. } => rounds.leave(*number),
            Table::Processes(seat) => seat.finish(),
        }
    }
}
