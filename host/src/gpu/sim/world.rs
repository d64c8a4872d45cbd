//! One simulated machine, shared by its GPUs and by the threads that use them.
//!
//! Invariant: the world moves only while a thread waits in it, and one thread at a time moves it. In
//! an autonomous world that is always its own, and threads that wait just wait.
//!
//! Simulated time jumps freely only if every thread that uses the world waits in it too. While one
//! is outside, it may be about to launch what the lanes wait for, and time passes as for real:
//! else a busy machine would make deadlines pass that no GPU would miss. A thread that has not
//! come yet cannot be known, so even a free jump takes a fraction of the real time. Nor can it be
//! known what another process is about to do: lanes of a world that is autonomous or shares memory
//! wait no faster than in real time.

use super::config::{Config, Statistics};
use super::engine::{Engine, Outcome};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LockResult, Mutex, MutexGuard, Weak};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// Turns between two looks at what other threads want.
const SLICE: u64 = 4096;
/// Longest real wait for other threads before lanes look again.
const PACE: Duration = Duration::from_micros(200);

/// A free jump takes this fraction of the real time, once nothing has happened for a while, and at
/// most so long. The simulated world does not depend on it.
const JUMP_FRACTION: u64 = 20;
const FREE_IDLE_NS: u64 = 5_000_000;
const LONGEST_JUMP: Duration = Duration::from_millis(2);

thread_local! {
    /// Lives as long as its thread.
    static ALIVE: Arc<()> = Arc::new(());
}

/// A simulated machine.
pub(super) struct Shared {
    pub(super) config: Config,
    state: Mutex<State>,
    /// Something completed, was queued, or the thread that moved the world has stopped.
    changed: Condvar,
    /// Threads about to take the lock: the one that moves the world lets them.
    wanting: AtomicUsize,
}

/// What the lock protects.
pub(super) struct State {
    pub(super) engine: Engine,
    /// A thread is moving the world, now or as soon as it has the lock again.
    moving: bool,
    /// Threads that wait in the world.
    waiting: usize,
    /// Every thread that has used the world.
    threads: HashMap<ThreadId, Weak<()>>,
    /// No GPU of the world is left.
    ended: bool,
}

type Guard<'a> = MutexGuard<'a, State>;

impl Shared {
    pub(super) fn new(config: &Config) -> Shared {
        let state = State {
            engine: Engine::new(config),
            moving: config.autonomous,
            waiting: 0,
            threads: HashMap::new(),
            ended: false,
        };
        Shared {
            config: config.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wanting: AtomicUsize::new(0),
        }
    }

    pub(super) fn statistics(&self) -> Statistics {
        self.lock().engine.statistics()
    }

    pub(super) fn occasions(&self) -> Vec<u64> {
        self.lock().engine.machine().faults.occasions()
    }

    /// Takes the lock and notes that this thread uses the world.
    pub(super) fn enter(&self) -> Guard<'_> {
        let mut state = self.lock();
        // A thread on its way out uses the world without being waited for.
        let alive = ALIVE.try_with(Arc::downgrade).unwrap_or_default();
        state.threads.entry(thread::current().id()).or_insert(alive);
        if state.moving {
            self.changed.notify_all();
        }
        state
    }

    fn lock(&self) -> Guard<'_> {
        self.request().expect("the simulator does not panic")
    }

    fn request(&self) -> LockResult<Guard<'_>> {
        self.wanting.fetch_add(1, Ordering::SeqCst);
        let state = self.state.lock();
        self.wanting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// Moves the world, or lets another thread, until `done` has an answer.
    pub(super) fn wait<T>(
        &self,
        device: u32,
        mut done: impl FnMut(&mut Engine) -> Option<Result<T>>,
    ) -> Result<T> {
        let mut state = self.enter();
        state.waiting += 1;
        let mut mover = false;
        let answer = loop {
            if let Some(answer) = done(&mut state.engine) {
                break answer;
            }
            if state.moving && !mover {
                if self.config.autonomous && state.engine.is_at_rest() {
                    break Err(stuck(device, &state.engine));
                }
                (state, _) = self.sleep(state, 100 * PACE);
                continue;
            }
            mover = true;
            state.moving = true;
            match self.advance(&mut state) {
                Some(Outcome::Nothing) => break Err(stuck(device, &state.engine)),
                Some(Outcome::Idle(ns)) => state = self.pace(state, ns),
                _ => {}
            }
            state = self.let_others(state);
        };
        state.waiting -= 1;
        if mover {
            state.moving = false;
        }
        self.changed.notify_all();
        answer
    }

    /// Moves the world a little, unless another thread does.
    pub(super) fn nudge(&self) {
        let mut state = self.enter();
        if state.moving {
            return;
        }
        state.waiting += 1;
        state.moving = true;
        if let Some(Outcome::Idle(ns)) = self.advance(&mut state) {
            state = self.pace(state, ns);
        }
        state.waiting -= 1;
        state.moving = false;
        self.changed.notify_all();
    }

    /// One slice; the outcome if it needs an answer.
    fn advance(&self, state: &mut State) -> Option<Outcome> {
        match state.engine.run(SLICE) {
            Outcome::Progressed => {
                self.changed.notify_all();
                None
            }
            Outcome::Spent => None,
            outcome => Some(outcome),
        }
    }

    /// Moves an autonomous world for as long as it has a GPU.
    pub(super) fn drive(&self) {
        let mut state = self.lock();
        while !state.ended {
            match self.advance(&mut state) {
                Some(Outcome::Nothing) => {
                    // Whoever waits for more than there was must know.
                    self.changed.notify_all();
                    let slept = self.changed.wait(state);
                    state = slept.expect("the simulator does not panic");
                }
                Some(Outcome::Idle(ns)) => state = self.pace(state, ns),
                _ => {}
            }
            state = self.let_others(state);
        }
    }

    /// The last GPU is gone: nothing moves any more.
    pub(super) fn end(&self) {
        // A poisoned lock has ended the world's thread already, and this must not panic.
        if let Ok(mut state) = self.request() {
            state.ended = true;
        }
        self.changed.notify_all();
    }

    /// All lanes wait: skips `ns` nanoseconds, at real speed where another thread or another world
    /// may help them.
    fn pace<'a>(&'a self, mut state: Guard<'a>, ns: u64) -> Guard<'a> {
        state.threads.retain(|_, alive| alive.strong_count() > 0);
        if state.engine.is_alone() && state.threads.len() <= state.waiting {
            if state.engine.idle_ns() > FREE_IDLE_NS {
                let limit = Duration::from_nanos(ns / JUMP_FRACTION).min(LONGEST_JUMP);
                let (returned, woken) = self.sleep(state, limit);
                state = returned;
                if woken {
                    return state;
                }
            }
            state.engine.advance(ns);
            return state;
        }
        let before = Instant::now();
        (state, _) = self.sleep(state, PACE.min(Duration::from_nanos(ns)));
        let passed = u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // No more than that at once: this thread may have been the one that was held up.
        state.engine.advance(passed.min(ns.max(PACE.as_nanos() as u64)));
        state
    }

    /// Sleeps until something changes, at most for `limit`; returns whether something did.
    fn sleep<'a>(&'a self, state: Guard<'a>, limit: Duration) -> (Guard<'a>, bool) {
        let slept = self.changed.wait_timeout(state, limit);
        let (state, timeout) = slept.expect("the simulator does not panic");
        (state, !timeout.timed_out())
    }

    /// Lets threads that want the lock have it: a mutex alone is not fair.
    fn let_others<'a>(&'a self, state: Guard<'a>) -> Guard<'a> {
        if self.wanting.load(Ordering::SeqCst) == 0 {
            return state;
        }
        drop(state);
        while self.wanting.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        self.lock()
    }
}

fn stuck(device: u32, engine: &Engine) -> Error {
    Error::Simulated {
        device,
        reason: "a stream waits for something that nothing queued will ever do".into(),
        seed: engine.statistics().seed,
    }
}
