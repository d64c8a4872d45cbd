//! How both ends wait: they spin and sleep as planned, in slices, and look between two sleeps whether the other end is there.
//!
//! Invariant: every wait ends at its deadline, and not later than a slice after the process waited for has ended.

use super::bell::Bell;
use super::rhythm::{Phase, Plan};
use crate::error::Result;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Longest sleep without a look at who is waited for.
const SLICE: Duration = Duration::from_millis(20);
/// Polls between two looks at the clock, which costs as much as some of them.
const POLLS: u32 = 32;

/// How long a wait may take, and how.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    pub(super) limit: Duration,
    pub(super) plan: Plan,
}

/// What `poll` finds within `patience`, and how long it was waited, found or not. `look` is asked between sleeps.
pub(super) fn wait<T>(
    bell: &Bell<'_>,
    bit: NonZeroU32,
    patience: Patience,
    mut poll: impl FnMut() -> Result<Option<T>>,
    mut look: impl FnMut() -> Result<()>,
) -> Result<(Option<T>, Duration)> {
    if let Some(found) = poll()? {
        return Ok((Some(found), Duration::ZERO));
    }
    let begin = Instant::now();
    let mut next_look = SLICE;
    loop {
        let waited = begin.elapsed();
        let left = patience.limit.saturating_sub(waited);
        let phase = if left.is_zero() { Phase::Sleep(left) } else { patience.plan.phase(waited) };
        let found = match phase {
            Phase::Spin => spin(&mut poll)?,
            Phase::Sleep(most) => sleep(bell, bit, left.min(most).min(SLICE), &mut poll)?,
        };
        if found.is_some() {
            return Ok((found, begin.elapsed()));
        }
        if phase == Phase::Spin && waited < next_look {
            continue;
        }
        next_look = waited + SLICE;
        look()?;
        if left.is_zero() {
            // What `look` has found out.
            return Ok((poll()?, waited));
        }
    }
}

fn spin<T>(poll: &mut impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    for _ in 0..POLLS {
        std::hint::spin_loop();
        if let Some(found) = poll()? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn sleep<T>(
    bell: &Bell<'_>,
    bit: NonZeroU32,
    slice: Duration,
    poll: &mut impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let mut found = Ok(None);
    if !slice.is_zero() {
        bell.sleep(bit, slice, || {
            found = poll();
            !matches!(found, Ok(None))
        });
    }
    // What came during the sleep, before anybody is found dead or late.
    if matches!(found, Ok(None)) { poll() } else { found }
}
