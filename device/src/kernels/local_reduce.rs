//! Reduces tensors that lie on one GPU or are mapped into it: what a step does with the chunks that copy
//! engines have brought.

use super::{accumulate_units, finish_units, load_units, store_units};
use crate::abi::Args;
use crate::element::{self, Element};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Form, Full};
use crate::tensor::{Codec, Message};

/// `dst = reduction, in rank order, of the tensors at args.peers`, `args.units` units, rounded once. An
/// address of 0 contributes nothing. `dst` may be one of them.
///
/// # Safety
/// As for [`super::run`]; each of `args.peers` is 0 or a tensor.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn local_reduce<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let message =
        |address| Message::of(args, address, Full::FORMAT, E::EXPANSION).share(lane, args);
    let dst = message(args.dst);
    let mut turn = 0;
    while dst.has(turn) {
        let result = dst.chunk(turn);
        let source = |rank| message(lane.peer(rank)).chunk(turn);
        let mut whole = result.whole_units();
        for rank in 0..args.world {
            if lane.peer(rank) != 0 {
                whole = whole.min(source(rank).whole_units());
            }
        }
        // SAFETY: passed on to the caller.
        unsafe {
            for_units!(lane, whole, result.units, |N, unit| {
                let mut totals = [element::empty(args.op); N];
                for rank in 0..args.world {
                    if lane.peer(rank) != 0 {
                        let units = load_units::<L, E, Full, N>(lane, source(rank), unit);
                        accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, units);
                    }
                }
                let units = finish_units::<L, E, Full, N>(lane, args.scale, totals);
                store_units::<L, E, Full, N>(lane, result, unit, units);
            });
        }
        turn += 1;
    }
}
