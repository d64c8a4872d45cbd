//! How links are measured.
//!
//! Invariant: a figure is the median of samples taken after a warm-up, by the GPUs' own clocks, over a
//! pair that has passed a probe with data where both directions are there. One thread drives all
//! GPUs, and no kernel waits for one that is queued behind it: only probes wait, two at a time, on
//! streams of their own.

use super::rig::Rig;
use super::{Figures, Measurement, Pair, Quantities};
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef};
use peerlane_device::abi::{Args, Kernel, MAX_THREADS, Operation, UNIT, UNROLL, probe, state};
use std::time::Duration;

/// Rounds of the probe that decides whether a pair works.
const PROOF_ROUNDS: u32 = 16;
/// How long a probe may take: far more than any link, and more than the host may be held up between
/// the launches of its two sides.
const DEADLINE: Duration = Duration::from_secs(1);
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
                rounds: 16,
                repeats: 3,
                sample: Duration::ZERO,
                background: Duration::ZERO,
            },
        }
    }
}

/// What a rate is a rate of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mover {
    Stores,
    Loads,
    CopyEngine,
}

const MOVERS: [Mover; 3] = [Mover::Stores, Mover::Loads, Mover::CopyEngine];

type Direction = (usize, usize);

/// Measures every ordered pair of `gpus`. A pair that does not work is no error: it says why.
///
/// Nothing else should use the GPUs meanwhile.
///
/// # Errors
/// No memory, or a GPU fails.
pub fn measure(gpus: &[GpuRef], settings: &Settings) -> Result<Measurement> {
    gpus.iter().try_for_each(|gpu| gpu.load_kernels())?;
    let rig = Rig::new(gpus, settings.bytes)?;
    let world = rig.world();
    let mut bench = Bench { rig, settings, reasons: vec![None; world * world], round: 1 };
    bench.map_all()?;
    bench.prove_all()?;
    let (directions, pairs) = (bench.working(), bench.pairs());
    // All pairs first: that also wakes links which save power.
    let loaded = bench.rates(&[directions.clone()], LOADED_FACTOR)?;
    let each: Vec<Vec<Direction>> = directions.iter().map(|&direction| vec![direction]).collect();
    let alone = bench.rates(&each, 1.0)?;
    let mut quiet = vec![None; world * world];
    let mut busy = quiet.clone();
    let fastest = directions.iter().map(|&d| loaded[bench.index(d)][2]).fold(0.0, f64::max);
    for pair in pairs {
        quiet[bench.index(pair)] = Some(bench.latency(pair, None)?);
        busy[bench.index(pair)] = Some(bench.latency(pair, Some((&directions, fastest)))?);
    }
    Ok(bench.report(&alone, &loaded, &quiet, &busy))
}

/// A measurement under way. Tables are indexed by [`Bench::index`].
struct Bench<'a> {
    rig: Rig<'a>,
    settings: &'a Settings,
    /// Why a direction does not work.
    reasons: Vec<Option<String>>,
    /// The next round of the probes, which no mailbox has seen.
    round: u32,
}

impl Bench<'_> {
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
                for direction in [(a, b), (b, a)] {
                    let index = self.index(direction);
                    self.reasons[index] = Some(reason.clone());
                }
            }
        }
        Ok(())
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
    fn send(&self, (from, to): Direction, mover: Mover, set: &[Direction]) -> Result<()> {
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
        let blocks = (gpu.properties().multiprocessors / sharing).min(filled).max(1);
        let mut args = Args { units, src: src.0, dst: dst.0, ..self.rig.probe(from, to).1 };
        args.operation = 0;
        // SAFETY: as above; others may write the same units, whose content means nothing.
        unsafe { gpu.launch(Kernel::Stream, blocks, MAX_THREADS, &args, stream) }
    }

    /// Microseconds one way between both GPUs of `pair`; with `load`, while copies run in all those
    /// directions, of which the fastest reaches that many GB/s.
    fn latency(&mut self, pair: Direction, load: Option<(&[Direction], f64)>) -> Result<f64> {
        let mut samples = Vec::new();
        for _ in 0..self.settings.repeats.max(1) {
            if let Some((directions, fastest)) = load {
                self.keep_busy(directions, fastest)?;
            }
            let rounds = self.settings.rounds.max(1);
            // Under load a round takes longer; all of them must fit into it.
            let rounds = if load.is_some() { rounds.div_ceil(4) } else { rounds };
            let ns = self.bounce(pair, rounds)?.map_err(|reason| Error::Unreachable {
                from: self.rig.gpu(pair.0).properties().ordinal,
                to: self.rig.gpu(pair.1).properties().ordinal,
                reason: format!("the first probe passed, but now {reason}"),
            })?;
            for &direction in load.map_or(&[][..], |(directions, _)| directions) {
                self.rig.gpu(direction.0).stream_synchronize(self.rig.stream(direction)?)?;
            }
            samples.push(ns / f64::from(rounds) / 1e3);
        }
        Ok(median(samples))
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
    fn bounce(
        &mut self,
        (a, b): Direction,
        rounds: u32,
    ) -> Result<std::result::Result<f64, String>> {
        for (mine, other) in [(a, b), (b, a)] {
            let (stream, base) = self.rig.probe(mine, other);
            let args = Args {
                operation: Operation::Probe as u32,
                deadline_ns: DEADLINE.as_nanos() as u64,
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

fn fault(from: usize, to: usize, what: &str) -> String {
    format!("the driver offers access, but what GPU{from} stores into GPU{to} {what}")
}

/// How often something that takes `one` milliseconds must run to last `wanted`.
fn calls(wanted: f64, one: f64) -> u32 {
    // A float that is too large, or no number, becomes the nearest integer or 0.
    ((wanted / one).ceil() as u32).clamp(1, MOST_CALLS)
}

/// The middle value; of two, the smaller.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}
