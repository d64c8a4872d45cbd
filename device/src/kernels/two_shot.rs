//! Two-shot all-reduce: reduce-scatter, then all-gather, in one kernel without a barrier between.
//!
//! Two steps and 2(n-1)/n x S bytes out of each GPU, where one-shot sends (n-1) x S in one: from
//! three ranks on, and from the size where bytes outweigh a step. Both halves use the same pipes;
//! data announce themselves in both, so a chunk's second half starts as soon as its owner has it.
//! (FlashInfer's and SGLang's two-shot Lamport kernels have the same two halves.)

use super::{part, reduced_units, send_parts, store_units, successors, visible};
use crate::abi::{Args, phase};
use crate::element::Element;
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Full, everyone_else};
use crate::tensor::Codec;

/// `dst = reduction over ranks of src`, `args.units` units, rank r reducing the r-th
/// `args.part_units` of them.
///
/// Turn t sends chunk t of every part, reduces chunk t-1 of the own part, takes the results of
/// chunk t-2: what a turn waits for was sent by its peers a turn ago.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn two_shot<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let everyone = everyone_else(args.world, args.rank);
    // All parts count the chunks of the first one, which is never shorter than another, so slots
    // stay in step; chunks beyond a part's end are empty.
    let full = part::<L, E>(lane, args, args.src, 0);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, everyone);
        let mut turn = 0;
        while turn < 2 || full.has(turn - 2) {
            let sends = full.has(turn);
            let mut taken = 0;
            if sends {
                let source = |rank| part::<L, E>(lane, args, args.src, rank);
                let slot = scatter_slot(turn);
                send_parts::<L, E>(&mut call, args, source, turn, slot);
            }
            if turn >= 1 && full.has(turn - 1) {
                let slot = result_slot(turn - 1, sends);
                reduce_own::<L, E>(&mut call, args, turn - 1, slot);
            }
            if turn == 1 && full.has(2) {
                // Turn 2 sends slots 3 and 4; a lane of four slots needs the first one back for it.
                taken = 1;
            }
            if turn >= 2 {
                let slot = result_slot(turn - 2, full.has(turn - 1));
                take_results::<L, E>(&mut call, args, turn - 2, slot);
                taken = slot + 1;
            }
            // The last turn sends nothing, and leaves returning its slots to the next call.
            let last = !full.has(turn.max(1) - 1);
            if (taken != 0 || call.seals_all()) && !last {
                call.turn(everyone, 2 * turn + sends as u32, false, everyone, taken);
            }
            turn += 1;
        }
        call.end(2 * (turn - 2), 2 * (turn - 2));
    }
}

/// The slot of this call that carries chunk `turn` to its owner: slots go out in the order
/// scatter 0, scatter 1, result 0, scatter 2, result 1, ...
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn scatter_slot(turn: u32) -> u32 {
    if turn == 0 { 0 } else { 2 * turn - 1 }
}

/// The slot of this call that carries chunk `turn` back; `more` says whether chunk `turn + 1` exists
/// and was sent before it.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn result_slot(turn: u32, more: bool) -> u32 {
    2 * turn + 1 + more as u32
}

/// Reduces chunk `turn` of this rank's part, keeps the result and sends it to every peer as slot
/// number `slot` of this call.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn reduce_own<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    turn: u32,
    slot: u32,
) {
    let lane = call.lane();
    let own = part::<L, E>(lane, args, args.src, args.rank).chunk(turn);
    let result = part::<L, E>(lane, args, args.dst, args.rank).chunk(turn);
    let whole = own.whole_units().min(result.whole_units());
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, whole, own.units, |N, index| {
            let units = reduced_units::<L, E, Full, N>(call, args, own, index, scatter_slot(turn));
            let units = visible::<E, N>(units);
            if call.ok() {
                store_units::<L, E, Full, N>(lane, result, index, units);
            }
            for peer in successors(args) {
                let number = call.sent(peer).wrapping_add(slot);
                let room = call.reserve(peer, number);
                call.put_units(room, index, number, units);
            }
        });
    }
}

/// Stores every peer's result for chunk `turn` of its part from slot number `slot` of this call.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn take_results<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    turn: u32,
    slot: u32,
) {
    let lane = call.lane();
    for peer in successors(args) {
        let result = part::<L, E>(lane, args, args.dst, peer).chunk(turn);
        // SAFETY: passed on to the caller.
        unsafe {
            let number = call.received(peer).wrapping_add(slot);
            // One unit at a time: with four, ptxas spills registers on sm_90.
            for_units!(lane, 0, result.units, |N, index| {
                let units = call.take::<N>(peer, number, index, phase::RESULT);
                if call.ok() {
                    store_units::<L, E, Full, N>(lane, result, index, units);
                }
            });
        }
    }
}
