//! Inputs for checks and tests: random, from a seed, with the values that break protocols.
//!
//! Invariant: the same seed and name give the same bytes on every machine, so that a failing case
//! can be replayed from its command line alone.

use crate::DType;
use crate::reference::push;

/// A small random number generator (splitmix64): good enough for inputs, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator for what `name` calls, under `seed`.
    pub fn new(seed: u64, name: &str) -> Rng {
        // FNV-1a; splitmix64 mixes what it leaves close together.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut rng = Rng(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        rng.0 = rng.next_u64();
        rng
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number in `0..limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The bias of the remainder does not matter for limits this small.
        self.next_u64() % limit
    }

    /// A value of magnitude 2^-5 to 2^2, so that the order of additions shows in their sum.
    fn ordinary(&mut self) -> f32 {
        let bits = self.next_u64();
        let exponent = 127 - 5 + (bits >> 32 & 7) as u32 % 7;
        f32::from_bits((bits as u32 & 0x807f_ffff) | exponent << 23)
    }
}

/// What an input holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Values {
    /// Random numbers of ordinary size.
    Ordinary,
    /// The same, every other one replaced: zeros of both signs, infinities, NaN, the smallest and
    /// the largest numbers, and runs of ones, which the protocol uses as its mark of a free slot.
    Special,
    /// Nothing but that mark.
    Free,
}

impl Values {
    /// All kinds of input.
    pub const ALL: [Values; 3] = [Values::Ordinary, Values::Special, Values::Free];

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Values::Ordinary => "ordinary",
            Values::Special => "special",
            Values::Free => "free",
        }
    }
}

/// Bit patterns of `dtype` that are easy to get wrong.
fn specials(dtype: DType) -> [u32; 9] {
    // Zeros, infinities, a NaN, the smallest and the largest number, the largest subnormal, ones.
    match dtype {
        DType::F32 => [
            0,
            0x8000_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0001,
            1,
            0x7f7f_ffff,
            0x007f_ffff,
            u32::MAX,
        ],
        DType::F16 => [0, 0x8000, 0x7c00, 0xfc00, 0x7e01, 1, 0x7bff, 0x03ff, 0xffff],
        DType::Bf16 => [0, 0x8000, 0x7f80, 0xff80, 0x7fc1, 1, 0x7f7f, 0x007f, 0xffff],
    }
}

/// `count` elements of `dtype`.
pub fn elements(dtype: DType, count: usize, values: Values, rng: &mut Rng) -> Vec<u8> {
    let total = count * dtype.bytes();
    if values == Values::Free {
        return vec![0xff; total];
    }
    let mut bytes = Vec::with_capacity(total);
    while bytes.len() < total {
        if values == Values::Special && rng.below(2) == 0 {
            let choice = rng.below(9) as usize;
            let bits = specials(dtype)[choice].to_le_bytes();
            // Ones come four to sixteen bytes at a time, since only whole words of them matter.
            let repeat = if choice == 8 { (4 << rng.below(3)) / dtype.bytes() } else { 1 };
            (0..repeat).for_each(|_| bytes.extend(&bits[..dtype.bytes()]));
        } else {
            push(dtype, rng.ordinary(), &mut bytes);
        }
    }
    bytes.truncate(total);
    bytes
}

/// `count` bytes.
pub fn bytes(count: usize, values: Values, rng: &mut Rng) -> Vec<u8> {
    if values == Values::Free {
        return vec![0xff; count];
    }
    let mut bytes = Vec::with_capacity(count + 16);
    while bytes.len() < count {
        if values == Values::Special && rng.below(2) == 0 {
            bytes.extend(std::iter::repeat_n(0xff, 1 + rng.below(16) as usize));
        } else {
            bytes.extend(rng.next_u64().to_le_bytes());
        }
    }
    bytes.truncate(count);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::value;

    #[test]
    fn names_and_seeds_tell_inputs_apart() {
        let draw =
            |seed, name: &str| elements(DType::F32, 8, Values::Ordinary, &mut Rng::new(seed, name));
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }

    #[test]
    fn ordinary_values_are_ordinary() {
        for dtype in DType::ALL {
            let tensor = elements(dtype, 5000, Values::Ordinary, &mut Rng::new(3, "ordinary"));
            for element in tensor.chunks_exact(dtype.bytes()) {
                let size = value(dtype, element).abs();
                assert!((1.0 / 32.0..=4.0).contains(&size), "{dtype:?}: {size}");
            }
        }
    }

    #[test]
    fn special_values_hold_the_free_mark() {
        for dtype in DType::ALL {
            let tensor = elements(dtype, 5000, Values::Special, &mut Rng::new(4, "special"));
            assert_eq!(tensor.len(), 5000 * dtype.bytes());
            assert!(tensor.chunks_exact(4).any(|word| word == [0xff; 4]));
            assert!(tensor.chunks_exact(dtype.bytes()).any(|e| value(dtype, e) == 0.0));
        }
        assert_eq!(bytes(77, Values::Special, &mut Rng::new(5, "bytes")).len(), 77);
    }
}
