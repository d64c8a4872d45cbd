//! Reduce-scatter: every rank sends each other rank that rank's part, and reduces its own.
//!
//! One step and (n-1) x S/n bytes out of each GPU.

use super::{reduced_units, send_parts, store_units};
use crate::abi::Args;
use crate::element::Element;
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Form, Full, everyone_else};
use crate::tensor::{Codec, Message};

/// `dst = reduction over ranks of part args.rank of src`, parts of `args.shard_bytes` bytes.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn reduce_scatter<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let message = |address| Message::of(args, address, Full::FORMAT, E::EXPANSION);
    let part = |rank: u32| message(args.src + rank as u64 * args.shard_bytes).share(lane, args);
    let everyone = everyone_else(args.world, args.rank);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, everyone);
        let (own, dst) = (part(args.rank), message(args.dst).share(lane, args));
        let lag = (own.has(1) || call.seals_all()) as u32;
        let mut turn = 0;
        while turn < lag || own.has(turn - lag) {
            if own.has(turn) {
                send_parts::<L, E>(&mut call, args, part, turn, turn);
            }
            if turn >= lag {
                let behind = turn - lag;
                let (own, result) = (own.chunk(behind), dst.chunk(behind));
                let whole = own.whole_units().min(result.whole_units());
                for_units!(lane, whole, own.units, |N, index| {
                    let units = reduced_units::<L, E, Full, N>(&mut call, args, own, index, behind);
                    if call.ok() {
                        store_units::<L, E, Full, N>(lane, result, index, units);
                    }
                });
            }
            if lag != 0 && own.has(turn) {
                call.release_taken(everyone, turn, own.has(turn + args.layout.slots - 2));
            }
            turn += 1;
        }
        call.end(turn - lag, turn - lag);
    }
}
