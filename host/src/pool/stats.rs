//! What a pool has done and holds.
//!
//! Invariant: `reserved` is what is in use, idle and retired together; nothing else is counted twice.

/// What a pool holds, in bytes, and how often it had what was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// What callers asked for and still hold.
    pub requested: usize,
    /// The blocks that hold it.
    pub in_use: usize,
    /// Blocks that wait to be used again.
    pub idle: usize,
    /// Blocks that cannot be used again, since their stream could not say when it is done with them.
    /// They go with the pool.
    pub retired: usize,
    /// The most that was in use at a time.
    pub high_water: usize,
    /// Requests that an idle block met.
    pub hits: u64,
    /// Requests that took new memory.
    pub misses: u64,
    /// Idle blocks given back to the driver.
    pub trimmed: u64,
}

impl Stats {
    /// All memory that the pool has from the driver.
    pub fn reserved(&self) -> usize {
        self.in_use + self.idle + self.retired
    }

    /// The share of the reserved memory that holds nothing anyone asked for: idle blocks, and what blocks
    /// are larger than requests. 0 for a pool that holds nothing.
    pub fn fragmentation(&self) -> f64 {
        match self.reserved() {
            0 => 0.0,
            reserved => 1.0 - self.requested as f64 / reserved as f64,
        }
    }

    pub(super) fn taken(&mut self, requested: usize, class: usize) {
        self.requested += requested;
        self.in_use += class;
        self.high_water = self.high_water.max(self.in_use);
    }

    pub(super) fn returned(&mut self, requested: usize, class: usize) {
        self.requested -= requested;
        self.in_use -= class;
    }
}
