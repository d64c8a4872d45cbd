//! One simulated GPU thread: the simulator's [`Lane`].
//!
//! Invariant: a lane touches memory only at addresses that [`LaneContext::check`] has passed; one
//! that did anything else suspends with [`Turn::Fault`] and is never resumed.
//!
//! A lane runs until it does something that others may see or that waits, so a turn is a few
//! memory accesses long. Kernels keep nothing on a lane's stack that needs dropping, so a lane that
//! is not resumed again leaks nothing.

use super::access::{load_u8, load_u16, load_words, store_u8, store_u16, store_words, word};
use super::context::{Barrier, LaneContext, Machine, Turn};
use super::fault::{Harm, Held, flip};
use super::random::Chance;
use super::stack::has_room;
use half::{bf16, f16};
use peerlane_device::abi::Args;
use peerlane_device::lane::{Lane, Unit};
use std::sync::atomic::{Ordering, fence};

/// One simulated GPU thread. It is valid while its kernel runs, on its own coroutine.
#[derive(Clone, Copy)]
pub struct SimLane {
    context: *const LaneContext,
}

impl SimLane {
    /// # Safety
    /// `context` outlives every use, and the uses are on the lane's own coroutine.
    pub(super) unsafe fn new(context: *const LaneContext) -> SimLane {
        SimLane { context }
    }

    #[inline(always)]
    fn context<'a>(self) -> &'a LaneContext {
        // SAFETY: valid as long as the lane runs, by the promise of `new`.
        unsafe { &*self.context }
    }

    /// The arguments of the lane's kernel.
    pub(super) fn args<'a>(self) -> &'a Args {
        &self.context().kernel().args
    }

    fn suspend(self, turn: Turn) {
        let context = self.context();
        if !has_room(context.stack_limit) && turn != Turn::Fault {
            self.fault("it has used up its stack".into());
        }
        // SAFETY: the coroutine set its yielder before the body began, and this runs on it.
        unsafe { &*context.yielder.get() }.suspend(turn);
    }

    fn fault(self, reason: String) -> ! {
        // A second reason would come from a lane that was resumed, and none is.
        let _ = self.context().fault.set(reason);
        loop {
            self.suspend(Turn::Fault);
        }
    }

    #[inline(always)]
    fn maybe_yield(self, chance: Chance) {
        if self.context().kernel().machine.random.chance(chance) {
            let turn = if self.context().acted.get() { Turn::Ready } else { Turn::Waiting };
            self.suspend(turn);
        }
    }

    #[inline(always)]
    fn check(self, what: &str, address: u64, bytes: u64) {
        if let Err(reason) = self.context().check(address, bytes, bytes) {
            self.fault(format!("{what} of {bytes} bytes at {address:#x}: {reason}"));
        }
    }

    /// Prepares a plain access: its own puts to the same place come first.
    #[inline(always)]
    fn plain(self, what: &str, address: u64, bytes: u64) {
        self.check(what, address, bytes);
        self.land_range(address, bytes);
    }

    #[inline(always)]
    fn land_range(self, address: u64, bytes: u64) {
        let context = self.context();
        // The published ones are older.
        if !context.published().is_empty() {
            context.published().land_range(address, bytes);
        }
        if !context.outbox.is_empty() {
            context.outbox.land_range(context.published(), address, bytes);
        }
    }

    /// The words at a checked address, as this lane sees them.
    #[inline(always)]
    fn see<const N: usize>(self, address: u64) -> [u32; N] {
        let context = self.context();
        // SAFETY: checked by the caller.
        let mut words = unsafe { load_words(address) };
        if context.outbox.is_empty() && context.published().is_empty() {
            return words;
        }
        for (word, at) in words.iter_mut().zip((address..).step_by(4)) {
            let pending = context.outbox.newest(at).or_else(|| context.published().newest(at));
            *word = pending.unwrap_or(*word);
        }
        words
    }

    /// Puts words at a checked address.
    fn put(self, address: u64, values: &[u32]) {
        let context = self.context();
        context.acted.set(true);
        if context.kernel().machine.faults.on_stores {
            self.put_with_faults(address, values);
        } else if !context.loses(address) {
            self.put_whole(address, values);
        }
    }

    /// As `put`, where a store may suffer.
    fn put_with_faults(self, address: u64, values: &[u32]) {
        let (context, kernel) = (self.context(), self.context().kernel());
        let Machine { faults, memory, clock, .. } = &*kernel.machine;
        // What is kept back is older than what comes now.
        kernel.land_held(|held| held.address == address);
        let mut words = [0; 4];
        words[..values.len()].copy_from_slice(values);
        let count = values.len();
        match faults.harm(kernel.device, address, &memory.borrow()) {
            None => {}
            Some(Harm::Lost) => return,
            Some(Harm::Flipped(bit)) => flip(&mut words[..count], bit),
            Some(Harm::Late(ns)) => {
                // Older stores to the same place come first.
                self.land_range(address, 4 * count as u64);
                let (until, block) = (clock.get() + ns, context.block);
                return kernel.hold(Held { until, block, address, words, count });
            }
        }
        if !context.loses(address) {
            self.put_whole(address, &words[..count]);
        }
    }

    /// Puts what nothing happens to.
    fn put_whole(self, address: u64, values: &[u32]) {
        let (context, kernel) = (self.context(), self.context().kernel());
        if !kernel.machine.weak {
            // SAFETY: checked by the caller.
            unsafe { store_words(address, values) };
            kernel.machine.progress.set(true);
            return;
        }
        context.list();
        // Room is made for all words at once: the halves of a unit enter whole, to land whole.
        while context.outbox.is_full() {
            let machine = &*kernel.machine;
            context.outbox.land_some(context.published(), &machine.random, machine.policy.tear);
        }
        for (value, address) in values.iter().zip((address..).step_by(4)) {
            context.outbox.put(address, *value);
        }
    }

    fn acted(self) {
        self.context().acted.set(true);
        self.context().kernel().machine.progress.set(true);
    }
}

impl Lane for SimLane {
    const BREAKABLE: bool = true;
    const CHECKED: bool = true;
    const BOUNDED: bool = true;

    fn thread(self) -> u32 {
        self.context().thread
    }

    fn threads(self) -> u32 {
        self.context().kernel().threads
    }

    fn block(self) -> u32 {
        self.context().block
    }

    fn blocks(self) -> u32 {
        self.context().kernel().blocks.len() as u32
    }

    fn peer(self, rank: u32) -> u64 {
        self.args().peers[rank as usize]
    }

    fn table(self, index: u32) -> u64 {
        self.args().table[index as usize]
    }

    fn sync_threads(self) {
        self.acted();
        self.suspend(Turn::Barrier(Barrier::Plain));
    }

    fn sync_threads_or(self, value: bool) -> bool {
        self.acted();
        self.suspend(Turn::Barrier(Barrier::Or(value)));
        self.context().kernel().blocks[self.context().block as usize].any.get()
    }

    unsafe fn load_u8(self, address: u64) -> u32 {
        self.plain("load", address, 1);
        // SAFETY: `plain` has checked it.
        u32::from(unsafe { load_u8(address) })
    }

    unsafe fn load_u16(self, address: u64) -> u32 {
        self.plain("load", address, 2);
        // SAFETY: `plain` has checked it.
        u32::from(unsafe { load_u16(address) })
    }

    unsafe fn load_u32(self, address: u64) -> u32 {
        self.plain("load", address, 4);
        // SAFETY: `plain` has checked it.
        let [word] = unsafe { load_words(address) };
        word
    }

    unsafe fn load_u32x2(self, address: u64) -> [u32; 2] {
        self.plain("load", address, 8);
        // SAFETY: `plain` has checked it.
        unsafe { load_words(address) }
    }

    unsafe fn load_u32x4(self, address: u64) -> Unit {
        self.plain("load", address, 16);
        // SAFETY: `plain` has checked it.
        unsafe { load_words(address) }
    }

    unsafe fn store_u8(self, address: u64, value: u32) {
        self.plain("store", address, 1);
        // SAFETY: `plain` has checked it.
        unsafe { store_u8(address, value as u8) };
        self.acted();
    }

    unsafe fn store_u16(self, address: u64, value: u32) {
        self.plain("store", address, 2);
        // SAFETY: `plain` has checked it.
        unsafe { store_u16(address, value as u16) };
        self.acted();
    }

    unsafe fn store_u32(self, address: u64, value: u32) {
        self.plain("store", address, 4);
        // SAFETY: `plain` has checked it.
        unsafe { store_words(address, &[value]) };
        self.acted();
    }

    unsafe fn store_u32x2(self, address: u64, value: [u32; 2]) {
        self.plain("store", address, 8);
        // SAFETY: `plain` has checked it.
        unsafe { store_words(address, &value) };
        self.acted();
    }

    unsafe fn store_u32x4(self, address: u64, value: Unit) {
        self.plain("store", address, 16);
        // SAFETY: `plain` has checked it.
        unsafe { store_words(address, &value) };
        self.acted();
    }

    unsafe fn put_unit(self, address: u64, value: Unit) {
        self.check("put", address, 16);
        self.put(address, &value);
        self.maybe_yield(self.context().kernel().machine.policy.put);
    }

    unsafe fn poll_unit(self, address: u64) -> Unit {
        self.check("poll", address, 16);
        self.maybe_yield(self.context().kernel().machine.policy.poll);
        self.see(address)
    }

    unsafe fn put_word(self, address: u64, value: u32) {
        self.check("put", address, 4);
        self.put(address, &[value]);
        self.maybe_yield(self.context().kernel().machine.policy.put);
    }

    unsafe fn poll_word(self, address: u64) -> u32 {
        self.check("poll", address, 4);
        self.maybe_yield(self.context().kernel().machine.policy.poll);
        let [word] = self.see(address);
        word
    }

    unsafe fn poll_word_acquire(self, address: u64) -> u32 {
        // Loads of simulated lanes are in order, and acquire what other worlds have released.
        // SAFETY: passed on to the caller.
        unsafe { self.poll_word(address) }
    }

    unsafe fn add_word(self, address: u64, value: u32) {
        self.plain("add", address, 4);
        // SAFETY: `plain` has checked it.
        unsafe { word(address) }.fetch_add(value, Ordering::AcqRel);
    }

    unsafe fn claim_word(self, address: u64) -> bool {
        self.plain("claim", address, 4);
        // SAFETY: `plain` has checked it.
        let word = unsafe { word(address) };
        let won = word.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if won {
            self.acted();
        }
        won
    }

    fn fence_system(self) {
        let context = self.context();
        let published = context.published();
        if !published.is_empty() || !context.outbox.is_empty() {
            published.land_all();
            context.outbox.land_all(published);
            self.acted();
        }
        while let Some(until) = context.kernel().holds(context.block) {
            self.suspend(Turn::Sleep(until));
        }
        // Other worlds share no lock with this one.
        fence(Ordering::SeqCst);
        self.maybe_yield(context.kernel().machine.policy.put);
    }

    fn clock_ns(self) -> u64 {
        // As coarse as a kernel must be able to bear.
        self.context().kernel().machine.clock.get() / 1000 * 1000
    }

    fn pause(self) {
        self.context().acted.set(false);
        self.suspend(Turn::Waiting);
    }

    fn sleep(self, ns: u32) {
        self.context().acted.set(false);
        let until = self.context().kernel().machine.clock.get() + u64::from(ns);
        self.suspend(Turn::Sleep(until));
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
        // Equal values differ only as zeros do, and +0 is the larger.
        if a == b { f32::from_bits(a.to_bits() & b.to_bits()) } else { a.max(b) }
    }

    fn min_f32(self, a: f32, b: f32) -> f32 {
        if a == b { f32::from_bits(a.to_bits() | b.to_bits()) } else { a.min(b) }
    }
}
