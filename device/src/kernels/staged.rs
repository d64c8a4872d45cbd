//! Staged all-reduce: two-shot in which each rank sends to one other at a time.
//!
//! Stage d sends to the d-th rank after this one and waits for the d-th rank before it, so no GPU
//! has more than one stream out and one in, and every pair has its stage. 2(n-1) steps, the bytes of
//! two-shot, and its sums: in rank order, rounded once, where a ring rounds at every step. For PCIe root
//! complexes whose throughput collapses under many-to-many writes (FlashInfer's staged PCIe kernels
//! order their traffic so).

use super::{load_units, own_units, part, reduced_units, store_units, successors, visible};
use crate::abi::{Args, phase};
use crate::element::Element;
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Full, everyone_else};
use crate::tensor::Codec;

/// `dst = reduction over ranks of src`, `args.units` units, rank r reducing the r-th
/// `args.part_units` of them.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn staged<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let everyone = everyone_else(args.world, args.rank);
    let full = part::<L, E>(lane, args, args.src, 0);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, everyone);
        let mut turn = 0;
        while full.has(turn) {
            scatter::<L, E>(&mut call, args, turn);
            reduce_own::<L, E>(&mut call, args, turn);
            exchange_results::<L, E>(&mut call, args, turn);
            // A slot for the scattered chunk, one for the result.
            let taken = 2 * (turn + 1);
            if full.has(turn + args.layout.slots / 2) {
                call.turn(0, 0, false, everyone, taken);
            }
            turn += 1;
        }
        call.end(2 * turn, 2 * turn);
    }
}

/// The rank that sends to this one while this one sends to `peer`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn opposite(args: &Args, peer: u32) -> u32 {
    let place = 2 * args.rank + args.world - peer;
    if place >= 2 * args.world {
        place - 2 * args.world
    } else if place >= args.world {
        place - args.world
    } else {
        place
    }
}

/// Sends each peer chunk `turn` of its part, in stages.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn scatter<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    turn: u32,
) {
    let lane = call.lane();
    let mine = part::<L, E>(lane, args, args.src, args.rank).chunk(turn);
    for peer in successors(args) {
        let chunk = part::<L, E>(lane, args, args.src, peer).chunk(turn);
        // SAFETY: passed on to the caller.
        unsafe {
            let number = call.sent(peer).wrapping_add(2 * turn);
            let room = call.reserve(peer, number);
            for_units!(lane, chunk.whole_units(), chunk.units, |N, unit| {
                let units = own_units::<L, E, Full, N>(lane, args, chunk, unit);
                call.put_units(room, unit, number, visible::<E, N>(units));
            });
            let from = opposite(args, peer);
            let expected = call.received(from).wrapping_add(2 * turn);
            if lane.thread() < mine.units {
                call.wait_unit(from, expected, lane.thread(), phase::DATA);
            }
        }
    }
}

/// Reduces chunk `turn` of this rank's part.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn reduce_own<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    turn: u32,
) {
    let lane = call.lane();
    let own = part::<L, E>(lane, args, args.src, args.rank).chunk(turn);
    let result = part::<L, E>(lane, args, args.dst, args.rank).chunk(turn);
    let whole = own.whole_units().min(result.whole_units());
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, whole, own.units, |N, unit| {
            let units = reduced_units::<L, E, Full, N>(call, args, own, unit, 2 * turn);
            if call.ok() {
                store_units::<L, E, Full, N>(lane, result, unit, visible::<E, N>(units));
            }
        });
    }
}

/// Sends each peer the result for chunk `turn` of this rank's part and keeps theirs, in stages.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn exchange_results<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    turn: u32,
) {
    let lane = call.lane();
    let mine = part::<L, E>(lane, args, args.dst, args.rank).chunk(turn);
    for peer in successors(args) {
        let from = opposite(args, peer);
        let theirs = part::<L, E>(lane, args, args.dst, from).chunk(turn);
        // SAFETY: passed on to the caller. What this thread reads of its own part it has written.
        unsafe {
            let number = call.sent(peer).wrapping_add(2 * turn + 1);
            let room = call.reserve(peer, number);
            for_units!(lane, mine.whole_units(), mine.units, |N, unit| {
                let units = load_units::<L, E, Full, N>(lane, mine, unit);
                call.put_units(room, unit, number, visible::<E, N>(units));
            });
            let number = call.received(from).wrapping_add(2 * turn + 1);
            // One unit at a time: with four, ptxas spills registers on sm_90.
            for_units!(lane, 0, theirs.units, |N, unit| {
                let units = call.take::<N>(from, number, unit, phase::RESULT);
                if call.ok() {
                    store_units::<L, E, Full, N>(lane, theirs, unit, units);
                }
            });
        }
    }
}
