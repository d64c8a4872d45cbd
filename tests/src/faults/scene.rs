//! What a seed draws: a machine, a group, calls, and what is to go wrong.

use super::class::Class;
use super::tensors::Tensors;
use crate::group::with_room_for_checks;
use crate::job::{Call, Job, random_jobs};
use crate::machine::{Links, small};
use peerlane::cases::Rng;
use peerlane::gpu::sim::{self, Fault, Harm, Target};
use peerlane::{Algorithm, Config, Pattern, Transport, Wire};
use std::time::Duration;

/// A wait's deadline, in simulated time. Waits that succeed take a tenth of it at most.
pub(super) const DEADLINE: Duration = Duration::from_millis(100);
/// That of scheduled calls, which is real time, on a machine that may be busy.
const REAL_DEADLINE: Duration = Duration::from_millis(400);
/// A place that no run comes to.
const NEVER: u64 = u64::MAX;
/// Pairs of GPUs whose stores a dry run counts.
const PAIRS: usize = 6;

/// What kinds of calls a scene makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One kernel each.
    Fused,
    /// All-reduces as copies and local reductions, among others.
    Scheduled,
    /// Direct all-reduces of registered tensors, behind others.
    Registered,
}

/// What a seed draws.
#[derive(Clone, Debug)]
pub struct Scene {
    /// It.
    pub seed: u64,
    /// What goes wrong.
    pub class: Class,
    /// Which calls are made.
    pub kind: Kind,
    /// How many ranks there are.
    pub world: u32,
    /// The machine, without its fault.
    pub machine: sim::Config,
    /// The group's configuration.
    pub config: Config,
    /// The calls, and those that come after a failure.
    pub jobs: [Vec<Job>; 2],
    /// Calls on registered tensors, behind the others.
    pub tensors: Option<Tensors>,
    /// Negative control: what becomes of a host is not told to the others.
    pub mute: bool,
}

/// Where and how the fault of a scene strikes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Nowhere,
    /// In the machine.
    Machine(Vec<Fault>),
    /// On the host of a rank, before its call with this number; after it the machine moves so many times before
    /// anybody notices.
    Host {
        /// The rank.
        rank: usize,
        /// Its first call that it does not make.
        call: usize,
        /// How far the machine moves meanwhile.
        nudges: u64,
    },
}

impl Scene {
    /// The scene of `seed`: all classes in turn.
    pub fn new(seed: u64) -> Scene {
        let mut rng = Rng::new(seed, "faults");
        let class = Class::ALL[(seed % Class::ALL.len() as u64) as usize];
        let kind = match rng.below(24) {
            0 => Kind::Scheduled,
            1..4 if !class.by_host() => Kind::Registered,
            _ => Kind::Fused,
        };
        let kind = if class.by_host() { Kind::Fused } else { kind };
        let world = match rng.below(32) {
            0 => 16,
            1 | 2 if !class.needs_peers() => 1,
            n => 2 + (n % 7) as u32,
        };
        let fewest = if class.needs_peers() { 2 } else { 1 };
        let devices = match rng.below(4) {
            0 => fewest + rng.below((world - fewest + 1).into()) as u32,
            _ => world,
        };
        let (links, transport) = match kind {
            Kind::Fused if class.by_host() => (Links::None, Transport::Host),
            Kind::Fused if class.by_link() => (Links::All, Transport::P2p),
            Kind::Fused => match rng.below(4) {
                0 => (Links::All, Transport::Host),
                1 => (Links::ALL[rng.below(4) as usize], Transport::Auto),
                _ => (Links::All, Transport::P2p),
            },
            Kind::Scheduled | Kind::Registered => (Links::All, Transport::P2p),
        };
        let one_way = links.missing(devices);
        let machine = sim::Config { devices, seed, one_way, ..sim::Config::default() };
        let mut config = config(kind, world, transport, &mut rng);
        if Rng::new(seed, "checks").below(3) == 0 {
            config = with_room_for_checks(Config { checked: true, ..config }, world);
        }
        let jobs = [2 + rng.below(6), 2].map(|calls| jobs(kind, world, calls as usize, &mut rng));
        let tensors = (kind == Kind::Registered).then(|| Tensors::random(world, &mut rng));
        Scene { seed, class, kind, world, machine, config, jobs, tensors, mute: false }
    }

    /// Faults that never strike, in whose place the scene's may strike: the machine counts how often.
    pub fn probes(&self) -> Vec<Fault> {
        let mut rng = Rng::new(self.seed, "probes");
        let devices = self.machine.devices;
        let gpu = rng.below(devices.into()) as u32;
        match self.class {
            Class::GpuStops => vec![Fault::Stop { gpu, turn: NEVER }],
            Class::GpuCrawls => {
                vec![Fault::Slow { gpu, turn: NEVER, turn_ns: 1, lasts_ns: 0 }]
            }
            class if class.needs_peers() => {
                let memory = match (self.config.transport, rng.below(2)) {
                    (Transport::Host, _) | (Transport::Auto, 0) => Target::Host,
                    _ => Target::Device,
                };
                let pair = |_| {
                    let from = rng.below(devices.into()) as u32;
                    let to = (from + 1 + rng.below(u64::from(devices) - 1) as u32) % devices;
                    Fault::Store { from, to, memory, nth: NEVER, harm: Harm::Lost }
                };
                (0..PAIRS).map(pair).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Where the fault strikes, given how often there was occasion for each of the probes.
    pub fn place(&self, occasions: &[u64]) -> Place {
        let mut rng = Rng::new(self.seed, "place");
        let probes = self.probes();
        let there: Vec<_> = probes.iter().zip(occasions).filter(|(_, count)| **count > 0).collect();
        if let Class::CallMissing | Class::ProcessDies | Class::Abort = self.class {
            let rank = rng.below(self.world.into()) as usize;
            let call = rng.below(self.calls() as u64) as usize;
            return Place::Host { rank, call, nudges: rng.below(40) };
        }
        if there.is_empty() {
            return Place::Nowhere;
        }
        let (fault, count) = there[rng.below(there.len() as u64) as usize];
        let n = 1 + rng.below(*count);
        Place::Machine(vec![match *fault {
            Fault::Stop { gpu, .. } => Fault::Stop { gpu, turn: n },
            Fault::Slow { gpu, .. } => {
                let turn_ns = [1000, 100_000, 10_000_000][rng.below(3) as usize];
                Fault::Slow { gpu, turn: n, turn_ns, lasts_ns: (10 + rng.below(40)) * turn_ns }
            }
            Fault::Store { from, to, memory, .. } => {
                let harm = match self.class {
                    Class::StoreLate => Harm::Late(1 << (10 + rng.below(21))),
                    Class::BitFlipped | Class::HostBitFlipped => {
                        Harm::Flipped(rng.below(128) as u32)
                    }
                    _ => Harm::Lost,
                };
                Fault::Store { from, to, memory, nth: n, harm }
            }
        }])
    }

    /// How many calls a rank makes.
    pub fn calls(&self) -> usize {
        self.jobs[0].len() + self.tensors.as_ref().map_or(0, Tensors::calls)
    }
}

fn config(kind: Kind, world: u32, transport: Transport, rng: &mut Rng) -> Config {
    // Where counters wrap, and where seals begin to be renewed.
    let first_slot = match rng.below(8) {
        0 | 1 => u32::MAX - rng.below(12) as u32,
        2 => (1 << 29) - rng.below(12) as u32,
        _ => 0,
    };
    let max_blocks = Some(1 + rng.below(2) as u32);
    let config = Config { first_slot, max_blocks, transport, deadline: DEADLINE, ..small(world) };
    match kind {
        Kind::Scheduled => Config {
            staging_bytes: Some(96 << 10),
            chunk_bytes: Some(256),
            deadline: REAL_DEADLINE,
            ..config
        },
        _ => config,
    }
}

fn jobs(kind: Kind, world: u32, calls: usize, rng: &mut Rng) -> Vec<Job> {
    let most = 1 << (6 + rng.below(7));
    let mut jobs = random_jobs(world, calls, most, rng);
    if kind == Kind::Scheduled {
        for job in &mut jobs {
            if let Call::AllReduce { count, wire, algorithm, .. } = &mut job.call {
                let pattern = Pattern::ALL[rng.below(Pattern::ALL.len() as u64) as usize];
                (*algorithm, *wire) = (Some(Algorithm::Scheduled(pattern)), Wire::Native);
                *count = (*count).max(1);
            }
        }
    }
    jobs
}
