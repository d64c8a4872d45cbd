//! The caller's tensors, unit by unit: vector accesses where address and length allow, narrower
//! ones at unaligned addresses and at the end.
//!
//! Invariant: no byte outside the tensor is read or written, and none is read after this thread
//! wrote it, so source and destination may be the same tensor.

use crate::abi::{Args, Format, UNIT};
use crate::element::{Bf16, Element, F16, F32, F32AsBf16};
use crate::lane::{Lane, Unit};

/// Tensor bytes as they are: for collectives that move data without looking at it.
#[derive(Clone, Copy)]
pub struct Bytes;

/// Between a tensor and the payload words of one unit.
///
/// `valid` counts the tensor bytes of this unit that exist; words beyond them are 0 when loaded and
/// ignored when stored. `WHOLE` promises that all exist and that the address is 16-byte aligned.
#[allow(clippy::missing_safety_doc, reason = "the contract of `Lane`: accessible memory")]
pub trait Codec: Copy {
    /// Tensor bytes per payload byte.
    const EXPANSION: usize;
    /// Loads a unit of `words` payload words.
    unsafe fn load<L: Lane, const WHOLE: bool>(lane: L, words: usize, at: u64, valid: u32) -> Unit;
    /// Stores a unit of `words` payload words.
    unsafe fn store<L: Lane, const WHOLE: bool>(
        lane: L,
        words: usize,
        at: u64,
        valid: u32,
        unit: Unit,
    );
    /// Loads a whole unit of four payload words at an aligned address, from a tensor that other GPUs write to.
    unsafe fn pull<L: Lane>(lane: L, at: u64) -> Unit;
    /// Stores a whole unit of four payload words at an aligned address, into a tensor of any GPU.
    unsafe fn push<L: Lane>(lane: L, at: u64, unit: Unit);
}

impl Codec for Bytes {
    const EXPANSION: usize = 1;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load<L: Lane, const WHOLE: bool>(lane: L, words: usize, at: u64, valid: u32) -> Unit {
        let bytes = 4 * words as u32;
        // SAFETY: the caller vouches for `valid` bytes at `at`.
        unsafe {
            if WHOLE || valid == bytes && at.is_multiple_of(bytes as u64) {
                if words == 4 {
                    return lane.load_u32x4(at);
                }
                let [a, b] = lane.load_u32x2(at);
                return [a, b, 0, 0];
            }
            load_narrow(lane, at, valid)
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store<L: Lane, const WHOLE: bool>(
        lane: L,
        words: usize,
        at: u64,
        valid: u32,
        unit: Unit,
    ) {
        let bytes = 4 * words as u32;
        // SAFETY: the caller vouches for `valid` bytes at `at`.
        unsafe {
            if WHOLE || valid == bytes && at.is_multiple_of(bytes as u64) {
                if words == 4 {
                    return lane.store_u32x4(at, unit);
                }
                return lane.store_u32x2(at, [unit[0], unit[1]]);
            }
            store_narrow(lane, at, valid, unit);
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn pull<L: Lane>(lane: L, at: u64) -> Unit {
        // SAFETY: the same contract.
        unsafe { lane.poll_unit(at) }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn push<L: Lane>(lane: L, at: u64, unit: Unit) {
        // SAFETY: the same contract.
        unsafe { lane.put_unit(at, unit) };
    }
}

impl Codec for F32AsBf16 {
    const EXPANSION: usize = 2;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load<L: Lane, const WHOLE: bool>(lane: L, words: usize, at: u64, valid: u32) -> Unit {
        // SAFETY: the caller vouches for `valid` bytes at `at`.
        unsafe {
            let first = Bytes::load::<L, WHOLE>(lane, 4, at, valid.min(16));
            let [a, b] = round_pairs(lane, first);
            if words == 2 {
                return [a, b, 0, 0];
            }
            let second = Bytes::load::<L, WHOLE>(lane, 4, at + 16, valid.saturating_sub(16));
            let [c, d] = round_pairs(lane, second);
            [a, b, c, d]
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store<L: Lane, const WHOLE: bool>(
        lane: L,
        words: usize,
        at: u64,
        valid: u32,
        unit: Unit,
    ) {
        // SAFETY: the caller vouches for `valid` bytes at `at`.
        unsafe {
            Bytes::store::<L, WHOLE>(
                lane,
                4,
                at,
                valid.min(16),
                widen_pairs(lane, unit[0], unit[1]),
            );
            if words == 4 {
                let second = widen_pairs(lane, unit[2], unit[3]);
                Bytes::store::<L, WHOLE>(lane, 4, at + 16, valid.saturating_sub(16), second);
            }
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn pull<L: Lane>(lane: L, at: u64) -> Unit {
        // SAFETY: the same contract; the unit has 32 tensor bytes.
        let (first, second) = unsafe { (lane.poll_unit(at), lane.poll_unit(at + 16)) };
        let ([a, b], [c, d]) = (round_pairs(lane, first), round_pairs(lane, second));
        [a, b, c, d]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn push<L: Lane>(lane: L, at: u64, unit: Unit) {
        // SAFETY: the same contract; the unit has 32 tensor bytes.
        unsafe {
            lane.put_unit(at, widen_pairs(lane, unit[0], unit[1]));
            lane.put_unit(at + 16, widen_pairs(lane, unit[2], unit[3]));
        }
    }
}

/// Four f32 as two words of bf16.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn round_pairs<L: Lane>(lane: L, values: Unit) -> [u32; 2] {
    let [a, b, c, d] = values;
    [
        Bf16::narrow(lane, [f32::from_bits(a), f32::from_bits(b)]),
        Bf16::narrow(lane, [f32::from_bits(c), f32::from_bits(d)]),
    ]
}

/// Two words of bf16 as four f32.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn widen_pairs<L: Lane>(lane: L, low: u32, high: u32) -> Unit {
    let ([a, b], [c, d]) = (Bf16::widen(lane, low), Bf16::widen(lane, high));
    [a.to_bits(), b.to_bits(), c.to_bits(), d.to_bits()]
}

macro_rules! as_bytes {
    ($($element:ty),*) => {$(
        impl Codec for $element {
            const EXPANSION: usize = 1;

            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            unsafe fn load<L: Lane, const WHOLE: bool>(lane: L, words: usize, at: u64, valid: u32) -> Unit {
                // SAFETY: the same contract.
                unsafe { Bytes::load::<L, WHOLE>(lane, words, at, valid) }
            }

            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            unsafe fn store<L: Lane, const WHOLE: bool>(lane: L, words: usize, at: u64, valid: u32, unit: Unit) {
                // SAFETY: the same contract.
                unsafe { Bytes::store::<L, WHOLE>(lane, words, at, valid, unit) }
            }

            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            unsafe fn pull<L: Lane>(lane: L, at: u64) -> Unit {
                // SAFETY: the same contract.
                unsafe { Bytes::pull(lane, at) }
            }

            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            unsafe fn push<L: Lane>(lane: L, at: u64, unit: Unit) {
                // SAFETY: the same contract.
                unsafe { Bytes::push(lane, at, unit) };
            }
        }
    )*};
}
as_bytes!(F32, F16, Bf16);

/// The widest access, of 4, 2 or 1 bytes, that `at` is aligned for and `left` bytes allow.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn step(at: u64, left: u32) -> u32 {
    if left >= 4 && at.is_multiple_of(4) {
        4
    } else if left >= 2 && at.is_multiple_of(2) {
        2
    } else {
        1
    }
}

/// The first `valid` bytes at `at`. A loop rather than 16 cases: it is the rare path, in every kernel.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn load_narrow<L: Lane>(lane: L, at: u64, valid: u32) -> Unit {
    let (mut low, mut high) = (0u64, 0u64);
    let mut done = 0;
    while done < valid {
        let at = at + done as u64;
        let step = step(at, valid - done);
        // SAFETY: the caller vouches for `valid` bytes; `step` fits the alignment.
        let value = unsafe {
            match step {
                4 => lane.load_u32(at),
                2 => lane.load_u16(at),
                _ => lane.load_u8(at),
            }
        } as u64;
        // An access at `at` may straddle the two halves only if `at` is unaligned to it.
        low |= if done < 8 { value << (8 * done) } else { 0 };
        high |= if done >= 8 {
            value << (8 * (done - 8))
        } else if done + step > 8 {
            value >> (8 * (8 - done))
        } else {
            0
        };
        done += step;
    }
    [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32]
}

/// Stores the first `valid` bytes of `unit`, as [`load_narrow`] loads them.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn store_narrow<L: Lane>(lane: L, at: u64, valid: u32, unit: Unit) {
    let mut done = 0;
    while done < valid {
        let at = at + done as u64;
        let step = step(at, valid - done);
        let value = byte_run(unit, done);
        // SAFETY: the caller vouches for `valid` bytes; `step` fits the alignment.
        unsafe {
            match step {
                4 => lane.store_u32(at, value),
                2 => lane.store_u16(at, value & 0xffff),
                _ => lane.store_u8(at, value & 0xff),
            }
        }
        done += step;
    }
}

/// The bytes of `unit` from number `first` on, as many as fit in a word.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn byte_run(unit: Unit, first: u32) -> u32 {
    let low = unit[0] as u64 | (unit[1] as u64) << 32;
    let high = unit[2] as u64 | (unit[3] as u64) << 32;
    let shift = 8 * (first % 8);
    if first >= 8 {
        return (high >> shift) as u32;
    }
    let carry = if shift == 0 { 0 } else { high << (64 - shift) };
    (low >> shift | carry) as u32
}

/// A tensor, or one rank's part of it, as a run of units. All counts fit 32 bits.
#[derive(Clone, Copy)]
pub struct Message {
    address: u64,
    /// Units in it.
    units: u32,
    /// Tensor bytes of the last one.
    tail: u32,
    /// Tensor bytes of every other.
    stride: u32,
}

impl Message {
    /// The message that `args.units` and `args.tail` describe, at `address`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn of(args: &Args, address: u64, format: Format, expansion: usize) -> Message {
        let stride = (format.payload() * expansion) as u32;
        Message { address, units: args.units, tail: args.tail, stride }
    }

    /// A message of `bytes` bytes at `address`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn of_bytes(address: u64, bytes: u64, format: Format) -> Message {
        let stride = format.payload() as u32;
        let units = bytes.div_ceil(stride as u64) as u32;
        let tail = (bytes - units.saturating_sub(1) as u64 * stride as u64) as u32;
        Message { address, units, tail, stride }
    }

    /// The part of `units` units that begins at unit `first`; shorter or empty where the message ends.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn part(self, first: u32, units: u32) -> Message {
        let left = self.units.saturating_sub(first);
        let tail = if left > units { self.stride } else { self.tail };
        let units = if left < units { left } else { units };
        Message { address: self.address + first as u64 * self.stride as u64, units, tail, ..self }
    }

    /// What `lane`'s block moves of the message: a run of `args.block_units` units.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn share<L: Lane>(self, lane: L, args: &Args) -> Share {
        let first = lane.block() * args.block_units;
        let Message { address, units, tail, stride } = self.part(first, args.block_units);
        let offset = first as u64 * stride as u64;
        Share { address, units, tail, stride, chunk_units: args.chunk_units, offset }
    }
}

/// One block's part of a message, cut into chunks, one a turn.
#[derive(Clone, Copy)]
pub struct Share {
    address: u64,
    units: u32,
    tail: u32,
    stride: u32,
    /// Units in every chunk but the last.
    chunk_units: u32,
    /// Tensor bytes of the message before this share.
    offset: u64,
}

impl Share {
    /// Whether there is a chunk number `turn`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn has(self, turn: u32) -> bool {
        turn * self.chunk_units < self.units
    }

    /// Chunk number `turn`; empty beyond the end.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn chunk(self, turn: u32) -> Chunk {
        let first = turn * self.chunk_units;
        let left = self.units.saturating_sub(first);
        let units = if left < self.chunk_units { left } else { self.chunk_units };
        let tail = if left > units { self.stride } else { self.tail };
        let address = self.address + first as u64 * self.stride as u64;
        Chunk { address, units, tail, stride: self.stride }
    }

    /// Offset of chunk number `turn` from the message's first byte.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn chunk_offset(self, turn: u32) -> u64 {
        self.offset + (turn * self.chunk_units) as u64 * self.stride as u64
    }
}

/// A run of units that one block moves through one slot.
#[derive(Clone, Copy)]
pub struct Chunk {
    /// Address of its first byte.
    pub address: u64,
    /// Units in it.
    pub units: u32,
    /// Tensor bytes of the last one.
    tail: u32,
    /// Tensor bytes of every other.
    pub stride: u32,
}

impl Chunk {
    /// The same chunk of a tensor at `base`, if this one is counted from a tensor's first byte.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn from(self, base: u64) -> Chunk {
        Chunk { address: base + self.address, ..self }
    }

    /// Bytes of the unit at `index` that exist.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn valid(self, index: u32) -> u32 {
        if index + 1 == self.units { self.tail } else { self.stride }
    }

    /// Address of the unit at `index`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn at(self, index: u32) -> u64 {
        self.address + index as u64 * self.stride as u64
    }

    /// Units that vector accesses reach: those that exist completely, if the chunk is aligned.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn whole_units(self) -> u32 {
        let aligned = self.address.is_multiple_of(UNIT as u64);
        let short = self.tail != self.stride;
        if aligned { self.units.saturating_sub(short as u32) } else { 0 }
    }
}

/// Units that a thread moves at once. Checked calls are too large for more than one.
pub const AT_ONCE: usize = if cfg!(feature = "checked") { 1 } else { crate::abi::UNROLL };

/// Runs `$body` for this thread's units of a chunk: with `$n` = [`AT_ONCE`] while that many whole units
/// are left, then with `$n` = 1. `$index` is the first unit, the others follow `threads` apart.
#[macro_export]
macro_rules! for_units {
    ($lane:expr, $whole:expr, $units:expr, |$n:ident, $index:ident| $body:block) => {{
        let (threads, units, whole) = ($lane.threads(), $units, $whole);
        let mut $index = $lane.thread();
        {
            const $n: usize = $crate::tensor::AT_ONCE;
            while $index + ($n as u32 - 1) * threads < whole {
                $body
                $index += $n as u32 * threads;
            }
        }
        {
            const $n: usize = 1;
            while $index < units {
                $body
                $index += threads;
            }
        }
    }};
}

/// Runs `$body` for `$u` = 0 up to `$n`, which is 1 or `UNROLL`, written out: LLVM leaves a loop over
/// a body of this size alone, and then keeps the units in local memory.
#[macro_export]
macro_rules! unrolled {
    ($n:ident, |$u:ident| $body:block) => {{
        const { assert!($n == 1 || $n == $crate::abi::UNROLL && $crate::abi::UNROLL == 4) };
        {
            let $u = 0;
            $body
        }
        if $n > 1 {
            {
                let $u = 1;
                $body
            }
            {
                let $u = 2;
                $body
            }
            {
                let $u = 3;
                $body
            }
        }
    }};
}
