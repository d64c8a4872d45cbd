//! Stream: moves memory and does nothing else, to see what a link gives.
//!
//! The collectives' accesses to tensors, plain 16-byte loads and stores, `UNROLL` in flight per
//! thread. With `dst` on a peer the stores cross the link, with `src` on a peer the loads do.

use crate::abi::{Args, UNIT, UNROLL};
use crate::lane::Lane;
use crate::unrolled;

/// Copies `args.units` units from `args.src` to `args.dst`; neighbouring threads of the whole grid
/// move neighbouring units. It waits for nobody, touches no mailbox and uses no other field.
///
/// # Safety
/// Both addresses have that many units, aligned, in memory that this GPU may access. Where several
/// kernels write the same units, what is left there is any of theirs.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn stream<L: Lane>(lane: L, args: &Args) {
    const N: usize = UNROLL;
    let units = args.units as u64;
    let step = lane.blocks() as u64 * lane.threads() as u64;
    let mut unit = lane.block() as u64 * lane.threads() as u64 + lane.thread() as u64;
    // SAFETY: passed on to the caller.
    unsafe {
        while unit + (N as u64 - 1) * step < units {
            let at = |u: usize| (unit + u as u64 * step) * UNIT as u64;
            let mut values = [[0; 4]; N];
            // All loads before the first store, so that they are in flight together.
            unrolled!(N, |u| {
                values[u] = lane.load_u32x4(args.src + at(u));
            });
            unrolled!(N, |u| {
                lane.store_u32x4(args.dst + at(u), values[u]);
            });
            unit += N as u64 * step;
        }
        while unit < units {
            let at = unit * UNIT as u64;
            lane.store_u32x4(args.dst + at, lane.load_u32x4(args.src + at));
            unit += step;
        }
    }
}
