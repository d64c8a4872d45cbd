//! Who may look at a segment's payload, and who may write it.
//!
//! Invariant: payload is never written while somebody looks at it. An importer counts its look and then reads the generation; the
//! exporter changes the generation and then reads the counts. A `SeqCst` fence lies between the two on both sides, so at least one
//! of them sees the other's store: the importer finds that it came too late, or the exporter that it has to wait.

use super::primitive::{AtomicU64, Ordering, fence};

/// Begins a look at payload of `generation`; the generation that it is now, if that is another.
pub(super) fn take(borrows: &AtomicU64, now: &AtomicU64, generation: u64) -> Result<(), u64> {
    borrows.fetch_add(1, Ordering::Relaxed);
    // Its other half is in `give_up`.
    fence(Ordering::SeqCst);
    let now = now.load(Ordering::Relaxed);
    if now == generation {
        return Ok(());
    }
    end(borrows);
    Err(now)
}

/// Another look, by somebody who looks already.
pub(super) fn again(borrows: &AtomicU64) {
    borrows.fetch_add(1, Ordering::Relaxed);
}

/// Ends a look.
pub(super) fn end(borrows: &AtomicU64) {
    // What was read was read before: who finds no borrow, with acquire, may write.
    borrows.fetch_sub(1, Ordering::Release);
}

/// Ends the looks of somebody who is gone.
pub(super) fn forget(borrows: &AtomicU64, looks: u64) {
    borrows.fetch_sub(looks, Ordering::Release);
}

/// Gives up what was exported so far. `is_free` tells from then on who still looks.
pub(super) fn give_up(now: &AtomicU64) {
    now.fetch_add(1, Ordering::Relaxed);
    // Its other half is in `take`.
    fence(Ordering::SeqCst);
}

/// Whether nobody looks under this count.
pub(super) fn is_free(borrows: &AtomicU64) -> bool {
    borrows.load(Ordering::Acquire) == 0
}
