//! What goes wrong in a machine because its configuration says so: a GPU that stops or crawls, a store that
//! is late, lost or changed.
//!
//! Invariant: a fault strikes once, at a place in the schedule that follows from the configuration alone, and a
//! machine without faults takes the turns that it would take if this module did not exist. A late store is late within
//! the memory model: fences of its block and the end of its kernel wait for it. The others are what hardware must
//! not do.

use super::memory::Memory;
use std::cell::{Cell, RefCell};

/// Something that goes wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Fault {
    /// The GPU hangs for good at the end of a turn of one of its lanes: none of them takes another, and nothing
    /// that is queued on it starts. Once nothing else runs, every call that waits for it fails.
    Stop {
        /// The GPU.
        gpu: u32,
        /// Which turn of its lanes, counted from 1.
        turn: u64,
    },
    /// From a turn on, for a while, the GPU takes its turns slowly.
    Slow {
        /// The GPU.
        gpu: u32,
        /// Which turn of its lanes, counted from 1.
        turn: u64,
        /// Simulated nanoseconds between two turns of a lane; 1 is as fast as any.
        turn_ns: u64,
        /// Simulated nanoseconds until it is as fast as before.
        lasts_ns: u64,
    },
    /// A store into the memory of a GPU, by a kernel (a unit or a word) or by a stream (a word or a copy), suffers.
    Store {
        /// The GPU that stores.
        from: u32,
        /// The GPU whose memory it is.
        to: u32,
        /// Which memory.
        memory: Target,
        /// Which of those stores, counted from 1.
        nth: u64,
        /// What becomes of it.
        harm: Harm,
    },
}

/// Whether a store goes to a GPU's own memory or to pinned host memory that was allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Target {
    /// Its own memory.
    Device,
    /// Its pinned host memory.
    Host,
}

/// What becomes of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Harm {
    /// It never lands.
    Lost,
    /// It lands this many simulated nanoseconds later than it might, when all others have long landed. A stream's
    /// stores are never late.
    Late(u64),
    /// It lands with this bit flipped, counted modulo its length.
    Flipped(u32),
}

/// A store that waits until its time.
pub(super) struct Held {
    pub(super) until: u64,
    pub(super) block: u32,
    pub(super) address: u64,
    pub(super) words: [u32; 4],
    pub(super) count: usize,
}

/// All faults of a machine, and how far each has come.
#[derive(Default)]
pub(super) struct Faults {
    list: Vec<(Fault, Cell<u64>)>,
    /// Whether any of them is about turns, and about stores.
    pub(super) on_turns: bool,
    pub(super) on_stores: bool,
    stopped: RefCell<Vec<u32>>,
    /// Which GPU is slow, its time between turns, and until when.
    slow: Cell<Option<(u32, u64, u64)>>,
    /// Stores held in kernels.
    pub(super) held: Cell<u32>,
}

impl Faults {
    pub(super) fn new(faults: &[Fault]) -> Faults {
        let is_store = |fault: &&Fault| matches!(fault, Fault::Store { .. });
        Faults {
            list: faults.iter().map(|fault| (*fault, Cell::new(0))).collect(),
            on_turns: faults.iter().any(|fault| !is_store(&fault)),
            on_stores: faults.iter().any(|fault| is_store(&fault)),
            ..Faults::default()
        }
    }

    /// For each fault, how many of the turns or stores that it counts there have been.
    pub(super) fn occasions(&self) -> Vec<u64> {
        self.list.iter().map(|(_, count)| count.get()).collect()
    }

    /// Whether `gpu` has stopped.
    pub(super) fn has_stopped(&self, gpu: u32) -> bool {
        self.on_turns && self.stopped.borrow().contains(&gpu)
    }

    /// A lane of `gpu` has taken a turn; says whether it was the GPU's last.
    pub(super) fn turn(&self, gpu: u32, now: u64) -> bool {
        let mut stops = false;
        for (fault, count) in &self.list {
            let (Fault::Stop { gpu: whose, turn } | Fault::Slow { gpu: whose, turn, .. }) = *fault
            else {
                continue;
            };
            if whose != gpu || advance(count) != turn {
                continue;
            }
            match *fault {
                Fault::Slow { turn_ns, lasts_ns, .. } => {
                    self.slow.set(Some((gpu, turn_ns.max(1), now.saturating_add(lasts_ns))));
                }
                _ => stops = true,
            }
        }
        if stops {
            self.stopped.borrow_mut().push(gpu);
        }
        stops
    }

    /// When a lane of `gpu` that has taken a turn may take its next, if that is not at once. The lanes of a slow GPU
    /// keep step, which spares the others looking in vain between them.
    pub(super) fn rest(&self, gpu: u32, now: u64) -> Option<u64> {
        let (slow, turn_ns, until) = self.slow.get()?;
        (slow == gpu && now < until).then(|| (now / turn_ns + 1) * turn_ns)
    }

    /// What becomes of a store by `from` at `address`.
    pub(super) fn harm(&self, from: u32, address: u64, memory: &Memory) -> Option<Harm> {
        let (to, is_host) = memory.whose(address)?;
        let target = if is_host { Target::Host } else { Target::Device };
        let mut harm = None;
        for (fault, count) in &self.list {
            if let Fault::Store { from: by, to: into, memory, nth, harm: what } = *fault
                && (by, into, memory) == (from, to, target)
                && advance(count) == nth
            {
                harm = Some(what);
            }
        }
        harm
    }
}

fn advance(count: &Cell<u64>) -> u64 {
    count.set(count.get() + 1);
    count.get()
}

/// `words` with a bit flipped.
pub(super) fn flip(words: &mut [u32], bit: u32) {
    let bit = bit as usize % (32 * words.len());
    words[bit / 32] ^= 1 << (bit % 32);
}
