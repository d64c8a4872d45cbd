//! Ring all-reduce: reduce-scatter and all-gather, each rank sending to its successor only.
//!
//! 2(n-1) steps and 2(n-1)/n x S bytes out of each GPU, the bytes of two-shot in more steps. What it
//! has over two-shot is one stream out of and one into each GPU, all the time: the way for PCIe
//! switches and root complexes that many-to-many traffic slows down. Partial sums are rounded to the
//! wire type at each step, as in NCCL's ring. (Patarasuk, Yuan: Bandwidth optimal all-reduce
//! algorithms for clusters of workstations, 2009.)

use super::{accumulate_units, finish_units, own_units, part, store_units, visible};
use crate::abi::{Args, phase};
use crate::element::{self, Element};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Full, Room};
use crate::tensor::{Codec, Share};

/// `dst = reduction over ranks of src`, `args.units` units, in as many parts of `args.part_units` as
/// there are ranks.
///
/// Chunk by chunk, this rank takes what its predecessor sent in the step before, works on it and sends it
/// on. Step s is about part rank - 1 - s: up to step n - 1, its sum, complete there and then for the
/// part that has this rank's number; after it, results.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn ring<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let Neighbours { before, after } = Neighbours::of(args);
    let steps = 2 * (args.world - 1);
    let full = part::<L, E>(lane, args, args.src, 0);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, 1 << before | 1 << after);
        let mut chunk = 0;
        while full.has(chunk) {
            let mut step = 0;
            while step <= steps {
                let slot = chunk * steps + step;
                if step < args.world {
                    sum_step::<L, E>(&mut call, args, chunk, step, slot);
                } else {
                    result_step::<L, E>(&mut call, args, chunk, step, slot);
                }
                // The last slots of the call are left to the next one.
                let needed = full.has(chunk + 1) || step + args.layout.slots <= steps;
                if step != 0 && needed {
                    call.turn(0, 0, false, 1 << before, slot);
                }
                step += 1;
            }
            chunk += 1;
        }
        let slots = chunk * steps;
        let books = |rank| if lane.thread() == rank { slots } else { 0 };
        call.end(books(after), books(before));
    }
}

/// Whom this rank receives from and sends to.
struct Neighbours {
    before: u32,
    after: u32,
}

impl Neighbours {
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn of(args: &Args) -> Neighbours {
        let (rank, last) = (args.rank, args.world - 1);
        Neighbours {
            before: if rank == 0 { last } else { rank - 1 },
            after: if rank == last { 0 } else { rank + 1 },
        }
    }
}

/// This block's share of the part of the tensor at `address` that step `step` is about.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn part_of_step<L: Lane, E: Codec>(lane: L, args: &Args, address: u64, step: u32) -> Share {
    let back = 1 + if step >= args.world { step - args.world } else { step };
    let rank = if args.rank >= back { args.rank - back } else { args.rank + args.world - back };
    part::<L, E>(lane, args, address, rank)
}

/// Adds this rank's own units to the sum that came in the slot before `slot`, if any has, and sends it
/// on as slot number `slot` of this call. The last such step completes the sum, which is kept too.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn sum_step<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    chunk: u32,
    step: u32,
    slot: u32,
) {
    let lane = call.lane();
    let Neighbours { before, after } = Neighbours::of(args);
    let complete = step == args.world - 1;
    let own = part_of_step::<L, E>(lane, args, args.src, step).chunk(chunk);
    let result = part_of_step::<L, E>(lane, args, args.dst, step).chunk(chunk);
    // Units that double on their way to the tensor one at a time: with four, ptxas spills registers on
    // sm_80.
    let whole = if E::EXPANSION > 1 { 0 } else { own.whole_units().min(result.whole_units()) };
    let scale = if complete { args.scale } else { 1.0 };
    // SAFETY: passed on to the caller.
    unsafe {
        let taken = call.received(before).wrapping_add(slot.wrapping_sub(1));
        let number = call.sent(after).wrapping_add(slot);
        let room = call.reserve(after, number);
        for_units!(lane, whole, own.units, |N, unit| {
            let mut totals = [element::empty(args.op); N];
            if step != 0 {
                let partial = call.take::<N>(before, taken, unit, phase::DATA);
                accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, partial);
            }
            let mine = visible::<E, N>(own_units::<L, E, Full, N>(lane, args, own, unit));
            accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, mine);
            let units = finish_units::<L, E, Full, N>(lane, scale, totals);
            let units = visible::<E, N>(units);
            if complete && call.ok() {
                store_units::<L, E, Full, N>(lane, result, unit, units);
            }
            call.put_units(room, unit, number, units);
        });
    }
}

/// Keeps the result that came in the slot before `slot`, and sends it on unless the next rank is where
/// it came from.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn result_step<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    chunk: u32,
    step: u32,
    slot: u32,
) {
    let lane = call.lane();
    let Neighbours { before, after } = Neighbours::of(args);
    let last = step == 2 * (args.world - 1);
    let result = part_of_step::<L, E>(lane, args, args.dst, step).chunk(chunk);
    // SAFETY: passed on to the caller.
    unsafe {
        let taken = call.received(before).wrapping_add(slot - 1);
        let number = call.sent(after).wrapping_add(slot);
        let room = if last { Room::NOWHERE } else { call.reserve(after, number) };
        for_units!(lane, result.whole_units(), result.units, |N, unit| {
            let units = call.take::<N>(before, taken, unit, phase::RESULT);
            if call.ok() {
                store_units::<L, E, Full, N>(lane, result, unit, units);
            }
            if !last {
                call.put_units(room, unit, number, units);
            }
        });
    }
}
