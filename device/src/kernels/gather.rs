//! Gather: the root joins the members' tensors along their last dimension.
//!
//! Members send their rows as one run of bytes; the root knows every width and puts each unit
//! where its row and column are. One step, bound by the root's own link. Ranks that bring nothing
//! neither send nor are waited for.

use super::all_gather::send_bytes;
use super::{load_units, successors};
use crate::abi::{Args, phase};
use crate::for_units;
use crate::lane::{Lane, Unit};
use crate::pipe::{Call, Form};
use crate::tensor::{Bytes, Chunk, Codec, Message, Share, byte_run};
use crate::unrolled;

/// `dst[row] = members' src[row]`, one after the other in rank order, on the root.
///
/// # Safety
/// As for [`super::run`].
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn gather<L: Lane, F: Form>(lane: L, args: &Args) {
    // SAFETY: passed on to the caller.
    unsafe {
        if args.rank == args.root { receive::<L, F>(lane, args) } else { send::<L, F>(lane, args) }
    }
}

/// This block's share of what `rank` brings, whose first byte is at `address`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn rows_of<L: Lane, F: Form>(lane: L, args: &Args, rank: u32, address: u64) -> Share {
    Message::of_bytes(address, args.rows * lane.table(rank), F::FORMAT).share(lane, args)
}

/// A member's side.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn send<L: Lane, F: Form>(lane: L, args: &Args) {
    let message = rows_of::<L, F>(lane, args, args.rank, args.src);
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, 1 << args.root);
        let mut turn = 0;
        while message.has(turn) {
            let chunk = message.chunk(turn);
            let hidden = send_bytes(&mut call, core::iter::once(args.root), chunk, turn);
            call.seal(1 << args.root, turn + 1, hidden);
            turn += 1;
        }
        call.end(turn, 0);
    }
}

/// The root's side: chunk after chunk from every member in turn, so that all of them stay busy.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn receive<L: Lane, F: Form>(lane: L, args: &Args) {
    let mut peers = 0;
    for peer in successors(args) {
        peers |= ((lane.table(peer) != 0) as u32) << peer;
    }
    // SAFETY: passed on to the caller.
    unsafe {
        let mut call = Call::<L, F>::begin(lane, args, peers);
        let own = Place::of(lane, args, args.rank);
        let src = rows_of::<L, F>(lane, args, args.rank, args.src);
        let mut turn = 0;
        let mut more = true;
        while more {
            let chunk = src.chunk(turn);
            for_units!(lane, 0, chunk.units, |N, index| {
                let units = load_units::<L, Bytes, F, N>(lane, chunk, index);
                own.store_units::<L, F, N>(lane, src.chunk_offset(turn), chunk, index, units);
            });
            more = src.has(turn + 1);
            for peer in successors(args) {
                let message = rows_of::<L, F>(lane, args, peer, 0);
                let (chunk, place) = (message.chunk(turn), Place::of(lane, args, peer));
                let number = call.received(peer).wrapping_add(turn);
                for_units!(lane, 0, chunk.units, |N, index| {
                    let units = call.take::<N>(peer, number, index, phase::DATA);
                    if call.ok() {
                        let start = message.chunk_offset(turn);
                        place.store_units::<L, F, N>(lane, start, chunk, index, units);
                    }
                });
                more |= message.has(turn + 1);
            }
            turn += 1;
            // The last turn leaves returning its slots to the next call.
            if more {
                call.turn(0, 0, false, peers, taken::<L, F>(lane, args, turn));
            }
        }
        call.end(0, taken::<L, F>(lane, args, turn));
    }
}

/// How many of this block's first `turns` chunks the rank of this thread's number sends.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn taken<L: Lane, F: Form>(lane: L, args: &Args, turns: u32) -> u32 {
    let rank = lane.thread();
    if rank >= args.world || turns == 0 {
        return 0;
    }
    let message = rows_of::<L, F>(lane, args, rank, 0);
    let mut count = turns;
    // At most one turn is beyond the end unless members' sizes differ.
    while count > 0 && !message.has(count - 1) {
        count -= 1;
    }
    count
}

/// Where one member's bytes lie in the joined tensor.
#[derive(Clone, Copy)]
struct Place {
    /// Address of the member's first column in the first row.
    address: u64,
    /// Bytes of the member in one row.
    width: u64,
    /// Bytes from one row to the next.
    pitch: u64,
}

impl Place {
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn of<L: Lane>(lane: L, args: &Args, member: u32) -> Place {
        let (mut before, mut pitch) = (0, 0);
        for rank in 0..args.world {
            if rank == member {
                before = pitch;
            }
            pitch += lane.table(rank);
        }
        Place { address: args.dst + before, width: lane.table(member), pitch }
    }

    /// Stores `N` units of a chunk that begins `start` bytes into the member's rows.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_units<L: Lane, F: Form, const N: usize>(
        self,
        lane: L,
        start: u64,
        chunk: Chunk,
        index: u32,
        units: [Unit; N],
    ) {
        unrolled!(N, |u| {
            let index = index + u as u32 * lane.threads();
            let offset = start + (index * chunk.stride) as u64;
            // SAFETY: passed on to the caller.
            unsafe { self.store(lane, F::WORDS, offset, chunk.valid(index), units[u]) };
        });
    }

    /// Stores the `valid` bytes of `unit` that begin `offset` bytes into the member's rows.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store<L: Lane>(self, lane: L, words: usize, offset: u64, valid: u32, unit: Unit) {
        let (row, column) = self.row_and_column(offset);
        let start = self.address + row * self.pitch + column;
        // SAFETY: the caller's joined tensor holds all rows of all members.
        unsafe {
            if column + valid as u64 <= self.width {
                Bytes::store::<L, false>(lane, words, start, valid, unit);
                return;
            }
            // The unit spans rows: byte by byte, stepping over the other members' columns.
            let (mut address, mut left, mut done) = (start, self.width - column, 0);
            while done < valid {
                lane.store_u8(address, byte_run(unit, done) & 0xff);
                (address, left, done) = (address + 1, left - 1, done + 1);
                if left == 0 {
                    address += self.pitch - self.width;
                    left = self.width;
                }
            }
        }
    }

    /// Divides as seldom and as narrowly as it can: one row needs no division, and 64-bit ones are slow.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn row_and_column(self, offset: u64) -> (u64, u64) {
        if offset < self.width {
            return (0, offset);
        }
        // A width is never 0 here; the checked forms keep a panic out of the kernel.
        let row = if (offset | self.width) >> 32 == 0 {
            (offset as u32).checked_div(self.width as u32).unwrap_or(0) as u64
        } else {
            offset.checked_div(self.width).unwrap_or(0)
        };
        (row, offset - row * self.width)
    }
}
