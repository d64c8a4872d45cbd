//! Chance: the generator that every decision of a world draws from, and the temper of its seed.
//!
//! Invariant: nothing in the simulator that one host thread can observe depends on anything but
//! the seed and that thread's calls; no address, no wall clock and no hash order enters a decision.

use std::cell::Cell;

/// A probability in 65536ths.
pub(super) type Chance = u32;

/// A wyrand generator behind a shared reference: lanes and the scheduler draw from the same one.
pub(super) struct Random(Cell<u64>);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        let random = Random(Cell::new(seed ^ 0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    pub(super) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0xa076_1d64_78bd_642f);
        self.0.set(state);
        let product = u128::from(state) * u128::from(state ^ 0xe703_7ed1_a0b4_28db);
        (product >> 64) as u64 ^ product as u64
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&self, bound: usize) -> usize {
        (((self.next() >> 32) * bound as u64) >> 32) as usize
    }

    pub(super) fn chance(&self, chance: Chance) -> bool {
        (self.next() & 0xffff) < u64::from(chance)
    }

    /// The numbers below `count` in random order.
    pub(super) fn shuffled(&self, count: u32) -> Vec<u32> {
        let mut numbers: Vec<u32> = (0..count).collect();
        for index in (1..numbers.len()).rev() {
            numbers.swap(index, self.below(index + 1));
        }
        numbers
    }

    /// A power of two from `2^low` to `2^high`.
    fn power(&self, low: u32, high: u32) -> u32 {
        1 << (low as usize + self.below((high - low + 1) as usize))
    }
}

/// How a seed schedules. Uniform choice between lanes explores little: all ranks move at the same
/// pace and every store lands soon. So each seed draws its own pace for everything that can differ.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    /// Most turns that one block gets before another is chosen.
    pub(super) burst: u32,
    /// That a lane gets a turn because it had the last one.
    pub(super) stay: Chance,
    /// That a poll gives up its turn.
    pub(super) poll: Chance,
    /// That a put gives up its turn.
    pub(super) put: Chance,
    /// That a block with waiting lanes is chosen although others have work.
    pub(super) spin: Chance,
    /// That something leaves a store buffer after a turn.
    pub(super) drain: Chance,
    /// How many quarters of the store buffers something leaves when nobody can run. Few let waiting
    /// lanes see halves of things; many spare them looking in vain again and again.
    pub(super) flush: usize,
    /// That what leaves a store buffer is one word, not all of its unit that is there.
    pub(super) tear: Chance,
    /// That a stream whose next operation could start does not start it yet.
    pub(super) hold: Chance,
    /// How far the paces of kernels and of blocks lie apart: 0 not at all, 2 a factor of 256.
    skew: usize,
}

impl Policy {
    pub(super) fn new(random: &Random) -> Policy {
        Policy {
            burst: random.power(0, 6),
            stay: 65536 - random.power(10, 16),
            poll: random.power(9, 15),
            put: random.power(10, 15),
            spin: random.power(9, 14),
            drain: random.power(9, 16),
            flush: 1 << random.below(5),
            tear: random.power(12, 16),
            hold: random.power(8, 15),
            skew: random.below(3),
        }
    }

    /// The pace of a kernel or a block: how many of 256 attempts to schedule it succeed.
    pub(super) fn pace(&self, random: &Random) -> u32 {
        match self.skew {
            0 => 256,
            1 => 256 >> random.below(4),
            _ => [256, 256, 32, 4, 1][random.below(5)],
        }
    }
}
