//! The memory of all ranks while one execution of a model lasts.
//!
//! Invariant: one kind of cell for each kind of access (`device/src/lane.rs`). Slots are pairs of 64-bit
//! atomics, since a unit may come in halves; words that others write are 32-bit atomics; counters and
//! tensors are plain cells, on which loom reports every race. An access to anything else panics.

use loom::cell::Cell;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use peerlane_device::abi::{Control, FREE, Layout, Status, UNIT, lane_words};
use peerlane_device::lane::Unit;
use std::collections::HashMap;
use std::mem::offset_of;

/// What the counters of all lanes hold before the first call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Start {
    /// Slots sent, received and returned so far: every lane's.
    pub slots: u32,
    /// How many of those came after the last seal.
    pub sealed_ago: u32,
}

/// Everything that the ranks can reach.
pub struct World {
    words: HashMap<u64, AtomicU32>,
    halves: HashMap<u64, AtomicU64>,
    cells: HashMap<u64, Cell<u32>>,
    /// Calls that each rank has begun. Nothing that loom knows of: scenes look at it to see what came first.
    pub begun: [std::cell::Cell<u32>; 3],
}

/// Units of each rank's two tensors.
const TENSOR_UNITS: u64 = 8;

impl World {
    /// Mailboxes for `world` ranks as they are after clearing, but for the counters.
    pub fn new(world: u32, layout: Layout, start: Start) -> World {
        let mut memory = World {
            words: HashMap::new(),
            halves: HashMap::new(),
            cells: HashMap::new(),
            begun: Default::default(),
        };
        for rank in 0..world {
            for base in [mailbox(rank), host_mailbox(rank)] {
                memory.word(base + offset_of!(Control, abort) as u64, 0);
                memory.add_lanes(base, world, rank, layout, start);
            }
            memory.word(mailbox(rank) + offset_of!(Control, claim) as u64, 0);
            memory.cell(mailbox(rank) + offset_of!(Control, epoch) as u64, 0);
            for field in STATUS {
                memory.word(status(rank) + field as u64, 0);
            }
            for base in [src(rank), dst(rank)] {
                for word in 0..TENSOR_UNITS * 4 {
                    memory.cell(base + 4 * word, 0);
                }
            }
        }
        memory
    }

    fn add_lanes(&mut self, base: u64, world: u32, rank: u32, layout: Layout, start: Start) {
        for (lane, peer) in (0..layout.lanes).flat_map(|l| (0..world).map(move |p| (l, p))) {
            if peer == rank {
                continue;
            }
            let at = |offset: usize| base + (layout.words(lane) + 4 * peer) as u64 + offset as u64;
            self.cell(at(lane_words::SENT), start.slots);
            self.cell(at(lane_words::RECEIVED), start.slots);
            self.word(at(lane_words::CREDIT), start.slots);
            self.word(at(lane_words::SEALED), start.slots.wrapping_sub(start.sealed_ago));
            let slot = layout.slot(Layout::source(peer, rank, world), lane, 0);
            for half in 0..layout.lane_bytes as u64 / 8 {
                let free = u64::from(FREE) << 32 | u64::from(FREE);
                self.halves.insert(base + slot as u64 + 8 * half, AtomicU64::new(free));
            }
        }
    }

    fn word(&mut self, at: u64, value: u32) {
        self.words.insert(at, AtomicU32::new(value));
    }

    fn cell(&mut self, at: u64, value: u32) {
        self.cells.insert(at, Cell::new(value));
    }

    /// The word that others write at `at`.
    pub fn word_at(&self, at: u64) -> &AtomicU32 {
        self.words.get(&at).unwrap_or_else(|| panic!("there is no word at {at:#x}"))
    }

    /// The plain cell at `at`.
    pub fn cell_at(&self, at: u64) -> &Cell<u32> {
        self.cells.get(&at).unwrap_or_else(|| panic!("there is no cell at {at:#x}"))
    }

    fn half_at(&self, at: u64) -> &AtomicU64 {
        self.halves.get(&at).unwrap_or_else(|| panic!("there is no slot at {at:#x}"))
    }

    /// Stores a unit as its two halves, relaxed.
    pub fn put_unit(&self, at: u64, unit: Unit) {
        for half in 0..UNIT / 8 {
            let value = u64::from(unit[2 * half]) | u64::from(unit[2 * half + 1]) << 32;
            self.half_at(at + 8 * half as u64).store(value, Ordering::Relaxed);
        }
    }

    /// Loads a unit as its two halves, relaxed.
    pub fn poll_unit(&self, at: u64) -> Unit {
        let [a, b] = [at, at + 8].map(|at| self.half_at(at).load(Ordering::Relaxed));
        [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
    }

    /// The words of a tensor from `at` on.
    pub fn load<const N: usize>(&self, at: u64) -> [u32; N] {
        std::array::from_fn(|word| self.cell_at(at + 4 * word as u64).get())
    }

    /// Overwrites the words of a tensor from `at` on.
    pub fn store(&self, at: u64, values: &[u32]) {
        for (value, at) in values.iter().zip((at..).step_by(4)) {
            self.cell_at(at).set(*value);
        }
    }

    /// A word of `rank`'s status page, as its host reads it.
    pub fn status_word(&self, rank: u32, offset: usize) -> u32 {
        self.word_at(status(rank) + offset as u64).load(Ordering::Acquire)
    }

    /// Raises `rank`'s abort word in its status page, as a host does.
    pub fn abort(&self, rank: u32) {
        self.word_at(status(rank) + offset_of!(Status, abort) as u64).store(1, Ordering::Release);
    }
}

const STATUS: [usize; 8] = [
    offset_of!(Status, abort),
    offset_of!(Status, state),
    offset_of!(Status, operation),
    offset_of!(Status, peer),
    offset_of!(Status, phase),
    offset_of!(Status, block),
    offset_of!(Status, epoch),
    offset_of!(Status, waited),
];

/// Address of `rank`'s mailbox in its GPU's memory.
pub fn mailbox(rank: u32) -> u64 {
    u64::from(rank + 1) << 40
}

/// Address of `rank`'s host mailbox.
pub fn host_mailbox(rank: u32) -> u64 {
    mailbox(rank) + (1 << 32)
}

/// Address of `rank`'s status page.
pub fn status(rank: u32) -> u64 {
    mailbox(rank) + (2 << 32)
}

/// Address of the tensor that `rank` reads.
pub fn src(rank: u32) -> u64 {
    mailbox(rank) + (3 << 32)
}

/// Address of the tensor that `rank` writes.
pub fn dst(rank: u32) -> u64 {
    mailbox(rank) + (4 << 32)
}
