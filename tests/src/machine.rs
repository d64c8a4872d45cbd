//! The GPUs under test: simulated ones with a seed, or the real ones of this machine.

use crate::processes::Gpus;
use peerlane::gpu::{Backend, GpuRef, cuda, sim};
use peerlane::{Config, layout};
use std::time::Duration;

/// A machine with GPUs.
pub struct Machine {
    gpus: Vec<GpuRef>,
}

impl Machine {
    /// `devices` simulated GPUs.
    pub fn sim(devices: u32, seed: u64) -> Machine {
        Machine::simulated(&sim::Config { devices, seed, ..Default::default() })
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
        ..Config::default()
    }
}
