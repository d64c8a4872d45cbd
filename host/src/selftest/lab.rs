//! A self-test under way: which directions there are, what has come of each check, how much time is left.
//!
//! Invariant: every check of every direction gets exactly one outcome. One thread drives all GPUs; every wait of a
//! kernel has a deadline, and no kernel waits for one that is queued behind it: what several GPUs do together is
//! queued on all of them in the same order.

use super::{Check, Identity, Outcome, Pair, Report, Settings, Step, Verdict};
use crate::cases::Rng;
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef};
use crate::links::rig::Rig;
use std::time::{Duration, Instant};

/// From one position to another.
pub(super) type Direction = (usize, usize);

/// What is wrong with a direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) direction: Direction,
    pub(super) reason: String,
}

impl Fault {
    pub(super) fn new(direction: Direction, reason: impl Into<String>) -> Fault {
        Fault { direction, reason: reason.into() }
    }
}

/// What a running self-test tells.
pub enum Event<'a> {
    /// A check begins.
    Begin(&'a Step),
    /// A check of the ordered pair is over.
    Outcome((u32, u32), &'a Outcome),
}

/// Tests every ordered pair of `gpus` in this process. A pair that fails is no error: the report says so.
///
/// A driver that crashes or hangs takes the process along: [`in_child`](super::in_child) does not.
///
/// # Errors
/// No memory, or a GPU fails before anything was checked.
pub fn run(gpus: &[GpuRef], settings: &Settings) -> Result<Report> {
    run_with(gpus, settings, &mut |_| {})
}

/// As [`run`]; `tell` hears what begins and what came of it.
///
/// # Errors
/// As [`run`].
pub fn run_with(
    gpus: &[GpuRef],
    settings: &Settings,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Report> {
    let begin = Instant::now();
    let mut lab = Lab::new(gpus, settings, tell)?;
    lab.check_pairs();
    lab.check_together();
    Ok(lab.report(begin.elapsed()))
}

/// Tables are indexed by [`Lab::index`].
pub(super) struct Lab<'a> {
    pub(super) rig: Rig<'a>,
    pub(super) gpus: &'a [GpuRef],
    pub(super) settings: &'a Settings,
    tell: &'a mut dyn FnMut(Event<'_>),
    /// Why there is nothing to test in a direction.
    closed: Vec<Option<String>>,
    outcomes: Vec<Vec<Outcome>>,
    /// The next round of the probes, which no mailbox has seen.
    pub(super) round: u32,
    pub(super) rng: Rng,
    until: Instant,
    /// Why nothing more is run.
    cut_short: Option<String>,
}

impl<'a> Lab<'a> {
    /// Everything that the checks need, and every GPU mapped into every other.
    fn new(
        gpus: &'a [GpuRef],
        settings: &'a Settings,
        tell: &'a mut dyn FnMut(Event<'_>),
    ) -> Result<Lab<'a>> {
        let until = Instant::now() + settings.limit;
        gpus.iter().try_for_each(|gpu| gpu.load_kernels())?;
        let rig = Rig::new(gpus, settings.bytes)?;
        let tables = gpus.len() * gpus.len();
        let mut lab = Lab {
            rig,
            gpus,
            settings,
            tell,
            closed: vec![None; tables],
            outcomes: vec![Vec::new(); tables],
            round: 1,
            rng: Rng::new(settings.seed, "self-test"),
            until,
            cut_short: None,
        };
        lab.map_all()?;
        Ok(lab)
    }

    fn index(&self, (from, to): Direction) -> usize {
        from * self.gpus.len() + to
    }

    /// Every ordered pair.
    pub(super) fn directions(&self) -> impl Iterator<Item = Direction> + use<> {
        let world = self.gpus.len();
        let all = (0..world).flat_map(move |from| (0..world).map(move |to| (from, to)));
        all.filter(|(from, to)| from != to)
    }

    /// Whether `from` can use the memory of `to`.
    pub(super) fn is_open(&self, direction: Direction) -> bool {
        self.closed[self.index(direction)].is_none()
    }

    fn has_failed(&self, direction: Direction) -> bool {
        let failed = |one: &Outcome| matches!(one.verdict, Verdict::Failed { .. });
        self.outcomes[self.index(direction)].iter().any(failed)
    }

    /// Both directions, if data can go both ways and nothing is known against that.
    pub(super) fn is_sound_pair(&self, (a, b): Direction) -> bool {
        [(a, b), (b, a)].into_iter().all(|way| self.is_open(way) && !self.has_failed(way))
    }

    /// Maps every GPU into every other, or notes why not.
    fn map_all(&mut self) -> Result<()> {
        for direction in self.directions() {
            let (gpu, peer) = (&self.gpus[direction.0], self.gpus[direction.1].properties());
            let reason = if gpu.properties().ordinal == peer.ordinal {
                Some("both are one GPU".to_owned())
            } else if !gpu.peer_access(peer.ordinal)?.access {
                Some("the driver offers no peer access".to_owned())
            } else {
                // Also where a GPU can have no more peers.
                gpu.enable_peer(peer.ordinal).err().map(|error| error.to_string())
            };
            let index = self.index(direction);
            self.closed[index] = reason;
        }
        Ok(())
    }

    /// All checks of one pair after the other.
    fn check_pairs(&mut self) {
        let pairs: Vec<Direction> = self.directions().filter(|(a, b)| a < b).collect();
        for (a, b) in pairs {
            for way in [(a, b), (b, a)] {
                self.attempt(Check::Stores, &[way], |lab| lab.stores(way));
                self.attempt(Check::Loads, &[way], |lab| lab.loads(way));
                self.attempt(Check::CopyEngine, &[way], |lab| lab.copies(way));
            }
            let both = [(a, b), (b, a)];
            self.attempt_waits(Check::Ordering, &both, |lab| lab.ordering((a, b)));
            self.attempt_waits(Check::Packets, &both, |lab| lab.packets((a, b)));
            self.attempt_waits(Check::FullWidth, &both, |lab| lab.full_width((a, b)));
            self.attempt_waits(Check::Replay, &both, |lab| lab.replay((a, b)));
        }
    }

    fn check_together(&mut self) {
        let all: Vec<Direction> = self.directions().collect();
        self.attempt_waits(Check::Together, &all, Lab::together);
    }

    /// As [`Lab::attempt`], for kernels that wait for what comes back. Where something is known to be wrong they
    /// would only wait until their deadlines.
    fn attempt_waits(
        &mut self,
        check: Check,
        directions: &[Direction],
        run: impl FnOnce(&mut Self) -> Result<Vec<Fault>>,
    ) {
        if directions.iter().any(|way| self.has_failed(*way)) {
            self.skip(check, directions, "a link that it needs has failed before");
        } else {
            self.attempt(check, directions, run);
        }
    }

    /// Makes one check, and gives each direction its outcome.
    fn attempt(
        &mut self,
        check: Check,
        directions: &[Direction],
        run: impl FnOnce(&mut Self) -> Result<Vec<Fault>>,
    ) {
        if self.cut_short.is_none() && Instant::now() >= self.until {
            self.cut_short = Some(format!("{:?} are over", self.settings.limit));
        }
        if let Some(reason) = self.cut_short.clone() {
            return self.skip(check, directions, &reason);
        }
        let open: Vec<Direction> =
            directions.iter().copied().filter(|way| self.is_open(*way)).collect();
        if open.is_empty() {
            return self.skip(check, directions, "");
        }
        let positions = open.iter().map(|(from, to)| (*from as u32, *to as u32)).collect();
        (self.tell)(Event::Begin(&Step { check, directions: positions }));
        let begin = Instant::now();
        let result = run(self);
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        for &way in directions {
            let verdict = match (&result, self.closed[self.index(way)].clone()) {
                (_, Some(reason)) => Verdict::NotRun { reason },
                (Err(Error::Unsupported { reason, .. }), _) => {
                    Verdict::NotRun { reason: reason.clone() }
                }
                (Err(error), _) if is_short_of_memory(error) => {
                    Verdict::NotRun { reason: error.to_string() }
                }
                (Err(error), _) => Verdict::Failed { reason: error.to_string() },
                (Ok(faults), _) => match faults.iter().find(|fault| fault.direction == way) {
                    Some(fault) => Verdict::Failed { reason: fault.reason.clone() },
                    None => Verdict::Passed,
                },
            };
            self.record(way, Outcome { check, verdict, ms });
        }
        match result {
            Err(error) if is_short_of_memory(&error) => self.cut_short = Some(error.to_string()),
            Err(_) => self.look_for_dead(directions),
            Ok(_) => {}
        }
    }

    /// A GPU whose context is lost answers everything with the same error, which says nothing of its links.
    fn look_for_dead(&mut self, directions: &[Direction]) {
        let dead = directions.iter().find_map(|way| {
            let error = self.gpus[way.0].synchronize().err()?;
            Some(format!("a GPU has failed: {error}"))
        });
        self.cut_short = dead.or(self.cut_short.take());
    }

    /// Notes that a check is not made: `reason`, where nothing else stands in its way.
    fn skip(&mut self, check: Check, directions: &[Direction], reason: &str) {
        for &way in directions {
            let closed = self.closed[self.index(way)].clone();
            let reason = closed.unwrap_or_else(|| reason.to_owned());
            self.record(way, Outcome { check, verdict: Verdict::NotRun { reason }, ms: 0.0 });
        }
    }

    fn record(&mut self, way: Direction, outcome: Outcome) {
        (self.tell)(Event::Outcome((way.0 as u32, way.1 as u32), &outcome));
        let index = self.index(way);
        self.outcomes[index].push(outcome);
    }

    fn report(&mut self, took: Duration) -> Report {
        let directions: Vec<Direction> = self.directions().collect();
        let pairs = directions.into_iter().map(|way| {
            let index = self.index(way);
            let mut checks = std::mem::take(&mut self.outcomes[index]);
            checks.sort_by_key(|outcome| outcome.check);
            Pair { from: way.0 as u32, to: way.1 as u32, checks }
        });
        let pairs = pairs.collect();
        Report {
            backend: self.gpus.first().map_or(Backend::Sim, |gpu| gpu.backend()),
            gpus: self.gpus.iter().map(Identity::of).collect(),
            pairs,
            cut_short: self.cut_short.take(),
            seconds: took.as_secs_f64(),
        }
    }
}

/// Whether a GPU had no room for a check, which says nothing of its links.
fn is_short_of_memory(error: &Error) -> bool {
    const OUT_OF_MEMORY: u32 = 2;
    matches!(error, Error::Driver { code: OUT_OF_MEMORY, .. })
}

/// What one check that waits finds between the first two GPUs, whatever the others would.
#[cfg(test)]
pub(super) fn only(gpus: &[GpuRef], settings: &Settings, check: Check) -> Result<Vec<Fault>> {
    let tell = &mut |_: Event<'_>| {};
    let mut lab = Lab::new(gpus, settings, tell)?;
    match check {
        Check::Ordering => lab.ordering((0, 1)),
        Check::Packets => lab.packets((0, 1)),
        Check::FullWidth => lab.full_width((0, 1)),
        Check::Replay => lab.replay((0, 1)),
        _ => lab.together(),
    }
}
