//! Element types: how 32-bit words of the wire become f32 values and back.
//!
//! Invariant: values are combined in f32 and rounded once, in [`Element::narrow`]; bf16 and f16
//! widen exactly, so a value's bits on the wire decide it completely.

use crate::abi::ReduceOp;
use crate::lane::Lane;

/// What a 32-bit word of the wire holds: one f32, or two 16-bit floats.
pub trait Element: Copy {
    /// A word that changes no sum. `-0.0`, since `0.0` would turn `-0.0` into `0.0`.
    const ZERO: u32;
    /// A word that changes no maximum or minimum: a NaN, which loses against every number. Not
    /// `abi::FREE`.
    const NAN: u32;

    /// The values of a word; the second is meaningless where a word holds one.
    fn widen<L: Lane>(lane: L, word: u32) -> [f32; 2];
    /// The word that holds `values`, rounded to nearest even.
    fn narrow<L: Lane>(lane: L, values: [f32; 2]) -> u32;

    /// What a rank that contributes nothing sends.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn neutral(op: u32) -> u32 {
        if is_sum(op) { Self::ZERO } else { Self::NAN }
    }
}

/// f32, travelling as it is.
#[derive(Clone, Copy)]
pub struct F32;
/// f16, two in a word.
#[derive(Clone, Copy)]
pub struct F16;
/// bf16, two in a word.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32 in the tensor, bf16 on the wire: ranks use their own value as their peers receive it.
#[derive(Clone, Copy)]
pub struct F32AsBf16;

impl Element for F32 {
    const ZERO: u32 = 0x8000_0000;
    const NAN: u32 = 0x7fff_ffff;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn widen<L: Lane>(_: L, word: u32) -> [f32; 2] {
        [f32::from_bits(word), 0.0]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn narrow<L: Lane>(_: L, values: [f32; 2]) -> u32 {
        values[0].to_bits()
    }
}

impl Element for F16 {
    const ZERO: u32 = 0x8000_8000;
    const NAN: u32 = 0x7fff_7fff;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn widen<L: Lane>(lane: L, word: u32) -> [f32; 2] {
        [lane.f16_to_f32(word & 0xffff), lane.f16_to_f32(word >> 16)]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn narrow<L: Lane>(lane: L, values: [f32; 2]) -> u32 {
        lane.f16_from_f32(values[0]) | lane.f16_from_f32(values[1]) << 16
    }
}

impl Element for Bf16 {
    const ZERO: u32 = 0x8000_8000;
    const NAN: u32 = 0x7fff_7fff;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn widen<L: Lane>(_: L, word: u32) -> [f32; 2] {
        [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn narrow<L: Lane>(lane: L, values: [f32; 2]) -> u32 {
        lane.bf16x2_from_f32(values[0], values[1])
    }
}

impl Element for F32AsBf16 {
    const ZERO: u32 = Bf16::ZERO;
    const NAN: u32 = Bf16::NAN;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn widen<L: Lane>(lane: L, word: u32) -> [f32; 2] {
        Bf16::widen(lane, word)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn narrow<L: Lane>(lane: L, values: [f32; 2]) -> u32 {
        Bf16::narrow(lane, values)
    }
}

/// f32 to bf16 to nearest even, in the low half; for GPUs without the instruction (before sm_80).
pub fn bf16_round(value: f32) -> u32 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    (bits + 0x7fff + (bits >> 16 & 1)) >> 16
}

/// Whether `op` adds: a sum or an average.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn is_sum(op: u32) -> bool {
    op == ReduceOp::Sum as u32 || op == ReduceOp::Avg as u32
}

/// The running reduction of one unit.
pub type Accumulator = [[f32; 2]; 4];

/// An accumulator that holds nothing yet.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn empty(op: u32) -> Accumulator {
    [[if is_sum(op) { -0.0 } else { f32::NAN }; 2]; 4]
}

/// Adds the first `words` words of `unit` to `total`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn accumulate<L: Lane, E: Element>(
    lane: L,
    op: u32,
    total: &mut Accumulator,
    unit: [u32; 4],
    words: usize,
) {
    let mut values = [[0.0; 2]; 4];
    for w in 0..words {
        values[w] = E::widen(lane, unit[w]);
    }
    // One branch for the unit, the same for all threads; the loops unroll.
    if is_sum(op) {
        for w in 0..words {
            total[w][0] += values[w][0];
            total[w][1] += values[w][1];
        }
    } else if op == ReduceOp::Max as u32 {
        for w in 0..words {
            total[w][0] = lane.max_f32(total[w][0], values[w][0]);
            total[w][1] = lane.max_f32(total[w][1], values[w][1]);
        }
    } else {
        for w in 0..words {
            total[w][0] = lane.min_f32(total[w][0], values[w][0]);
            total[w][1] = lane.min_f32(total[w][1], values[w][1]);
        }
    }
}

/// The reduction as wire words: scaled, then rounded once.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn finish<L: Lane, E: Element>(
    lane: L,
    scale: f32,
    total: &Accumulator,
    words: usize,
) -> [u32; 4] {
    let mut unit = [0; 4];
    for w in 0..words {
        // A scale of 1 changes no bit, so there is no branch on it.
        unit[w] = E::narrow(lane, [total[w][0] * scale, total[w][1] * scale]);
    }
    unit
}
