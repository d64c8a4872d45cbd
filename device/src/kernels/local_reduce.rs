//! `dst += src` on one GPU: what a tree step does with a chunk that a copy engine has brought.

use super::{accumulate_units, finish_units, load_units, store_units};
use crate::abi::Args;
use crate::element::{self, Element};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Form, Full};
use crate::tensor::{Codec, Message};

/// `dst = dst op src`, `args.units` units, rounded once.
///
/// # Safety
/// As for [`super::run`].
#[inline(always)]
pub unsafe fn local_reduce<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let message =
        |address| Message::of(args, address, Full::FORMAT, E::EXPANSION).share(lane, args);
    let (src, dst) = (message(args.src), message(args.dst));
    let mut turn = 0;
    while src.has(turn) {
        let (from, to) = (src.chunk(turn), dst.chunk(turn));
        let whole = from.whole_units().min(to.whole_units());
        // SAFETY: passed on to the caller.
        unsafe {
            for_units!(lane, whole, from.units, |N, unit| {
                let mine = load_units::<L, E, Full, N>(lane, to, unit);
                let other = load_units::<L, E, Full, N>(lane, from, unit);
                let mut totals = [element::empty(args.op); N];
                accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, mine);
                accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, other);
                let units = finish_units::<L, E, Full, N>(lane, args.scale, totals);
                store_units::<L, E, Full, N>(lane, to, unit, units);
            });
        }
        turn += 1;
    }
}
