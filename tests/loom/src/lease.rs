//! Exporters and importers of `host/src/transfer/`: `lease.rs`, the shipping code, under loom.
//!
//! Invariant: nothing of the protocol is written a second time here. Payload is a cell of loom's, which reports whoever reads it while
//! it is written.

#[allow(dead_code, reason = "the host uses all of it")]
#[path = "../../../host/src/transfer/lease.rs"]
mod protocol;

use loom::cell::UnsafeCell;
use primitive::{AtomicU64, Ordering};

/// What `host/src/channel/primitive.rs` has, for loom.
mod primitive {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};

    pub(super) fn fence(order: Ordering) {
        if !super::NO_FENCE.get() {
            loom::sync::atomic::fence(order);
        }
    }
}

thread_local! {
    /// Loom runs all threads of an execution in one.
    static NO_FENCE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether the fences are left out, for the executions that follow on this thread.
pub fn leave_fences_out(yes: bool) {
    NO_FENCE.set(yes);
}

/// A segment with one number as its payload.
pub struct Segment {
    generation: AtomicU64,
    borrows: AtomicU64,
    payload: UnsafeCell<u64>,
}

// SAFETY: loom runs one thread at a time, and reports what would be a race.
unsafe impl Sync for Segment {}

impl Segment {
    /// With `value` exported in generation 0.
    pub fn new(value: u64) -> Segment {
        let [generation, borrows] = [0, 0].map(AtomicU64::new);
        Segment { generation, borrows, payload: UnsafeCell::new(value) }
    }

    /// What the descriptor of `generation` leads to, looked at twice; none if it comes too late.
    pub fn import(&self, generation: u64) -> Option<[u64; 2]> {
        protocol::take(&self.borrows, &self.generation, generation).ok()?;
        let look = || {
            // SAFETY: what loom is to find out.
            self.payload.with(|payload| unsafe { *payload })
        };
        let seen = [look(), look()];
        protocol::end(&self.borrows);
        Some(seen)
    }

    /// Gives the payload up and writes another, unless somebody looks at it.
    pub fn clear_and_export(&self, value: u64) -> bool {
        protocol::give_up(&self.generation);
        let free = protocol::is_free(&self.borrows);
        if free {
            // SAFETY: what loom is to find out.
            self.payload.with_mut(|payload| unsafe { *payload = value });
        }
        free
    }

    /// The generation, for a descriptor.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }
}
