//! How a process joins a group: what is shown, offered, mapped and probed, in which order.
//!
//! Invariant: all ranks join or none does, and then all return the same error. So a rank that fails
//! brings its failure to the round instead of staying away.

use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::GpuRef;
use crate::group::{Agreement, Card, Group};
use crate::probe;
use crate::rendezvous::{Processes, Seat};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::os::fd::OwnedFd;

/// Joins as `rank`; returns this process's view of the group.
pub(crate) fn join(meeting: &Processes, rank: u32, gpu: &GpuRef, config: &Config) -> Result<Group> {
    let seat = meeting.enter(rank)?;
    let segment = seat.segment.clone();
    let cards: Vec<Card> =
        share(&seat, rank, Card::prepare(gpu, config), None)?.into_iter().map(|(c, _)| c).collect();
    let agreement = Agreement::of(&cards, config)?;
    let (own, offer, file) = match agreement.offer(gpu, config, &segment, rank) {
        Ok((own, offer, file)) => (Some(own), Ok(offer), file),
        Err(error) => (None, Err(error), None),
    };
    let offers = share(&seat, rank, offer, file)?;
    // It is there, or sharing the failure would have returned.
    let Some(own) = own else { return Err(Error::Closed { op: "join", rank }) };
    let mapped = agreement.accept(gpu, &segment, (rank, &own), &cards, offers);
    let (members, mapped) = match mapped {
        Ok(members) => (members, Ok(())),
        Err(error) => (Vec::new(), Err(error)),
    };
    share(&seat, rank, mapped, None)?;
    let probe = probe::Probe { gpu, rank, shape: agreement.shape, members: &members };
    for step in 0..probe::steps(agreement.shape.world) {
        share(&seat, rank, probe.run(step), None)?;
    }
    Ok(Group::of_processes(agreement.shape, members, seat.join(own)?))
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
            other => Failure::Unsupported { reason: format!("rank {rank}: {other}") },
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
