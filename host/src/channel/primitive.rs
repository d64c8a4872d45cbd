//! Atomics, and the futex, as the ring uses them: those of the machine. `tests/loom` has loom's in their place, so that
//! the ring's own code is model-checked.

use rustix::thread::futex;
use std::num::NonZeroU32;
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Sleeps while `word` is `expected`, until woken for one of `bits` or for `slice`. May return for no reason.
pub(super) fn futex_wait(word: &AtomicU32, expected: u32, bits: NonZeroU32, slice: Duration) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let until = Duration::new(now.tv_sec as u64, now.tv_nsec as u32) + slice;
    let Ok(until) = rustix::time::Timespec::try_from(until) else { return };
    // Whatever it returns, the caller looks again. Not a private futex: other processes wake.
    let _ = futex::wait_bitset(word, futex::Flags::empty(), expected, Some(&until), bits);
}

/// Wakes all that sleep on `word` for one of `bits`.
pub(super) fn futex_wake(word: &AtomicU32, bits: NonZeroU32) {
    let _ = futex::wake_bitset(word, futex::Flags::empty(), i32::MAX as u32, bits);
}
