//! Tests of the simulator itself: it must behave as a GPU does where kernels rely on it, and worse
//! than a GPU does where they must not.

mod access;
mod autonomous;
mod faults;
mod graphs;
mod memory_model;
mod schedule;
mod shared;
mod streams;

use super::device::SimGpu;
use super::{Config, SimLane, World};
use crate::error::Result;
use crate::gpu::{DevicePtr, Gpu, Stream};
use peerlane_device::abi::{Args, Layout};
use std::sync::Arc;

/// The default stream.
const DEFAULT: Stream = Stream(0);

/// A machine whose GPUs all reach each other, with memory `bytes` each, zeroed.
struct Machine {
    world: World,
    gpus: Vec<SimGpu>,
    memory: Vec<DevicePtr>,
}

impl Machine {
    fn new(devices: u32, seed: u64, bytes: usize) -> Machine {
        Machine::with(&Config { devices, seed, ..Config::default() }, bytes)
    }

    fn with(config: &Config, bytes: usize) -> Machine {
        let world = World::new(config);
        let gpus: Vec<SimGpu> = (0..config.devices).map(|ordinal| world.gpu(ordinal)).collect();
        for gpu in &gpus {
            for peer in (0..config.devices).filter(|&p| p != gpu.properties().ordinal) {
                gpu.enable_peer(peer).unwrap();
            }
        }
        let memory: Vec<DevicePtr> = gpus.iter().map(|gpu| gpu.alloc(bytes).unwrap()).collect();
        for (gpu, memory) in gpus.iter().zip(&memory) {
            // SAFETY: the memory is of that size.
            unsafe { gpu.fill(*memory, 0, bytes, DEFAULT).unwrap() };
        }
        let machine = Machine { world, gpus, memory };
        // A peer's store must not come before this rank's zeros.
        machine.synchronize().unwrap();
        machine
    }

    /// Arguments for `rank`, with everybody's memory as peers.
    fn args(&self, rank: u32) -> Args {
        let mut args = args();
        args.rank = rank;
        args.world = self.gpus.len() as u32;
        for (peer, memory) in args.peers.iter_mut().zip(&self.memory) {
            *peer = memory.0;
        }
        args
    }

    /// Queues `body` on one GPU's default stream.
    fn launch(
        &self,
        rank: u32,
        grid: (u32, u32),
        body: impl Fn(SimLane, &Args) + Send + Sync + 'static,
    ) -> Result<()> {
        let gpu = &self.gpus[rank as usize];
        gpu.launch_body("body", Arc::new(body), grid, &self.args(rank), DEFAULT)
    }

    fn synchronize(&self) -> Result<()> {
        self.gpus.iter().try_for_each(|gpu| gpu.stream_synchronize(DEFAULT))
    }

    /// The word at `offset` of a GPU's memory, after its default stream.
    fn word(&self, rank: usize, offset: usize) -> u32 {
        read(&self.gpus[rank], self.memory[rank].offset(offset), DEFAULT)
    }
}

fn read(gpu: &dyn Gpu, at: DevicePtr, stream: Stream) -> u32 {
    let mut bytes = [0; 4];
    // SAFETY: every test asks for words inside its memory.
    unsafe { gpu.download(&mut bytes, at, stream).unwrap() };
    u32::from_ne_bytes(bytes)
}

fn args() -> Args {
    let layout = Layout::new(1, 1, 1).unwrap();
    Args { deadline: 0, chunk_units: 0, ..Args::new(0, 1, layout) }
}
