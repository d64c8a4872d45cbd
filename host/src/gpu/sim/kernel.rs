//! One running kernel: its lanes as coroutines, and who of each block can run.
//!
//! Invariant: a coroutine is resumed only by the thread that holds the world's lock, never after it
//! has ended or faulted, and its stack goes back to the pool with it.

use super::context::{Barrier, KernelContext, LaneContext, Machine, Turn};
use super::lane::SimLane;
use super::stack::{self, LaneStack};
use super::work::{Launch, Owner};
use corosensei::{Coroutine, CoroutineResult};
use peerlane_device::abi::Args;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

/// What each lane of a kernel runs.
pub(super) type Body = Arc<dyn Fn(SimLane, &Args) + Send + Sync>;

type Outcome = Result<(), String>;
type Thread = Coroutine<(), Turn, Outcome, LaneStack>;

/// A block's lanes, by what they wait for.
#[derive(Default)]
pub(super) struct BlockRun {
    /// Can run. In the scheduler's list of ready blocks while not empty.
    pub(super) ready: Vec<u32>,
    /// Wait for memory to change. In the scheduler's list of waiting blocks while not empty.
    pub(super) behind: Vec<u32>,
    pub(super) listed_ready: bool,
    pub(super) listed_behind: bool,
    /// How many of 256 attempts to schedule it succeed.
    pub(super) pace: u32,
    /// Lanes that have not ended.
    live: u32,
    /// Lanes at the barrier.
    arrived: u32,
    barrier: Option<Barrier>,
}

/// What a turn of a lane led to.
pub(super) enum Step {
    /// The lane can go on, or waits; the block's lists say so.
    Continue,
    /// The lane sleeps until this time.
    Sleep(u64),
    /// The last lane has ended; stores may still be on their way.
    Finished,
    /// The kernel did something forbidden.
    Failed(String),
}

/// A running kernel.
pub(super) struct KernelRun {
    /// Counts launches, so that a slot that is used again is not mistaken.
    pub(super) serial: u64,
    pub(super) owner: Owner,
    pub(super) context: Rc<KernelContext>,
    pub(super) blocks: Vec<BlockRun>,
    /// Its GPU has stopped: no lane takes a turn any more.
    pub(super) stopped: bool,
    threads: Vec<Thread>,
    live_blocks: u32,
}

impl KernelRun {
    pub(super) fn new(
        machine: &Rc<Machine>,
        serial: u64,
        launch: &Launch,
        owner: Owner,
    ) -> KernelRun {
        let Launch { blocks, threads, .. } = *launch;
        let stacks = stack::take((blocks * threads) as usize);
        let limit = |lane: u32| stacks[lane as usize].limit_address();
        let context = KernelContext::new(machine, launch, limit);
        let lanes = stacks.into_iter().zip(&context.lanes);
        let coroutines = lanes.map(|(stack, lane)| thread(stack, lane)).collect();
        let random = &machine.random;
        let kernel_pace = machine.policy.pace(random);
        let block_run = |_| BlockRun {
            ready: random.shuffled(threads),
            pace: (kernel_pace * machine.policy.pace(random) / 256).max(1),
            live: threads,
            ..BlockRun::default()
        };
        let block_runs = (0..blocks).map(block_run).collect();
        KernelRun {
            serial,
            owner,
            context,
            blocks: block_runs,
            stopped: machine.faults.has_stopped(launch.device),
            threads: coroutines,
            live_blocks: blocks,
        }
    }

    /// Gives `thread` of `block` a turn. It must be in none of the block's lists.
    pub(super) fn step(&mut self, block: u32, thread: u32) -> (Turn, Step) {
        let lane = (block * self.context.threads + thread) as usize;
        let turn = match self.threads[lane].resume(()) {
            CoroutineResult::Yield(turn) => turn,
            CoroutineResult::Return(Ok(())) => return (Turn::Ready, self.ended(block)),
            CoroutineResult::Return(Err(panic)) => {
                let reason = format!("it panicked: {panic}");
                return (Turn::Fault, self.failed(block, thread, &reason));
            }
        };
        let run = &mut self.blocks[block as usize];
        let step = match turn {
            Turn::Ready => {
                run.ready.push(thread);
                Step::Continue
            }
            Turn::Waiting => {
                run.behind.push(thread);
                Step::Continue
            }
            Turn::Sleep(until) => Step::Sleep(until),
            Turn::Barrier(barrier) => self.arrived(block, thread, barrier),
            Turn::Fault => {
                let reason = self.context.lanes[lane].fault.get();
                let reason = reason.map_or("it stopped", String::as_str).to_owned();
                self.failed(block, thread, &reason)
            }
        };
        (turn, step)
    }

    /// Whether its lanes have ended and its stores have landed.
    pub(super) fn is_over(&self) -> bool {
        let context = &self.context;
        self.live_blocks == 0
            && context.dirty.borrow().is_empty()
            && context.held.borrow().is_none()
    }

    fn failed(&self, block: u32, thread: u32, reason: &str) -> Step {
        let name = self.context.name;
        Step::Failed(format!("kernel {name}, block {block}, thread {thread}: {reason}"))
    }

    fn arrived(&mut self, block: u32, thread: u32, barrier: Barrier) -> Step {
        let run = &mut self.blocks[block as usize];
        let merged = match (run.barrier, barrier) {
            (None, first) => Some(first),
            (Some(Barrier::Plain), Barrier::Plain) => Some(Barrier::Plain),
            (Some(Barrier::Or(a)), Barrier::Or(b)) => Some(Barrier::Or(a | b)),
            _ => None,
        };
        if merged.is_none() {
            let reason = "it waits in one kind of block barrier, others of its block in the other";
            return self.failed(block, thread, reason);
        }
        run.barrier = merged;
        run.arrived += 1;
        self.release(block)
    }

    fn ended(&mut self, block: u32) -> Step {
        let run = &mut self.blocks[block as usize];
        run.live -= 1;
        if run.live > 0 {
            return self.release(block);
        }
        self.live_blocks -= 1;
        if self.live_blocks > 0 { Step::Continue } else { Step::Finished }
    }

    /// Opens the barrier of `block` if all its live lanes are there.
    fn release(&mut self, block: u32) -> Step {
        let threads = self.context.threads;
        let run = &mut self.blocks[block as usize];
        if run.arrived < run.live {
            return Step::Continue;
        }
        if run.live < threads {
            let name = self.context.name;
            let (arrived, ended) = (run.arrived, threads - run.live);
            return Step::Failed(format!(
                "kernel {name}, block {block}: {arrived} threads wait in a block barrier, {ended} have ended without it"
            ));
        }
        if let Some(Barrier::Or(any)) = run.barrier.take() {
            self.context.blocks[block as usize].any.set(any);
        }
        run.arrived = 0;
        run.ready.extend(0..threads);
        self.context.publish(block);
        Step::Continue
    }
}

impl Drop for KernelRun {
    fn drop(&mut self) {
        let stacks = self.threads.drain(..).map(|mut thread| {
            // SAFETY: a lane's frames own nothing that must be dropped: kernels are `no_std`
            // code over `Copy` values, and whatever a test's body owned is leaked.
            unsafe { thread.force_reset() };
            thread.into_stack()
        });
        stack::give_back(stacks);
    }
}

/// The coroutine of `lane`. It captures nothing that needs dropping: see `KernelRun::drop`.
fn thread(stack: LaneStack, lane: &LaneContext) -> Thread {
    let lane: *const LaneContext = lane;
    Coroutine::with_stack(stack, move |yielder, ()| {
        // SAFETY: the kernel's context outlives its coroutines, which are reset before it goes.
        let context = unsafe { &*lane };
        context.yielder.set(yielder);
        // SAFETY: as above, and this is the lane's coroutine.
        let lane = unsafe { SimLane::new(context) };
        // A panic must not cross into the scheduler's stack.
        let body = &context.kernel().body;
        catch_unwind(AssertUnwindSafe(|| body(lane, lane.args()))).map_err(|panic| message(&*panic))
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "with no message".to_owned()
    }
}
