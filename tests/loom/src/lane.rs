//! One thread of a block as loom sees it: the model checker's [`Lane`].
//!
//! Invariant: every access is exactly as strong as docs/memory-model.md promises, with one exception. A word
//! that was polled is loaded with acquire: the kernels rely on a *store* staying behind the load that it depends
//! on (rule 6), which the C++ model that loom follows cannot say. So a later load may be ordered more than on a GPU.

use crate::block::Block;
use crate::scene::Faults;
use crate::world::World;
use half::{bf16, f16};
use loom::sync::atomic::{Ordering, fence};
use loom::thread::yield_now;
use peerlane_device::abi::MAX_RANKS;
use peerlane_device::lane::{Lane, Unit};
use std::cell::Cell;

/// What a thread of a block has for the whole of an execution.
pub(crate) struct Context {
    pub(crate) world: std::rc::Rc<World>,
    pub(crate) block: std::rc::Rc<Block>,
    pub(crate) thread: u32,
    pub(crate) threads: u32,
    pub(crate) faults: Faults,
    /// Turns of a wait between two yields.
    pub(crate) patience: u32,
    /// Turns of a wait that are explored.
    pub(crate) most_turns: u32,
    /// Turns of the wait that this thread is in.
    pub(crate) turns: Cell<u32>,
    /// Nanoseconds that pass between two looks at the clock.
    pub(crate) tick: u64,
    pub(crate) now: Cell<u64>,
}

/// A thread of a block, in one kernel.
#[derive(Clone, Copy)]
pub struct LoomLane<'a> {
    context: &'a Context,
    thread: u32,
    peers: [u64; MAX_RANKS],
}

impl<'a> LoomLane<'a> {
    pub(crate) fn new(context: &'a Context, peers: [u64; MAX_RANKS]) -> LoomLane<'a> {
        LoomLane { context, thread: context.thread, peers }
    }

    /// Thread `thread` of a block whose threads are one loom thread, for programs that make all of them take
    /// each step together. So three ranks need no more than three of loom's five threads.
    pub fn as_thread(self, thread: u32) -> LoomLane<'a> {
        LoomLane { thread, ..self }
    }

    fn world(&self) -> &World {
        &self.context.world
    }
}

impl Lane for LoomLane<'_> {
    const BREAKABLE: bool = true;
    const CHECKED: bool = true;
    const BOUNDED: bool = true;

    fn thread(self) -> u32 {
        self.thread
    }

    fn threads(self) -> u32 {
        self.context.threads
    }

    fn block(self) -> u32 {
        0
    }

    fn blocks(self) -> u32 {
        1
    }

    fn peer(self, rank: u32) -> u64 {
        self.peers[rank as usize]
    }

    fn table(self, index: u32) -> u64 {
        panic!("entry {index} of the table; the scenes' kernels have none")
    }

    fn sync_threads(self) {
        self.sync_threads_or(false);
    }

    fn sync_threads_or(self, value: bool) -> bool {
        if self.context.faults.no_barrier { value } else { self.context.block.wait(value) }
    }

    unsafe fn load_u8(self, address: u64) -> u32 {
        panic!("a load of one byte at {address:#x}; the scenes' tensors are whole words")
    }

    unsafe fn load_u16(self, address: u64) -> u32 {
        panic!("a load of two bytes at {address:#x}; the scenes' tensors are whole words")
    }

    unsafe fn load_u32(self, address: u64) -> u32 {
        self.world().cell_at(address).get()
    }

    unsafe fn load_u32x2(self, address: u64) -> [u32; 2] {
        self.world().load(address)
    }

    unsafe fn load_u32x4(self, address: u64) -> Unit {
        self.world().load(address)
    }

    unsafe fn store_u8(self, address: u64, _: u32) {
        panic!("a store of one byte at {address:#x}; the scenes' tensors are whole words")
    }

    unsafe fn store_u16(self, address: u64, _: u32) {
        panic!("a store of two bytes at {address:#x}; the scenes' tensors are whole words")
    }

    unsafe fn store_u32(self, address: u64, value: u32) {
        self.world().cell_at(address).set(value);
    }

    unsafe fn store_u32x2(self, address: u64, value: [u32; 2]) {
        self.world().store(address, &value);
    }

    unsafe fn store_u32x4(self, address: u64, value: Unit) {
        self.world().store(address, &value);
    }

    unsafe fn put_unit(self, address: u64, value: Unit) {
        self.context.turns.set(0);
        self.world().put_unit(address, value);
    }

    unsafe fn poll_unit(self, address: u64) -> Unit {
        self.world().poll_unit(address)
    }

    unsafe fn put_word(self, address: u64, value: u32) {
        self.context.turns.set(0);
        self.world().word_at(address).store(value, Ordering::Relaxed);
    }

    unsafe fn poll_word(self, address: u64) -> u32 {
        let relaxed = self.context.faults.no_dependency;
        let ordering = if relaxed { Ordering::Relaxed } else { Ordering::Acquire };
        self.world().word_at(address).load(ordering)
    }

    unsafe fn poll_word_acquire(self, address: u64) -> u32 {
        let relaxed = self.context.faults.no_acquire;
        let ordering = if relaxed { Ordering::Relaxed } else { Ordering::Acquire };
        self.world().word_at(address).load(ordering)
    }

    unsafe fn add_word(self, address: u64, value: u32) {
        // A plain cell: loom would report any other thread that touches it meanwhile.
        let cell = self.world().cell_at(address);
        cell.set(cell.get().wrapping_add(value));
    }

    unsafe fn claim_word(self, address: u64) -> bool {
        let word = self.world().word_at(address);
        if self.context.faults.no_claim {
            word.store(1, Ordering::Relaxed);
            return true;
        }
        word.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn fence_system(self) {
        if !self.context.faults.no_fence {
            fence(Ordering::AcqRel);
        }
    }

    fn clock_ns(self) -> u64 {
        let now = self.context.now.get() + self.context.tick;
        self.context.now.set(now);
        now
    }

    fn pause(self) {
        let turns = self.context.turns.get() + 1;
        self.context.turns.set(turns);
        if turns == self.context.most_turns {
            loom::skip_branch();
        }
        if turns.is_multiple_of(self.context.patience) {
            yield_now();
        }
    }

    fn sleep(self, _: u32) {
        self.pause();
    }

    fn f16_from_f32(self, value: f32) -> u32 {
        u32::from(f16::from_f32(value).to_bits())
    }

    fn f16_to_f32(self, bits: u32) -> f32 {
        f16::from_bits(bits as u16).to_f32()
    }

    fn bf16x2_from_f32(self, low: f32, high: f32) -> u32 {
        let half = |value: f32| u32::from(bf16::from_f32(value).to_bits());
        half(high) << 16 | half(low)
    }

    fn max_f32(self, a: f32, b: f32) -> f32 {
        a.max(b)
    }

    fn min_f32(self, a: f32, b: f32) -> f32 {
        a.min(b)
    }
}
