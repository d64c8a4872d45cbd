//! A group goes on without some of its ranks, in memory of its own.
//!
//! Invariant: a rank that is gone, or only hangs, may still write to the memory that it knew. So the survivors take
//! new memory, by the path of joining, and leave the old as at the end of a group: it goes when nobody can write
//! to it any more. All survivors go on or none does.

use crate::choice::{Choice, Known};
use crate::collectives::invalid;
use crate::communicator::{Communicator, Config};
use crate::error::{Error, Result};
use crate::gpu::GpuRef;
use crate::group::Group;
use crate::join;
use crate::regroup::Agreed;
use crate::rendezvous::{Assembly, Meeting, Terms, Topic, meeting_of};
use std::sync::Arc;

/// The name of these calls in errors.
const OP: &str = "shrink";
/// The round of threads that comes after those of [`Communicator::meet`]: all have let go of the old memory.
const LEFT: usize = 5;

/// Who is left.
struct Survivors {
    /// Their ranks until now, in order: the new ranks are the places in here.
    ranks: Vec<u32>,
    /// The others, a bit each.
    without: u32,
}

impl Survivors {
    /// All of `world` ranks but those in `without`.
    fn of(world: u32, without: &[u32]) -> Result<Survivors> {
        let wrong =
            |expected: String| Err(invalid(OP, "without", expected, format!("{without:?}")));
        let mut bits = 0;
        for rank in without {
            if *rank >= world {
                return wrong(format!("ranks from 0 to {}", world - 1));
            }
            if bits >> rank & 1 != 0 {
                return wrong("each rank once".into());
            }
            bits |= 1 << rank;
        }
        if bits == 0 {
            return wrong("at least one rank".into());
        }
        let ranks = (0..world).filter(|rank| bits >> rank & 1 == 0).collect();
        Ok(Survivors { ranks, without: bits })
    }

    fn world(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// The new rank of `rank`.
    fn place(&self, rank: u32) -> Option<u32> {
        (0..).zip(&self.ranks).find(|(_, old)| **old == rank).map(|(new, _)| new)
    }

    /// What the survivors meet with: what names ranks follows them. A hub that is gone is the default again.
    fn config(&self, config: &Config, agreed: Agreed) -> Config {
        let islands = config.islands.as_ref().map(|islands| {
            self.ranks.iter().map(|rank| islands[*rank as usize]).collect::<Vec<_>>()
        });
        let hub = config.hub.and_then(|hub| self.place(hub));
        // A rank may have changed its deadline since; what is compared must not differ.
        Config { islands, hub, deadline: agreed.deadline, ..config.clone() }
    }
}

impl Communicator {
    /// Goes on without the ranks in `without`, which are gone or hang. All others call it with the same ranks, each from
    /// its thread or process, and come out of it as a smaller group: the world size is theirs, and they are
    /// numbered anew in the order they had. [`Communicator::shrink_all`] is for one thread that drives them.
    ///
    /// Waits are ended and the other ranks and this rank's GPU are waited for as in [`Communicator::recover`]. The
    /// memory is new: CUDA graphs with earlier calls must not be launched any more, and tensors are
    /// registered again. Islands lose the ranks that are left out; a hub that is left out is the default again.
    /// Aborters stay valid, and stop the new group from the end of this call on.
    /// A rank that is left out and alive gets [`Error::Stopped`] or its like, and can close its communicator.
    ///
    /// # Errors
    /// On every rank, and the communicator stays aborted and may try again: `without` is empty, names this rank or one
    /// there is not; ranks name different ones; one that is not named does not come, cannot go on or is gone.
    pub fn shrink(&mut self, without: &[u32]) -> Result<()> {
        self.group(OP)?;
        let survivors = Survivors::of(self.world_size(), without)?;
        let Some(rank) = survivors.place(self.rank()) else {
            let expected = format!("other ranks than {}, which calls", self.rank());
            return Err(invalid(OP, "without", expected, format!("{without:?}")));
        };
        self.abort();
        let agreed = self.arrive(OP, Topic::Shrink, survivors.without)?;
        let config = survivors.config(self.config(), agreed);
        let (group, known, meeting) = self.meet_survivors(rank, &survivors, &config, agreed)?;
        self.move_on((rank, agreed), config, group, &known)?;
        // Freeing may wait for the GPU: for calls that need one of this rank's, if a peer made them now.
        if let Some(meeting) = meeting {
            let _ = meeting.exchange(rank, LEFT, ());
        }
        Ok(())
    }

    /// As [`Communicator::shrink`], for the survivors of a group of this process, in the order of their ranks.
    ///
    /// # Errors
    /// As for [`Communicator::shrink`]; and if `ranks` are not the survivors, in order.
    pub fn shrink_all(ranks: &mut [&mut Communicator], without: &[u32]) -> Result<()> {
        let survivors = survivors_of(ranks, without)?;
        ranks.iter().for_each(|rank| rank.abort());
        ranks.iter().try_for_each(|rank| rank.drain_gpu())?;
        let cards: Vec<_> = ranks.iter().map(|rank| rank.card()).collect();
        let agreed = Agreed::on(&cards);
        let config = survivors.config(ranks[0].config(), agreed);
        let gpus: Vec<GpuRef> = ranks.iter().map(|rank| rank.gpu().clone()).collect();
        let (group, known) = Communicator::assemble(&gpus, &config)?;
        for (rank, place) in ranks.iter_mut().zip(0..) {
            rank.move_on((place, agreed), config.clone(), group.clone(), &known)?;
        }
        Ok(())
    }

    /// Builds a group with the other survivors, once this rank's GPU is idle. Says where they met, if they are threads.
    fn meet_survivors(
        &self,
        rank: u32,
        survivors: &Survivors,
        config: &Config,
        agreed: Agreed,
    ) -> Result<(Group, Known, Option<Meeting>)> {
        let (topic, patience) = (Topic::Survivors(survivors.world()), agreed.patience());
        match &self.group(OP)?.assembly {
            Assembly::Threads(meetings) => {
                let meeting = meetings.enter(rank, topic, patience)?;
                let ready = self.drain_gpu();
                let joined =
                    ready.and_then(|()| Communicator::meet(&meeting, rank, self.gpu(), config));
                let (group, known) = joined.inspect_err(|error| meeting.give_up(rank, error))?;
                Ok((group, known, Some(meeting)))
            }
            Assembly::Processes(segment) => {
                let watched = Some((segment.clone(), survivors.without));
                let terms = Terms { without: 0, watched };
                let seat = meeting_of(segment, topic, patience).enter_on(rank, &terms);
                let joined = seat
                    .and_then(|seat| join::join(seat, rank, self.drain_gpu(), self.gpu(), config));
                let failed = |error| self.explain(OP, survivors.without, as_shrink(error));
                let (group, known) = joined.map_err(failed)?;
                Ok((group, known, None))
            }
        }
    }

    /// Goes on as `rank` of `group`. All survivors can or none can.
    fn move_on(
        &mut self,
        (rank, agreed): (u32, Agreed),
        config: Config,
        group: Group,
        known: &Known,
    ) -> Result<()> {
        let choice = Choice::settle(&config, &group.shape, known)?;
        self.end_generation()?;
        let deadline = self.config().deadline;
        self.stop_scheduled();
        self.forget_calls(None)?;
        self.renumber(rank, Config { deadline, ..config }, group, choice);
        self.begin_generation(agreed);
        Ok(())
    }
}

/// What a survivor brought to the meeting was no matter of joining.
fn as_shrink(error: Error) -> Error {
    match error {
        Error::Unsupported { reason, .. } => Error::Unsupported { op: OP, reason },
        other => other,
    }
}

/// Who is left, if that is whom `ranks` are.
fn survivors_of(ranks: &[&mut Communicator], without: &[u32]) -> Result<Survivors> {
    let wrong = |got: String| {
        let expected = "all ranks of one group of this process but those in `without`, in order";
        Err(invalid(OP, "ranks", expected.to_owned(), got))
    };
    let Some(first) = ranks.first() else { return wrong("none".into()) };
    let log = &first.group(OP)?.log;
    let survivors = Survivors::of(first.world_size(), without)?;
    if ranks.len() != survivors.ranks.len() {
        return wrong(format!("{} of {} ranks", ranks.len(), survivors.ranks.len()));
    }
    for (rank, expected) in ranks.iter().zip(&survivors.ranks) {
        if !Arc::ptr_eq(&rank.group(OP)?.log, log) || rank.rank() != *expected {
            return wrong(format!("rank {} of some group instead of {expected}", rank.rank()));
        }
    }
    Ok(survivors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regroup::Agreed;

    fn survivors(world: u32, without: &[u32]) -> Survivors {
        Survivors::of(world, without).unwrap()
    }

    #[test]
    fn what_names_ranks_follows_them() {
        let islands = Some(vec![0, 0, 1, 1, 2]);
        let config = Config { islands, hub: Some(3), ..Config::default() };
        let left = survivors(5, &[4, 1]);
        let agreed = Agreed::on(&[]);
        assert_eq!((left.world(), left.ranks.as_slice()), (3, [0, 2, 3].as_slice()));
        let found = left.config(&config, agreed);
        assert_eq!((found.islands, found.hub), (Some(vec![0, 1, 1]), Some(2)));
        let found = survivors(5, &[3]).config(&config, agreed);
        assert_eq!((found.islands, found.hub), (Some(vec![0, 0, 1, 2]), None));
    }

    #[test]
    fn ranks_that_cannot_be_left_out_are_named() {
        for (without, expected) in [
            (&[][..], "at least one rank"),
            (&[0, 4], "ranks from 0 to 3"),
            (&[2, 2], "each rank once"),
        ] {
            let error = Survivors::of(4, without).map(|_| ()).unwrap_err().to_string();
            assert_eq!(error, format!("shrink: without: expected {expected}, got {without:?}"));
        }
    }
}
