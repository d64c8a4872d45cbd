//! One algorithm a file, and the table that joins them to their names.
//!
//! Every algorithm gives each block one run of the message, the same on every rank, so block b of
//! one rank talks to block b of the others only. Unit u of a chunk belongs to the same
//! thread in every phase; that is why source and destination may be the same tensor.

mod all_gather;
mod barrier;
mod broadcast;
mod direct;
mod gather;
mod local_reduce;
mod one_shot;
mod probe;
mod reduce_scatter;
mod ring;
mod staged;
mod stream;
mod tree;
mod two_shot;

pub use all_gather::all_gather;
pub use barrier::barrier;
pub use broadcast::broadcast;
pub use direct::direct;
pub use gather::gather;
pub use local_reduce::local_reduce;
pub use one_shot::one_shot;
pub use probe::probe;
pub use reduce_scatter::reduce_scatter;
pub use ring::ring;
pub use staged::staged;
pub use stream::stream;
pub use tree::{tree, tree_broadcast};
pub use two_shot::two_shot;

use crate::abi::{Args, FREE, Kernel, flags, phase};
use crate::element::{self, Accumulator, Bf16, Element, F16, F32, F32AsBf16};
use crate::lane::{Lane, Unit};
use crate::pipe::{Call, Form, Full, Packet};
use crate::tensor::{Chunk, Codec, Message, Share};
use crate::{for_units, unrolled};

macro_rules! run_table {
    ($($variant:ident $symbol:literal $body:ident::<$($parameter:ident),*> $barriers:literal;)*) => {
        /// Runs one thread of `kernel`: what a simulated GPU executes where a real one jumps to
        /// the entry.
        ///
        /// # Safety
        /// Every address that `kernel` derives from `args` is what [`Args`] says it is, and all
        /// threads of the block run it.
        pub unsafe fn run<L: Lane>(kernel: Kernel, lane: L, args: &Args) {
            // SAFETY: passed on to the caller.
            unsafe {
                match kernel {
                    $(Kernel::$variant => $body::<L, $($parameter),*>(lane, args),)*
                }
            }
        }
    };
}
crate::for_each_kernel!(run_table);

/// The ranks other than this one, in the order in which this rank sends to them: its successor
/// first, so that in every step each rank is sent to by one other.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn successors(args: &Args) -> impl Iterator<Item = u32> + Clone + use<> {
    let (rank, world) = (args.rank, args.world);
    (1..world).map(move |step| if rank + step < world { rank + step } else { rank + step - world })
}

/// This rank's units of a chunk, or what changes nothing if it does not contribute: `N` units from
/// `index` on, `threads` apart.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn own_units<L, E, F, const N: usize>(
    lane: L,
    args: &Args,
    chunk: Chunk,
    index: u32,
) -> [Unit; N]
where
    L: Lane,
    E: Element + Codec,
    F: Form,
{
    if args.flags & flags::NO_CONTRIBUTION != 0 {
        return [[E::neutral(args.op); 4]; N];
    }
    // SAFETY: the caller's chunk lies in its tensor.
    unsafe { load_units::<L, E, F, N>(lane, chunk, index) }
}

/// `N` units of a chunk from `index` on, `threads` apart. More than one only if all are whole.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn load_units<L, C, F, const N: usize>(lane: L, chunk: Chunk, index: u32) -> [Unit; N]
where
    L: Lane,
    C: Codec,
    F: Form,
{
    let mut units = [[0; 4]; N];
    unrolled!(N, |u| {
        let index = index + u as u32 * lane.threads();
        // SAFETY: the caller's chunk lies in its tensor.
        units[u] = unsafe {
            if N > 1 {
                C::load::<L, true>(lane, F::WORDS, chunk.at(index), 0)
            } else {
                C::load::<L, false>(lane, F::WORDS, chunk.at(index), chunk.valid(index))
            }
        };
    });
    units
}

/// Stores `N` units of a chunk, as [`load_units`] loads them.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn store_units<L, C, F, const N: usize>(lane: L, chunk: Chunk, index: u32, units: [Unit; N])
where
    L: Lane,
    C: Codec,
    F: Form,
{
    unrolled!(N, |u| {
        let index = index + u as u32 * lane.threads();
        // SAFETY: the caller's chunk lies in its tensor.
        unsafe {
            if N > 1 {
                C::store::<L, true>(lane, F::WORDS, chunk.at(index), 0, units[u]);
            } else {
                C::store::<L, false>(lane, F::WORDS, chunk.at(index), chunk.valid(index), units[u]);
            }
        }
    });
}

/// The reduction, in rank order, of this rank's own units and those that each peer sent in slot
/// number `turn` of this call: `N` units from `index` on. Means nothing once `call.ok()` is false.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn reduced_units<L, E, F, const N: usize>(
    call: &mut Call<'_, L, F>,
    args: &Args,
    own: Chunk,
    index: u32,
    turn: u32,
) -> [Unit; N]
where
    L: Lane,
    E: Element + Codec,
    F: Form,
{
    let lane = call.lane();
    let mut totals = [element::empty(args.op); N];
    for rank in 0..args.world {
        // SAFETY: passed on to the caller.
        let units = unsafe {
            if rank == args.rank {
                visible::<E, N>(own_units::<L, E, F, N>(lane, args, own, index))
            } else {
                let number = call.received(rank).wrapping_add(turn);
                call.take::<N>(rank, number, index, phase::DATA)
            }
        };
        accumulate_units::<L, E, F, N>(lane, args.op, &mut totals, units);
    }
    finish_units::<L, E, F, N>(lane, args.scale, totals)
}

/// Adds `units` to `totals`, unit by unit.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn accumulate_units<L, E, F, const N: usize>(
    lane: L,
    op: u32,
    totals: &mut [Accumulator; N],
    units: [Unit; N],
) where
    L: Lane,
    E: Element,
    F: Form,
{
    unrolled!(N, |u| {
        element::accumulate::<L, E>(lane, op, &mut totals[u], units[u], F::WORDS);
    });
}

/// The reductions as wire words.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn finish_units<L, E, F, const N: usize>(lane: L, scale: f32, totals: [Accumulator; N]) -> [Unit; N]
where
    L: Lane,
    E: Element,
    F: Form,
{
    let mut units = [[0; 4]; N];
    unrolled!(N, |u| {
        units[u] = element::finish::<L, E>(lane, scale, &totals[u], F::WORDS);
    });
    units
}

/// `units` without a word that looks like a free slot. That word is NaN in every element of it, and
/// another NaN takes its place, on this rank and on its peers alike; so reductions never seal.
///
/// Called as late as possible: it is the first to wait for the units, and what it waits ahead of is
/// not in flight meanwhile (0.15 us of 2.6 in small calls).
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn visible<E: Element, const N: usize>(mut units: [Unit; N]) -> [Unit; N] {
    unrolled!(N, |u| {
        let unit = units[u];
        let word = |w: u32| if w == FREE { E::NAN } else { w };
        units[u] = [word(unit[0]), word(unit[1]), word(unit[2]), word(unit[3])];
    });
    units
}

/// Whether any of `units` holds what looks like a free slot.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn any_hidden<F: Form, const N: usize>(units: &[Unit; N]) -> bool {
    let mut hidden = false;
    unrolled!(N, |u| {
        hidden |= F::hidden(units[u]);
    });
    hidden
}

/// This block's share of part number `part` of the tensor at `address`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn part<L: Lane, E: Codec>(lane: L, args: &Args, address: u64, part: u32) -> Share {
    let tensor = Message::of(args, address, Full::FORMAT, E::EXPANSION);
    tensor.part(part * args.part_units, args.part_units).share(lane, args)
}

/// Sends every peer chunk number `turn` of its own part, `part(peer)`, as slot number `slot` of this
/// call.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn send_parts<L, E>(
    call: &mut Call<'_, L, Full>,
    args: &Args,
    part: impl Fn(u32) -> Share,
    turn: u32,
    slot: u32,
) where
    L: Lane,
    E: Element + Codec,
{
    let lane = call.lane();
    for peer in successors(args) {
        let chunk = part(peer).chunk(turn);
        // SAFETY: passed on to the caller.
        unsafe {
            let number = call.sent(peer).wrapping_add(slot);
            let room = call.reserve(peer, number);
            for_units!(lane, chunk.whole_units(), chunk.units, |N, index| {
                let units = own_units::<L, E, Full, N>(lane, args, chunk, index);
                call.put_units(room, index, number, visible::<E, N>(units));
            });
        }
    }
}
