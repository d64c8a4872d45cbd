//! Memory that ranks of one process use as it is, without mapping it: the addresses of this process's own ranks.
//!
//! Invariant: an address is taken from a rank's offer only if a rank of this very process has noted it here for the
//! same group, rank and purpose, and its memory is still there. So nothing that another process says, whichever
//! process it claims to be, becomes an address here.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A mailbox and the staging area behind it.
    Mailbox,
    /// The tensor of a registration.
    Tensor(u64),
}

/// Whose memory it is: the number of the group, the rank, the purpose.
pub(crate) type Owner = (u64, u32, Purpose);

static NOTES: Mutex<Vec<(Owner, u64, usize)>> = Mutex::new(Vec::new());

fn notes() -> MutexGuard<'static, Vec<(Owner, u64, usize)>> {
    // Every change is one call.
    NOTES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the note back when it goes.
pub(crate) struct Note((Owner, u64, usize));

/// Notes the `bytes` bytes at `address`, which `owner` is about to offer.
pub(crate) fn note(owner: Owner, address: u64, bytes: usize) -> Note {
    notes().push((owner, address, bytes));
    Note((owner, address, bytes))
}

/// Whether a rank of this process, `owner`, offers `bytes` bytes at `address`.
pub(crate) fn offers(owner: Owner, address: u64, bytes: usize) -> bool {
    notes().contains(&(owner, address, bytes))
}

impl Drop for Note {
    fn drop(&mut self) {
        let mut notes = notes();
        if let Some(index) = notes.iter().position(|note| *note == self.0) {
            notes.swap_remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_noted_is_offered_and_only_while_it_is() {
        let owner = (u64::MAX - 7, 3, Purpose::Tensor(5));
        let note = note(owner, 0x1000, 64);
        assert!(offers(owner, 0x1000, 64));
        let (group, rank, purpose) = owner;
        assert!(!offers((group - 1, rank, purpose), 0x1000, 64), "another group");
        assert!(!offers((group, rank + 1, purpose), 0x1000, 64), "another rank");
        assert!(!offers((group, rank, Purpose::Mailbox), 0x1000, 64), "another purpose");
        assert!(!offers(owner, 0x1010, 64) && !offers(owner, 0x1000, 128), "another place");
        drop(note);
        assert!(!offers(owner, 0x1000, 64));
    }
}
