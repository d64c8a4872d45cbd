//! What the links between GPUs give, measured: [`measure()`] fills a [`Measurement`], a [`Cache`] keeps
//! it, and islands, hubs and transports are read off it.
//!
//! Invariant: a figure was measured here or by the same version of Peerlane on the same GPUs, or it
//! is not there and the pair says why. What the driver claims is never a figure. Pairs are named by
//! positions in the list of GPUs; the first of a pair acts: it stores, loads or copies.

mod cache;
mod islands;
mod latency;
mod measure;
pub(crate) mod rig;

pub use cache::{CACHE_VARIABLE, Cache, Key};
pub(crate) use cache::{LINKS, fingerprint, read_file, replace_file};
pub use islands::{GAP, TIE, hub, islands};
pub use measure::{Settings, measure};

use crate::error::Result;
use crate::gpu::{Backend, GpuRef};
use crate::topology::Topology;
use serde::{Deserialize, Serialize};

/// Every ordered pair of GPUs, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Whether the GPUs are real. Figures of simulated ones are simulated.
    pub backend: Backend,
    /// GPUs measured.
    pub gpus: u32,
    /// Bytes that one store, load or copy moved.
    pub message_bytes: u64,
    /// Every ordered pair of two different positions, by `from`, then by `to`.
    pub pairs: Vec<Pair>,
}

/// One ordered pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Position of the GPU that acts.
    pub from: u32,
    /// Position of the GPU whose memory it stores into, loads from or copies to.
    pub to: u32,
    /// What was measured; none if `from` cannot use the memory of `to`.
    pub figures: Option<Figures>,
    /// Why a figure is missing.
    pub reason: Option<String>,
}

/// The figures of one ordered pair.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// While no other pair is busy.
    pub alone: Quantities,
    /// While every GPU sends to every other.
    pub loaded: Quantities,
}

/// What is measured. GB/s are 10^9 bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantities {
    /// Microseconds from a small put to a flag that the other side has seen, the mean of both
    /// directions; none if only one of them is there.
    pub latency_us: Option<f64>,
    /// GB/s of stores by a kernel.
    pub store_gbps: f64,
    /// GB/s of loads by a kernel.
    pub load_gbps: f64,
    /// GB/s of the copy engine, writing.
    pub copy_gbps: f64,
}

/// One of the fields of [`Quantities`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// [`Quantities::latency_us`].
    Latency,
    /// [`Quantities::store_gbps`].
    Store,
    /// [`Quantities::load_gbps`].
    Load,
    /// [`Quantities::copy_gbps`].
    Copy,
}

/// One of the fields of [`Figures`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// [`Figures::alone`].
    Alone,
    /// [`Figures::loaded`].
    Loaded,
}

/// How what one rank sends can reach another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// Both ranks are on one GPU.
    SameGpu,
    /// The first's GPU writes into the second's memory.
    P2p,
    /// Only through host memory.
    Host,
}

impl Quantity {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Quantity; 4] =
        [Quantity::Latency, Quantity::Store, Quantity::Load, Quantity::Copy];

    /// What it is, with its unit.
    pub const fn title(self) -> &'static str {
        match self {
            Quantity::Latency => "latency, us",
            Quantity::Store => "SM stores, GB/s",
            Quantity::Load => "SM loads, GB/s",
            Quantity::Copy => "copy engine, GB/s",
        }
    }
}

impl Traffic {
    /// Both, in the order in which they are shown.
    pub const ALL: [Traffic; 2] = [Traffic::Alone, Traffic::Loaded];

    /// The name used in titles.
    pub const fn name(self) -> &'static str {
        match self {
            Traffic::Alone => "alone",
            Traffic::Loaded => "all pairs at once",
        }
    }
}

impl Reach {
    /// The name used in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Reach::SameGpu => "same",
            Reach::P2p => "p2p",
            Reach::Host => "host",
        }
    }
}

impl Measurement {
    /// The pair of two different positions.
    pub fn pair(&self, from: u32, to: u32) -> Option<&Pair> {
        self.pairs.iter().find(|pair| (pair.from, pair.to) == (from, to))
    }

    /// One figure of a pair, if there is one.
    pub fn figure(&self, from: u32, to: u32, quantity: Quantity, traffic: Traffic) -> Option<f64> {
        let figures = self.pair(from, to)?.figures?;
        let quantities = match traffic {
            Traffic::Alone => figures.alone,
            Traffic::Loaded => figures.loaded,
        };
        match quantity {
            Quantity::Latency => quantities.latency_us,
            Quantity::Store => Some(quantities.store_gbps),
            Quantity::Load => Some(quantities.load_gbps),
            Quantity::Copy => Some(quantities.copy_gbps),
        }
    }

    /// `[from][to]` of one figure.
    pub fn matrix(&self, quantity: Quantity, traffic: Traffic) -> Vec<Vec<Option<f64>>> {
        let row =
            |from| (0..self.gpus).map(|to| self.figure(from, to, quantity, traffic)).collect();
        (0..self.gpus).map(row).collect()
    }

    /// The islands by SM stores alone, which is how the kernels send.
    pub fn islands(&self) -> Vec<Vec<u32>> {
        islands(&self.matrix(Quantity::Store, Traffic::Alone))
    }

    /// The hub of `members` by SM stores alone.
    pub fn hub(&self, members: &[u32]) -> Option<u32> {
        hub(&self.matrix(Quantity::Store, Traffic::Alone), members)
    }

    /// Whether it is what [`measure()`] makes of `gpus` GPUs: nothing that was read from a file is
    /// believed before.
    fn is_sound(&self, gpus: u32) -> bool {
        let order = (0..gpus).flat_map(|from| (0..gpus).map(move |to| (from, to)));
        let order = order.filter(|(from, to)| from != to);
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let sound = |q: &Quantities| {
            let rates = [q.store_gbps, q.load_gbps, q.copy_gbps];
            q.latency_us.is_none_or(positive) && rates.into_iter().all(positive)
        };
        self.gpus == gpus
            && self.pairs.iter().map(|pair| (pair.from, pair.to)).eq(order)
            && self.pairs.iter().all(|pair| match &pair.figures {
                Some(figures) => sound(&figures.alone) && sound(&figures.loaded),
                None => pair.reason.is_some(),
            })
    }
}

/// How `from` can send to `to`: by what was measured, or else by what the driver says. The other direction may
/// be another way.
pub fn transport(
    topology: &Topology,
    measurement: Option<&Measurement>,
    from: u32,
    to: u32,
) -> Option<Reach> {
    let link = topology.link(from, to)?;
    let works = match measurement {
        Some(measured) => measured.pair(from, to).is_some_and(|pair| pair.figures.is_some()),
        None => link.access.access,
    };
    Some(match (works, link.same_gpu) {
        (true, true) => Reach::SameGpu,
        (true, false) => Reach::P2p,
        (false, _) => Reach::Host,
    })
}

/// A measurement, and where it came from.
#[derive(Clone, Debug)]
pub struct Found {
    /// The figures.
    pub measurement: Measurement,
    /// Whether they were in the cache; else they were measured just now.
    pub cached: bool,
    /// What did not go as it should, in words.
    pub notes: Vec<String>,
}

/// The measurement of `gpus`: from `cache`, if it is there under `key` and `refresh` is not asked for,
/// else made now and kept there. Trouble with the cache is a note. Without a key or a cache nothing
/// is read or kept.
///
/// # Errors
/// As [`measure()`].
pub fn find(
    gpus: &[GpuRef],
    settings: &Settings,
    key: Option<&Key>,
    cache: Option<&Cache>,
    refresh: bool,
) -> Result<Found> {
    let mut notes = Vec::new();
    let place = key.zip(cache);
    if let (Some((key, cache)), false) = (place, refresh) {
        match cache.load(key) {
            Ok(Some(measurement)) => return Ok(Found { measurement, cached: true, notes }),
            Ok(None) => {}
            Err(note) => notes.push(note),
        }
    }
    let measurement = measure(gpus, settings)?;
    if let Some(Err(note)) = place.map(|(key, cache)| cache.store(key, &measurement)) {
        notes.push(note);
    }
    Ok(Found { measurement, cached: false, notes })
}

#[cfg(test)]
mod tests;
