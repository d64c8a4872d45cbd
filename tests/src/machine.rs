//! The GPUs under test: simulated ones with a seed, or the real ones of this machine.

use peerlane::gpu::{Backend, GpuRef, cuda, sim};
use peerlane::{Config, layout};
use peerlane_device::abi::Layout;
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

    /// Whether the GPUs are simulated.
    pub fn is_simulated(&self) -> bool {
        self.gpus[0].backend() == Backend::Sim
    }
}

/// A configuration with the smallest slots there are and two lanes, so that a few KiB take many
/// chunks and fill the pipes.
pub fn small(world: u32) -> Config {
    // `choose` gives smaller limits smaller slots before it gives up lanes.
    let slots = layout::choose(world, 32 << 20).expect("the default fits any world").slots;
    let layout = Layout { lanes: 2, slots, slot_units: 64, reserved: 0 };
    Config {
        mailbox_bytes: layout.mailbox_bytes(world),
        max_blocks: Some(2),
        deadline: Duration::from_secs(10),
        ..Config::default()
    }
}
