//! What ranks bring when they register a tensor or end that, and what it adds up to.
//!
//! Invariant: what is decided here follows from what all ranks brought, so all of them decide the same.

use crate::collectives::invalid;
use crate::error::{Error, LONGEST_REASON, Result, clipped};
use crate::gpu::MemoryHandle;
use peerlane_device::abi::UNIT;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

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

impl Offer {
    /// That a tensor of `bytes` bytes lies in the allocation where tensors may lie.
    pub(super) fn check(&self, op: &'static str, rank: u32, bytes: usize) -> Result<()> {
        let ends =
            self.offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes as u64);
        let exists = self.base.checked_add(self.bytes as u64).is_some();
        if ends && exists && self.offset.is_multiple_of(UNIT as u64) {
            return Ok(());
        }
        let expected = format!("a tensor of {bytes} bytes at a multiple of {UNIT} in its memory");
        let Offer { base, offset, .. } = self;
        let got =
            format!("{} bytes at {base:#x} and {offset} into it from rank {rank}", self.bytes);
        Err(invalid(op, "offer", expected, got))
    }
}

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
    outcomes
        .try_for_each(|outcome| outcome)
        .map_err(|reason| Error::Unsupported { op, reason: clipped(&reason) })
}

/// What a rank makes of the cards of three, as JSON.
#[cfg(any(fuzzing, test))]
pub(crate) fn check_cards(data: &[u8]) -> Result<()> {
    const OP: &str = "register";
    let Ok(cards) = serde_json::from_slice::<[Card; 3]>(data) else { return Ok(()) };
    let cards: Cards = cards.into_iter().map(|card| (card, None)).collect();
    agree(OP, &cards)?;
    let Task::Register(bytes) = cards[0].0.task else { return Ok(()) };
    for (rank, (card, _)) in (0..).zip(&cards) {
        if let Ok(Some(offer)) = &card.outcome {
            offer.check(OP, rank, bytes)?;
            // As the ranks do with what they believe.
            let _ = offer.base + offer.offset + bytes as u64;
        }
    }
    Ok(())
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Task::Register(bytes) => write!(f, "a new one of {bytes} bytes"),
            Task::Deregister(number) => write!(f, "the end of number {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_lies_in_its_allocation() {
        let check = |base, bytes, offset, tensor| {
            let process = (1, 2);
            let offer =
                Offer { base, bytes, id: 1, offset, handle: None, process, peers_reach: true };
            offer.check("register", 3, tensor).map_err(|error| error.to_string())
        };
        assert_eq!(check(0x1000, 4096, 0, 4096), Ok(()));
        assert_eq!(check(0x1000, 4096, 4080, 16), Ok(()));
        let bad = [
            (0x1000, 4096, 4080, 17),
            (0x1000, 4096, 8, 16),
            (0x1000, 4096, u64::MAX - 15, 16),
            (0x1000, 0, 0, 1),
            (0x1000, 4096, 16, usize::MAX),
            (u64::MAX - 4095, 8192, 0, 16),
        ];
        for (base, bytes, offset, tensor) in bad {
            let reason = check(base, bytes, offset, tensor).unwrap_err();
            assert!(reason.starts_with("register: offer: expected a tensor of"), "{reason}");
            assert!(reason.ends_with("from rank 3"), "{reason}");
        }
    }
}
