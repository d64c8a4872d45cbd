//! Simulated GPUs: a machine of virtual GPUs on the CPU, behind the same trait as real ones.
//!
//! Every GPU thread is a coroutine that runs the kernel's own Rust source. A seed decides which
//! runs next and when a store reaches memory, so a failure comes back with its seed.
//!
//! Invariant: what a real GPU might forgive, this one does not. Stores are late, torn and out of
//! order unless a fence orders them; ranks run at very different paces; every access is checked.
//! It promises nothing about speed: simulated time only orders events and lets deadlines pass.
//!
//! A unit lands whole or in halves of 8 bytes. What it does not model: caches and load reordering (a
//! load always sees memory as it is when it runs), limits on resident blocks, and bandwidth.
//!
//! Ranks that are processes have a world each, made from equal configurations. Device memory that
//! one world exports is a file, which the others map: all they know of each other.

mod access;
mod backing;
mod capture;
mod config;
mod context;
mod device;
mod engine;
mod fail;
mod fault;
mod gpu;
mod kernel;
mod lane;
mod memory;
mod mover;
mod outbox;
mod random;
mod scheduler;
mod shared;
mod stack;
mod stream;
#[cfg(test)]
mod tests;
mod work;
mod world;

pub use config::{Config, Statistics};
pub use fault::{Fault, Harm, Target};
pub use lane::SimLane;

use super::GpuRef;
use std::sync::Arc;

/// A simulated machine. It lives as long as one of its GPUs.
pub struct World(Arc<mover::Handle>);

impl World {
    /// Makes a machine.
    ///
    /// # Panics
    /// If the machine is to be autonomous and the operating system has no thread for it.
    pub fn new(config: &Config) -> World {
        World(Arc::new(mover::Handle::new(world::Shared::new(config))))
    }

    /// The seed that it was made with.
    pub fn seed(&self) -> u64 {
        self.0.config.seed
    }

    /// What it has done so far.
    pub fn statistics(&self) -> Statistics {
        self.0.statistics()
    }

    /// For each fault of its configuration, how many of the turns or stores that the fault counts there have been:
    /// one with a number that is reached has struck.
    pub fn occasions(&self) -> Vec<u64> {
        self.0.occasions()
    }

    /// Its GPUs, by ordinal.
    pub fn devices(&self) -> Vec<GpuRef> {
        (0..self.0.config.devices).map(|ordinal| Arc::new(self.gpu(ordinal)) as GpuRef).collect()
    }

    fn gpu(&self, ordinal: u32) -> device::SimGpu {
        device::SimGpu::new(&self.0, ordinal)
    }
}

/// The GPUs of a new simulated machine.
pub fn devices(config: &Config) -> Vec<GpuRef> {
    World::new(config).devices()
}
