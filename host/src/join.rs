//! How a process joins a group: what is shown, offered, mapped and probed, in which order.
//!
//! Invariant: all ranks join or none does, and then all return the same error. So a rank that fails
//! brings its failure to the round instead of staying away.

use crate::choice::Known;
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::GpuRef;
use crate::group::{Agreement, Card, Group};
use crate::mailbox::{Member, Offer};
use crate::probe;
use crate::rendezvous::{Processes, Seat};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Most characters of a reason that travels. A compiler's log can be longer than a message.
const LONGEST_REASON: usize = 1000;

/// Joins as `rank`; returns this process's view of the group, and what rank 0 found out for it.
pub(crate) fn join(
    meeting: &Processes,
    rank: u32,
    gpu: &GpuRef,
    config: &Config,
) -> Result<(Group, Known)> {
    let seat = meeting.enter(rank)?;
    let segment = seat.segment.clone();
    let cards: Vec<Card> =
        share(&seat, rank, Card::prepare(gpu, config), None)?.into_iter().map(|(c, _)| c).collect();
    let agreement = Agreement::of(&cards, config)?;
    let known = share(&seat, rank, agreement.known(rank, &cards, config), None)?.swap_remove(0).0;
    let (own, offer, file) = match agreement.offer(gpu, config, &segment, rank) {
        Ok((own, offer, file)) => (Some(own), Ok(offer), file),
        Err(error) => (None, Err(error), None),
    };
    let entered = Entered { seat: &seat, agreement: &agreement, cards: &cards, rank, gpu };
    match (entered.map_and_probe(own.as_ref(), offer, file), own) {
        (Ok(members), Some(own)) => {
            Ok((Group::of_processes(agreement.shape, members, seat.join(own)?), known))
        }
        (Err(error), Some(own)) => {
            seat.abandon(own);
            Err(error)
        }
        (Err(error), None) => Err(error),
        (Ok(_), None) => Err(Error::Closed { op: "join", rank }),
    }
}

/// A rank that knows what all ranks agree on.
struct Entered<'a> {
    seat: &'a Seat,
    agreement: &'a Agreement,
    cards: &'a [Card],
    rank: u32,
    gpu: &'a GpuRef,
}

impl Entered<'_> {
    /// Offers this rank's mailbox, maps the others' and probes them. Whatever has been mapped is
    /// unmapped when this fails.
    fn map_and_probe(
        &self,
        own: Option<&Arc<Member>>,
        offer: Result<Offer>,
        file: Option<OwnedFd>,
    ) -> Result<Vec<Arc<Member>>> {
        let Entered { seat, agreement, cards, rank, gpu } = *self;
        let offers = share(seat, rank, offer, file)?;
        // It is there, or sharing the failure would have returned.
        let Some(own) = own else { return Err(Error::Closed { op: "join", rank }) };
        let mapped = agreement.accept(gpu, &seat.segment, (rank, own), cards, offers);
        let (members, mapped) = match mapped {
            Ok(members) => (members, Ok(())),
            Err(error) => (Vec::new(), Err(error)),
        };
        share(seat, rank, mapped, None)?;
        let probe = probe::Probe { gpu, rank, shape: agreement.shape, members: &members };
        for step in 0..probe::steps(agreement.shape.world) {
            share(seat, rank, probe.run(step), None)?;
        }
        Ok(members)
    }
}

/// Brings `outcome` to the next round. If any rank brings a failure, all return the first one.
fn share<T: Serialize + DeserializeOwned>(
    seat: &Seat,
    rank: u32,
    outcome: Result<T>,
    file: Option<OwnedFd>,
) -> Result<Vec<(T, Option<OwnedFd>)>> {
    let outcome = outcome.map_err(|error| Failure::of(rank, error));
    let all = seat.exchange(&outcome, file)?;
    all.into_iter().map(|(outcome, file)| Ok((outcome.map_err(Error::from)?, file))).collect()
}

/// Why a rank cannot join, as it travels.
#[derive(Serialize, Deserialize)]
enum Failure {
    Unreachable { from: u32, to: u32, reason: String },
    Unsupported { reason: String },
}

impl Failure {
    fn of(rank: u32, error: Error) -> Failure {
        match error {
            Error::Unreachable { from, to, reason } => Failure::Unreachable { from, to, reason },
            other => {
                let text = format!("rank {rank}: {other}");
                Failure::Unsupported { reason: text.chars().take(LONGEST_REASON).collect() }
            }
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Unreachable { from, to, reason } => Error::Unreachable { from, to, reason },
            Failure::Unsupported { reason } => Error::Unsupported { op: "join", reason },
        }
    }
}
