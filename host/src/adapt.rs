//! Mailboxes and staging areas that follow the workload: the ranks compare what their calls needed, come to
//! the same sizes, and where these are new, meet again for new memory.
//!
//! Invariant: all ranks go on with the new memory or all with the old. What decides is the same on every
//! rank; a rank that cannot go on says so in the meeting; and nothing that only one rank could fail at
//! comes after the last round. Memory that is replaced goes when every rank has let go of it, as at the end
//! of a group.

use crate::choice::{Choice, Known};
use crate::collectives::invalid;
use crate::communicator::{Communicator, Config};
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef};
use crate::group::Group;
use crate::join;
use crate::plan::Shape;
use crate::rendezvous::{Assembly, Meeting, Topic, meeting_of};
use crate::sizing::{Need, Sizes, Sizing, State};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The name of these calls in errors.
const OP: &str = "adapt";
/// Test only: a bit of [`Config::broken`] that lets a rank on a simulated GPU go on before its calls are done.
#[doc(hidden)]
pub const BREAK_DRAIN: u32 = 1 << 30;
/// The round of threads that comes after those of [`Communicator::meet`]: all have let go of the old memory.
const LEFT: usize = 5;
/// How long the ranks may take to join again, once their calls are done.
pub(crate) const REJOIN: Duration = Duration::from_secs(30);
/// Between two looks at whether the calls are done.
const PAUSE: Duration = Duration::from_micros(50);

/// What [`Communicator::adapt`] has come to, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Adapted {
    /// The sizes until now.
    pub before: Sizes,
    /// The sizes from now on.
    pub after: Sizes,
}

impl Adapted {
    /// Whether there is new memory.
    pub fn changed(&self) -> bool {
        self.before != self.after
    }
}

/// What a rank shows the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Marks {
    need: Need,
    captured: u64,
    state: State,
    deadline: Duration,
}

/// What all marks add up to.
struct Verdict {
    state: State,
    /// The longest of the ranks' deadlines.
    deadline: Duration,
}

impl Verdict {
    /// The same on every rank.
    fn of(all: &[Marks], config: &Config, sizing: &Sizing, shape: &Shape) -> Result<Verdict> {
        let first = &all[0];
        for (rank, marks) in all.iter().enumerate() {
            if marks.captured != 0 {
                let reason = format!(
                    "rank {rank} has captured {} calls in CUDA graphs, which hold the mailboxes' addresses",
                    marks.captured
                );
                return Err(Error::Unsupported { op: OP, reason });
            }
            if marks.state != first.state {
                let reason = format!(
                    "rank 0 and rank {rank} have adapted differently: {:?} and {:?}",
                    first.state, marks.state
                );
                return Err(Error::Rendezvous { world: shape.world, reason });
            }
        }
        let need = all.iter().map(|marks| marks.need).fold(Need::default(), Need::max);
        let state = first.state.next(need, sizing, shape, config.chunk_bytes.is_none());
        let deadline = all.iter().map(|marks| marks.deadline).max().unwrap_or_default();
        Ok(Verdict { state, deadline })
    }

    /// The configuration that the ranks meet with.
    fn config(&self, config: &Config) -> Config {
        let Sizes { mailbox_bytes, staging_bytes } = self.state.sizes;
        let staging_bytes = Some(staging_bytes);
        // A rank may have changed its deadline since; what is compared must not differ.
        Config { mailbox_bytes, staging_bytes, deadline: self.deadline, ..config.clone() }
    }
}

impl Communicator {
    /// Lets the sizes of mailboxes and staging areas follow the calls since the last time, within the
    /// limits of [`Config::sizing`]. All ranks call it, each from its thread or process, after the same
    /// calls; [`Communicator::adapt_all`] is for one thread that drives all of them.
    ///
    /// It waits for the other ranks for as long as this rank's deadline. If nothing changes, nothing is
    /// waited for but them. If sizes change, it also waits for this rank's calls, for as long as the deadline, and
    /// for memory to be allocated, mapped and probed, and the calls after it use that; what the last call
    /// was queued on must still exist. `Work` of calls before it stays valid.
    ///
    /// # Errors
    /// On every rank, and the communicator goes on with the memory it has: a rank does not come, cannot go
    /// on or has captured a call in a CUDA graph; there is no memory. If a rank's calls have failed, or fail
    /// meanwhile, those of all ranks have.
    pub fn adapt(&mut self) -> Result<Adapted> {
        let (shape, sizing) = (self.group(OP)?.shape, self.sizing()?);
        let all = self.show_marks()?;
        self.meetings += 1;
        let verdict = Verdict::of(&all, self.config(), &sizing, &shape)?;
        let before = self.state.sizes;
        let after = verdict.state.sizes;
        if after != before {
            let config = verdict.config(self.config());
            let joined = self.meet_again(&config, verdict.deadline);
            self.meetings += 1;
            let (group, known, meeting) = joined.map_err(as_adapt)?;
            self.move_to(config, group, &known)?;
            // Freeing may wait for the GPU: for calls that need one of this rank's, if a peer made them now.
            if let Some(meeting) = meeting {
                let _ = meeting.exchange(self.rank(), LEFT, ());
            }
        }
        self.adapted(verdict.state, after != before);
        Ok(Adapted { before, after })
    }

    /// As [`Communicator::adapt`], for all ranks of a group of this process, in rank order.
    ///
    /// # Errors
    /// As for [`Communicator::adapt`]; and if `ranks` are not all ranks of one group, in order.
    pub fn adapt_all(ranks: &mut [&mut Communicator]) -> Result<Adapted> {
        let first = Communicator::whole_group(OP, ranks)?;
        let sizing = first.sizing()?;
        let shape = first.group(OP)?.shape;
        let marks = ranks.iter().map(|rank| rank.health().map(|()| rank.marks()));
        let all: Vec<Marks> = marks.collect::<Result<_>>()?;
        let verdict = Verdict::of(&all, ranks[0].config(), &sizing, &shape)?;
        let before = ranks[0].state.sizes;
        let after = verdict.state.sizes;
        if after != before {
            ranks.iter().try_for_each(|rank| rank.drain(verdict.deadline))?;
            let config = verdict.config(ranks[0].config());
            let gpus: Vec<GpuRef> = ranks.iter().map(|rank| rank.gpu().clone()).collect();
            let (group, known) = Communicator::assemble(&gpus, &config)?;
            for rank in ranks.iter_mut() {
                rank.move_to(config.clone(), group.clone(), &known)?;
            }
        }
        ranks.iter_mut().for_each(|rank| rank.adapted(verdict.state, after != before));
        Ok(Adapted { before, after })
    }

    /// The limits, which all ranks brought alike.
    fn sizing(&self) -> Result<Sizing> {
        let expected = || "a Config with limits for its sizes".to_owned();
        self.config().sizing.ok_or_else(|| invalid(OP, "sizing", expected(), "none"))
    }

    fn marks(&self) -> Marks {
        Marks {
            need: self.tally.need,
            captured: self.tally.captured,
            state: self.state,
            deadline: self.config().deadline,
        }
    }

    /// Exchanges the marks of all ranks.
    fn show_marks(&self) -> Result<Vec<Marks>> {
        let (rank, patience) = (self.rank(), self.config().deadline);
        let (assembly, topic) = (&self.group(OP)?.assembly, Topic::Sizes(self.meetings));
        self.health().inspect_err(|error| assembly.decline(rank, topic, patience, error))?;
        let all = assembly.sit(rank, topic, patience)?.exchange(self.marks(), None)?;
        Ok(all.into_iter().map(|(marks, _)| marks).collect())
    }

    /// Joins once more, with other sizes; the others wait for this rank's calls to be done. Says where the
    /// ranks met, if they are threads.
    fn meet_again(
        &self,
        config: &Config,
        deadline: Duration,
    ) -> Result<(Group, Known, Option<Meeting>)> {
        let (rank, topic) = (self.rank(), Topic::Sizes(self.meetings));
        // All ranks are here. One may spend its deadline on its calls, and a probe may last.
        let patience = deadline + REJOIN;
        match &self.group(OP)?.assembly {
            Assembly::Threads(meetings) => {
                let meeting = meetings.enter(rank, topic, patience)?;
                let ready = self.drain(deadline);
                let joined =
                    ready.and_then(|()| Communicator::meet(&meeting, rank, self.gpu(), config));
                let (group, known) = joined.inspect_err(|error| meeting.give_up(rank, error))?;
                Ok((group, known, Some(meeting)))
            }
            Assembly::Processes(segment) => {
                let meeting = meeting_of(segment, topic, patience);
                let ready = self.drain(deadline);
                let seat = meeting.enter(rank)?;
                let (group, known) = join::join(seat, rank, ready.clone(), self.gpu(), config)
                    .map_err(|error| ready.err().unwrap_or(error))?;
                Ok((group, known, None))
            }
        }
    }

    /// Waits until this rank's calls are done, and says whether they went well.
    fn drain(&self, deadline: Duration) -> Result<()> {
        if self.config().broken & BREAK_DRAIN != 0 && self.gpu().backend() == Backend::Sim {
            return Ok(());
        }
        let until = Instant::now() + deadline;
        while !self.is_drained()? {
            if Instant::now() >= until {
                return Err(Error::Rendezvous {
                    world: self.world_size(),
                    reason: format!(
                        "the calls of rank {} are not done after {deadline:?}",
                        self.rank()
                    ),
                });
            }
            std::thread::sleep(PAUSE);
        }
        self.health()
    }

    /// Goes on with the memory of `group`. All ranks can or none can.
    fn move_to(&mut self, config: Config, group: Group, known: &Known) -> Result<()> {
        let choice = Choice::settle(&config, &group.shape, known)?;
        self.group(OP)?.leave_together(config.deadline);
        let config = Config { deadline: self.config().deadline, ..config };
        let aborted = self.replace_group(config, group, choice);
        if aborted {
            self.abort();
        }
        Ok(())
    }

    /// Notes that the ranks have looked at their sizes.
    fn adapted(&mut self, state: State, resized: bool) {
        self.state = state;
        self.tally.roll(resized);
    }
}

/// What another rank brought to the meeting was no matter of joining.
fn as_adapt(error: Error) -> Error {
    match error {
        Error::Unsupported { reason, .. } => Error::Unsupported { op: OP, reason },
        other => other,
    }
}
