//! The barrier of a block: one atomic addition, and parking.
//!
//! Invariant: what a thread did before it came happens before what any thread does after: the last one to come
//! has acquired what the others released with their additions, and its `unpark` passes that on. Nobody
//! spins and nobody stores anything else, so a barrier adds few executions.

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread::{self, Thread};
use std::cell::{Cell, RefCell};

/// What the threads of one block share. The plain fields are changed between two of loom's steps.
pub(crate) struct Block {
    threads: u32,
    /// Threads that have come, in all barriers so far.
    come: AtomicU32,
    /// Barriers that are over.
    over: Cell<u32>,
    /// Whether any thread has brought `true`, to the barrier that is under way and to the last one.
    any: Cell<[bool; 2]>,
    /// Who waits.
    waiting: RefCell<Vec<Thread>>,
}

impl Block {
    /// A block of `threads` threads.
    pub(crate) fn new(threads: u32) -> Block {
        Block {
            threads,
            come: AtomicU32::new(0),
            over: Cell::new(0),
            any: Cell::new([false; 2]),
            waiting: RefCell::new(Vec::new()),
        }
    }

    /// Waits until all threads of the block have come; whether any brought `true`.
    pub(crate) fn wait(&self, value: bool) -> bool {
        if self.threads == 1 {
            return value;
        }
        // Before this thread counts as having come: who comes last must find it here.
        self.waiting.borrow_mut().push(thread::current());
        let [now, last] = self.any.get();
        self.any.set([now | value, last]);
        let over = self.over.get();
        let come = self.come.fetch_add(1, Ordering::AcqRel) + 1;
        if come.is_multiple_of(self.threads) {
            let [now, _] = self.any.get();
            self.any.set([false, now]);
            self.over.set(over + 1);
            let me = thread::current().id();
            let waiting = self.waiting.take();
            waiting.iter().filter(|thread| thread.id() != me).for_each(Thread::unpark);
        }
        while self.over.get() == over {
            thread::park();
        }
        self.any.get()[1]
    }
}
