//! How one side sleeps until another has something for it.
//!
//! Invariant: a wake-up is never lost. Who publishes stores first and then looks who is asleep; who goes to sleep says
//! so first and then looks for what was published. A `SeqCst` fence lies between store and load on both sides, so at
//! least one of them sees the other's store: the publisher wakes, or the sleeper stays awake.

use super::primitive::{AtomicU32, Ordering, fence, futex_wait, futex_wake};
use std::num::NonZeroU32;
use std::time::Duration;

/// Two words in shared memory. What other processes write into them costs time, never more: sleeps are short.
pub(super) struct Bell<'a> {
    /// Counts wake-ups: what sleepers sleep on.
    pub(super) rings: &'a AtomicU32,
    /// Who is asleep, or about to be, a bit each.
    pub(super) asleep: &'a AtomicU32,
}

impl Bell<'_> {
    /// Wakes those of `bits` that sleep: no system call if none does, one for all of them if any does.
    pub(super) fn ring(&self, bits: u32) {
        // Orders the caller's stores before the load. Its other half is in `sleep`.
        fence(Ordering::SeqCst);
        let Some(bits) = NonZeroU32::new(self.asleep.load(Ordering::Relaxed) & bits) else {
            return;
        };
        // What is published before they run again rings no second time. The bit may be of a new sleep by now: that
        // sleeper has read `rings` before it set its bit (acquire there, release here), so it finds another number
        // than the one that it read and does not sleep.
        self.asleep.fetch_and(!bits.get(), Ordering::Relaxed);
        self.rings.fetch_add(1, Ordering::Release);
        futex_wake(self.rings, bits);
    }

    /// Wakes everybody, asleep or about to be, after the caller's stores.
    pub(super) fn ring_all(&self) {
        // Release: who reads the new number sees what the caller has stored; who read the old one does not sleep.
        self.rings.fetch_add(1, Ordering::Release);
        futex_wake(self.rings, NonZeroU32::MAX);
    }

    /// Sleeps until it rings for `bit`, for `slice` at most, unless `ready` says that there is no need to.
    pub(super) fn sleep(&self, bit: NonZeroU32, slice: Duration, ready: impl FnOnce() -> bool) {
        let seen = self.rings.load(Ordering::Acquire);
        self.asleep.fetch_or(bit.get(), Ordering::Relaxed);
        // Orders the bit before the loads of `ready`. Its other half is in `ring`.
        fence(Ordering::SeqCst);
        if !ready() {
            futex_wait(self.rings, seen, bit, slice);
        }
        self.asleep.fetch_and(!bit.get(), Ordering::Relaxed);
    }
}
