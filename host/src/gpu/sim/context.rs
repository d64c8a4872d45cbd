//! What a running lane reaches: its own state, its block's, its kernel's and the machine's.
//!
//! Invariant: all of it is reached through shared references and changed through cells. One OS
//! thread at a time runs lanes, the one that holds the world's lock, so the cells need no more.

use super::access::{load_words, store_words};
use super::fault::{Faults, Harm, Held, flip};
use super::kernel::Body;
use super::memory::Memory;
use super::outbox::{Outbox, Published};
use super::random::{Policy, Random};
use super::work::{Launch, Work};
use corosensei::Yielder;
use peerlane_device::abi::Args;
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// Simulated time that one turn of one lane takes.
pub(super) const TURN_NS: u64 = 1;
/// Allocations whose bounds a lane remembers.
const HITS: usize = 4;

/// What all kernels of a world share.
pub(super) struct Machine {
    pub(super) random: Random,
    pub(super) policy: Policy,
    pub(super) memory: RefCell<Memory>,
    /// Whether puts go through store buffers.
    pub(super) weak: bool,
    /// Ordered pairs of GPUs between which puts are lost.
    pub(super) lossy: Vec<(u32, u32)>,
    /// What goes wrong.
    pub(super) faults: Faults,
    /// Simulated nanoseconds since the world began.
    pub(super) clock: Cell<u64>,
    /// Something happened that a waiting lane might see.
    pub(super) progress: Cell<bool>,
}

impl Machine {
    /// Does what a stream of `device` is to do that is not a kernel; says how many bytes it moved.
    pub(super) fn store(&self, device: u32, work: &Work) -> Result<usize, String> {
        let memory = self.memory.borrow();
        let (Work::Store { dst, .. } | Work::Copy { dst, .. }) = *work else {
            return memory.transfer(device, work);
        };
        let harm =
            if self.faults.on_stores { self.faults.harm(device, dst, &memory) } else { None };
        if harm == Some(Harm::Lost) {
            return Ok(0);
        }
        let bytes = memory.transfer(device, work)?;
        if let Some(Harm::Flipped(bit)) = harm
            && bytes >= 4
            && dst.is_multiple_of(4)
        {
            // SAFETY: `transfer` has checked the address, which is a word's; no lane runs now.
            unsafe {
                let mut words = load_words::<1>(dst);
                flip(&mut words, bit);
                store_words(dst, &words);
            }
        }
        Ok(bytes)
    }
}

/// Why a lane gave up its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It can go on at once.
    Ready,
    /// It waits for memory to change.
    Waiting,
    /// It waits for its block.
    Barrier(Barrier),
    /// It sleeps until this time.
    Sleep(u64),
    /// It did what it must not; `Lane::fault` says what.
    Fault,
}

/// The two block-wide barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Barrier {
    Plain,
    Or(bool),
}

/// A running kernel, as its lanes see it.
pub(super) struct KernelContext {
    pub(super) machine: Rc<Machine>,
    pub(super) name: &'static str,
    pub(super) device: u32,
    pub(super) body: Body,
    pub(super) args: Args,
    pub(super) threads: u32,
    pub(super) blocks: Vec<BlockContext>,
    pub(super) lanes: Vec<LaneContext>,
    /// Store buffers that are not empty.
    pub(super) dirty: RefCell<Vec<Dirty>>,
    /// A store that a fault makes late.
    pub(super) held: RefCell<Option<Held>>,
}

/// A store buffer that is not empty.
#[derive(Clone, Copy)]
pub(super) enum Dirty {
    /// Of the lane with this index.
    Lane(u32),
    /// Of the block with this index.
    Block(u32),
}

/// A running block, as its lanes see it.
#[derive(Default)]
pub(super) struct BlockContext {
    pub(super) published: Published,
    /// What the last `sync_threads_or` found.
    pub(super) any: Cell<bool>,
    /// It stands in `KernelContext::dirty`.
    listed: Cell<bool>,
}

/// The bounds of an allocation that a lane has been allowed to access.
#[derive(Clone, Copy, Default)]
struct Hit {
    start: u64,
    bytes: u64,
}

/// One lane.
pub(super) struct LaneContext {
    kernel: *const KernelContext,
    pub(super) index: u32,
    pub(super) block: u32,
    pub(super) thread: u32,
    pub(super) outbox: Outbox,
    /// It has done more than look and wait since its last pause.
    pub(super) acted: Cell<bool>,
    pub(super) fault: OnceCell<String>,
    pub(super) yielder: Cell<*const Yielder<(), Turn>>,
    pub(super) stack_limit: usize,
    /// It stands in `KernelContext::dirty`.
    listed: Cell<bool>,
    hits: Cell<[Hit; HITS]>,
    generation: Cell<u64>,
}

impl KernelContext {
    /// Lays out the lanes of a launch; `stack_limit` says where each lane's stack ends.
    pub(super) fn new(
        machine: &Rc<Machine>,
        launch: &Launch,
        stack_limit: impl Fn(u32) -> usize,
    ) -> Rc<KernelContext> {
        let Launch { blocks, threads, .. } = *launch;
        Rc::new_cyclic(|kernel| KernelContext {
            machine: Rc::clone(machine),
            name: launch.name,
            device: launch.device,
            body: Arc::clone(&launch.body),
            args: launch.args,
            threads,
            blocks: (0..blocks).map(|_| BlockContext::default()).collect(),
            lanes: (0..blocks * threads)
                .map(|index| LaneContext {
                    kernel: kernel.as_ptr(),
                    index,
                    block: index / threads,
                    thread: index % threads,
                    outbox: Outbox::default(),
                    acted: Cell::new(true),
                    fault: OnceCell::new(),
                    yielder: Cell::new(std::ptr::null()),
                    stack_limit: stack_limit(index),
                    listed: Cell::new(false),
                    hits: Cell::default(),
                    generation: Cell::new(0),
                })
                .collect(),
            dirty: RefCell::default(),
            held: RefCell::default(),
        })
    }

    /// Lands something from a store buffer chosen at random.
    pub(super) fn land_some(&self) {
        let machine = &*self.machine;
        let mut dirty = self.dirty.borrow_mut();
        if dirty.is_empty() {
            return;
        }
        let index = machine.random.below(dirty.len());
        let (empty, listed) = match dirty[index] {
            Dirty::Lane(lane) => {
                let lane = &self.lanes[lane as usize];
                lane.outbox.land_some(lane.published(), &machine.random, machine.policy.tear);
                (lane.outbox.is_empty(), &lane.listed)
            }
            Dirty::Block(block) => {
                let block = &self.blocks[block as usize];
                block.published.land_some(&machine.random, machine.policy.tear);
                (block.published.is_empty(), &block.listed)
            }
        };
        if empty {
            dirty.swap_remove(index);
            listed.set(false);
        }
        machine.progress.set(true);
    }

    /// Keeps a store back, in place of one that was kept back before.
    pub(super) fn hold(&self, store: Held) {
        self.land_held(|_| true);
        *self.held.borrow_mut() = Some(store);
        let faults = &self.machine.faults;
        faults.held.set(faults.held.get() + 1);
    }

    /// Lands the store that was kept back, if it is one that `chosen` picks.
    pub(super) fn land_held(&self, chosen: impl Fn(&Held) -> bool) {
        let Some(store) = self.held.borrow_mut().take_if(|held| chosen(held)) else { return };
        // SAFETY: the put checked the address, and memory is not given back while kernels run.
        unsafe { store_words(store.address, &store.words[..store.count]) };
        let faults = &self.machine.faults;
        faults.held.set(faults.held.get() - 1);
        self.machine.progress.set(true);
    }

    /// When the store that was kept back in `block` lands, if there is one.
    pub(super) fn holds(&self, block: u32) -> Option<u64> {
        self.held.borrow().as_ref().filter(|held| held.block == block).map(|held| held.until)
    }

    /// Lands everything: the kernel is over.
    pub(super) fn land_all(&self) {
        self.land_held(|_| true);
        for block in &self.blocks {
            block.published.land_all();
        }
        for lane in &self.lanes {
            lane.outbox.land_all(&self.blocks[lane.block as usize].published);
        }
        self.dirty.borrow_mut().clear();
    }

    /// The lanes of `block` have come to a barrier: they see each other's stores from here on.
    pub(super) fn publish(&self, block: u32) {
        let first = (block * self.threads) as usize;
        let context = &self.blocks[block as usize];
        for lane in &self.lanes[first..first + self.threads as usize] {
            lane.outbox.publish(&context.published);
        }
        if !context.published.is_empty() && !context.listed.replace(true) {
            self.dirty.borrow_mut().push(Dirty::Block(block));
        }
    }
}

impl LaneContext {
    #[inline(always)]
    pub(super) fn kernel(&self) -> &KernelContext {
        // SAFETY: the kernel's context owns this one and does not move, being in an `Rc`.
        unsafe { &*self.kernel }
    }

    #[inline(always)]
    pub(super) fn published(&self) -> &Published {
        &self.kernel().blocks[self.block as usize].published
    }

    /// The lane's outbox is about to hold something.
    pub(super) fn list(&self) {
        if !self.listed.replace(true) {
            self.kernel().dirty.borrow_mut().push(Dirty::Lane(self.index));
        }
    }

    /// Whether what this lane puts at `address` is lost on the way.
    pub(super) fn loses(&self, address: u64) -> bool {
        let kernel = self.kernel();
        let lossy = &kernel.machine.lossy;
        let owner = || kernel.machine.memory.borrow().owner(address);
        !lossy.is_empty() && owner().is_some_and(|to| lossy.contains(&(kernel.device, to)))
    }

    /// Checks an access of `bytes` bytes, to be aligned to `align`.
    #[inline(always)]
    pub(super) fn check(&self, address: u64, bytes: u64, align: u64) -> Result<(), String> {
        if !address.is_multiple_of(align) {
            return Err(format!("it is not aligned to {align} bytes"));
        }
        let kernel = self.kernel();
        let memory = kernel.machine.memory.borrow();
        let mut hits = self.hits.get();
        if self.generation.get() == memory.generation() {
            let inside = |hit: &Hit| {
                let offset = address.wrapping_sub(hit.start);
                offset < hit.bytes && hit.bytes - offset >= bytes
            };
            if hits.iter().any(inside) {
                return Ok(());
            }
        } else {
            hits = Default::default();
            self.generation.set(memory.generation());
        }
        let range = memory.find(kernel.device, address, bytes as usize)?;
        hits.rotate_right(1);
        hits[0] = Hit { start: range.start, bytes: range.end - range.start };
        self.hits.set(hits);
        Ok(())
    }
}
