//! What a pool holds that no block does, and which of it goes to whom.
//!
//! Invariant: a chunk is in one place: in a block, idle, or retired; the books say how much is where.

use super::stats::Stats;
use crate::gpu::{DevicePtr, Event, HostMemory, Stream};
use std::collections::{BTreeMap, VecDeque};

/// One piece of memory from the driver.
#[derive(Clone, Copy)]
pub(super) enum Memory {
    Device(DevicePtr),
    Host(HostMemory),
}

impl Memory {
    pub(super) fn device(self) -> DevicePtr {
        match self {
            Memory::Device(memory) => memory,
            Memory::Host(memory) => memory.device,
        }
    }
}

/// Memory, and the event that says when its last holder's stream is done with it.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    pub(super) memory: Memory,
    pub(super) event: Event,
    /// Where the event was recorded last; `None` for memory that nobody has used.
    pub(super) freed_on: Option<Stream>,
    /// Whether other processes may have it mapped.
    pub(super) exported: bool,
}

#[derive(Default)]
pub(super) struct State {
    /// By class; in a class, what was freed first comes first.
    pub(super) idle: BTreeMap<usize, VecDeque<Chunk>>,
    pub(super) retired: Vec<Chunk>,
    pub(super) stats: Stats,
}

impl State {
    /// An idle chunk of the class, if there is one: one that needs no wait before one that does.
    pub(super) fn take(&mut self, class: usize, stream: Stream) -> Option<Chunk> {
        let idle = self.idle.get_mut(&class)?;
        let ready = |chunk: &Chunk| chunk.freed_on.is_none_or(|freed_on| freed_on == stream);
        let at = idle.iter().rposition(ready).unwrap_or(0);
        let chunk = idle.remove(at)?;
        self.stats.idle -= class;
        Some(chunk)
    }

    pub(super) fn put(&mut self, class: usize, chunk: Chunk) {
        self.idle.entry(class).or_default().push_back(chunk);
        self.stats.idle += class;
    }

    pub(super) fn retire(&mut self, class: usize, chunk: Chunk) {
        self.retired.push(chunk);
        self.stats.retired += class;
    }

    /// The largest idle chunk that nobody else may have mapped.
    pub(super) fn take_largest(&mut self) -> Option<(usize, Chunk)> {
        let found = self.idle.iter().rev().find_map(|(class, idle)| {
            Some((*class, idle.iter().position(|chunk| !chunk.exported)?))
        });
        let (class, at) = found?;
        let chunk = self.idle.get_mut(&class)?.remove(at)?;
        self.stats.idle -= class;
        Some((class, chunk))
    }
}
