//! How a call's units are spread over blocks and threads, and along which trees sums are taken.
//!
//! Pure: no GPU, no I/O. The inputs are the same on every rank (sizes that ranks must bring alike,
//! and a [`Group`](Shape) agreed on at start-up), so every rank makes the same plan.

pub mod forest;
pub mod roles;
pub mod staging;
pub mod steps;

use crate::algorithm::Algorithm;
use crate::choice::LinkClass;
use forest::Forest;
use peerlane_device::abi::{DType, Format, Layout, MAX_RANKS, MAX_THREADS, Wire};

/// What all ranks of a communicator have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of ranks.
    pub world: u32,
    /// The mailbox layout.
    pub layout: Layout,
    /// Most blocks that a call may use on any rank.
    pub max_blocks: u32,
    /// Some rank reaches another through host memory.
    pub host: bool,
    /// Which island each rank belongs to, for hierarchical all-reduces.
    pub islands: [u8; MAX_RANKS],
    /// The rank that passes broadcasts on by [`Route::Hub`](crate::Route::Hub).
    pub hub: u32,
    /// The kind of the slowest link between two ranks.
    pub class: LinkClass,
}

impl Shape {
    /// A shape whose islands are two halves, whose hub is rank 0 and whose ranks all reach each other's
    /// memory over NVLink.
    pub fn new(world: u32, layout: Layout, max_blocks: u32) -> Shape {
        Shape {
            world,
            layout,
            max_blocks,
            host: false,
            islands: halves(world),
            hub: 0,
            class: LinkClass::NvLink,
        }
    }

    /// Each rank's island.
    pub fn by_island(&self) -> &[u8] {
        &self.islands[..self.world as usize]
    }
}

/// The islands of ranks of which nothing is known.
pub fn halves(world: u32) -> [u8; MAX_RANKS] {
    let mut islands = [0; MAX_RANKS];
    for (rank, island) in (0..world).zip(&mut islands) {
        *island = (rank >= world.div_ceil(2)) as u8;
    }
    islands
}

/// How a kernel is launched and how it cuts its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Units of the message.
    pub units: usize,
    /// Blocks, the same on every rank.
    pub blocks: u32,
    /// Threads in each block.
    pub threads: u32,
    /// Units of a message that one block moves.
    pub block_units: u32,
    /// Units in a full chunk.
    pub chunk_units: u32,
}

impl Grid {
    /// Chunks in which a block sends its part of the message, one after the other.
    pub fn turns(&self) -> u32 {
        self.block_units.div_ceil(self.chunk_units)
    }
}

/// Bytes up to which broadcasts and gathers let data and flags travel together. They carry any bytes,
/// token ids of -1 among them, and such payload would have to be sealed.
const PACKET_BYTES: usize = 32 << 10;

/// Blocks of calls through host memory: where latency counts, more of them only poll; where bandwidth
/// counts, it takes more to keep enough on the way. Two H200s, PCIe Gen5, 32 and 128 blocks: 57 and 66 us
/// at 1 MiB, 278 and 189 us at 4 MiB, 4.3 and 2.1 ms at 64 MiB.
const HOST_BLOCKS: (u32, u32) = (32, 128);
/// Units of a message from which on bandwidth counts.
const HOST_STREAM_UNITS: usize = 128 << 10;

/// The format for a message of `bytes` bytes that is moved, not reduced.
pub fn format(bytes: usize) -> Format {
    if bytes <= PACKET_BYTES { Format::Packet } else { Format::Full }
}

/// The grid for messages of `units` units to each peer.
pub fn grid(shape: &Shape, units: usize) -> Grid {
    let units = units.max(1);
    // Calls that seal all chunks have half the lanes, and so have the others.
    let few = if units < HOST_STREAM_UNITS { HOST_BLOCKS.0 } else { HOST_BLOCKS.1 };
    let limit = if shape.host { few.min(shape.layout.lanes.div_ceil(2)) } else { u32::MAX };
    let most_blocks = shape.max_blocks.min(shape.layout.lanes).min(limit) as usize;
    let threads = threads(units, most_blocks);
    // Whole rows of threads, so that no warp is half empty and every share begins aligned.
    let block_units = units.div_ceil(most_blocks).next_multiple_of(threads as usize);
    Grid {
        units,
        blocks: units.div_ceil(block_units) as u32,
        threads,
        block_units: block_units as u32,
        chunk_units: block_units.min(shape.layout.slot_units as usize) as u32,
    }
}

/// Whether chunks are sealed whatever they hold: over host memory, from three chunks a block on. Such
/// calls wait for bandwidth, which polling for the data themselves would take; shorter ones wait for
/// latency, which a seal adds to.
pub fn seals_all(shape: &Shape, grid: &Grid) -> bool {
    shape.host && shape.layout.lanes > 1 && grid.block_units > 2 * grid.chunk_units
}

/// Threads in a block: as few as give each thread one unit, but at least a warp's worth per
/// scheduler.
fn threads(units: usize, most_blocks: usize) -> u32 {
    let even = units.div_ceil(most_blocks).next_power_of_two();
    (even as u32).clamp(128, MAX_THREADS)
}

/// The trees along which `algorithm` adds up `count` elements, and the elements in a part; `None` if it
/// adds them in rank order and rounds once. `islands` has an entry for each rank.
pub fn trees(
    islands: &[u8],
    algorithm: Algorithm,
    (count, dtype, wire): (usize, DType, Wire),
) -> Option<(Forest, usize)> {
    // A rank alone adds nothing up, and two-shot's trees are one level high.
    let adds_once = matches!(algorithm, Algorithm::TwoShot | Algorithm::Staged);
    if adds_once || islands.len() < 2 {
        return None;
    }
    let forest = roles::forest(islands, algorithm.pattern())?;
    let unit = Format::Full.payload() * expansion(dtype, wire);
    let units = (count * dtype.bytes()).div_ceil(unit);
    let part = part_units(forest.parts(), units) * (unit / dtype.bytes());
    Some((forest, part))
}

/// Tensor bytes per wire byte.
pub fn expansion(dtype: DType, wire: Wire) -> usize {
    if dtype == DType::F32 && wire == Wire::Bf16 { 2 } else { 1 }
}

/// Units of every part but the last ones of a tensor of `units` units in `parts` parts.
pub fn part_units(parts: u32, units: usize) -> usize {
    units.div_ceil(parts as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;
    use proptest::prelude::*;

    fn shape(world: u32, max_blocks: u32) -> Shape {
        Shape::new(world, layout::choose(world, 32 << 20).unwrap(), max_blocks)
    }

    proptest! {
        #[test]
        fn a_grid_covers_the_message_and_fits_the_layout(
            world in 1u32..=16, max_blocks in 1u32..=264, units in 0usize..1 << 24,
        ) {
            let shape = shape(world, max_blocks);
            let grid = grid(&shape, units);
            prop_assert!(grid.blocks >= 1 && grid.blocks <= max_blocks.min(shape.layout.lanes));
            prop_assert!(grid.threads.is_power_of_two() && grid.threads <= MAX_THREADS);
            prop_assert!(grid.chunk_units >= 1 && grid.chunk_units <= shape.layout.slot_units);
            // All units belong to a block, and no block is idle.
            prop_assert_eq!(units.max(1).div_ceil(grid.block_units as usize), grid.blocks as usize);
            prop_assert!(grid.chunk_units.is_multiple_of(4));
        }
    }

    #[test]
    fn few_blocks_fill_pcie() {
        let host = Shape { host: true, ..shape(2, 264) };
        assert_eq!(grid(&host, 1 << 16).blocks, HOST_BLOCKS.0);
        assert_eq!(grid(&host, 1 << 20).blocks, HOST_BLOCKS.1);
        assert_eq!(grid(&Shape { max_blocks: 5, ..host }, 1 << 20).blocks, 5);
    }
}
