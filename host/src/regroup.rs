//! How ranks whose calls were cut short come together again: what recovering and shrinking have in common.
//!
//! Invariant: a rank that cannot go on says so in the next round, so all ranks go on or all return an error. A
//! rank whose process has ended ends the rounds of the others at once, with its name; one that does not
//! come ends them when their patience does.

use crate::adapt::{BREAK_DRAIN, REJOIN};
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::Backend;
use crate::rendezvous::{Presence, Segment, Table, Topic, lost_among};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a rank whose meeting has failed looks for a process that has ended, which whoever watches over the
/// group may notice a moment later than the meeting does.
const LATE: Duration = Duration::from_millis(200);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);
/// Most characters of a reason that travels.
const LONGEST_REASON: usize = 1000;

/// How the calls of one generation have ended, once the next has begun to clear their traces.
#[derive(Clone, Default)]
pub(crate) struct Outcome(Arc<OnceLock<Result<()>>>);

impl Outcome {
    /// Says it, if nothing has been said yet.
    pub(crate) fn settle(&self, outcome: Result<()>) {
        let _ = self.0.set(outcome);
    }

    /// What was said.
    pub(crate) fn said(&self) -> Option<Result<()>> {
        self.0.get().cloned()
    }
}

/// What a rank shows the others when it comes.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Card {
    generation: u64,
    /// The number of its last assembly about registrations.
    registrations: u64,
    meetings: u64,
    deadline: Duration,
}

/// What all cards add up to. A rank that was cut off at the end of a meeting is a number behind the others in
/// one thing or another; from here on all have the same.
#[derive(Clone, Copy)]
pub(crate) struct Agreed {
    /// The generation that begins.
    pub(crate) generation: u64,
    registrations: u64,
    meetings: u64,
    /// The longest of the ranks' deadlines.
    pub(crate) deadline: Duration,
}

impl Agreed {
    /// The same on every rank.
    pub(crate) fn on(cards: &[Card]) -> Agreed {
        let most = |number: fn(&Card) -> u64| cards.iter().map(number).max().unwrap_or_default();
        Agreed {
            generation: most(|card| card.generation) + 1,
            registrations: most(|card| card.registrations),
            meetings: most(|card| card.meetings),
            deadline: cards.iter().map(|card| card.deadline).max().unwrap_or_default(),
        }
    }

    /// How long the ranks may take from here on: one may have work of the application to wait for, and a probe may
    /// last.
    pub(crate) fn patience(&self) -> Duration {
        self.deadline + REJOIN
    }
}

/// Rounds of an exchange among the ranks that are left.
pub(crate) struct Circle {
    op: &'static str,
    rank: u32,
    world: u32,
    /// The ranks that do not come, a bit each.
    without: u32,
    segment: Option<Arc<Segment>>,
    table: Table,
}

impl Circle {
    /// Brings `outcome`, and returns what all ranks bring, in rank order, or the first failure among that.
    pub(crate) fn share<T>(&mut self, outcome: Result<T>) -> Result<Vec<T>>
    where
        T: Serialize + DeserializeOwned + Clone + Send + 'static,
    {
        let Circle { op, rank, world, without, .. } = *self;
        let value = outcome.map_err(|error| -> String {
            format!("rank {rank}: {error}").chars().take(LONGEST_REASON).collect()
        });
        let all = self.table.exchange(value, None).and_then(|all| {
            let failed = |reason| Error::Rendezvous { world, reason };
            all.into_iter().map(|(value, _)| value.map_err(failed)).collect()
        });
        all.map_err(|error| explained(op, self.segment.as_ref(), (rank, without), error))
    }
}

/// That no process of the ranks that come has ended. If one has, this rank's later calls say so too.
fn nobody_lost(
    op: &'static str,
    segment: Option<&Arc<Segment>>,
    rank: u32,
    without: u32,
) -> Result<()> {
    let lost = |segment: &Arc<Segment>| Some((segment.clone(), lost_among(segment, without)?));
    let Some((segment, peer)) = segment.and_then(lost) else { return Ok(()) };
    segment.tell_lost(rank, peer);
    Err(Error::PeerLost { operation: op, rank, peer, pid: segment.pid(peer) })
}

/// Why a meeting has failed: because of a process that has ended, if one has.
fn explained(
    op: &'static str,
    segment: Option<&Arc<Segment>>,
    (rank, without): (u32, u32),
    error: Error,
) -> Error {
    let until = Instant::now() + LATE;
    while segment.is_some() {
        if let Err(lost) = nobody_lost(op, segment, rank, without) {
            return lost;
        }
        if Instant::now() >= until {
            break;
        }
        std::thread::sleep(LOOK);
    }
    error
}

impl Communicator {
    /// How often the ranks have recovered or shrunk.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn card(&self) -> Card {
        Card {
            generation: self.generation,
            registrations: self.registrations_ref().last_number(),
            meetings: self.meetings,
            deadline: self.config().deadline,
        }
    }

    /// Meets the ranks that are not in `without`, for as long as this rank's deadline, and compares cards.
    pub(crate) fn arrive(&self, op: &'static str, topic: Topic, without: u32) -> Result<Agreed> {
        if let Some(segment) = self.group(op)?.segment() {
            let left = |rank: &u32| segment.presence(*rank) == Presence::Left;
            let mut awaited = (0..self.world_size()).filter(|rank| without >> rank & 1 == 0);
            if let Some(rank) = awaited.find(left) {
                let reason = format!("rank {rank} has closed its communicator");
                return Err(Error::Rendezvous { world: self.world_size(), reason });
            }
        }
        let mut circle = self.circle(op, topic, without, self.config().deadline)?;
        Ok(Agreed::on(&circle.share(Ok(self.card()))?))
    }

    /// Takes this rank's place among the ranks that are not in `without`.
    pub(crate) fn circle(
        &self,
        op: &'static str,
        topic: Topic,
        without: u32,
        patience: Duration,
    ) -> Result<Circle> {
        let (rank, world, group) = (self.rank(), self.world_size(), self.group(op)?);
        let segment = group.segment().cloned();
        nobody_lost(op, segment.as_ref(), rank, without)?;
        let table = group.assembly.sit_without(rank, topic, without, patience);
        let table = table.map_err(|e| explained(op, segment.as_ref(), (rank, without), e))?;
        Ok(Circle { op, rank, world, without, segment, table })
    }

    /// Why a meeting about this group has failed: because of a process that has ended, if one has.
    pub(crate) fn explain(&self, op: &'static str, without: u32, error: Error) -> Error {
        let segment = self.group(op).ok().and_then(|group| group.segment());
        explained(op, segment, (self.rank(), without), error)
    }

    /// Waits until nothing runs on this rank's GPU any more. The whole GPU, since graphs with this communicator's calls
    /// may have been launched on any stream.
    pub(crate) fn drain_gpu(&self) -> Result<()> {
        if self.config().broken & BREAK_DRAIN != 0 && self.gpu().backend() == Backend::Sim {
            return Ok(());
        }
        self.gpu().synchronize()
    }

    /// Says how the calls of this generation have ended, now that all have. A rank whose kernels met no abort has
    /// completed them; of scheduled calls that cannot be told.
    pub(crate) fn end_generation(&mut self) -> Result<()> {
        let well = self.group("recover")?.member(self.rank()).is_well() && !self.has_scheduled();
        self.outcome.settle(if well { Ok(()) } else { self.health() });
        Ok(())
    }

    /// Begins the generation that the ranks have agreed on.
    pub(crate) fn begin_generation(&mut self, agreed: Agreed) {
        self.registrations().skip_to(agreed.registrations);
        self.meetings = agreed.meetings;
        self.generation = agreed.generation;
        self.outcome = Outcome::default();
    }
}
