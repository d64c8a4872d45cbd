//! Broadcast: the root sends its bytes to every other rank.
//!
//! One step and (n-1) x S bytes out of the root. Nothing flows back but credits, so the root may
//! run ahead of a slow rank by the slots of a lane, and no further.

use super::all_gather::{send_bytes, take_bytes};
use super::successors;
use crate::abi::Args;
use crate::lane::Lane;
use crate::pipe::{Call, Form, everyone_else};
use crate::tensor::Message;

/// `dst = the root's src`, `args.units` units.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn broadcast<L: Lane, F: Form>(lane: L, args: &Args) {
    let is_root = args.rank == args.root;
    let peers = if is_root { everyone_else(args.world, args.rank) } else { 1 << args.root };
    let address = if is_root { args.src } else { args.dst };
    let message = Message::of(args, address, F::FORMAT, 1).share(lane, args);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, peers);
        let mut turn = 0;
        while message.has(turn) {
            let chunk = message.chunk(turn);
            if is_root {
                let hidden = send_bytes(&mut call, successors(args), chunk, turn);
                call.seal(peers, turn + 1, hidden);
            } else {
                let number = call.received(args.root).wrapping_add(turn);
                take_bytes(&mut call, args.root, number, chunk);
                // The last turn leaves returning its slot to the next call.
                if message.has(turn + 1) {
                    call.turn(0, 0, false, peers, turn + 1);
                }
            }
            turn += 1;
        }
        let (sent, received) = if is_root { (turn, 0) } else { (0, turn) };
        call.end(sent, received);
    }
}
