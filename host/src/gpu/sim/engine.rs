//! The state of a world, and how it moves: streams feed the scheduler, which feeds them back.
//!
//! Invariant: nothing moves but inside [`Engine::run`], which somebody calls who waits, or the
//! world's own thread if it has one. So without one a host thread alone sees the same world for the
//! same calls.

use super::capture::Capture;
use super::config::{Config, Statistics};
use super::context::Machine;
use super::fault::Faults;
use super::memory::{Memory, Origin};
use super::random::{Policy, Random};
use super::scheduler::{Event, STOPPED, Scheduler};
use super::stream::{EventState, Queue};
use super::work::{GraphPlan, GraphRun, Mark, Owner, Work};
use crate::error::Error;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Simulated time without any event after which kernels count as hung.
const HANG_NS: u64 = 300_000_000_000;

/// Turns between two attempts of a stream that held something back.
const HOLD_TURNS: u64 = 256;

/// Worlds made so far, so that no two share a handle.
static WORLDS: AtomicU64 = AtomicU64::new(1);

/// How far a call to [`Engine::run`] came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// An operation of a stream completed.
    Progressed,
    /// The turns are over.
    Spent,
    /// All lanes wait: this many nanoseconds may be skipped.
    Idle(u64),
    /// Nothing is running and nothing can start.
    Nothing,
}

/// An executable graph in the table.
pub(super) struct GraphEntry {
    pub(super) plan: Arc<GraphPlan>,
    /// Set when the latest launch is done: launches of one graph do not overlap.
    pub(super) last: Option<Mark>,
}

/// The state of one world.
pub(super) struct Engine {
    pub(super) scheduler: Scheduler,
    pub(super) streams: BTreeMap<u64, Queue>,
    pub(super) events: BTreeMap<u64, (u32, EventState)>,
    /// Those of them that keep their time.
    pub(super) timed: BTreeSet<u64>,
    pub(super) captures: BTreeMap<u64, Capture>,
    pub(super) graphs: BTreeMap<u64, GraphEntry>,
    /// Some stream may have something to start.
    pub(super) stirred: bool,
    /// Operations of streams completed so far.
    pub(super) completed: u64,
    /// The error of each device whose kernel did something forbidden.
    failed: Vec<Option<Error>>,
    running_graphs: Vec<Option<GraphRun>>,
    /// Waits for a word of memory that are under way.
    awaiting: Vec<(u32, u64, u32, Owner)>,
    startable: VecDeque<(u32, Work, Owner)>,
    /// What was to start on a GPU that has stopped.
    stuck: Vec<(u32, Owner)>,
    launches: u64,
    next_handle: u64,
    seed: u64,
    autonomous: bool,
}

// SAFETY: the `Rc`s, cells and coroutines in here are reachable from here only, and whoever uses
// them holds the world's lock, so threads take turns with all of them at once.
unsafe impl Send for Engine {}

impl Engine {
    pub(super) fn new(config: &Config) -> Engine {
        let random = Random::new(config.seed);
        let policy = Policy::new(&random);
        let machine = Rc::new(Machine {
            random,
            policy,
            memory: RefCell::new(Memory::new(config.devices)),
            weak: config.weak,
            lossy: config.lossy.clone(),
            faults: Faults::new(&config.faults),
            clock: Cell::new(0),
            progress: Cell::new(false),
        });
        let streams = (0..config.devices).map(|d| (default_stream(d), Queue::new(d)));
        Engine {
            scheduler: Scheduler::new(machine),
            streams: streams.collect(),
            events: BTreeMap::new(),
            timed: BTreeSet::new(),
            captures: BTreeMap::new(),
            graphs: BTreeMap::new(),
            stirred: false,
            completed: 0,
            failed: vec![None; config.devices as usize],
            running_graphs: Vec::new(),
            awaiting: Vec::new(),
            startable: VecDeque::new(),
            stuck: Vec::new(),
            launches: 0,
            next_handle: WORLDS.fetch_add(1, Ordering::Relaxed) << 32,
            seed: config.seed,
            autonomous: config.autonomous,
        }
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.scheduler.machine
    }

    pub(super) fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    pub(super) fn statistics(&self) -> Statistics {
        Statistics {
            seed: self.seed,
            steps: self.scheduler.steps,
            launches: self.launches,
            clock_ns: self.machine().clock.get(),
            trace: self.scheduler.trace,
        }
    }

    /// The error that `device` is stuck with, if any.
    pub(super) fn check(&self, device: u32) -> Result<(), Error> {
        self.failed[device as usize].clone().map_or(Ok(()), Err)
    }

    /// Takes memory back; it stays readable for stores on their way until no kernel runs. False if
    /// `user` did not get it from a call of this kind.
    pub(super) fn free(&mut self, user: u32, base: u64, origin: Origin) -> bool {
        let mut memory = self.machine().memory.borrow_mut();
        let known = memory.free(user, base, origin);
        if self.scheduler.is_empty() {
            memory.release_freed();
        }
        known
    }

    /// Whether nothing but this world can end a wait in it, so that its time means nothing to others.
    pub(super) fn is_alone(&self) -> bool {
        !self.autonomous && !self.machine().memory.borrow().is_shared()
    }

    /// Whether nothing moves until something is queued.
    pub(super) fn is_at_rest(&self) -> bool {
        let nothing_waits =
            self.awaiting.is_empty() && self.stuck.is_empty() && self.scheduler.is_empty();
        !self.stirred && self.startable.is_empty() && nothing_waits
    }

    /// Moves the world for about `turns` turns, or until an operation of a stream completes.
    pub(super) fn run(&mut self, turns: u64) -> Outcome {
        let completed = self.completed;
        loop {
            self.pump();
            if self.completed != completed {
                return Outcome::Progressed;
            }
            // A stream may hold back what it could start; kernels get a little further meanwhile.
            let held = self.stirred;
            match self.scheduler.run(if held { HOLD_TURNS } else { turns }) {
                Event::Spent | Event::Empty | Event::Idle(_) if held => {}
                Event::Spent => return Outcome::Spent,
                Event::Empty if !self.stuck.is_empty() => {
                    self.fail(self.stuck[0].0, STOPPED.into());
                }
                Event::Empty if self.awaiting.is_empty() => return Outcome::Nothing,
                Event::Empty => return Outcome::Idle(self.scheduler.jump()),
                Event::Idle(ns) => return Outcome::Idle(ns),
                Event::Finished(owner) => self.complete(owner),
                Event::Failed(device, reason) => self.fail(device, reason),
            }
        }
    }

    /// For how long nothing has happened.
    pub(super) fn idle_ns(&self) -> u64 {
        self.scheduler.idle
    }

    /// Lets simulated time pass while nothing happens. Kernels that wait for another world may do
    /// so for ever, as they may on a real GPU.
    pub(super) fn advance(&mut self, ns: u64) {
        if self.scheduler.advance(ns) < HANG_NS || !self.is_alone() {
            return;
        }
        const LONG: &str = "nothing has happened for five minutes of simulated time";
        let kernels = self.scheduler.running().map(|(name, at)| (format!("kernel {name}"), at));
        let waits = self.awaiting.iter().map(|&(device, at, value, _)| {
            (format!("a stream waits for {value} in the word at {at:#x}"), device)
        });
        let hung: Vec<_> = kernels.chain(waits).collect();
        for (what, device) in hung {
            self.fail(device, format!("{what}: {LONG}"));
        }
    }

    /// Ends the waits whose words have their values.
    fn look(&mut self) {
        let mut index = 0;
        while let Some(&(device, at, value, owner)) = self.awaiting.get(index) {
            let found = self.machine().memory.borrow().holds(device, at, value);
            match found {
                Ok(true) if self.machine().faults.has_stopped(device) => index += 1,
                Ok(false) => index += 1,
                Ok(true) => {
                    self.awaiting.swap_remove(index);
                    self.scheduler.happened();
                    self.complete(owner);
                }
                // Ends all waits of the device, this one among them.
                Err(reason) => {
                    self.fail(device, reason);
                    index = 0;
                }
            }
        }
    }

    /// Starts what can start.
    fn pump(&mut self) {
        if std::mem::take(&mut self.stirred) {
            let keys: Vec<u64> = self.streams.keys().copied().collect();
            for key in keys {
                self.pump_stream(key);
            }
        }
        self.look();
        while let Some((device, work, owner)) = self.startable.pop_front() {
            self.start(device, work, owner);
            // A node of a graph that waits for no more lets others start.
            self.look();
        }
    }

    /// Starts `work`; what is not a kernel or a graph is done at once.
    pub(super) fn start(&mut self, device: u32, work: Work, owner: Owner) {
        if self.failed[device as usize].is_some() {
            return self.complete(owner);
        }
        if self.machine().faults.has_stopped(device) {
            return self.stuck.push((device, owner));
        }
        match work {
            Work::Launch(launch) => {
                self.launches += 1;
                self.scheduler.launch(&launch, self.launches, owner);
            }
            Work::Graph(plan) => self.start_graph(plan, owner),
            Work::Await { at, value } => self.awaiting.push((device, at, value, owner)),
            immediate => {
                if let Err(reason) = self.scheduler.transfer(device, &immediate) {
                    self.fail(device, reason);
                }
                self.complete(owner);
            }
        }
    }

    fn start_graph(&mut self, plan: Arc<GraphPlan>, owner: Owner) {
        if plan.nodes.is_empty() {
            return self.complete(owner);
        }
        let free = self.running_graphs.iter().position(Option::is_none);
        let graph = free.unwrap_or_else(|| {
            self.running_graphs.push(None);
            self.running_graphs.len() - 1
        });
        let run = GraphRun::new(plan, owner);
        for node in run.roots() {
            let at = &run.plan.nodes[node];
            self.startable.push_back((at.device, at.work.clone(), Owner::Node { graph, node }));
        }
        self.running_graphs[graph] = Some(run);
    }

    /// `owner`'s work is done.
    fn complete(&mut self, owner: Owner) {
        match owner {
            Owner::Stream(key) => {
                if let Some(queue) = self.streams.get_mut(&key) {
                    queue.busy = false;
                }
                self.stirred = true;
                self.completed += 1;
            }
            Owner::Node { graph, node } => {
                let Some(run) = &mut self.running_graphs[graph] else { return };
                for next in run.done(node) {
                    let at = &run.plan.nodes[next];
                    let owner = Owner::Node { graph, node: next };
                    self.startable.push_back((at.device, at.work.clone(), owner));
                }
                if run.is_done() {
                    let owner = run.owner;
                    self.running_graphs[graph] = None;
                    self.complete(owner);
                }
            }
        }
        if self.scheduler.is_empty() {
            self.machine().memory.borrow_mut().release_freed();
        }
    }

    /// Makes `device` unusable, as an illegal access makes a CUDA context. Its kernels end, what is
    /// queued on it completes without effect, and every call that waits for it says why.
    fn fail(&mut self, device: u32, reason: String) {
        let error = Error::Simulated { device, reason, seed: self.seed };
        self.failed[device as usize].get_or_insert(error);
        let waits = self.awaiting.extract_if(.., |wait| wait.0 == device);
        let stuck = self.stuck.extract_if(.., |stuck| stuck.0 == device).map(|stuck| stuck.1);
        let waits: Vec<Owner> = waits.map(|wait| wait.3).chain(stuck).collect();
        for owner in self.scheduler.remove_device(device).into_iter().chain(waits) {
            self.complete(owner);
        }
    }
}

/// The key of a device's default stream; no handle reaches it.
pub(super) fn default_stream(device: u32) -> u64 {
    u64::MAX - u64::from(device)
}
