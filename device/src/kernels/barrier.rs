//! Barrier: no rank's kernel ends before every rank's has begun.

use super::successors;
use crate::abi::{Args, phase};
use crate::lane::Lane;
use crate::pipe::{Call, Packet, everyone_else};

/// One block; thread p talks to rank p. An empty packet through the pipes of lane 0, so a barrier
/// is ordered with the calls around it.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn barrier<L: Lane>(lane: L, args: &Args) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Packet>::begin(lane, args, everyone_else(args.world, args.rank));
        let thread = lane.thread();
        for peer in successors(args) {
            if peer == thread {
                let number = call.sent(peer);
                let room = call.reserve(peer, number);
                // `put_units` and `take` step by thread; each peer has a slot of its own, so
                // every thread can use the first unit.
                call.put_units(room, 0, number, [[0; 4]]);
                let number = call.received(peer);
                call.take::<1>(peer, number, 0, phase::BARRIER);
            }
        }
        call.end(1, 1);
    }
}
