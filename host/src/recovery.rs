//! A group that was aborted begins anew, with the memory it has: nothing is loaded, mapped or captured again.
//!
//! Invariant: nobody clears memory before every rank's GPU is idle, and nobody uses it before every rank has cleared
//! its own. So a store of the last generation lands before the clearing, or never (docs/protocol.md). All
//! ranks go on or none does; nothing that only one rank could fail at comes after the last round.

use crate::communicator::Communicator;
use crate::error::Result;
use crate::mailbox::Extent;
use crate::plan::Shape;
use crate::probe::Probe;
use crate::regroup::{Agreed, Circle};
use crate::rendezvous::Topic;

/// The name of these calls in errors.
const OP: &str = "recover";

impl Communicator {
    /// Brings the communicator back after an abort, a time-out or any other error of its calls. All ranks call
    /// it, each from its thread or process; [`Communicator::recover_all`] is for one thread that drives all
    /// of them. On a healthy communicator it is a reset.
    ///
    /// It ends all waits of all ranks, waits for the other ranks for as long as this rank's deadline and for everything
    /// on this rank's GPU, clears mailboxes and counters where they are, and probes every pair if the ranks are
    /// processes. Tensors, registrations, CUDA graphs and aborters stay valid; what was in flight is undefined.
    /// [`Work`](crate::Work) that nobody had waited for says what went wrong. No call, nor a graph with one, may be
    /// made on any rank meanwhile.
    ///
    /// # Errors
    /// On every rank, and the communicator stays aborted and may try again: a rank does not come or cannot go on.
    /// [`Error::PeerLost`](crate::Error::PeerLost) if a rank's process has ended: only
    /// [`Communicator::shrink`] goes on then.
    pub fn recover(&mut self) -> Result<()> {
        self.group(OP)?;
        let outcome = self.recover_together();
        if outcome.is_err() {
            self.abort();
        }
        outcome
    }

    /// As [`Communicator::recover`], for all ranks of a group of this process, in rank order.
    ///
    /// # Errors
    /// As for [`Communicator::recover`]; and if `ranks` are not all ranks of one group, in order.
    pub fn recover_all(ranks: &mut [&mut Communicator]) -> Result<()> {
        Communicator::whole_group(OP, ranks)?;
        let outcome = recover_each(ranks);
        if outcome.is_err() {
            ranks.iter().for_each(|rank| rank.abort());
        }
        outcome
    }

    fn recover_together(&mut self) -> Result<()> {
        // Nobody waits for what will not come, on the GPU or, behind it, on the host.
        self.abort();
        let agreed = self.arrive(OP, Topic::Recovery, 0)?;
        let mut circle = self.circle(OP, Topic::Restart, 0, agreed.patience())?;
        circle.share(self.come_to_rest())?;
        circle.share(self.clear())?;
        // An abort that began before all had cleared has stored all its words when this round ends, and is found
        // at the last; one that begins later finds every rank's word cleared, and stays.
        self.aborter.settle();
        circle.share(Ok(()))?;
        self.probe_again(&mut circle)?;
        circle.share(self.health())?;
        self.begin_generation(agreed);
        Ok(())
    }

    /// Waits until nothing of this rank runs. Its monitor ends too, before any rank clears the words that it stores.
    fn come_to_rest(&mut self) -> Result<()> {
        self.drain_gpu()?;
        self.stop_watching();
        Ok(())
    }

    /// Makes this rank's memory, its entries in the call log and its status what they were before the first call.
    fn clear(&mut self) -> Result<()> {
        self.end_generation()?;
        let captured = self.stop_scheduled();
        let (rank, config) = (self.rank(), self.config());
        let group = self.group(OP)?;
        let Shape { world, layout, .. } = group.shape;
        let own = group.member(rank);
        own.clear(Extent::new(layout, world, config.staging()))?;
        if config.first_slot != 0 {
            own.number_slots_from(config.first_slot, layout)?;
        }
        if let Some(host) = &group.mailboxes.hosts[rank as usize] {
            host.empty(layout, config.first_slot);
        }
        group.log.forget(rank);
        own.clear_status();
        own.clear_abort();
        self.forget_calls(captured)
    }

    /// Probes every pair, as when the processes joined. What carries a pair's data stays what it is: graphs hold the
    /// addresses. Ranks of one process have never been probed.
    fn probe_again(&self, circle: &mut Circle) -> Result<()> {
        let group = self.group(OP)?;
        if group.segment().is_none() {
            return Ok(());
        }
        let (gpu, rank) = (self.gpu(), self.rank());
        let probe = Probe { gpu, rank, shape: group.shape, mailboxes: &group.mailboxes };
        for step in 0..probe.steps() {
            let verdict = probe.run(0, step);
            let verdict = verdict.and_then(|failure| failure.map_or(Ok(()), |(_, e)| Err(e)));
            circle.share(verdict)?;
        }
        Ok(())
    }
}

fn recover_each(ranks: &mut [&mut Communicator]) -> Result<()> {
    ranks.iter().for_each(|rank| rank.abort());
    ranks.iter_mut().try_for_each(|rank| rank.come_to_rest())?;
    ranks.iter_mut().try_for_each(|rank| rank.clear())?;
    ranks.iter().for_each(|rank| rank.aborter.settle());
    ranks.iter().try_for_each(|rank| rank.health())?;
    let cards: Vec<_> = ranks.iter().map(|rank| rank.card()).collect();
    let agreed = Agreed::on(&cards);
    ranks.iter_mut().for_each(|rank| rank.begin_generation(agreed));
    Ok(())
}
