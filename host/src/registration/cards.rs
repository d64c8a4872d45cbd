//! What ranks bring when they register a tensor or end that, and what it adds up to.
//!
//! Invariant: what is decided here follows from what all ranks brought, so all of them decide the same.

use crate::collectives::invalid;
use crate::error::{Error, Result};
use crate::gpu::MemoryHandle;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

/// Most characters of a reason that travels.
const LONGEST_REASON: usize = 1000;

/// What a rank brings to the first round.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Card {
    pub(super) task: Task,
    /// What it offers, or why it cannot.
    pub(super) outcome: std::result::Result<Option<Offer>, String>,
}

/// What a rank came for.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) enum Task {
    /// To register so many bytes.
    Register(usize),
    /// To end the registration of this number.
    Deregister(u64),
}

/// How others reach a tensor.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Where the tensor's allocation begins, and how large it is.
    pub(super) base: u64,
    pub(super) bytes: usize,
    pub(super) id: u64,
    /// Bytes from there to the tensor.
    pub(super) offset: u64,
    /// For other processes; none if there are none.
    pub(super) handle: Option<MemoryHandle>,
    pub(super) process: (u32, u64),
    /// Ranks of the same process reach it where it is.
    pub(super) peers_reach: bool,
}

/// What the others brought, with the files beside it.
pub(super) type Cards = Vec<(Card, Option<OwnedFd>)>;

impl Card {
    pub(super) fn new(rank: u32, task: Task, outcome: Result<Option<Offer>>) -> Card {
        Card { task, outcome: outcome.map_err(|error| reason(rank, &error)) }
    }
}

/// What went wrong on `rank`, for the others.
pub(super) fn reason(rank: u32, error: &Error) -> String {
    format!("rank {rank}: {error}").chars().take(LONGEST_REASON).collect()
}

/// That all ranks came for the same. The same answer on all of them.
pub(super) fn agree(op: &'static str, cards: &Cards) -> Result<()> {
    let others = (1..).zip(cards.iter().skip(1));
    for (rank, (card, _)) in others {
        let (argument, first, other) = match (cards[0].0.task, card.task) {
            (first, other) if first == other => continue,
            (Task::Register(first), Task::Register(other)) => {
                ("bytes", first.to_string(), other.to_string())
            }
            (first, other) => ("registration", first.to_string(), other.to_string()),
        };
        let expected = format!("{first}, as rank 0 brings");
        return Err(invalid(op, argument, expected, format!("{other} from rank {rank}")));
    }
    let outcomes = cards.iter().map(|(card, _)| card.outcome.clone().map(drop));
    settled(op, outcomes)
}

/// The first failure among what the ranks brought.
pub(super) fn settled(
    op: &'static str,
    mut outcomes: impl Iterator<Item = std::result::Result<(), String>>,
) -> Result<()> {
    outcomes.try_for_each(|outcome| outcome).map_err(|reason| Error::Unsupported { op, reason })
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Task::Register(bytes) => write!(f, "a new one of {bytes} bytes"),
            Task::Deregister(number) => write!(f, "the end of number {number}"),
        }
    }
}
