//! Trees: sums flow from the leaves to a root, the result flows back; or bytes from a root on.
//!
//! The tensor comes in parts, each with a tree of its own (binomial: one part; double binary: two;
//! islands: as many as an island has ranks). A rank knows its [`Role`] in each part and nothing else of
//! the tree, so one kernel runs them all. Every part is pipelined in chunks. Partial sums are
//! rounded to the wire type at each rank that passes them on, as in NCCL's tree, where one-shot
//! and two-shot round once; the ranks still end with one root's bits.

use super::all_gather::send_bytes;
use super::{
    accumulate_units, any_hidden, finish_units, own_units, part, store_units, successors, visible,
};
use crate::abi::{Args, Role, phase};
use crate::element::{self, Element};
use crate::for_units;
use crate::lane::Lane;
use crate::pipe::{Call, Full};
use crate::tensor::{Bytes, Codec};

/// This rank's place in the trees, and how their chunks are numbered.
///
/// An ordered pair of ranks may carry sums of one part and results of another. So a turn has two slots
/// if there are several parts, one for each direction of flow, and one if there is one part. Slots that a
/// turn does not use are skipped: they count, but nobody writes or reads them.
#[derive(Clone, Copy)]
struct Flow {
    /// Slots in a turn.
    stride: u32,
    /// Turns between a chunk's start at the leaves and its sum at the ranks above.
    inner_lag: u32,
    /// Turns between a chunk's start and its result at every rank but the root.
    result_lag: u32,
}

impl Flow {
    /// A tensor of one chunk needs no lags. With more, leaves run ahead of the results, far enough to
    /// cover the way up and down, near enough for the slots (docs/protocol.md).
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn of(args: &Args, several: bool) -> Flow {
        let stride = 1 + (args.parts > 1) as u32;
        let result_lag = if several { args.layout.slots / (2 * stride) + 1 } else { 0 };
        Flow { stride, inner_lag: several as u32, result_lag }
    }

    /// The slot of this call in which chunk `chunk` travels towards the root.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn sum_slot(self, chunk: u32) -> u32 {
        self.stride * chunk
    }

    /// The slot of this call in which the result for chunk `chunk` travels. The root sends it a turn
    /// after the leaves have sent the chunk.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn result_slot(self, chunk: u32) -> u32 {
        self.stride * (chunk + 1) + self.stride - 1
    }

    /// Slots from each peer that are done with at the end of `turn`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn taken(self, turn: u32) -> u32 {
        self.stride * (turn + 2).saturating_sub(self.result_lag)
    }
}

/// `dst = reduction over ranks of src`, `args.units` units in `args.parts` parts of `args.part_units`.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn tree<L: Lane, E: Element + Codec>(lane: L, args: &Args) {
    let peers = with_all_parts(lane, args, |role| role.neighbours());
    // No part is longer than the first.
    let full = part::<L, E>(lane, args, args.src, 0);
    let flow = Flow::of(args, full.has(1));
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, peers);
        let mut turn = 0;
        while turn < flow.result_lag || full.has(turn - flow.result_lag) {
            if full.has(turn) {
                send_leaves::<L, E>(&mut call, args, flow, turn);
            }
            if turn >= flow.inner_lag && full.has(turn - flow.inner_lag) {
                reduce_inner::<L, E>(&mut call, args, flow, turn - flow.inner_lag);
            }
            if turn >= flow.result_lag {
                pass_results::<L, E>(&mut call, args, flow, turn - flow.result_lag);
            }
            // What is left after that, no later chunk waits for.
            let later = turn + args.layout.slots / flow.stride - flow.result_lag;
            let taken = flow.taken(turn);
            if flow.result_lag != 0 && taken != 0 && full.has(later) {
                call.turn(0, 0, false, peers, taken);
            }
            turn += 1;
        }
        let slots = flow.stride * (turn - flow.result_lag + 1);
        call.end(slots, slots);
    }
}

/// This rank's place in the tree of part number `part`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn role<L: Lane>(lane: L, part: u32) -> Role {
    Role::from_bits(lane.table(part))
}

/// All parts' `of`, together.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn with_all_parts<L: Lane>(lane: L, args: &Args, of: impl Fn(Role) -> u32) -> u32 {
    (0..args.parts).fold(0, |mask, part| mask | of(role(lane, part)))
}

/// The ranks in `mask`, in the order in which this rank sends to them.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn members(args: &Args, mask: u32) -> impl Iterator<Item = u32> + Clone + use<> {
    successors(args).filter(move |rank| mask >> rank & 1 != 0)
}

/// Sends chunk `chunk` of every part in which this rank is a leaf.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn send_leaves<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    flow: Flow,
    chunk: u32,
) {
    let lane = call.lane();
    for index in 0..args.parts {
        let role = role(lane, index);
        let Some(parent) = role.parent() else { continue };
        if role.children() != 0 {
            continue;
        }
        let own = part::<L, E>(lane, args, args.src, index).chunk(chunk);
        // SAFETY: passed on to the caller.
        unsafe {
            let number = call.sent(parent).wrapping_add(flow.sum_slot(chunk));
            let room = call.reserve(parent, number);
            for_units!(lane, own.whole_units(), own.units, |N, unit| {
                let units = own_units::<L, E, Full, N>(lane, args, own, unit);
                call.put_units(room, unit, number, visible::<E, N>(units));
            });
        }
    }
}

/// Adds up chunk `chunk` of every part in which this rank has children; sends the sum to its parent
/// or, where it is the root, keeps it and sends it to its children.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn reduce_inner<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    flow: Flow,
    chunk: u32,
) {
    let lane = call.lane();
    for index in 0..args.parts {
        let role = role(lane, index);
        if role.children() == 0 {
            continue;
        }
        let own = part::<L, E>(lane, args, args.src, index).chunk(chunk);
        let result = part::<L, E>(lane, args, args.dst, index).chunk(chunk);
        let whole = own.whole_units().min(result.whole_units());
        let parent = role.parent();
        let scale = if parent.is_none() { args.scale } else { 1.0 };
        let (receivers, offset) = match parent {
            Some(parent) => (1 << parent, flow.sum_slot(chunk)),
            None => (role.children(), flow.result_slot(chunk)),
        };
        // SAFETY: passed on to the caller.
        unsafe {
            for_units!(lane, whole, own.units, |N, unit| {
                let mut totals = [element::empty(args.op); N];
                for rank in 0..args.world {
                    let units = if rank == args.rank {
                        visible::<E, N>(own_units::<L, E, Full, N>(lane, args, own, unit))
                    } else if role.children() >> rank & 1 != 0 {
                        let number = call.received(rank).wrapping_add(flow.sum_slot(chunk));
                        call.take::<N>(rank, number, unit, phase::DATA)
                    } else {
                        continue;
                    };
                    accumulate_units::<L, E, Full, N>(lane, args.op, &mut totals, units);
                }
                let units = finish_units::<L, E, Full, N>(lane, scale, totals);
                let units = visible::<E, N>(units);
                if parent.is_none() && call.ok() {
                    store_units::<L, E, Full, N>(lane, result, unit, units);
                }
                for peer in members(args, receivers) {
                    let number = call.sent(peer).wrapping_add(offset);
                    let room = call.reserve(peer, number);
                    call.put_units(room, unit, number, units);
                }
            });
        }
    }
}

/// Takes the result for chunk `chunk` of every part whose root is another rank, keeps it and sends
/// it on.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn pass_results<L: Lane, E: Element + Codec>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    flow: Flow,
    chunk: u32,
) {
    let lane = call.lane();
    for index in 0..args.parts {
        let role = role(lane, index);
        let Some(parent) = role.parent() else { continue };
        let result = part::<L, E>(lane, args, args.dst, index).chunk(chunk);
        // One unit at a time for GPUs before Hopper: with four, ptxas spills registers on sm_80.
        let older = cfg!(target_arch = "nvptx64") && !cfg!(target_feature = "sm_90");
        let whole = if older { 0 } else { result.whole_units() };
        // SAFETY: passed on to the caller.
        unsafe {
            let taken = call.received(parent).wrapping_add(flow.result_slot(chunk));
            for_units!(lane, whole, result.units, |N, unit| {
                let units = call.take::<N>(parent, taken, unit, phase::RESULT);
                if call.ok() {
                    store_units::<L, E, Full, N>(lane, result, unit, units);
                }
                for peer in members(args, role.children()) {
                    let number = call.sent(peer).wrapping_add(flow.result_slot(chunk));
                    let room = call.reserve(peer, number);
                    call.put_units(room, unit, number, units);
                }
            });
        }
    }
}

/// `dst = the root's src`, `args.units` units in `args.parts` parts, each along its own tree.
///
/// Turn t carries chunk t of every part; with two parts the same pair may carry both, so a turn has a
/// slot for each. Nothing flows back but credits.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn tree_broadcast<L: Lane>(lane: L, args: &Args) {
    let senders = with_all_parts(lane, args, |role| role.parent().map_or(0, |rank| 1 << rank));
    let receivers = with_all_parts(lane, args, |role| role.children());
    let is_root = args.rank == args.root;
    let address = if is_root { args.src } else { args.dst };
    let full = part::<L, Bytes>(lane, args, address, 0);
    let stride = args.parts;
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, Full>::begin(lane, args, senders | receivers);
        let mut turn = 0;
        while full.has(turn) {
            let mut index = 0;
            while index < args.parts {
                let role = role(lane, index);
                let chunk = part::<L, Bytes>(lane, args, address, index).chunk(turn);
                let slot = stride * turn + index;
                let children = members(args, role.children());
                let hidden = match role.parent() {
                    None => send_bytes(&mut call, children, chunk, slot),
                    Some(parent) => pass_bytes(&mut call, parent, children, chunk, slot),
                };
                // Sealed part by part: who is below in this tree may be above in the next one.
                let last = index + 1 == args.parts;
                let needed = last && full.has(turn + args.layout.slots / stride);
                let taken = if needed { slot + 1 } else { 0 };
                call.turn(role.children(), slot + 1, hidden, senders, taken);
                index += 1;
            }
            turn += 1;
        }
        let thread = lane.thread();
        let with = |mask: u32| if mask >> (thread & 31) & 1 != 0 { stride * turn } else { 0 };
        call.end(with(receivers), with(senders));
    }
}

/// Stores what `parent` sent in slot number `slot` of this call and sends it to `children` in theirs;
/// whether any of it looks like a free slot.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn pass_bytes<L: Lane>(
    call: &mut Call<'_, L, Full>,
    parent: u32,
    children: impl Iterator<Item = u32> + Clone,
    chunk: crate::tensor::Chunk,
    slot: u32,
) -> bool {
    let lane = call.lane();
    let mut hidden = false;
    // SAFETY: passed on to the caller.
    unsafe {
        let taken = call.received(parent).wrapping_add(slot);
        for_units!(lane, chunk.whole_units(), chunk.units, |N, unit| {
            let units = call.take::<N>(parent, taken, unit, phase::DATA);
            if call.ok() {
                store_units::<L, Bytes, Full, N>(lane, chunk, unit, units);
            }
            hidden |= any_hidden::<Full, N>(&units);
            for peer in children.clone() {
                let number = call.sent(peer).wrapping_add(slot);
                let room = call.reserve(peer, number);
                call.put_units(room, unit, number, units);
            }
        });
    }
    hidden
}
