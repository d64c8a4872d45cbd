//! A scene: some ranks, the threads of their blocks that matter, and what is left out on purpose. [`Scene::passes`]
//! runs it under every execution that loom finds within the scene's bound; [`Scene::fails`] wants one to fail.
//!
//! Invariant: a scene is deterministic but for loom's choices. Every thread of a block is a loom thread; the
//! first one of loom's five is the ranks' host.

use crate::block::Block;
use crate::lane::{Context, LoomLane};
use crate::world::{Start, World, dst, host_mailbox, mailbox, src, status};
use loom::sync::atomic::{Ordering, fence};
use loom::thread;
use peerlane_device::abi::{Args, Layout, Operation, Status, TICK_SHIFT, state};
use std::cell::Cell;
use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

/// What the machine leaves out: for the orderings that have no `BREAK_*` switch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Fences do nothing.
    pub no_fence: bool,
    /// Block barriers do nothing.
    pub no_barrier: bool,
    /// The load of a seal is relaxed.
    pub no_acquire: bool,
    /// A store may overtake the load of the credit that it waited for.
    pub no_dependency: bool,
    /// Everybody takes the claim for the record.
    pub no_claim: bool,
    /// A kernel's stores may be on their way when the next kernel begins, as those to host memory are.
    pub no_boundary: bool,
}

/// A block: which of its threads there are, and how many they believe to be.
///
/// A thread that neither keeps books nor has a unit changes nothing, and is left out.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// The threads' numbers.
    pub numbers: &'static [u32],
    /// What `Lane::threads` says.
    pub count: u32,
}

/// Who takes part, and on which machine.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// The block of each rank.
    pub ranks: &'static [Threads],
    /// Slots of a lane.
    pub slots: u32,
    /// Units of a slot.
    pub slot_units: u32,
    /// `abi::flags` for every call.
    pub flags: u32,
    /// What the counters begin with.
    pub start: Start,
    /// Whether all pairs use host memory.
    pub by_host: bool,
    /// What the machine leaves out.
    pub faults: Faults,
    /// Nanoseconds between two looks at each rank's clock.
    pub tick: [u64; 3],
    /// How long a wait may last. One that could end is over before the first look at the clock: so a wait that
    /// lasts longer is a wait in vain.
    pub deadline: u32,
    /// Turns of a wait between two at which another thread must go on. Loom lets no load that comes after such a
    /// turn return what one before it has returned, if there is something newer: where data may be late
    /// although the thread has looked for them already, there must be turns without.
    pub patience: u32,
    /// Turns of one wait after which loom tries no more alternatives in an execution. Without this bound it would
    /// let two threads wait in turns for ever, while a third that could go on does not.
    pub turns: u32,
    /// Most times that loom interrupts a thread in one execution, waits not counted.
    pub preemptions: usize,
}

/// One thread of a rank's block.
#[derive(Clone, Copy)]
pub struct Seat<'a> {
    scene: &'a Scene,
    context: &'a Context,
    rank: u32,
}

/// What the host sees: the ranks' memory, and their end.
pub struct Host {
    /// All memory.
    pub world: Rc<World>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Host {
    /// Waits until all kernels of all ranks are over.
    pub fn join(self) -> Rc<World> {
        for thread in self.threads {
            thread.join().expect("a rank panicked");
        }
        self.world
    }
}

/// Most steps of an execution. A wait that never ends reaches it, which loom reports.
const MAX_BRANCHES: usize = 40_000;
/// Words of a thread's stack: kernels are inlined as a whole.
const STACK_WORDS: usize = 1 << 15;

/// What a loom thread may take along whatever it is.
struct OneThread<T>(T);

// SAFETY: loom's threads are coroutines on the one system thread that called `check`.
unsafe impl<T> Send for OneThread<T> {}

impl<T> OneThread<T> {
    fn get(&self) -> &T {
        &self.0
    }
}

impl Scene {
    /// Blocks of these threads, lanes of `slots` slots of one unit, nothing left out.
    pub const fn new(ranks: &'static [Threads], slots: u32) -> Scene {
        Scene {
            ranks,
            slots,
            slot_units: 1,
            flags: 0,
            start: Start { slots: 0, sealed_ago: 0 },
            by_host: false,
            faults: Faults {
                no_fence: false,
                no_barrier: false,
                no_acquire: false,
                no_dependency: false,
                no_claim: false,
                no_boundary: false,
            },
            tick: [2 << TICK_SHIFT; 3],
            deadline: 1,
            patience: 1,
            turns: 6,
            preemptions: 2,
        }
    }

    /// The same with `flags` set.
    pub const fn with(self, flags: u32) -> Scene {
        Scene { flags: self.flags | flags, ..self }
    }

    /// That `ranks`, run by every thread of every rank, and `host` hold whatever loom tries. Prints and returns
    /// how many executions that were.
    pub fn passes(
        &self,
        name: &str,
        ranks: impl Fn(Seat<'_>) + Copy + Send + Sync + 'static,
        host: impl Fn(Host) + Send + Sync + 'static,
    ) -> usize {
        let begun = Instant::now();
        let executions = Arc::new(AtomicUsize::new(0));
        self.check(&executions, ranks, host);
        let executions = executions.load(Ordering::Relaxed);
        let (bound, seconds) = (self.bound(), begun.elapsed().as_secs_f64());
        println!("{name}: {executions} executions, up to {bound} preemptions, {seconds:.1} s");
        executions
    }

    /// That an execution fails; how.
    pub fn fails(
        &self,
        name: &str,
        ranks: impl Fn(Seat<'_>) + Copy + Send + Sync + 'static,
        host: impl Fn(Host) + Send + Sync + 'static,
    ) -> String {
        let executions = Arc::new(AtomicUsize::new(0));
        let outcome = catch_unwind(AssertUnwindSafe(|| self.check(&executions, ranks, host)));
        let executions = executions.load(Ordering::Relaxed);
        let Err(panic) = outcome else {
            panic!("{name}: none of {executions} executions fails");
        };
        let reason = match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => panic.downcast_ref::<&str>().map_or("no reason", |text| text).into(),
        };
        println!("{name}: execution {executions} fails: {reason}");
        reason
    }

    /// The bound on preemptions: the scene's, or one more for who has the time.
    fn bound(&self) -> usize {
        let full = std::env::var_os("PEERLANE_LOOM_FULL").is_some_and(|value| value == "1");
        self.preemptions + usize::from(full)
    }

    fn check(
        &self,
        executions: &Arc<AtomicUsize>,
        ranks: impl Fn(Seat<'_>) + Copy + Send + Sync + 'static,
        host: impl Fn(Host) + Send + Sync + 'static,
    ) {
        let mut builder = loom::model::Builder::new();
        builder.max_branches = MAX_BRANCHES;
        builder.preemption_bound = Some(self.bound());
        let (scene, executions) = (*self, executions.clone());
        builder.check(move || {
            executions.fetch_add(1, Ordering::Relaxed);
            let world = Rc::new(World::new(scene.world(), scene.layout(), scene.start));
            let mut threads = Vec::new();
            for (rank, block) in scene.ranks.iter().enumerate() {
                let shared = Rc::new(Block::new(block.numbers.len() as u32));
                for number in block.numbers {
                    let context = OneThread(Context {
                        world: world.clone(),
                        block: shared.clone(),
                        thread: *number,
                        threads: block.count,
                        faults: scene.faults,
                        patience: scene.patience,
                        most_turns: scene.turns,
                        turns: Cell::new(0),
                        tick: scene.tick[rank],
                        now: Cell::new(scene.tick[rank]),
                    });
                    let body = move || {
                        let context = context.get();
                        ranks(Seat { scene: &scene, context, rank: rank as u32 });
                    };
                    let builder = thread::Builder::new().stack_size(STACK_WORDS);
                    threads.push(builder.spawn(body).expect("loom's threads are coroutines"));
                }
            }
            host(Host { world, threads });
        });
    }

    fn world(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// Where things lie in the scene's mailboxes.
    pub fn layout(&self) -> Layout {
        Layout::new(2, self.slots, self.slot_units).expect("a scene's mailbox is small")
    }
}

impl<'a> Seat<'a> {
    /// Which rank this thread belongs to.
    pub fn rank(self) -> u32 {
        self.rank
    }

    /// Which thread of the block it is.
    pub fn thread(self) -> u32 {
        self.context.thread
    }

    /// How many threads it believes the block to have.
    pub fn threads(self) -> u32 {
        self.context.threads
    }

    /// All memory.
    pub fn world(self) -> &'a World {
        &self.context.world
    }

    /// The arguments of a call of `units` units, each a chunk's part of `chunk_units`, all in one block.
    pub fn args(self, operation: Operation, units: u32, chunk_units: u32) -> Args {
        let scene = self.scene;
        let world = scene.world();
        let mut args = Args::new(self.rank, world, scene.layout());
        args.flags = scene.flags;
        args.operation = operation as u32;
        (args.units, args.tail, args.block_units, args.chunk_units) =
            (units, 16, units, chunk_units);
        (args.src, args.dst) = (src(self.rank), dst(self.rank));
        (args.status, args.deadline) = (status(self.rank), scene.deadline);
        for rank in 0..world {
            let remote = scene.by_host && rank != self.rank;
            args.peers[rank as usize] = if remote { host_mailbox(rank) } else { mailbox(rank) };
        }
        if scene.by_host {
            args.host_mailbox = host_mailbox(self.rank);
            args.host_senders = ((1 << world) - 1) & !(1 << self.rank);
        }
        args
    }

    /// Runs this thread's part of a kernel that `body` stands for, and ends with it: all threads of the block have
    /// come to the end, and what they stored is performed.
    pub fn kernel<R>(self, args: &Args, body: impl FnOnce(LoomLane<'a>, &Args) -> R) -> R {
        let result = body(LoomLane::new(self.context, args.peers), args);
        self.context.block.wait(false);
        if !self.context.faults.no_boundary {
            fence(Ordering::AcqRel);
        }
        result
    }

    /// How this rank's waits have ended so far, an `abi::state`.
    pub fn state(self) -> u32 {
        self.context.world.status_word(self.rank, offset_of!(Status, state))
    }

    /// That no wait of this rank was in vain.
    pub fn assert_ok(self) {
        let [state, peer, phase] =
            [offset_of!(Status, state), offset_of!(Status, peer), offset_of!(Status, phase)]
                .map(|field| self.context.world.status_word(self.rank, field));
        let rank = self.rank;
        assert_eq!(state, state::OK, "rank {rank} waited in vain for rank {peer}, phase {phase}");
    }
}
