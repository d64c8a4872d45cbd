//! All-gather: every rank sends its tensor to every other and keeps all of them.
//!
//! One step and (n-1) x S bytes out of each GPU, which no algorithm undercuts.

use super::{any_hidden, load_units, store_units, successors};
use crate::abi::{Args, phase};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Form, everyone_else};
use crate::tensor::{Bytes, Chunk, Message};

/// `dst = every rank's src`, one after the other, `args.shard_bytes` bytes each.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn all_gather<L: Lane, F: Form>(lane: L, args: &Args) {
    let message = |address| Message::of(args, address, F::FORMAT, 1).share(lane, args);
    let part = |rank: u32| message(args.dst + rank as u64 * args.shard_bytes);
    let everyone = everyone_else(args.world, args.rank);
    let src = message(args.src);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, everyone);
        let lag = src.has(1) as u32;
        let mut turn = 0;
        while turn < lag || src.has(turn - lag) {
            let hidden = src.has(turn) && {
                let own = part(args.rank).chunk(turn);
                send_and_keep(&mut call, args, src.chunk(turn), own, turn)
            };
            if lag == 0 {
                call.seal(everyone, turn + 1, hidden);
            }
            if turn >= lag {
                for peer in successors(args) {
                    let number = call.received(peer).wrapping_add(turn - lag);
                    let chunk = part(peer).chunk(turn - lag);
                    take_bytes(&mut call, peer, number, chunk);
                }
            }
            // The last turns leave returning their slots to the next call: a fence here waits for
            // everything that was just sent.
            if lag != 0 && src.has(turn) {
                let taken = if src.has(turn + args.layout.slots - 2) { turn } else { 0 };
                call.turn(everyone, turn + 1, hidden, everyone, taken);
            }
            turn += 1;
        }
        call.end(turn - lag, turn - lag);
    }
}

/// Sends a chunk to every peer as slot number `turn` of this call, and copies it to this rank's own
/// part unless it lies there already.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn send_and_keep<L: Lane, F: Form>(
    call: &mut Call<'_, L, F>,
    args: &Args,
    chunk: Chunk,
    own: Chunk,
    turn: u32,
) -> bool {
    let lane = call.lane();
    let whole = chunk.whole_units().min(own.whole_units());
    let mut hidden = false;
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, whole, chunk.units, |N, index| {
            let units = load_units::<L, Bytes, F, N>(lane, chunk, index);
            hidden |= any_hidden::<F, N>(&units);
            for peer in successors(args) {
                let number = call.sent(peer).wrapping_add(turn);
                let room = call.reserve(peer, number);
                call.put_units(room, index, number, units);
            }
            if own.address != chunk.address {
                store_units::<L, Bytes, F, N>(lane, own, index, units);
            }
        });
    }
    hidden
}

/// Stores what `peer` sent in its slot number `number`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub(super) unsafe fn take_bytes<L: Lane, F: Form>(
    call: &mut Call<'_, L, F>,
    peer: u32,
    number: u32,
    chunk: Chunk,
) {
    let lane = call.lane();
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, chunk.whole_units(), chunk.units, |N, index| {
            let units = call.take::<N>(peer, number, index, phase::DATA);
            if call.ok() {
                store_units::<L, Bytes, F, N>(lane, chunk, index, units);
            }
        });
    }
}

/// Sends a chunk to each of `peers` as slot number `turn` of this call.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub(super) unsafe fn send_bytes<L: Lane, F: Form>(
    call: &mut Call<'_, L, F>,
    peers: impl Iterator<Item = u32> + Clone,
    chunk: Chunk,
    turn: u32,
) -> bool {
    let lane = call.lane();
    let mut hidden = false;
    // SAFETY: passed on to the caller.
    unsafe {
        for_units!(lane, chunk.whole_units(), chunk.units, |N, index| {
            let units = load_units::<L, Bytes, F, N>(lane, chunk, index);
            hidden |= any_hidden::<F, N>(&units);
            for peer in peers.clone() {
                let number = call.sent(peer).wrapping_add(turn);
                let room = call.reserve(peer, number);
                call.put_units(room, index, number, units);
            }
        });
    }
    hidden
}
