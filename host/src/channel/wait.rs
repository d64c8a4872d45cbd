//! How both ends wait: they spin, then they sleep in slices, and look between two slices whether the other end is there.
//!
//! Invariant: every wait ends at its deadline, and not later than a slice after the process waited for has ended.

use super::bell::Bell;
use crate::error::Result;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Longest sleep without a look at who is waited for.
const SLICE: Duration = Duration::from_millis(20);
/// Polls between two looks at the clock, which costs as much as some of them.
const POLLS: u32 = 32;

/// How long a wait may take, and how much of it spinning.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    pub(super) limit: Duration,
    pub(super) spin: Duration,
}

/// What `poll` finds within `patience`, or how long it was waited. `look` is asked between sleeps.
pub(super) fn wait<T>(
    bell: &Bell<'_>,
    bit: NonZeroU32,
    patience: Patience,
    mut poll: impl FnMut() -> Result<Option<T>>,
    mut look: impl FnMut() -> Result<()>,
) -> Result<std::result::Result<T, Duration>> {
    if let Some(found) = poll()? {
        return Ok(Ok(found));
    }
    let begin = Instant::now();
    while begin.elapsed() < patience.spin.min(patience.limit) {
        for _ in 0..POLLS {
            std::hint::spin_loop();
            if let Some(found) = poll()? {
                return Ok(Ok(found));
            }
        }
    }
    loop {
        let left = patience.limit.saturating_sub(begin.elapsed());
        let mut found = Ok(None);
        if !left.is_zero() {
            bell.sleep(bit, left.min(SLICE), || {
                found = poll();
                !matches!(found, Ok(None))
            });
        }
        // What came during the sleep, before anybody is found dead or late.
        let found = if matches!(found, Ok(None)) { poll()? } else { found? };
        if let Some(found) = found {
            return Ok(Ok(found));
        }
        look()?;
        if left.is_zero() {
            // What `look` has found out.
            return Ok(poll()?.ok_or_else(|| begin.elapsed()));
        }
    }
}
