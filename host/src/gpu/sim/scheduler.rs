//! Which lane runs next, and how simulated time passes.
//!
//! Invariant: every lane that can run runs again after finitely many turns, every store in a buffer
//! lands after finitely many turns, and simulated time jumps only when no lane of the world can do
//! anything but wait.
//!
//! A turn goes to a random lane of a random block, several in a row to lanes of the same block.
//! Lanes that wait for memory fall behind: they are tried now and then while others have work, and
//! all of them once nobody has. A round in which all of them look and none finds anything means
//! that only time can help.

use super::context::{Machine, TURN_NS, Turn};
use super::kernel::{BlockRun, KernelRun, Step};
use super::work::{Launch, Owner, Work};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

/// Attempts to find a block whose pace lets it run; the last one is taken whatever its pace.
const ATTEMPTS: usize = 16;
/// Rounds in which all waiting lanes look in vain before time jumps: a wait loop may look at some
/// of what it waits for in some of its turns only.
const QUIET_ROUNDS: u32 = 16;
/// The first jump in time. Each later one is a 128th of the time waited: a loop that looks at the
/// clock in every 128th turn only still sees its deadline soon after it has come.
const FIRST_JUMP_NS: u64 = 200;
const JUMP_FRACTION: u64 = 128;

/// Why calls that wait for a GPU fail that a fault has stopped.
pub(super) const STOPPED: &str = "it has stopped, as a fault of its machine says";

/// Simulated time to start any operation of a stream.
const OPERATION_NS: u64 = 1000;
/// Simulated speed of copies and fills.
const BYTES_PER_NS: u64 = 200;

/// A block of a running kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
struct BlockRef {
    slot: usize,
    block: u32,
}

/// A sleeping lane; ordered by when it wakes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Sleeper {
    until: u64,
    serial: u64,
    slot: usize,
    block: u32,
    thread: u32,
}

/// Why the scheduler stopped.
pub(super) enum Event {
    /// The turns asked for are over.
    Spent,
    /// No kernel is running.
    Empty,
    /// All lanes wait; this many nanoseconds may be skipped.
    Idle(u64),
    /// The kernel of this owner is over.
    Finished(Owner),
    /// A kernel did something forbidden on this device. It is still there.
    Failed(u32, String),
}

/// All running kernels.
pub(super) struct Scheduler {
    pub(super) machine: Rc<Machine>,
    /// Turns taken so far.
    pub(super) steps: u64,
    /// A hash over every turn: which lane, and how it ended.
    pub(super) trace: u64,
    kernels: Vec<Option<KernelRun>>,
    ready: Vec<BlockRef>,
    behind: Vec<BlockRef>,
    sleeping: BinaryHeap<Reverse<Sleeper>>,
    /// Simulated time since something last happened.
    pub(super) idle: u64,
    /// Rounds that lanes which wait may still look in, since something happened or time passed.
    rounds: u32,
}

impl Scheduler {
    pub(super) fn new(machine: Rc<Machine>) -> Scheduler {
        Scheduler {
            machine,
            steps: 0,
            trace: 0,
            kernels: Vec::new(),
            ready: Vec::new(),
            behind: Vec::new(),
            sleeping: BinaryHeap::new(),
            idle: 0,
            rounds: QUIET_ROUNDS,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kernels.iter().all(Option::is_none)
    }

    /// The name and device of every running kernel.
    pub(super) fn running(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.kernels.iter().flatten().map(|kernel| (kernel.context.name, kernel.context.device))
    }

    /// Starts a kernel; `serial` differs for every launch.
    pub(super) fn launch(&mut self, launch: &Launch, serial: u64, owner: Owner) {
        self.pass(OPERATION_NS);
        let mut kernel = KernelRun::new(&self.machine, serial, launch, owner);
        let slot = self.kernels.iter().position(Option::is_none).unwrap_or_else(|| {
            self.kernels.push(None);
            self.kernels.len() - 1
        });
        for (block, run) in (0..).zip(&mut kernel.blocks) {
            run.listed_ready = true;
            self.ready.push(BlockRef { slot, block });
        }
        self.kernels[slot] = Some(kernel);
    }

    /// Does what is not a kernel, at once.
    pub(super) fn transfer(&mut self, device: u32, work: &Work) -> Result<(), String> {
        let bytes = self.machine.store(device, work)?;
        self.pass(OPERATION_NS + bytes as u64 / BYTES_PER_NS);
        Ok(())
    }

    /// Time goes by because something happens.
    fn pass(&self, ns: u64) {
        self.machine.clock.set(self.machine.clock.get() + ns);
        self.machine.progress.set(true);
    }

    /// Takes away all kernels of `device` and says whose they were. Their stores land.
    pub(super) fn remove_device(&mut self, device: u32) -> Vec<Owner> {
        let of_device =
            |k: &Option<KernelRun>| k.as_ref().is_some_and(|k| k.context.device == device);
        let slots = (0..self.kernels.len()).filter(|&slot| of_device(&self.kernels[slot]));
        let slots: Vec<usize> = slots.collect();
        slots.into_iter().filter_map(|slot| self.remove(slot)).collect()
    }

    fn remove(&mut self, slot: usize) -> Option<Owner> {
        let kernel = self.kernels[slot].take()?;
        kernel.context.land_all();
        self.ready.retain(|block| block.slot != slot);
        self.behind.retain(|block| block.slot != slot);
        self.machine.progress.set(true);
        Some(kernel.owner)
    }

    /// Something outside the kernels happened: who waits may find what it waits for.
    pub(super) fn happened(&mut self) {
        self.idle = 0;
        self.machine.progress.set(true);
    }

    /// How much time may be skipped while nothing happens.
    pub(super) fn jump(&self) -> u64 {
        (self.idle / JUMP_FRACTION).max(FIRST_JUMP_NS)
    }

    /// Lets `ns` nanoseconds pass in which nothing happens; returns for how long nothing has.
    pub(super) fn advance(&mut self, ns: u64) -> u64 {
        self.machine.clock.set(self.machine.clock.get() + ns);
        self.idle += ns;
        self.rounds = 1;
        self.idle
    }

    /// Runs until something happens that streams must know, for about `turns` turns.
    pub(super) fn run(&mut self, turns: u64) -> Event {
        let end = self.steps + turns;
        while self.steps < end {
            self.wake();
            let event = match self.pick() {
                Some(block) => self.burst(block),
                None => self.round(),
            };
            if let Some(event) = event {
                return event;
            }
        }
        Event::Spent
    }

    /// Lanes whose time has come wait again, for their next turn. They are not ready at once: lanes
    /// that sleep briefly between looks would keep time from jumping.
    fn wake(&mut self) {
        let now = self.machine.clock.get();
        if self.machine.faults.held.get() > 0 {
            self.land_late();
        }
        while let Some(Reverse(sleeper)) = self.sleeping.peek().copied()
            && sleeper.until <= now
        {
            self.sleeping.pop();
            if let Some(kernel) = &mut self.kernels[sleeper.slot]
                && kernel.serial == sleeper.serial
            {
                kernel.blocks[sleeper.block as usize].behind.push(sleeper.thread);
                self.list(BlockRef { slot: sleeper.slot, block: sleeper.block });
            }
        }
    }

    /// Chooses a block with a lane that can run.
    fn pick(&mut self) -> Option<BlockRef> {
        let machine = Rc::clone(&self.machine);
        if !self.behind.is_empty()
            && !self.ready.is_empty()
            && machine.random.chance(machine.policy.spin)
        {
            let lanes = machine.policy.burst as usize;
            return Some(self.revive(machine.random.below(self.behind.len()), lanes));
        }
        for attempt in 0.. {
            if self.ready.is_empty() {
                return None;
            }
            let index = machine.random.below(self.ready.len());
            let chosen = self.ready[index];
            let Some(run) = self.block(chosen) else {
                self.ready.swap_remove(index);
                continue;
            };
            if run.ready.is_empty() {
                run.listed_ready = false;
                self.ready.swap_remove(index);
            } else if attempt >= ATTEMPTS || machine.random.chance(run.pace << 8) {
                return Some(chosen);
            }
        }
        None
    }

    /// A block whose lanes may take turns.
    fn block(&mut self, at: BlockRef) -> Option<&mut BlockRun> {
        let kernel = self.kernels[at.slot].as_mut().filter(|kernel| !kernel.stopped)?;
        Some(&mut kernel.blocks[at.block as usize])
    }

    /// Lets up to `lanes` waiting lanes of one block look. Few while others have work: if all of
    /// them did each time, nobody else would get on.
    fn revive(&mut self, index: usize, lanes: usize) -> BlockRef {
        let machine = Rc::clone(&self.machine);
        let chosen = self.behind.swap_remove(index);
        if let Some(run) = self.block(chosen) {
            run.listed_behind = false;
            for _ in 0..lanes.min(run.behind.len()) {
                let lane = run.behind.swap_remove(machine.random.below(run.behind.len()));
                run.ready.push(lane);
            }
        }
        self.list(chosen);
        chosen
    }

    /// Puts a block into the lists that its lanes call for.
    fn list(&mut self, at: BlockRef) {
        let Some(run) = self.block(at) else { return };
        let ready = !run.ready.is_empty() && !std::mem::replace(&mut run.listed_ready, true);
        let behind = !run.behind.is_empty() && !std::mem::replace(&mut run.listed_behind, true);
        if ready {
            self.ready.push(at);
        }
        if behind {
            self.behind.push(at);
        }
    }

    /// Gives turns to lanes of one block.
    fn burst(&mut self, at: BlockRef) -> Option<Event> {
        let machine = Rc::clone(&self.machine);
        let turns = 1 + machine.random.below(machine.policy.burst as usize);
        for _ in 0..turns {
            let kernel = self.kernels[at.slot].as_mut().filter(|kernel| !kernel.stopped);
            let Some(kernel) = kernel else { break };
            let ready = &mut kernel.blocks[at.block as usize].ready;
            if ready.is_empty() {
                break;
            }
            // Whoever was last goes on, or anybody: some lanes get far ahead of their block.
            let stay = machine.random.chance(machine.policy.stay);
            let index = if stay { ready.len() - 1 } else { machine.random.below(ready.len()) };
            let thread = ready.swap_remove(index);
            let device = kernel.context.device;
            let (turn, step) = kernel.step(at.block, thread);
            self.account(at, thread, turn);
            let step = if machine.faults.on_turns {
                self.suffer(at, thread, (device, turn), step)
            } else {
                step
            };
            match step {
                Step::Continue => {}
                Step::Sleep(until) => self.sleep(at, thread, until),
                Step::Finished => break,
                Step::Failed(reason) => return Some(Event::Failed(device, reason)),
            }
            self.drain();
        }
        self.list(at);
        self.finished()
    }

    /// After a turn of a lane of `device`: it may be the GPU's last, or slow.
    fn suffer(
        &mut self,
        at: BlockRef,
        thread: u32,
        (device, turn): (u32, Turn),
        step: Step,
    ) -> Step {
        let machine = Rc::clone(&self.machine);
        let now = machine.clock.get();
        if machine.faults.turn(device, now) {
            let kernels = self.kernels.iter_mut().flatten();
            kernels.filter(|k| k.context.device == device).for_each(|k| k.stopped = true);
        }
        let Some(rest) = machine.faults.rest(device, now) else { return step };
        let Some(run) = self.block(at) else { return step };
        let list = match (turn, &step) {
            (Turn::Ready, Step::Continue) => &mut run.ready,
            (Turn::Waiting, Step::Continue) => &mut run.behind,
            (Turn::Sleep(_), Step::Sleep(until)) => return Step::Sleep(rest.max(*until)),
            _ => return step,
        };
        // Its turn put the lane at the end of a list, unless it was its last.
        if list.pop_if(|last| *last == thread).is_some() { Step::Sleep(rest) } else { step }
    }

    /// Lands the stores that were late, now that their time has come.
    fn land_late(&self) {
        let now = self.machine.clock.get();
        for kernel in self.kernels.iter().flatten() {
            kernel.context.land_held(|held| held.until <= now);
        }
    }

    /// What all that is left to run stands still on, if it does.
    fn standstill(&self) -> Option<Event> {
        let mut kernels = self.kernels.iter().flatten();
        let first = kernels.next()?;
        (first.stopped && kernels.all(|kernel| kernel.stopped))
            .then(|| Event::Failed(first.context.device, STOPPED.into()))
    }

    /// Ends a kernel whose lanes have ended and whose stores have landed.
    fn finished(&mut self) -> Option<Event> {
        let over = |kernel: &Option<KernelRun>| kernel.as_ref().is_some_and(KernelRun::is_over);
        let slot = self.kernels.iter().position(over)?;
        self.remove(slot).map(Event::Finished)
    }

    fn sleep(&mut self, at: BlockRef, thread: u32, until: u64) {
        if let Some(kernel) = &self.kernels[at.slot] {
            let BlockRef { slot, block } = at;
            let sleeper = Sleeper { until, serial: kernel.serial, slot, block, thread };
            self.sleeping.push(Reverse(sleeper));
        }
    }

    fn account(&mut self, at: BlockRef, thread: u32, turn: Turn) {
        let ended = match turn {
            Turn::Ready => 1,
            Turn::Waiting => 2,
            Turn::Barrier(_) => 3,
            Turn::Sleep(_) => 4,
            Turn::Fault => 5,
        };
        let who = (at.slot as u64) << 48 | u64::from(at.block) << 24 | u64::from(thread) << 4;
        let mixed = (self.trace ^ who ^ ended).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.trace = mixed ^ (mixed >> 29);
        self.steps += 1;
        self.machine.clock.set(self.machine.clock.get() + TURN_NS);
    }

    /// After a turn: perhaps a store lands somewhere.
    fn drain(&mut self) {
        let machine = &*self.machine;
        if machine.weak && machine.random.chance(machine.policy.drain) {
            let slot = machine.random.below(self.kernels.len());
            if let Some(kernel) = &self.kernels[slot] {
                kernel.context.land_some();
            }
        }
    }

    /// Nobody can run: lets stores land, then lets all that wait look, then asks for time.
    fn round(&mut self) -> Option<Event> {
        for kernel in self.kernels.iter().flatten() {
            let waiting = kernel.context.dirty.borrow().len();
            for _ in 0..(waiting * self.machine.policy.flush).div_ceil(4) {
                kernel.context.land_some();
            }
        }
        if let Some(event) = self.finished() {
            return Some(event);
        }
        if self.is_empty() {
            return Some(Event::Empty);
        }
        if self.machine.faults.on_turns
            && let Some(event) = self.standstill()
        {
            return Some(event);
        }
        if self.machine.progress.take() {
            self.idle = 0;
            self.rounds = QUIET_ROUNDS;
        }
        if self.rounds > 0 {
            self.rounds -= 1;
            while !self.behind.is_empty() {
                self.revive(self.behind.len() - 1, usize::MAX);
            }
            return None;
        }
        let jump = self.jump();
        let wake = self
            .sleeping
            .peek()
            .map_or(0, |Reverse(s)| s.until.saturating_sub(self.machine.clock.get()));
        // Where some only wait, the sleepers are awaited step by step: an overshoot is a delay.
        Some(Event::Idle(if self.behind.is_empty() { jump.max(wake) } else { jump }))
    }
}
