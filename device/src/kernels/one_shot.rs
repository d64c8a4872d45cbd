//! One-shot all-reduce: every rank sends its whole tensor to every other and reduces all of it.
//!
//! One step and (n-1) x S bytes out of each GPU: the fastest for small tensors, and at two ranks
//! for all, where two-shot would move the same bytes in two steps. (The push form of NCCL's and
//! FlashInfer's one-shot kernels, without their middle or closing barriers.)

use super::{
    accumulate_units, finish_units, own_units, reduced_units, store_units, successors, visible,
};
use crate::abi::{Args, flags, phase};
use crate::element::{self, Element};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Form, everyone_else};
use crate::tensor::{Chunk, Codec, Message};

/// `dst = reduction over ranks of src`, `args.units` units.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn one_shot<L: Lane, E: Element + Codec, F: Form>(lane: L, args: &Args) {
    // SAFETY: passed on to the caller.
    unsafe {
        if args.flags & flags::SINGLE != 0 {
            single::<L, E, F>(lane, args);
        } else {
            many::<L, E, F>(lane, args);
        }
    }
}

/// One unit a thread: the same steps as [`many`], without the arithmetic of chunks and tails. Small
/// calls are bound by the instructions before the first store and after the last load.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn single<L: Lane, E: Element + Codec, F: Form>(lane: L, args: &Args) {
    let everyone = everyone_else(args.world, args.rank);
    let thread = lane.thread();
    let unit = lane.block() * args.block_units + thread;
    let mine = thread < args.block_units && unit < args.units;
    let offset = unit as u64 * (F::FORMAT.payload() * E::EXPANSION) as u64;
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, everyone);
        let mut own = [[E::neutral(args.op); 4]];
        if mine {
            if args.flags & flags::NO_CONTRIBUTION == 0 {
                own = [E::load::<L, true>(lane, F::WORDS, args.src + offset, 0)];
            }
            for peer in successors(args) {
                let number = call.sent(peer);
                let room = call.reserve(peer, number);
                call.put_units(room, thread, number, visible::<E, 1>(own));
            }
        }
        // Keeps the polls of early warps out of the way of late warps' stores.
        call.turn(0, 0, false, 0, 0);
        if mine {
            let mut totals = [element::empty(args.op)];
            for rank in 0..args.world {
                let units = if rank == args.rank {
                    visible::<E, 1>(own)
                } else {
                    let number = call.received(rank);
                    call.take::<1>(rank, number, thread, phase::DATA)
                };
                accumulate_units::<L, E, F, 1>(lane, args.op, &mut totals, units);
            }
            if call.ok() {
                let [unit] = finish_units::<L, E, F, 1>(lane, args.scale, totals);
                E::store::<L, true>(lane, F::WORDS, args.dst + offset, 0, unit);
            }
        }
        call.end(1, 1);
    }
}

/// Any size: chunk by chunk.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn many<L: Lane, E: Element + Codec, F: Form>(lane: L, args: &Args) {
    let src = Message::of(args, args.src, F::FORMAT, E::EXPANSION).share(lane, args);
    let dst = Message::of(args, args.dst, F::FORMAT, E::EXPANSION).share(lane, args);
    let everyone = everyone_else(args.world, args.rank);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, everyone);
        // With several chunks, reducing stays one behind sending, so that the link never idles.
        let lag = (src.has(1) || call.seals_all()) as u32;
        let mut turn = 0;
        while turn < lag || src.has(turn - lag) {
            send::<L, E, F>(&mut call, args, src.chunk(turn), turn);
            if turn >= lag {
                let behind = turn - lag;
                reduce::<L, E, F>(&mut call, args, src.chunk(behind), dst.chunk(behind), behind);
            }
            if lag != 0 && src.has(turn) {
                call.release_taken(everyone, turn, src.has(turn + args.layout.slots - 2));
            }
            turn += 1;
        }
        call.end(turn - lag, turn - lag);
    }
}

/// Sends a chunk to every peer as slot number `turn` of this call.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn send<L: Lane, E: Element + Codec, F: Form>(
    call: &mut Call<'_, L, F>,
    args: &Args,
    chunk: Chunk,
    turn: u32,
) {
    let lane = call.lane();
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, chunk.whole_units(), chunk.units, |N, index| {
            let units = own_units::<L, E, F, N>(lane, args, chunk, index);
            for peer in successors(args) {
                let number = call.sent(peer).wrapping_add(turn);
                let room = call.reserve(peer, number);
                call.put_units(room, index, number, visible::<E, N>(units));
            }
        });
    }
}

/// Reduces a chunk from this rank's tensor and every peer's slot number `turn`, in rank order.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
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
