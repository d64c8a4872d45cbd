//! How links are measured: which pairs work, and their rates. `latency` has the rest.
//!
//! Invariant: a figure is the median of samples taken after a warm-up, by the GPUs' own clocks, over a
//! pair that has passed a probe with data where both directions are there. One thread drives all
//! GPUs, and no kernel waits for one that is queued behind it: only probes wait, two at a time, on
//! streams of their own.

use super::rig::Rig;
use super::{Figures, Measurement, Pair, Quantities};
use crate::error::Result;
use crate::gpu::{Backend, GpuRef};
use peerlane_device::abi::{Args, Kernel, MAX_THREADS, UNIT, UNROLL};
use std::time::Duration;

/// Rounds of the probe that decides whether a pair works.
const PROOF_ROUNDS: u32 = 16;
/// Most calls in a sample.
const MOST_CALLS: u32 = 32;
/// Samples of all pairs are longer, for the host needs a while to start them all: with 8 GPUs 0.2 ms.
const LOADED_FACTOR: f64 = 4.0;

/// How much is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Bytes of memory on each GPU, half of them for one message. Less if memory is short.
    pub bytes: usize,
    /// Rounds in a sample of the latency.
    pub rounds: u32,
    /// Samples, of which the median counts.
    pub repeats: u32,
    /// How long a sample of a rate lasts, at least.
    pub sample: Duration,
    /// How long copies keep all links busy while one pair's latency is taken.
    pub background: Duration,
}

impl Settings {
    /// What suits GPUs of this kind. For 2 real ones it takes a fraction of a second, for 8 a few
    /// seconds.
    pub fn of(backend: Backend) -> Settings {
        match backend {
            Backend::Cuda => Settings {
                bytes: 64 << 20,
                rounds: 256,
                repeats: 5,
                sample: Duration::from_millis(1),
                background: Duration::from_millis(3),
            },
            Backend::Sim => Settings {
                bytes: 64 << 10,
                rounds: 32,
                repeats: 3,
                sample: Duration::ZERO,
                background: Duration::ZERO,
            },
        }
    }
}

/// What a rate is a rate of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    Stores,
    Loads,
    CopyEngine,
}

const MOVERS: [Mover; 3] = [Mover::Stores, Mover::Loads, Mover::CopyEngine];

/// From one position to another.
pub(super) type Direction = (usize, usize);

/// Measures every ordered pair of `gpus`. A pair that does not work is no error: it says why.
///
/// Nothing else should use the GPUs meanwhile.
///
/// # Errors
/// No memory, or a GPU fails.
pub fn measure(gpus: &[GpuRef], settings: &Settings) -> Result<Measurement> {
    let mut bench = Bench::new(gpus, settings)?;
    bench.map_all()?;
    bench.run()
}

/// A measurement under way. Tables are indexed by [`Bench::index`].
pub(super) struct Bench<'a> {
    pub(super) rig: Rig<'a>,
    pub(super) settings: &'a Settings,
    /// Why a direction does not work.
    reasons: Vec<Option<String>>,
    /// The next round of the probes, which no mailbox has seen.
    pub(super) round: u32,
}

impl<'a> Bench<'a> {
    fn new(gpus: &'a [GpuRef], settings: &'a Settings) -> Result<Bench<'a>> {
        gpus.iter().try_for_each(|gpu| gpu.load_kernels())?;
        let reasons = vec![None; gpus.len() * gpus.len()];
        Ok(Bench { rig: Rig::new(gpus, settings.bytes)?, settings, reasons, round: 1 })
    }

    /// Measures what has been mapped.
    fn run(mut self) -> Result<Measurement> {
        self.prove_all()?;
        let (directions, pairs) = (self.working(), self.pairs());
        // All pairs first: that also wakes links which save power.
        let loaded = self.rates(std::slice::from_ref(&directions), LOADED_FACTOR)?;
        let each: Vec<Vec<Direction>> = directions.iter().map(|&one| vec![one]).collect();
        let alone = self.rates(&each, 1.0)?;
        let mut quiet = vec![None; self.reasons.len()];
        let mut busy = quiet.clone();
        let fastest = directions.iter().map(|&one| loaded[self.index(one)][2]).fold(0.0, f64::max);
        for pair in pairs {
            let index = self.index(pair);
            quiet[index] = self.latency(pair, None)?;
            if quiet[index].is_some() {
                busy[index] = self.latency(pair, Some((&directions, fastest)))?;
            }
        }
        Ok(self.report(&alone, &loaded, &quiet, &busy))
    }

    fn index(&self, (from, to): Direction) -> usize {
        from * self.rig.world() + to
    }

    /// Every ordered pair.
    fn directions(&self) -> impl Iterator<Item = Direction> + use<> {
        let world = self.rig.world();
        let all = (0..world).flat_map(move |from| (0..world).map(move |to| (from, to)));
        all.filter(|(from, to)| from != to)
    }

    fn works(&self, direction: Direction) -> bool {
        self.reasons[self.index(direction)].is_none()
    }

    /// The directions that work.
    fn working(&self) -> Vec<Direction> {
        self.directions().filter(|&direction| self.works(direction)).collect()
    }

    /// The pairs that work both ways, the lower position first.
    fn pairs(&self) -> Vec<Direction> {
        let pairs = self.directions().filter(|(low, high)| low < high);
        pairs.filter(|&(a, b)| self.works((a, b)) && self.works((b, a))).collect()
    }

    /// Maps every GPU into every other, or notes why not.
    fn map_all(&mut self) -> Result<()> {
        for (from, to) in self.directions() {
            let (gpu, peer) = (self.rig.gpu(from), self.rig.gpu(to).properties().ordinal);
            if gpu.properties().ordinal == peer {
                continue;
            }
            let reason = if !gpu.peer_access(peer)?.access {
                Some("the driver offers no peer access".to_owned())
            } else {
                // Also where a GPU can have no more peers.
                gpu.enable_peer(peer).err().map(|error| error.to_string())
            };
            let index = self.index((from, to));
            self.reasons[index] = reason;
        }
        Ok(())
    }

    /// Sends data both ways through every pair and compares them. Drivers have been seen that offer
    /// access and lose what is stored.
    fn prove_all(&mut self) -> Result<()> {
        for (a, b) in self.pairs() {
            if let Err(reason) = self.bounce((a, b), PROOF_ROUNDS)? {
                self.give_up((a, b), &reason);
            }
        }
        Ok(())
    }

    /// Notes that neither direction of a pair is any good.
    pub(super) fn give_up(&mut self, (a, b): Direction, reason: &str) {
        for direction in [(a, b), (b, a)] {
            let index = self.index(direction);
            self.reasons[index] = Some(reason.to_owned());
        }
    }

    /// GB/s of each mover for every direction in `sets`; the directions of one set are busy together.
    fn rates(&self, sets: &[Vec<Direction>], factor: f64) -> Result<Vec<[f64; 3]>> {
        let mut rates = vec![[0.0; 3]; self.reasons.len()];
        for set in sets {
            for (column, mover) in MOVERS.into_iter().enumerate() {
                for (&direction, rate) in set.iter().zip(self.rate(set, mover, factor)?) {
                    rates[self.index(direction)][column] = rate;
                }
            }
        }
        Ok(rates)
    }

    /// GB/s of each direction of `set` while all of them are busy.
    fn rate(&self, set: &[Direction], mover: Mover, factor: f64) -> Result<Vec<f64>> {
        let warm = self.sample(set, mover, 1)?.into_iter().fold(0.0, f64::max);
        let wanted = factor * self.settings.sample.as_secs_f64() * 1e3;
        let calls = calls(wanted, warm);
        let samples: Result<Vec<Vec<f64>>> =
            (0..self.settings.repeats.max(1)).map(|_| self.sample(set, mover, calls)).collect();
        let samples = samples?;
        let bytes = f64::from(calls) * self.rig.message as f64;
        let rate = |place: usize| {
            bytes / median(samples.iter().map(|sample| sample[place]).collect()) / 1e6
        };
        Ok((0..set.len()).map(rate).collect())
    }

    /// The milliseconds that `calls` messages took in each direction of `set`.
    fn sample(&self, set: &[Direction], mover: Mover, calls: u32) -> Result<Vec<f64>> {
        set.iter().try_for_each(|&direction| self.rig.begin(direction))?;
        for _ in 0..calls {
            set.iter().try_for_each(|&direction| self.send(direction, mover, set))?;
        }
        set.iter().try_for_each(|&direction| self.rig.end(direction))?;
        set.iter().map(|&direction| self.rig.elapsed_ms(direction)).collect()
    }

    /// Queues one message. The kernels of one GPU share its multiprocessors.
    pub(super) fn send(
        &self,
        (from, to): Direction,
        mover: Mover,
        set: &[Direction],
    ) -> Result<()> {
        let stream = self.rig.stream((from, to))?;
        let gpu = self.rig.gpu(from);
        let (reader, writer) = if mover == Mover::Loads { (to, from) } else { (from, to) };
        let (src, dst) = (self.rig.halves(reader).0, self.rig.halves(writer).1);
        if mover == Mover::CopyEngine {
            // SAFETY: both halves have `message` bytes and the peer is mapped.
            return unsafe { gpu.copy(dst, src, self.rig.message, stream) };
        }
        let units = (self.rig.message / UNIT) as u32;
        let sharing = set.iter().filter(|(other, _)| *other == from).count().max(1) as u32;
        let filled = units.div_ceil(MAX_THREADS * UNROLL as u32);
        // A power of two divides the message: no thread is left with a few units at the end.
        let blocks = (gpu.properties().multiprocessors / sharing).min(filled).max(1);
        let blocks = 1 << blocks.ilog2();
        let mut args = Args { units, src: src.0, dst: dst.0, ..self.rig.probe(from, to).1 };
        args.operation = 0;
        // SAFETY: as above; others may write the same units, whose content means nothing.
        unsafe { gpu.launch(Kernel::Stream, blocks, MAX_THREADS, &args, stream) }
    }

    /// Puts the tables together.
    fn report(
        &self,
        alone: &[[f64; 3]],
        loaded: &[[f64; 3]],
        quiet: &[Option<f64>],
        busy: &[Option<f64>],
    ) -> Measurement {
        let pairs = self.directions().map(|(from, to)| {
            let index = self.index((from, to));
            // Latency is a figure of both directions, kept with the lower position first.
            let both = self.index((from.min(to), from.max(to)));
            let figures = self.works((from, to)).then(|| Figures {
                alone: quantities(quiet[both], alone[index]),
                loaded: quantities(busy[both], loaded[index]),
            });
            let back = self.reasons[self.index((to, from))].as_ref();
            let one_way = back.map(|reason| format!("no latency: GPU{to} to GPU{from}: {reason}"));
            let reason = self.reasons[index].clone().or(one_way);
            Pair { from: from as u32, to: to as u32, figures, reason }
        });
        Measurement {
            backend: self.backend(),
            gpus: self.rig.world() as u32,
            message_bytes: self.rig.message as u64,
            pairs: pairs.collect(),
        }
    }

    fn backend(&self) -> Backend {
        if self.rig.world() == 0 { Backend::Sim } else { self.rig.gpu(0).backend() }
    }
}

fn quantities(latency_us: Option<f64>, rates: [f64; 3]) -> Quantities {
    let [store_gbps, load_gbps, copy_gbps] = rates;
    Quantities { latency_us, store_gbps, load_gbps, copy_gbps }
}

/// How often something that takes `one` milliseconds must run to last `wanted`.
pub(super) fn calls(wanted: f64, one: f64) -> u32 {
    // A float that is too large, or no number, becomes the nearest integer or 0.
    ((wanted / one).ceil() as u32).clamp(1, MOST_CALLS)
}

/// The middle value; of two, the smaller.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::sim;

    #[test]
    fn a_pair_that_is_mapped_one_way_has_rates_that_way() {
        let gpus = sim::devices(&sim::Config { devices: 2, ..sim::Config::default() });
        let settings = Settings { bytes: 32 << 10, ..Settings::of(Backend::Sim) };
        let mut bench = Bench::new(&gpus, &settings).unwrap();
        bench.map_all().unwrap();
        let index = bench.index((0, 1));
        bench.reasons[index] = Some("no way".into());
        let measurement = bench.run().unwrap();
        assert!(measurement.is_sound(2), "{measurement:?}");
        let [there, back] = &measurement.pairs[..] else { panic!("{measurement:?}") };
        assert_eq!((there.figures, there.reason.as_deref()), (None, Some("no way")));
        assert_eq!(back.reason.as_deref(), Some("no latency: GPU0 to GPU1: no way"));
        let Figures { alone, loaded } = back.figures.unwrap();
        assert!(alone.latency_us.is_none() && loaded.latency_us.is_none());
        assert!(alone.store_gbps > 0.0 && loaded.load_gbps > 0.0);
    }

    #[test]
    fn a_pair_that_is_given_up_has_no_figures() {
        let gpus = sim::devices(&sim::Config { devices: 3, ..sim::Config::default() });
        let settings = Settings::of(Backend::Sim);
        let mut bench = Bench::new(&gpus, &settings).unwrap();
        bench.map_all().unwrap();
        bench.give_up((2, 0), "flaky");
        assert_eq!(bench.pairs(), [(0, 1), (1, 2)]);
        assert_eq!(bench.working(), [(0, 1), (1, 0), (1, 2), (2, 1)]);
    }

    #[test]
    fn samples_are_long_enough_and_the_middle_counts() {
        assert_eq!([calls(1.0, 0.3), calls(1.0, 5.0), calls(0.0, 0.1)], [4, 1, 1]);
        assert_eq!([calls(1.0, 0.0), calls(0.0, 0.0)], [MOST_CALLS, 1]);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 1.0);
    }
}
