//! Direct all-reduce of registered tensors: every rank reads its part of all ranks' tensors where they
//! lie, and writes the result there.
//!
//! Two flags and (n-1)/n x S bytes into and out of each GPU, twice, as for two-shot; but no byte lies in a
//! mailbox, so nothing is stored twice, nothing is polled and no slot limits how much is on the way.
//! Invariant: between the two exchanges of flags, unit u of part r is touched by one thread of rank r only, on
//! whichever GPU it lies. docs/protocol.md argues why the exchanges are enough.

use super::{accumulate_units, finish_units, store_units, successors};
use crate::abi::{Args, flags, phase};
use crate::element::{self, Element};
use crate::lane::{Lane, Unit};
use crate::pipe::{Call, Form, Full, Packet, everyone_else};
use crate::tensor::{Chunk, Codec, Message};
use crate::{for_units, unrolled};

/// Every rank's tensor, at `args.table[rank]`, becomes the reduction of all: `args.units` units, of which
/// rank r reduces the r-th `args.part_units`. A block's share of a part is one chunk.
///
/// # Safety
/// As for [`super::run`]; every tensor begins at a multiple of 16 and is registered.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn direct<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let everyone = everyone_else(args.world, args.rank);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Packet>::begin(lane, args, everyone);
        if args.flags & flags::NO_CONTRIBUTION != 0 {
            neutralise::<L, E>(lane, args);
        }
        // A block that has waited in vain touches nobody's tensor and never says that it is done.
        if call.meet(0, phase::DATA, flags::BREAK_READY) {
            reduce_everywhere::<L, E>(lane, args);
            call.meet(1, phase::RESULT, flags::BREAK_DONE);
        }
        call.end(2, 2);
    }
}

/// This block's share of `rank`'s part, counted from a tensor's first byte.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn share<L: Lane, E: Codec>(lane: L, args: &Args, rank: u32) -> Chunk {
    let tensor = Message::of(args, 0, Full::FORMAT, E::EXPANSION);
    tensor.part(rank * args.part_units, args.part_units).share(lane, args).chunk(0)
}

/// Makes what the peers' blocks of this number will read of this rank's tensor change nothing. The result takes
/// its place anyway, so nobody has to be told who contributes.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn neutralise<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let mut rank = 0;
    while rank < args.world {
        let own = share::<L, E>(lane, args, rank).from(lane.table(args.rank));
        // SAFETY: passed on to the caller.
        unsafe {
            for_units!(lane, own.whole_units(), own.units, |N, index| {
                let units: [Unit; N] = [[E::neutral(args.op); 4]; N];
                store_units::<L, E, Full, N>(lane, own, index, units);
            });
        }
        rank += 1;
    }
}

/// Reduces this rank's part of all tensors, in rank order, and stores the result in each.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn reduce_everywhere<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let part = share::<L, E>(lane, args, args.rank);
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, part.whole_units(), part.units, |N, index| {
            let mut totals = [element::empty(args.op); N];
            // The next rank's units are on their way while these are added.
            let mut next = pull_units::<L, E, N>(lane, part.from(lane.table(0)), index);
            let mut rank = 0;
            while rank < args.world {
                let units = next;
                rank += 1;
                if rank < args.world {
                    next = pull_units::<L, E, N>(lane, part.from(lane.table(rank)), index);
                }
                accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, units);
            }
            let units = finish_units::<L, E, Full, N>(lane, args.scale, totals);
            for peer in successors(args) {
                push_units::<L, E, N>(lane, part.from(lane.table(peer)), index, units);
            }
            push_units::<L, E, N>(lane, part.from(lane.table(args.rank)), index, units);
        });
    }
}

/// `N` units of a chunk of any rank's tensor from `index` on, `threads` apart. More than one only if all are whole.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn pull_units<L: Lane, C: Codec, const N: usize>(
    lane: L,
    chunk: Chunk,
    index: u32,
) -> [Unit; N] {
    let mut units = [[0; 4]; N];
    unrolled!(N, |u| {
        let index = index + u as u32 * lane.threads();
        // SAFETY: the caller's chunk lies in a registered tensor.
        units[u] = unsafe {
            if N > 1 || index < chunk.whole_units() {
                C::pull(lane, chunk.at(index))
            } else {
                C::load::<L, false>(lane, Full::WORDS, chunk.at(index), chunk.valid(index))
            }
        };
    });
    units
}

/// Stores `N` units of a chunk, as [`pull_units`] loads them.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn push_units<L: Lane, C: Codec, const N: usize>(
    lane: L,
    chunk: Chunk,
    index: u32,
    units: [Unit; N],
) {
    unrolled!(N, |u| {
        let index = index + u as u32 * lane.threads();
        // SAFETY: the caller's chunk lies in a registered tensor.
        unsafe {
            if N > 1 || index < chunk.whole_units() {
                C::push(lane, chunk.at(index), units[u]);
            } else {
                let valid = chunk.valid(index);
                C::store::<L, false>(lane, Full::WORDS, chunk.at(index), valid, units[u]);
            }
        }
    });
}
