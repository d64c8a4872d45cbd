//! The virtual clock: how long a [`Schedule`] takes on a [`Fabric`].
//!
//! A discrete-event simulation. Transfers that are under way share the ports that they pass max-min
//! fairly; the rates change only when one begins or ends. No threads, no randomness: the same inputs give
//! the same bits.
//!
//! Invariant: at no time do the transfers through a port add up to more than it carries.

use super::fabric::{Engine, Fabric};
use super::schedule::{Schedule, Step, Work};
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

/// What things cost beside the bytes on the links.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Before the first byte leaves, microseconds.
    pub launch_us: f64,
    /// Between two chunks from one rank to another: the fence before a credit waits for what was just
    /// sent. Microseconds; stores only.
    pub gap_us: f64,
    /// How fast a rank adds up or stores what it has received, GB/s, all groups of blocks together.
    pub take_gbs: f64,
    /// What a copy takes longer than a store to be seen: the engine's start, and the flag after it.
    /// Microseconds.
    pub copy_us: f64,
    /// What a local sum costs that is a kernel of its own, microseconds; copies only.
    pub kernel_us: f64,
    /// Between two copies from one rank to another: the flag after the first. Microseconds.
    pub flag_us: f64,
    /// For a rank's own streams to follow the caller's, and the caller's to follow them, microseconds; copies
    /// only.
    pub fork_us: f64,
}

/// What went through a port.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Bytes, all transfers together.
    pub bytes: u64,
    /// How long any transfer passed it, microseconds.
    pub busy_us: f64,
    /// The largest share of what it carries that was in use.
    pub peak: f64,
}

/// What the clock says.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// When the last step was done, microseconds.
    pub total_us: f64,
    /// What went through each port of the fabric.
    pub loads: Vec<Load>,
}

/// Runs `schedule` on `fabric`.
///
/// # Panics
/// If they differ in the number of ranks.
pub fn run(schedule: &Schedule, fabric: &Fabric, costs: &Costs) -> Timeline {
    assert_eq!(schedule.world(), fabric.world(), "ranks of the schedule and of the fabric");
    let mut clock = Clock::new(schedule, fabric, costs);
    clock.start();
    while clock.advance() {}
    clock.timeline
}

/// Bytes that are left of a transfer when rounding errors alone are left.
const NOTHING: f64 = 1e-3;

/// What happens at a time that is known beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The transfer begins to send.
    Begin(u32),
    /// The step is done.
    Done(u32),
}

/// An event and its time; among those of one time, the one that was planned first comes first.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Planned(f64, u64, Event);

impl Eq for Planned {}

impl Ord for Planned {
    fn cmp(&self, other: &Planned) -> Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Planned) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A transfer that is under way.
struct Flow<'a> {
    step: u32,
    pair: usize,
    ports: &'a [usize],
    latency_us: f64,
    left: f64,
    /// Bytes per microsecond.
    rate: f64,
}

/// What one rank sends to one other: one transfer at a time, in order.
#[derive(Clone, Default)]
struct Pair {
    waiting: VecDeque<u32>,
    busy: bool,
    chunk: u32,
    free_at: f64,
}

struct Clock<'a> {
    schedule: &'a Schedule,
    fabric: &'a Fabric,
    costs: &'a Costs,
    now: f64,
    /// How many steps each step still waits for.
    missing: Vec<u32>,
    followers: Vec<Vec<u32>>,
    planned: BinaryHeap<Reverse<Planned>>,
    plans: u64,
    flows: Vec<Flow<'a>>,
    /// Whether a flow has begun or ended since rates were set.
    changed: bool,
    pairs: Vec<Pair>,
    /// When each group of each rank is done with what it has begun to take.
    taken_at: Vec<f64>,
    timeline: Timeline,
}

impl<'a> Clock<'a> {
    fn new(schedule: &'a Schedule, fabric: &'a Fabric, costs: &'a Costs) -> Clock<'a> {
        let (world, steps) = (schedule.world() as usize, schedule.steps());
        let mut followers = vec![Vec::new(); steps.len()];
        for (at, step) in (0..).zip(steps) {
            step.after.iter().for_each(|before| followers[*before as usize].push(at));
        }
        let loads = vec![Load::default(); fabric.ports().len()];
        let begin_us = match schedule.engine() {
            Engine::Stores => costs.launch_us,
            Engine::Copies => costs.fork_us,
        };
        Clock {
            schedule,
            fabric,
            costs,
            now: begin_us,
            missing: steps.iter().map(|step| step.after.len() as u32).collect(),
            followers,
            planned: BinaryHeap::new(),
            plans: 0,
            flows: Vec::new(),
            changed: false,
            pairs: vec![Pair::default(); world * world],
            taken_at: vec![0.0; world * schedule.groups() as usize],
            timeline: Timeline { total_us: begin_us, loads },
        }
    }

    /// Begins all that waits for nothing.
    fn start(&mut self) {
        for step in 0..self.missing.len() as u32 {
            if self.missing[step as usize] == 0 {
                self.ready(step);
            }
        }
    }

    fn plan(&mut self, at: f64, event: Event) {
        self.plans += 1;
        self.planned.push(Reverse(Planned(at, self.plans, event)));
    }

    /// Whatever a step waited for is done.
    fn ready(&mut self, step: u32) {
        let groups = self.schedule.groups();
        let Step { work, piece, .. } = &self.schedule.steps()[step as usize];
        let (work, piece) = (*work, *piece);
        match work {
            Work::Send { from, to, .. } => {
                let pair = self.pair(from, to);
                if self.pairs[pair].busy {
                    self.pairs[pair].waiting.push_back(step);
                } else {
                    self.occupy(pair, step);
                }
            }
            Work::Take { rank, bytes } => {
                let kernel_us = match self.schedule.engine() {
                    Engine::Stores => 0.0,
                    Engine::Copies => self.costs.kernel_us,
                };
                let worker = (rank * groups + piece % groups) as usize;
                let rate = 1e3 * self.costs.take_gbs / f64::from(groups);
                let end = self.now.max(self.taken_at[worker]) + kernel_us + bytes as f64 / rate;
                self.taken_at[worker] = end;
                self.plan(end, Event::Done(step));
            }
        }
    }

    /// Gives a pair that sends nothing its next transfer.
    fn occupy(&mut self, pair: usize, step: u32) {
        let chunk = self.schedule.steps()[step as usize].piece / self.schedule.groups();
        let Pair { free_at, chunk: last, .. } = self.pairs[pair];
        let gap_us = match self.schedule.engine() {
            Engine::Stores if chunk != last => self.costs.gap_us,
            Engine::Stores => 0.0,
            Engine::Copies => self.costs.flag_us,
        };
        (self.pairs[pair].busy, self.pairs[pair].chunk) = (true, chunk);
        self.plan(self.now.max(free_at + gap_us), Event::Begin(step));
    }

    fn pair(&self, from: u32, to: u32) -> usize {
        (from * self.schedule.world() + to) as usize
    }

    /// Goes on to the next time at which anything happens; false when nothing will.
    fn advance(&mut self) -> bool {
        if std::mem::take(&mut self.changed) {
            self.share();
        }
        let planned = self.planned.peek().map(|Reverse(plan)| plan.0);
        let ends = self.flows.iter().map(|flow| self.now + flow.left / flow.rate);
        let Some(next) = ends.chain(planned).min_by(f64::total_cmp) else { return false };
        self.pass(next - self.now);
        self.now = next;
        self.end_flows();
        while let Some(Reverse(Planned(at, _, event))) = self.planned.peek().copied() {
            if at > self.now {
                break;
            }
            self.planned.pop();
            match event {
                Event::Begin(step) => self.begin(step),
                Event::Done(step) => self.done(step),
            }
        }
        true
    }

    /// Lets all flows go on for a while.
    fn pass(&mut self, us: f64) {
        let mut busy = vec![false; self.timeline.loads.len()];
        for flow in &mut self.flows {
            flow.left -= flow.rate * us;
            flow.ports.iter().for_each(|port| busy[*port] = true);
        }
        for (load, _) in self.timeline.loads.iter_mut().zip(busy).filter(|(_, busy)| *busy) {
            load.busy_us += us;
        }
    }

    fn begin(&mut self, step: u32) {
        let Work::Send { from, to, bytes } = self.schedule.steps()[step as usize].work else {
            return;
        };
        let path = self.fabric.path(from, to);
        path.ports.iter().for_each(|port| self.timeline.loads[*port].bytes += bytes);
        let (pair, ports, latency_us) = (self.pair(from, to), &path.ports[..], path.latency_us);
        self.flows.push(Flow { step, pair, ports, latency_us, left: bytes as f64, rate: 0.0 });
        self.changed = true;
    }

    /// Ends the flows of which nothing is left.
    fn end_flows(&mut self) {
        let ended: Vec<_> = self.flows.extract_if(.., |flow| flow.left <= NOTHING).collect();
        let late_us = match self.schedule.engine() {
            Engine::Stores => 0.0,
            Engine::Copies => self.costs.copy_us,
        };
        for flow in ended {
            self.changed = true;
            self.plan(self.now + late_us + flow.latency_us, Event::Done(flow.step));
            let pair = &mut self.pairs[flow.pair];
            (pair.free_at, pair.busy) = (self.now, false);
            if let Some(next) = pair.waiting.pop_front() {
                self.occupy(flow.pair, next);
            }
        }
    }

    fn done(&mut self, step: u32) {
        self.timeline.total_us = self.timeline.total_us.max(self.now);
        for follower in std::mem::take(&mut self.followers[step as usize]) {
            self.missing[follower as usize] -= 1;
            if self.missing[follower as usize] == 0 {
                self.ready(follower);
            }
        }
    }

    /// Gives every flow its max-min fair rate: the port with the least for each of its flows fixes the
    /// rate of these; what they leave of other ports goes to the rest.
    fn share(&mut self) {
        let ports = self.fabric.ports();
        let mut streams = vec![0usize; ports.len()];
        self.flows.iter().flat_map(|flow| flow.ports).for_each(|port| streams[*port] += 1);
        let engine = self.schedule.engine();
        let capacity: Vec<f64> = ports
            .iter()
            .zip(&streams)
            .map(|(port, streams)| 1e3 * port.capacity(engine, *streams))
            .collect();
        let (mut left, mut waiting) = (capacity.clone(), streams.clone());
        let mut open: Vec<usize> = (0..self.flows.len()).collect();
        while !open.is_empty() {
            let share = |port: usize| left[port].max(0.0) / waiting[port] as f64;
            let least = (0..ports.len())
                .filter(|port| waiting[*port] > 0)
                .map(share)
                .fold(f64::INFINITY, f64::min);
            // All ports that are as scarce, within rounding, in one go.
            let scarce: Vec<bool> = (0..ports.len())
                .map(|port| waiting[port] > 0 && share(port) <= least * (1.0 + 1e-9))
                .collect();
            open.retain(|index| {
                let flow = &mut self.flows[*index];
                let fixed = flow.ports.iter().any(|port| scarce[*port]);
                if fixed {
                    flow.rate = least;
                    for port in flow.ports {
                        left[*port] -= least;
                        waiting[*port] -= 1;
                    }
                }
                !fixed
            });
        }
        for ((load, left), capacity) in self.timeline.loads.iter_mut().zip(left).zip(capacity) {
            load.peak = load.peak.max(1.0 - left / capacity);
        }
    }
}
