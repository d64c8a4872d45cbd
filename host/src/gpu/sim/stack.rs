//! The stacks that lanes run on.
//!
//! Invariant: a stack belongs to one coroutine or lies in the pool, and its memory is never given
//! back, so a pointer into one stays valid however a kernel ended.
//!
//! Stacks are carved out of large slabs: one mapping each, with a guard page each, would meet the
//! kernel's limit on mappings at 32 thousand lanes. What stands in for the guard page is
//! [`has_room`], which every suspension checks; between two suspensions a kernel calls leaf
//! functions only, and those fit into the reserve that the check keeps.

use corosensei::stack::{Stack, StackPointer};
use std::alloc::{Layout, alloc, handle_alloc_error};
use std::sync::{Mutex, PoisonError};

/// Address space of one stack. Only pages that are touched take memory; a kernel touches one or
/// two, the machinery that reports a panic up to a dozen.
const STACK_BYTES: usize = 128 * 1024;
/// What must be left when a lane suspends.
const RESERVE_BYTES: usize = 64 * 1024;
const SLAB_STACKS: usize = 64;
const PAGE: usize = 4096;

/// One stack out of the pool.
pub(super) struct LaneStack {
    base: StackPointer,
    limit: StackPointer,
}

impl LaneStack {
    /// The lowest address, for [`has_room`].
    pub(super) fn limit_address(&self) -> usize {
        self.limit.get()
    }
}

// SAFETY: `base` and `limit` bound memory that nothing else uses and that lives for ever, larger
// than the minimum. Overflow is caught by `has_room`, as the module says.
unsafe impl Stack for LaneStack {
    fn base(&self) -> StackPointer {
        self.base
    }

    fn limit(&self) -> StackPointer {
        self.limit
    }
}

static POOL: Mutex<Vec<LaneStack>> = Mutex::new(Vec::new());

/// Takes `count` stacks.
pub(super) fn take(count: usize) -> Vec<LaneStack> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    while pool.len() < count {
        add_slab(&mut pool);
    }
    let rest = pool.len() - count;
    pool.split_off(rest)
}

/// Puts stacks back.
pub(super) fn give_back(stacks: impl Iterator<Item = LaneStack>) {
    POOL.lock().unwrap_or_else(PoisonError::into_inner).extend(stacks);
}

/// Whether the caller, who runs on `stack`, may go one level deeper.
#[inline(always)]
pub(super) fn has_room(limit: usize) -> bool {
    let here = 0u8;
    (&raw const here).addr() > limit + RESERVE_BYTES
}

fn add_slab(pool: &mut Vec<LaneStack>) {
    let Ok(layout) = Layout::from_size_align(SLAB_STACKS * STACK_BYTES, PAGE) else {
        unreachable!("the constants make a layout");
    };
    // SAFETY: the layout is not empty.
    let slab = unsafe { alloc(layout) };
    if slab.is_null() {
        handle_alloc_error(layout);
    }
    for index in 0..SLAB_STACKS {
        let limit = slab as usize + index * STACK_BYTES;
        // Tops at the same offset in every page would all meet in the same few cache sets.
        let colour = (index * 320) % PAGE;
        let base = limit + STACK_BYTES - colour;
        if let (Some(base), Some(limit)) = (StackPointer::new(base), StackPointer::new(limit)) {
            pool.push(LaneStack { base, limit });
        }
    }
}
