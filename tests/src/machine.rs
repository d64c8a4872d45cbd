//! The GPUs under test: simulated ones with a seed, or the real ones of this machine.

use crate::processes::Gpus;
use peerlane::gpu::{Backend, GpuRef, cuda, sim};
use peerlane::{Config, layout};
use std::time::Duration;

/// Which simulated GPUs reach which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// Every GPU reaches every other.
    All,
    /// No GPU reaches another.
    None,
    /// 0 and 1 reach each other, so do 2 and 3, and so on. A last one without a partner is alone.
    Pairs,
    /// A third of the ordered pairs is missing.
    OneWay,
}

impl Links {
    /// All of them.
    pub const ALL: [Links; 4] = [Links::All, Links::None, Links::Pairs, Links::OneWay];

    /// Whether `from` reaches `to`.
    pub fn reach(self, from: u32, to: u32) -> bool {
        match self {
            _ if from == to => true,
            Links::All => true,
            Links::None => false,
            Links::Pairs => from / 2 == to / 2,
            Links::OneWay => (2 * from + to) % 3 != 1,
        }
    }

    /// The ordered pairs of `devices` GPUs that are missing.
    pub fn missing(self, devices: u32) -> Vec<(u32, u32)> {
        let pairs = (0..devices).flat_map(|from| (0..devices).map(move |to| (from, to)));
        pairs.filter(|(from, to)| !self.reach(*from, *to)).collect()
    }
}

/// A machine with GPUs.
pub struct Machine {
    gpus: Vec<GpuRef>,
}

impl Machine {
    /// `devices` simulated GPUs.
    pub fn sim(devices: u32, seed: u64) -> Machine {
        Machine::simulated(&sim::Config { devices, seed, ..Default::default() })
    }

    /// `devices` simulated GPUs with these links only.
    pub fn linked(devices: u32, seed: u64, links: Links) -> Machine {
        let one_way = links.missing(devices);
        Machine::simulated(&sim::Config { devices, seed, one_way, ..Default::default() })
    }

    /// The simulated machine that `config` describes.
    pub fn simulated(config: &sim::Config) -> Machine {
        Machine { gpus: sim::devices(config) }
    }

    /// The real GPUs of this machine, or why there are none.
    pub fn cuda() -> Result<Machine, String> {
        let gpus = cuda::devices().map_err(|error| error.to_string())?;
        if gpus.is_empty() { Err("the driver shows no GPU".into()) } else { Ok(Machine { gpus }) }
    }

    /// A GPU for each of `world` ranks; ranks beyond the number of GPUs share them.
    pub fn gpus(&self, world: u32) -> Vec<GpuRef> {
        self.gpus.iter().cycle().take(world as usize).cloned().collect()
    }

    /// All GPUs of a real machine, for ranks that are processes.
    pub fn all(&self) -> Gpus {
        Gpus::Cuda(self.gpus.len() as u32)
    }

    /// How many GPUs it has.
    pub fn count(&self) -> u32 {
        self.gpus.len() as u32
    }

    /// Whether the GPUs are simulated.
    pub fn is_simulated(&self) -> bool {
        self.gpus[0].backend() == Backend::Sim
    }
}

/// A configuration with the smallest slots there are and two lanes, so that a few KiB take many
/// chunks and fill the pipes.
pub fn small(world: u32) -> Config {
    let enough = |bytes: usize| layout::choose(world, bytes).is_some_and(|l| l.lanes >= 2);
    let (mut too_few, mut mailbox_bytes) = (0, 32 << 20);
    while too_few + 1 < mailbox_bytes {
        let middle = usize::midpoint(too_few, mailbox_bytes);
        *if enough(middle) { &mut mailbox_bytes } else { &mut too_few } = middle;
    }
    Config {
        mailbox_bytes,
        max_blocks: Some(2),
        deadline: Duration::from_secs(10),
        // Tests of deadlines wait in vain in their first call.
        first_deadline: Some(Duration::ZERO),
        ..Config::default()
    }
}
