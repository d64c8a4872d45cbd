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

/// Blocks of a class: those in use, and the most at a time since the pool last adapted, and before that.
#[derive(Clone, Copy, Default)]
struct Use {
    now: usize,
    most: usize,
    before: usize,
}

#[derive(Default)]
pub(super) struct State {
    /// By class; in a class, what was freed first comes first.
    pub(super) idle: BTreeMap<usize, VecDeque<Chunk>>,
    pub(super) retired: Vec<Chunk>,
    pub(super) stats: Stats,
    /// By class.
    uses: BTreeMap<usize, Use>,
}

impl State {
    /// A block of the class has a holder, who asked for `bytes`.
    pub(super) fn taken(&mut self, bytes: usize, class: usize) {
        self.stats.taken(bytes, class);
        let of = self.uses.entry(class).or_default();
        of.now += 1;
        of.most = of.most.max(of.now);
    }

    /// It has none any more.
    pub(super) fn returned(&mut self, bytes: usize, class: usize) {
        self.stats.returned(bytes, class);
        if let Some(of) = self.uses.get_mut(&class) {
            of.now -= 1;
        }
    }

    /// Ends a window, and takes the idle chunks that neither it nor the one before had a use for: of each class those that were
    /// freed first.
    pub(super) fn take_spare(&mut self) -> Vec<(usize, Chunk)> {
        let mut spare = Vec::new();
        for (class, idle) in &mut self.idle {
            let Use { now, most, before } = self.uses.get(class).copied().unwrap_or_default();
            let keep = most.max(before) - now;
            while idle.len() > keep
                && let Some(at) = idle.iter().position(|chunk| !chunk.exported)
                && let Some(chunk) = idle.remove(at)
            {
                self.stats.idle -= class;
                spare.push((*class, chunk));
            }
        }
        for of in self.uses.values_mut() {
            (of.before, of.most) = (of.most, of.now);
        }
        spare
    }

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
