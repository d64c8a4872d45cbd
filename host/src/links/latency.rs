//! How long a small message takes, on an idle machine and while every link is busy.
//!
//! Invariant: both sides of a probe are queued before either is waited for, on streams that hold
//! nothing else, and no other probe runs meanwhile. A probe that fails ends at its deadline.

use super::measure::{Bench, Direction, Mover, calls, median};
use crate::error::Result;
use peerlane_device::abi::{Args, Kernel, Operation, probe, state, ticks};
use std::time::Duration;

/// How long a probe may take: far more than any link, and more than the host may be held up between
/// the launches of its two sides.
const DEADLINE: Duration = Duration::from_secs(1);

impl Bench<'_> {
    /// Microseconds one way between both GPUs of `pair`; with `load`, while copies run in all those
    /// directions, of which the fastest reaches that many GB/s. None if the pair fails now: it passed
    /// its first probe and is no good all the same.
    pub(super) fn latency(
        &mut self,
        pair: Direction,
        load: Option<(&[Direction], f64)>,
    ) -> Result<Option<f64>> {
        let rounds = self.settings.rounds.max(1);
        // Under load a round takes longer; all of them must fit into it.
        let rounds = if load.is_some() { rounds.div_ceil(4) } else { rounds };
        let mut samples = Vec::new();
        for _ in 0..self.settings.repeats.max(1) {
            if let Some((directions, fastest)) = load {
                self.keep_busy(directions, fastest)?;
            }
            let outcome = self.bounce(pair, rounds)?;
            for &direction in load.map_or(&[][..], |(directions, _)| directions) {
                self.rig.gpu(direction.0).stream_synchronize(self.rig.stream(direction)?)?;
            }
            match outcome {
                Ok(ns) => samples.push(ns / f64::from(rounds) / 1e3),
                Err(reason) => {
                    self.give_up(pair, &reason);
                    return Ok(None);
                }
            }
        }
        Ok(Some(median(samples)))
    }

    /// Queues copies in all directions that last as long as the settings say.
    fn keep_busy(&self, directions: &[Direction], fastest: f64) -> Result<()> {
        let one_ms = self.rig.message as f64 / fastest / 1e6;
        for _ in 0..calls(self.settings.background.as_secs_f64() * 1e3, one_ms) {
            for &direction in directions {
                self.send(direction, Mover::CopyEngine, directions)?;
            }
        }
        Ok(())
    }

    /// Lets both GPUs send each other data and a flag `rounds` times and compare what comes; the
    /// nanoseconds that it took, or what went wrong. Both send at once, so a round is one way.
    pub(super) fn bounce(
        &mut self,
        (a, b): Direction,
        rounds: u32,
    ) -> Result<std::result::Result<f64, String>> {
        for (mine, other) in [(a, b), (b, a)] {
            let (stream, base) = self.rig.probe(mine, other);
            let args = Args {
                operation: Operation::Probe as u32,
                deadline: ticks(DEADLINE),
                mode: probe::PING_PONG,
                rounds,
                rows: u64::from(self.round),
                ..base
            };
            // SAFETY: both mailboxes are mapped both ways and big enough for the probe, and both
            // sides pass the same rounds, above all earlier.
            unsafe { self.rig.gpu(mine).launch(Kernel::Probe, 1, 32, &args, stream)? };
        }
        self.round += rounds;
        for (mine, other) in [(a, b), (b, a)] {
            self.rig.gpu(mine).stream_synchronize(self.rig.probe(mine, other).0)?;
        }
        let mut least = f64::INFINITY;
        for (mine, other) in [(a, b), (b, a)] {
            let page = self.rig.status(mine, other);
            // SAFETY: the page lives as long as the rig, and the kernels are over.
            let (found, ns) = unsafe {
                (
                    (&raw const (*page).state).read_volatile(),
                    (&raw const (*page).probe_ns).read_volatile(),
                )
            };
            match found {
                state::OK => {}
                state::CORRUPT => return Ok(Err(fault(other, mine, "arrives changed"))),
                state::TIMED_OUT => return Ok(Err(fault(other, mine, "does not arrive"))),
                // The other side gave up and says why.
                _ => continue,
            }
            // The side that started later did not wait for the other to be launched.
            least = least.min(ns as f64);
        }
        // The clock may tick as coarsely as 1 us.
        Ok(Ok(least.max(1.0)))
    }
}

/// What is wrong with a pair that failed its probe.
fn fault(from: usize, to: usize, what: &str) -> String {
    format!("the driver offers access, but what GPU{from} stores into GPU{to} {what}")
}
