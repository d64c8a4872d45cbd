//! How a process joins a group: what is shown, offered, mapped and probed, in which order.
//!
//! Invariant: all ranks join or none does, and then all return the same error. So a rank that fails
//! brings its failure to the round instead of staying away.

use crate::choice::Known;
use crate::communicator::Config;
use crate::error::{Error, LONGEST_REASON, Result, clipped};
use crate::gpu::GpuRef;
use crate::group::{Agreement, Card, Group, Mailboxes};
use crate::host_mailbox::HostMailbox;
use crate::mailbox::{Member, Offer};
use crate::plan::Shape;
use crate::probe::Probe;
use crate::rendezvous::Seat;
use crate::selftest::Verdicts;
use crate::transport::{Pairs, Transport};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Joins as `rank`, whose seat it is, and which is `ready` to or says why it cannot; returns this process's view of
/// the group, and what rank 0 found out for it.
pub(crate) fn join(
    seat: Seat,
    rank: u32,
    ready: Result<()>,
    gpu: &GpuRef,
    config: &Config,
) -> Result<(Group, Known)> {
    let segment = seat.segment.clone();
    let card = ready.and_then(|()| Card::prepare(gpu, config));
    let cards: Vec<Card> = values(share(&seat, rank, card, None)?);
    let agreement = Agreement::of(&cards, config)?;
    let known = agreement.known(gpu, (rank, Some(seat.patience())), &cards, config);
    let known = share(&seat, rank, known, None)?.swap_remove(0).0;
    let world = agreement.shape.world;
    known.check(world).map_err(|reason| Error::Rendezvous { world, reason })?;
    agreement.accept_verdicts(&known, config)?;
    let (own, offer, file) = match agreement.offer(gpu, config, &segment, rank) {
        Ok((own, offer, file)) => (Some(own), Ok(offer), file),
        Err(error) => (None, Err(error), None),
    };
    let entered = Entered {
        seat: &seat,
        agreement: &agreement,
        cards: &cards,
        verdicts: &known.verdicts,
        rank,
        gpu,
        config,
    };
    match (entered.map_and_probe(own.as_ref(), offer, file), own) {
        (Ok(mailboxes), Some(own)) => {
            Ok((Group::of_processes(agreement.shape, mailboxes, seat.join(own)?), known))
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
    verdicts: &'a Verdicts,
    rank: u32,
    gpu: &'a GpuRef,
    config: &'a Config,
}

impl Entered<'_> {
    /// Offers this rank's mailbox, maps the others' and probes them. Whatever has been mapped is
    /// unmapped when this fails.
    fn map_and_probe(
        &self,
        own: Option<&Arc<Member>>,
        offer: Result<Option<Offer>>,
        file: Option<OwnedFd>,
    ) -> Result<Mailboxes> {
        let Entered { seat, agreement, cards, verdicts, rank, gpu, config } = *self;
        let offers = share(seat, rank, offer, file)?;
        // It is there, or sharing the failure would have returned.
        let Some(own) = own else { return Err(Error::Closed { op: "join", rank }) };
        let segment = &seat.segment;
        let mapped = agreement.accept(gpu, segment, (rank, own), cards, offers, config.transport);
        let (members, unreached) = match mapped {
            Ok((members, unreached)) => (members, Ok(unreached)),
            Err(error) => (Vec::new(), Err(error)),
        };
        let unreached: Vec<u16> = values(share(seat, rank, unreached, None)?);
        let mut mailboxes = Mailboxes::new(members, verdicts.demote(Pairs::of(&unreached)));
        // Every pass but the last demotes at least one pair, so they end.
        for pass in 0.. {
            self.share_hosts(&mut mailboxes)?;
            let before = mailboxes.pairs;
            mailboxes.pairs = self.probe(&mailboxes, pass)?;
            if mailboxes.pairs == before {
                break;
            }
        }
        Ok(mailboxes)
    }

    /// Makes and maps the host mailboxes that are needed and not there yet.
    fn share_hosts(&self, mailboxes: &mut Mailboxes) -> Result<()> {
        let Entered { seat, agreement, rank, gpu, config, .. } = *self;
        let Mailboxes { hosts, pairs, .. } = mailboxes;
        if !pairs.any() {
            return Ok(());
        }
        let Shape { world, layout, .. } = agreement.shape;
        let own = &mut hosts[rank as usize];
        let made = match own {
            None if pairs.senders(rank) != 0 => {
                HostMailbox::create(gpu, layout, world, config.first_slot)
                    .map(|made| *own = Some(Arc::new(made)))
            }
            _ => Ok(()),
        };
        let file = made.and_then(|()| own.as_ref().map_or(Ok(None), |own| own.file()));
        let (made, file) = match file {
            Ok(file) => (Ok(()), file),
            Err(error) => (Err(error), None),
        };
        let offered = share(seat, rank, made, file)?;
        let open = |(peer, (_, file)): (usize, ((), Option<OwnedFd>))| {
            let needed = pairs.by_host(rank, peer as u32) && hosts[peer].is_none();
            if let Some(file) = file.filter(|_| needed) {
                hosts[peer] = Some(Arc::new(HostMailbox::open(gpu, layout, world, file)?));
            }
            Ok(())
        };
        let opened = offered.into_iter().enumerate().try_for_each(open);
        share(seat, rank, opened, None).map(drop)
    }

    /// Every pair exchanges patterns. Returns the pairs with those demoted to host memory between
    /// which they did not arrive.
    fn probe(&self, mailboxes: &Mailboxes, pass: u32) -> Result<Pairs> {
        let Entered { seat, agreement, rank, gpu, config, .. } = *self;
        let probe = Probe { gpu, rank, shape: agreement.shape, mailboxes };
        let mut pairs = mailboxes.pairs;
        let may_demote = config.transport == Transport::Auto;
        for step in 0..probe.steps() {
            let verdict = probe.run(pass, step).and_then(|failure| match failure {
                None => Ok(None),
                Some((peer, _)) if may_demote && !pairs.by_host(peer, rank) => Ok(Some(peer)),
                Some((_, error)) => Err(error),
            });
            let verdicts: Vec<Option<u32>> = values(share(seat, rank, verdict, None)?);
            let failures: Vec<(u32, u32)> =
                (0..).zip(&verdicts).filter_map(|(to, from)| Some(((*from)?, to))).collect();
            let world = agreement.shape.world;
            if let Some((from, to)) =
                failures.iter().find(|(from, to)| *from >= world || from == to)
            {
                let reason = format!("rank {to} says that nothing came from rank {from}");
                return Err(Error::Rendezvous { world, reason });
            }
            failures.into_iter().for_each(|(from, to)| pairs.demote(from, to));
            if verdicts.iter().any(Option::is_some) {
                share(seat, rank, self.forget_failures(mailboxes), None)?;
            }
        }
        Ok(pairs)
    }

    /// Makes this rank's words as if no probe had failed. All ranks do so before the next step.
    fn forget_failures(&self, mailboxes: &Mailboxes) -> Result<()> {
        let rank = self.rank as usize;
        if let Some(host) = &mailboxes.hosts[rank] {
            host.forget_failures();
        }
        mailboxes.members[rank].forget_failures()
    }
}

/// What the ranks brought to a round without files.
fn values<T>(all: Vec<(T, Option<OwnedFd>)>) -> Vec<T> {
    all.into_iter().map(|(value, _)| value).collect()
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
            Failure::Unreachable { from, to, reason } => {
                Error::Unreachable { from, to, reason: clipped(&reason) }
            }
            Failure::Unsupported { reason } => {
                Error::Unsupported { op: "join", reason: clipped(&reason) }
            }
        }
    }
}
