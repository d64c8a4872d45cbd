//! What a communicator's calls have brought: counts for people, and the high water that sizes follow.
//!
//! Invariant: counting a call takes a few integer operations and nothing else. Only calls that were queued
//! are counted, a captured one once, however often its graph runs.

use crate::plan::Grid;
use crate::sizing::{Need, Sizes};
use peerlane_device::abi::Operation;
use std::fmt;

/// Calls that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// All-reduces that are one kernel each.
    AllReduce = 0,
    /// All-reduces in copies and local reductions, through the staging area.
    Scheduled = 1,
    /// Reduce-scatters.
    ReduceScatter = 2,
    /// All-gathers.
    AllGather = 3,
    /// Broadcasts.
    Broadcast = 4,
    /// Gathers.
    Gather = 5,
    /// Barriers.
    Barrier = 6,
}

impl Family {
    /// All of them, in the order of their numbers.
    pub const ALL: [Family; 7] = [
        Family::AllReduce,
        Family::Scheduled,
        Family::ReduceScatter,
        Family::AllGather,
        Family::Broadcast,
        Family::Gather,
        Family::Barrier,
    ];

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Family::AllReduce => "all_reduce",
            Family::Scheduled => "scheduled",
            Family::ReduceScatter => "reduce_scatter",
            Family::AllGather => "all_gather",
            Family::Broadcast => "broadcast",
            Family::Gather => "gather",
            Family::Barrier => "barrier",
        }
    }

    pub(crate) const fn of(operation: Operation) -> Family {
        match operation {
            Operation::ReduceScatter => Family::ReduceScatter,
            Operation::AllGather => Family::AllGather,
            Operation::Broadcast => Family::Broadcast,
            Operation::Gather => Family::Gather,
            Operation::Barrier => Family::Barrier,
            _ => Family::AllReduce,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the calls of one family have brought. A call's bytes are those of its tensor: of the whole one for
/// all-reduces and broadcasts, of one rank's part for reduce-scatters and all-gathers, of the largest
/// rank's rows for gathers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Calls that were queued.
    pub calls: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes of the largest call ever.
    pub largest: u64,
    /// Bytes of the largest call since sizes were last looked at
    /// ([`Communicator::adapt`](crate::Communicator::adapt)).
    pub largest_since: u64,
    /// Calls that did not fit at once: a block sent its part of the message in more than one slot, or a chunk
    /// of a scheduled call was made smaller to fit the staging area.
    pub several_turns: u64,
}

/// What a communicator's calls have brought, on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    counts: [Counts; Family::ALL.len()],
    /// Calls that were captured in a CUDA graph. Counted only where
    /// [`Config::sizing`](crate::Config::sizing) is given, since asking takes time.
    pub captured: u64,
    /// How often the ranks have looked at their sizes together.
    pub adapts: u64,
    /// How often sizes have changed.
    pub resizes: u64,
    /// The sizes in force.
    pub sizes: Sizes,
}

impl Usage {
    /// What the calls of `family` have brought.
    pub fn of(&self, family: Family) -> &Counts {
        &self.counts[family as usize]
    }
}

/// The counts as they grow.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    counts: [Counts; Family::ALL.len()],
    /// Calls of each family when the ranks last began anew.
    began: [u64; Family::ALL.len()],
    /// What the calls since the last adaptation need.
    pub(crate) need: Need,
    pub(crate) captured: u64,
    pub(crate) adapts: u64,
    pub(crate) resizes: u64,
}

impl Tally {
    /// Counts a kernel's call, which sends messages as `sent` says; a rank alone sends none.
    #[inline]
    pub(crate) fn kernel(&mut self, operation: Operation, bytes: usize, sent: Option<&Grid>) {
        let several_turns = sent.is_some_and(|grid| grid.block_units > grid.chunk_units);
        self.count(Family::of(operation), bytes, several_turns);
        self.need.units = self.need.units.max(sent.map_or(0, |grid| grid.units));
    }

    /// Counts a scheduled call that `wants` so many bytes of a staging area of `has`.
    pub(crate) fn scheduled(&mut self, bytes: usize, wants: usize, has: usize) {
        self.count(Family::Scheduled, bytes, wants > has);
        self.need.staging_bytes = self.need.staging_bytes.max(wants);
    }

    #[inline]
    fn count(&mut self, family: Family, bytes: usize, several_turns: bool) {
        let counts = &mut self.counts[family as usize];
        counts.calls += 1;
        counts.bytes += bytes as u64;
        counts.largest_since = counts.largest_since.max(bytes as u64);
        counts.several_turns += u64::from(several_turns);
    }

    /// The ranks have looked at their sizes.
    pub(crate) fn roll(&mut self, resized: bool) {
        for counts in &mut self.counts {
            counts.largest = counts.largest.max(counts.largest_since);
            counts.largest_since = 0;
        }
        self.need = Need::default();
        self.adapts += 1;
        self.resizes += u64::from(resized);
    }

    /// The ranks begin anew: what failed on some of them is forgotten.
    pub(crate) fn begin_anew(&mut self) {
        self.began = self.counts.map(|counts| counts.calls);
    }

    /// Which call of its family the last one was since then: the same on all ranks that took part in all of them.
    pub(crate) fn number(&self, family: Family) -> u64 {
        self.counts[family as usize].calls - self.began[family as usize]
    }

    /// Calls of all kinds.
    pub(crate) fn calls(&self) -> u64 {
        self.counts.iter().map(|counts| counts.calls).sum()
    }

    /// What it says.
    pub(crate) fn report(&self, sizes: Sizes) -> Usage {
        let mut counts = self.counts;
        for counts in &mut counts {
            counts.largest = counts.largest.max(counts.largest_since);
        }
        let Tally { captured, adapts, resizes, .. } = *self;
        Usage { counts, captured, adapts, resizes, sizes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(units: usize, turns: u32) -> Grid {
        Grid { units, blocks: 1, threads: 128, block_units: 128 * turns, chunk_units: 128 }
    }

    #[test]
    fn every_operation_has_a_family_of_its_own() {
        let sizes = Sizes { mailbox_bytes: 1, staging_bytes: 2 };
        for code in 1..=6 {
            let operation = Operation::from_code(code).unwrap();
            let mut tally = Tally::default();
            tally.kernel(operation, 100, Some(&grid(7, 1)));
            let usage = tally.report(sizes);
            let family = Family::ALL.into_iter().find(|f| f.name() == operation.name()).unwrap();
            assert_eq!(usage.of(family).calls, 1);
            assert_eq!(Family::ALL.map(|f| usage.of(f).calls).iter().sum::<u64>(), 1);
        }
    }

    #[test]
    fn the_high_water_is_of_the_calls_since_and_of_all() {
        let sizes = Sizes { mailbox_bytes: 1, staging_bytes: 2 };
        let mut tally = Tally::default();
        tally.kernel(Operation::AllReduce, 1000, Some(&grid(63, 3)));
        tally.kernel(Operation::Broadcast, 10, Some(&grid(1, 1)));
        tally.scheduled(500, 64, 32);
        let counts = *tally.report(sizes).of(Family::AllReduce);
        assert_eq!((counts.largest, counts.largest_since, counts.several_turns), (1000, 1000, 1));
        assert_eq!(tally.need, Need { units: 63, staging_bytes: 64 });
        tally.roll(true);
        assert_eq!(tally.need, Need::default());
        tally.kernel(Operation::AllReduce, 10, None);
        let usage = tally.report(sizes);
        let counts = usage.of(Family::AllReduce);
        assert_eq!((counts.largest, counts.largest_since), (1000, 10));
        assert_eq!((counts.calls, counts.bytes, counts.several_turns), (2, 1010, 1));
        assert_eq!(usage.of(Family::Scheduled).several_turns, 1);
        assert_eq!((usage.adapts, usage.resizes), (1, 1));
    }
}
