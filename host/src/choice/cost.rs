//! What a call is expected to cost: a launch, steps, and bytes.
//!
//! time = launch + steps x alpha + bytes out of the busiest GPU / beta. Steps and bytes are read off the
//! trees that the kernels use; alpha and beta come from the kind of link, or from its measurement.
//!
//! Pure. Invariant: a cost never falls as bytes grow, except a packet's below the size at which it
//! is of use, and depends only on what all ranks agreed on.

use crate::algorithm::{Algorithm, Route};
use crate::links::{Measurement, Quantity, Traffic};
use crate::plan::Shape;
use crate::plan::forest::{Forest, Tree};
use crate::plan::roles;
use peerlane_device::abi::{Format, UNIT};
use serde::{Deserialize, Serialize};

/// The kind of the slowest link between two ranks of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkClass {
    /// NVLink between every pair, directly or through switches.
    NvLink,
    /// PCIe of this generation between some.
    Pcie(u8),
    /// Host memory between some.
    Host,
}

impl LinkClass {
    /// The name used in reports.
    pub fn name(self) -> String {
        match self {
            LinkClass::NvLink => "NVLink".into(),
            LinkClass::Pcie(generation) => format!("PCIe {generation}"),
            LinkClass::Host => "host memory".into(),
        }
    }
}

/// What links give. GB/s are 10^9 bytes a second, out of one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Links {
    /// Microseconds of a step: a store, seen by a peer that waits for it.
    pub step_us: f64,
    /// Stores to all other GPUs at once.
    pub store_gbps: f64,
    /// Stores to one other GPU, while each GPU has one to send to.
    pub single_gbps: f64,
    /// Copies by a copy engine.
    pub copy_gbps: f64,
}

/// Microseconds to begin a kernel in a graph.
const LAUNCH_US: f64 = 0.6;
/// Microseconds that a scheduled step takes longer than a store: a copy, flags, an event, a local reduction. Two
/// steps of 8 KiB take 41 us on two H200s.
const SCHEDULED_STEP_US: f64 = 18.5;
/// A message of full width is looked through for words that look free. Measured on two H200s
/// (docs/performance.md), that costs what sending this many bytes more costs.
const FULL_CHECK_BYTES: f64 = 1024.0;

impl Links {
    /// What links of a class give that nobody has measured (docs/tuning.md says where each figure comes from).
    pub fn of(class: LinkClass) -> Links {
        let even = |step_us, gbps, copy_gbps| Links {
            step_us,
            store_gbps: gbps,
            single_gbps: gbps,
            copy_gbps,
        };
        match class {
            LinkClass::NvLink => even(1.87, 356.0, 383.0),
            LinkClass::Pcie(generation) => {
                let gbps = match generation {
                    ..=3 => 13.0,
                    4 => 26.3,
                    _ => 53.0,
                };
                even(2.5, gbps, gbps)
            }
            LinkClass::Host => even(5.0, 20.0, 20.0),
        }
    }

    /// Whether they are figures that something could have been measured to have.
    pub(super) fn are_sound(&self) -> bool {
        let figures = [self.step_us, self.store_gbps, self.single_gbps, self.copy_gbps];
        figures.into_iter().all(|figure| figure.is_finite() && figure > 0.0)
    }

    /// The same with the rates of the slowest GPU in `measured`, if every pair has figures.
    ///
    /// The latency stays the class's: a step also polls, reduces and stores.
    pub fn measured(class: LinkClass, measured: &Measurement) -> Option<Links> {
        let others = f64::from(measured.gpus.checked_sub(1).filter(|others| *others > 0)?);
        let slowest = |quantity, traffic| {
            let rates = measured.pairs.iter();
            let rates = rates.map(|pair| measured.figure(pair.from, pair.to, quantity, traffic));
            let rates = rates.collect::<Option<Vec<f64>>>()?;
            rates.into_iter().reduce(f64::min)
        };
        let single_gbps = slowest(Quantity::Store, Traffic::Alone)?;
        let loaded = slowest(Quantity::Store, Traffic::Loaded)? * others;
        let copy_gbps = slowest(Quantity::Copy, Traffic::Alone)?;
        Some(Links { store_gbps: loaded, single_gbps, copy_gbps, ..Links::of(class) })
    }
}

/// What does not depend on the size of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Terms {
    /// Steps, one after the other.
    steps: f64,
    /// Tensors out of, or into, the busiest rank.
    tensors: f64,
    /// Steps before the last rank has a first chunk, beyond the first in each direction.
    hops: f64,
    /// Parts of the tensor.
    parts: f64,
    /// Whether some rank sends to several others at once.
    fans: bool,
}

impl Terms {
    /// Of the trees in each direction that a call uses.
    fn of(world: u32, directions: &[&[Tree]]) -> Terms {
        let parts = directions.first().map_or(1, |trees| trees.len());
        let mut terms =
            Terms { steps: 0.0, tensors: 0.0, hops: 0.0, parts: parts as f64, fans: false };
        let (mut sent, mut received) = (vec![0u32; world as usize], vec![0u32; world as usize]);
        for (direction, trees) in directions.iter().enumerate() {
            let height = trees.iter().map(Tree::height).max().unwrap_or(0);
            terms.steps += f64::from(height);
            // Where every rank has a part of its own, others keep it busy meanwhile.
            if parts < world as usize {
                terms.hops += f64::from(height.saturating_sub(1));
            }
            for rank in 0..world {
                let below = trees.iter().flat_map(|tree| tree.children(rank)).collect::<Vec<_>>();
                let above = trees.iter().filter_map(|tree| tree.parent(rank)).collect::<Vec<_>>();
                // The last direction is the one in which results come back.
                let is_result = direction + 1 == directions.len();
                let (to, from) = if is_result { (below, above) } else { (above, below) };
                terms.fans |= to.iter().any(|peer| *peer != to[0]);
                sent[rank as usize] += to.len() as u32;
                received[rank as usize] += from.len() as u32;
            }
        }
        let most = sent.into_iter().chain(received).max().unwrap_or(0);
        terms.tensors = f64::from(most) / terms.parts;
        terms
    }

    fn of_all_reduce(forest: &Forest, world: u32) -> Terms {
        Terms::of(world, &[forest.sums(), forest.results()])
    }
}

/// What one algorithm or route costs on some links: a line, bent where a chunk is full.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    fixed_us: f64,
    us_per_byte: f64,
    /// The same for each byte of a part, up to a chunk: it fills the way to the last rank.
    filling_us_per_byte: f64,
    chunk_bytes: f64,
    parts: f64,
}

impl Cost {
    /// Microseconds for `bytes` bytes on the wire.
    pub fn us(&self, bytes: usize) -> f64 {
        let bytes = bytes as f64;
        let filling = (bytes / self.parts).min(self.chunk_bytes);
        self.fixed_us + bytes * self.us_per_byte + filling * self.filling_us_per_byte
    }

    fn new(terms: Terms, step_us: f64, gbps: f64, shape: &Shape) -> Cost {
        let us_per_byte = 1e-3 / gbps;
        let blocks = shape.max_blocks.min(shape.layout.lanes);
        Cost {
            fixed_us: LAUNCH_US + terms.steps * step_us,
            us_per_byte: terms.tensors * us_per_byte,
            filling_us_per_byte: terms.hops * us_per_byte,
            chunk_bytes: f64::from(blocks) * f64::from(shape.layout.slot_units) * UNIT as f64,
            parts: terms.parts,
        }
    }

    /// Of an all-reduce among two ranks or more.
    pub fn of_all_reduce(algorithm: Algorithm, shape: &Shape, links: &Links) -> Cost {
        let world = shape.world;
        let fused = |terms: Terms| {
            let gbps = if terms.fans { links.store_gbps } else { links.single_gbps };
            Cost::new(terms, links.step_us, gbps, shape)
        };
        let others = f64::from(world - 1);
        let one_shot =
            Terms { steps: 1.0, tensors: others, hops: 0.0, parts: 1.0, fans: world > 2 };
        let forest = roles::forest(shape.by_island(), algorithm.pattern());
        let terms = forest.map_or(one_shot, |forest| Terms::of_all_reduce(&forest, world));
        match algorithm {
            Algorithm::OneShot(Format::Packet) => {
                let full = fused(terms);
                // Twice the bytes, and no check.
                let check_us = FULL_CHECK_BYTES * full.us_per_byte;
                let us_per_byte = 2.0 * full.us_per_byte;
                Cost { fixed_us: full.fixed_us - check_us, us_per_byte, ..full }
            }
            Algorithm::Staged => fused(Terms { steps: 2.0 * others, fans: false, ..terms }),
            Algorithm::Scheduled(_) => {
                let step_us = links.step_us + SCHEDULED_STEP_US;
                Cost::new(terms, step_us, links.copy_gbps, shape)
            }
            Algorithm::OneShot(Format::Full)
            | Algorithm::TwoShot
            | Algorithm::Ring
            | Algorithm::Tree
            | Algorithm::DoubleTree
            | Algorithm::Hierarchical => fused(terms),
        }
    }

    /// Of a broadcast from rank 0 among two ranks or more.
    pub fn of_broadcast(route: Route, shape: &Shape, links: &Links) -> Cost {
        let forest = roles::spread(shape, route.spread(), 0);
        let terms = Terms::of(shape.world, &[forest.results()]);
        if route.is_scheduled() {
            let step_us = links.step_us + SCHEDULED_STEP_US;
            return Cost::new(terms, step_us, links.copy_gbps, shape);
        }
        let gbps = if terms.fans { links.store_gbps } else { links.single_gbps };
        Cost::new(terms, links.step_us, gbps, shape)
    }
}
