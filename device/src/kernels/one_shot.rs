//! One-shot all-reduce: every rank sends its whole tensor to every other and reduces all of it.
//!
//! One step and (n-1) x S bytes out of each GPU: the fastest for small tensors, and at two ranks
//! for all, where two-shot would move the same bytes in two steps. (The push form of NCCL's and
//! FlashInfer's one-shot kernels, without their middle or closing barriers.)

use super::{any_hidden, own_units, reduced_units, store_units, successors};
use crate::abi::Args;
use crate::element::Element;
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Form, everyone_else};
use crate::tensor::{Chunk, Codec, Message};

/// `dst = reduction over ranks of src`, `args.units` units.
///
/// # Safety
/// As for [`super::run`].
#[inline(always)]
pub unsafe fn one_shot<L: Lane, E: Element + Codec, F: Form>(lane: L, args: &Args) {
    let src = Message::of(args, args.src, F::FORMAT, E::EXPANSION);
    let dst = Message::of(args, args.dst, F::FORMAT, E::EXPANSION);
    let everyone = everyone_else(args.world, args.rank);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, everyone);
        let (block, blocks) = (lane.block(), lane.blocks());
        // With several chunks, reducing stays one behind sending, so that the link never idles.
        let lag = src.has(block + blocks) as u32;
        let mut turn = 0;
        while turn < lag || src.has(block + (turn - lag) * blocks) {
            let ahead = src.chunk(block + turn * blocks);
            let hidden = ahead.units > 0 && send::<L, E, F>(&mut call, args, ahead, turn);
            if lag == 0 {
                call.seal(everyone, turn + 1, hidden);
            }
            if turn >= lag {
                let index = block + (turn - lag) * blocks;
                reduce::<L, E, F>(&mut call, args, src.chunk(index), dst.chunk(index), turn - lag);
            }
            // The last turn leaves returning its slot to the next call.
            if lag != 0 && ahead.units > 0 {
                call.turn(everyone, turn + 1, hidden, everyone, turn);
            }
            turn += 1;
        }
        call.end(turn - lag, turn - lag);
    }
}

/// Sends a chunk to every peer as slot number `turn` of this call. Returns whether this thread sent
/// anything that looks like a free slot.
#[inline(always)]
unsafe fn send<L: Lane, E: Element + Codec, F: Form>(
    call: &mut Call<'_, L, F>,
    args: &Args,
    chunk: Chunk,
    turn: u32,
) -> bool {
    let lane = call.lane();
    let mut hidden = false;
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, chunk.whole_units(), chunk.units, |N, index| {
            let units = own_units::<L, E, F, N>(lane, args, chunk, index);
            hidden |= any_hidden::<F, N>(&units);
            for peer in successors(args) {
                let number = call.sent(peer).wrapping_add(turn);
                let slot = call.reserve(peer, number);
                call.put_units(slot, index, number, units);
            }
        });
    }
    hidden
}

/// Reduces a chunk from this rank's tensor and every peer's slot number `turn`, in rank order.
#[inline(always)]
unsafe fn reduce<L: Lane, E: Element + Codec, F: Form>(
    call: &mut Call<'_, L, F>,
    args: &Args,
    own: Chunk,
    result: Chunk,
    turn: u32,
) {
    let lane = call.lane();
    let whole = own.whole_units().min(result.whole_units());
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, whole, own.units, |N, index| {
            let units = reduced_units::<L, E, F, N>(call, args, own, index, turn);
            if call.ok() {
                store_units::<L, E, F, N>(lane, result, index, units);
            }
        });
    }
}
