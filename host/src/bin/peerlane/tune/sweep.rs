//! The measurement: every candidate at every size, those without hope dropped, and a second look at
//! those that are close.
//!
//! Invariant: a candidate is checked against the reference before it is timed, at every size up to
//! [`CHECKED_BYTES`]; one that is wrong once is never chosen. All decisions are made here, in
//! one place, so the ranks always do the same.

use super::candidate::Way;
use crate::bench::job::Job;
use crate::bench::measure::Ranks;
use crate::bench::rank::{Fail, Timing};
use crate::output;
use crate::parse::bytes_name;
use peerlane::choice::{Choice, is_exact};
use peerlane::{DType, Operation, ReduceOp, Wire};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The largest size at which results are compared. Larger ones take the same kernels through more turns, and
/// the reference would take most of the time.
const CHECKED_BYTES: usize = 4 << 20;
/// A candidate this many times slower than the best at two sizes in a row is not measured at larger ones.
const HOPELESS: f64 = 3.0;
/// Candidates within this factor of the best are looked at twice.
const CLOSE: f64 = 1.25;
/// A choice stays from one size to the next while it is within this factor of the best.
const STEADY: f64 = 1.02;
/// Share of the budget for the first look.
const FIRST_SHARE: f64 = 0.6;
/// Most samples of a candidate, first and second look.
const SAMPLES: [usize; 2] = [15, 20];

/// What a table is for.
pub(super) const OPERATIONS: [Operation; 2] = [Operation::AllReduce, Operation::Broadcast];
/// What is measured. Tables go by bytes, so one element type does for all.
pub(super) const DTYPE: DType = DType::Bf16;

/// What is measured, and how.
pub(super) struct Sweep<'a> {
    pub(super) ranks: &'a mut Ranks,
    pub(super) world: u32,
    pub(super) sizes: &'a [usize],
    pub(super) calls: usize,
    pub(super) seed: u64,
    pub(super) begin: Instant,
    pub(super) budget: Duration,
    /// What is chosen without a table.
    pub(super) default: &'a Choice,
}

/// One size of one operation.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) bytes: usize,
    /// Microseconds by contender, first look.
    pub(super) first: BTreeMap<usize, f64>,
    /// The same, second look.
    pub(super) second: BTreeMap<usize, f64>,
    /// Chosen among those whose sums are exact.
    pub(super) chosen: usize,
    /// Chosen among all.
    pub(super) chosen_any: usize,
    /// What is chosen without a table.
    pub(super) default: usize,
}

/// One operation.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) operation: Operation,
    pub(super) rows: Vec<Row>,
    /// By contender: whether it may be chosen where sums must be exact.
    pub(super) exact: Vec<bool>,
    /// Candidates that were left out or dropped, and why.
    pub(super) notes: Vec<String>,
    /// Wrong results.
    pub(super) failures: Vec<String>,
}

impl Sweep<'_> {
    /// Measures both operations.
    pub(super) fn run(&mut self, ways: &[Way]) -> Result<Vec<Series>, Fail> {
        let progress = output::progress(2 * OPERATIONS.len() * self.sizes.len());
        let first = self.begin + self.budget.mul_f64(FIRST_SHARE);
        let mut all = Vec::new();
        for (done, operation) in OPERATIONS.into_iter().enumerate() {
            let later = (OPERATIONS.len() - 1 - done) * self.sizes.len();
            all.push(self.first_look(operation, ways, (first, later), &progress)?);
        }
        let mut left: usize = all.iter().map(|series| series.rows.len()).sum();
        let end = self.begin + self.budget.mul_f64(0.95);
        for series in &mut all {
            for row in &mut series.rows {
                progress.set_message(format!("again {}", bytes_name(row.bytes)));
                self.second_look(series.operation, row, slice(end, left))?;
                left -= 1;
                progress.inc(1);
            }
        }
        progress.finish_and_clear();
        Ok(all)
    }

    fn first_look(
        &mut self,
        operation: Operation,
        ways: &[Way],
        (end, later): (Instant, usize),
        progress: &indicatif::ProgressBar,
    ) -> Result<Series, Fail> {
        let exact = ways.iter().map(|way| match way {
            Way::AllReduce(algorithm) => is_exact(*algorithm, self.world),
            Way::Broadcast(_) => true,
        });
        let (rows, notes, failures) = (Vec::new(), Vec::new(), Vec::new());
        let mut series = Series { operation, rows, exact: exact.collect(), notes, failures };
        let numbers = (0..ways.len()).filter(|number| ways[*number].operation() == operation);
        let mut active: Vec<usize> = numbers.collect();
        let mut strikes: BTreeMap<usize, u32> = BTreeMap::new();
        for (index, size) in self.sizes.iter().enumerate() {
            // The smallest size is measured whatever the budget, so that there is an answer.
            if index > 0 && Instant::now() >= end {
                let spent = "the budget is spent: sizes from here on follow the model";
                series.notes.push(format!("{}: {spent}", bytes_name(*size)));
                break;
            }
            progress.set_message(format!("{} {}", operation.name(), bytes_name(*size)));
            let job = job(operation, self.world).sized(*size);
            self.check(&job, ways, &mut active, &mut series)?;
            let slice = slice(end, later + self.sizes.len() - index);
            let medians = self.time(&active, &job, slice, SAMPLES[0])?;
            let mut row = Row { bytes: job.bytes(), first: medians, ..Row::default() };
            self.choose(&series, ways, &mut row);
            let best = row.first.values().copied().fold(f64::INFINITY, f64::min);
            active.retain(|candidate| {
                let slow = row.first.get(candidate).is_some_and(|us| *us > HOPELESS * best);
                let strikes = strikes.entry(*candidate).or_default();
                *strikes = if slow { *strikes + 1 } else { 0 };
                if *strikes == 2 {
                    let name = ways[*candidate].name();
                    let from = bytes_name(row.bytes);
                    series.notes.push(format!("{name}: hopeless from {from}, not measured above"));
                }
                *strikes < 2
            });
            series.rows.push(row);
            progress.inc(1);
        }
        Ok(series)
    }

    /// Leaves those in `active` that the communicator carries out, and rightly.
    fn check(
        &mut self,
        job: &Job,
        ways: &[Way],
        active: &mut Vec<usize>,
        series: &mut Series,
    ) -> Result<(), Fail> {
        let timing = self.timing(1);
        if job.bytes() > CHECKED_BYTES {
            return Ok(());
        }
        let inputs = job.inputs(self.seed);
        let mut kept = Vec::new();
        for candidate in active.drain(..) {
            let name = ways[candidate].name();
            let checked = self.ranks.verify_one(candidate, job, &inputs);
            let tried = checked.and_then(|verdict| {
                self.ranks.capture(&[candidate], job, &timing).map(|()| verdict)
            });
            match tried {
                Ok(Ok(())) => kept.push(candidate),
                Ok(Err(wrong)) => {
                    series.failures.push(format!("{name} at {}: {wrong}", bytes_name(job.bytes())));
                }
                Err(error) if output::is_refusal(&error) => {
                    series.notes.push(format!("{name}: {error}"))
                }
                Err(error) => return Err(error),
            }
        }
        *active = kept;
        if active.is_empty() {
            return Err(format!("no candidate for {} is right", series.operation.name()).into());
        }
        Ok(())
    }

    /// Medians of as many samples as fit in `slice`: one at least, `most` at most.
    fn time(
        &mut self,
        candidates: &[usize],
        job: &Job,
        slice: Duration,
        most: usize,
    ) -> Result<BTreeMap<usize, f64>, Fail> {
        let begin = Instant::now();
        self.ranks.capture(candidates, job, &self.timing(1))?;
        // Every rank warms up what it is about to be timed at.
        self.ranks.sample(candidates, job, &self.timing(1))?;
        let once = Instant::now();
        let mut samples = self.ranks.sample(candidates, job, &self.timing(1))?;
        let round = once.elapsed().as_secs_f64().max(1e-6);
        let left = slice.saturating_sub(begin.elapsed()).as_secs_f64();
        let more = ((left / round) as usize).min(most - 1);
        if more > 0 {
            let others = self.ranks.sample(candidates, job, &self.timing(more))?;
            samples.iter_mut().zip(others).for_each(|(samples, more)| samples.extend(more));
        }
        Ok(candidates.iter().copied().zip(samples.into_iter().map(median)).collect())
    }

    /// Measures the candidates that are close to the best once more, with those that are chosen.
    fn second_look(
        &mut self,
        operation: Operation,
        row: &mut Row,
        slice: Duration,
    ) -> Result<(), Fail> {
        let best = row.first.values().copied().fold(f64::INFINITY, f64::min);
        let close = row.first.iter().filter(|(_, us)| **us <= CLOSE * best).map(|(c, _)| *c);
        let known = [row.chosen, row.chosen_any, row.default];
        let known = known.into_iter().filter(|candidate| row.first.contains_key(candidate));
        let mut candidates: Vec<usize> = close.chain(known).collect();
        candidates.sort_unstable();
        candidates.dedup();
        let job = job(operation, self.world).sized(row.bytes);
        row.second = self.time(&candidates, &job, slice, SAMPLES[1])?;
        Ok(())
    }

    /// Decides for a size. The choice of the size before, or the default, stays unless another is clearly
    /// faster, so that a table does not follow noise.
    fn choose(&self, series: &Series, ways: &[Way], row: &mut Row) {
        row.default = default_at(self.default, series.operation, ways, row.bytes);
        let before = series.rows.last();
        let fastest = |allowed: &dyn Fn(&usize) -> bool, before: Option<usize>| {
            let times = || row.first.iter().filter(|(candidate, _)| allowed(candidate));
            let best = times().min_by(|a, b| a.1.total_cmp(b.1));
            let (best, us) = best.map_or((row.default, f64::INFINITY), |(c, us)| (*c, *us));
            let steady = |candidate: &usize| {
                row.first.get(candidate).is_some_and(|other| *other <= STEADY * us)
            };
            before.into_iter().chain([row.default]).find(steady).unwrap_or(best)
        };
        let chosen = fastest(&|candidate| series.exact[*candidate], before.map(|row| row.chosen));
        let any = fastest(&|_| true, before.map(|row| row.chosen_any));
        (row.chosen, row.chosen_any) = (chosen, any);
    }

    fn timing(&self, replays: usize) -> Timing {
        Timing { calls: self.calls, replays, eager: false }
    }
}

/// What is measured of an operation, without a size.
pub(super) fn job(op: Operation, world: u32) -> Job {
    let (wire, reduce) = (Wire::Native, ReduceOp::Sum);
    let (algorithm, route) = (None, None);
    Job { op, dtype: DTYPE, wire, reduce, algorithm, route, root: 0, world, count: 0 }
}

/// The contender that `choice` takes.
pub(super) fn default_at(
    choice: &Choice,
    operation: Operation,
    ways: &[Way],
    bytes: usize,
) -> usize {
    let way = match operation {
        Operation::Broadcast => Way::Broadcast(choice.broadcast(bytes)),
        _ => Way::AllReduce(choice.all_reduce(bytes)),
    };
    ways.iter().position(|other| *other == way).unwrap_or(0)
}

/// An even share of the time until `end`.
fn slice(end: Instant, shares: usize) -> Duration {
    end.saturating_duration_since(Instant::now()) / shares.max(1) as u32
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get((samples.len().max(1) - 1) / 2).copied().unwrap_or(f64::INFINITY)
}
