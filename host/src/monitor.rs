//! The deadline of scheduled calls: streams wait for flags without one, so a thread looks after them.
//!
//! Invariant: a rank's board (in pinned host memory, written by its streams) says which calls are done and
//! what each stream waits for. If that does not change for as long as the deadline, or somebody aborts the
//! group, the thread leaves a record, aborts the group and then raises this rank's flags until its streams
//! have come to the end. It aborts first: whoever receives what such a stream sends must be able to
//! know that it means nothing. While nothing is outstanding the thread sleeps, unless a call was
//! captured: nobody says when a graph runs, so then it looks at the board now and then.

use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, GpuRef, HostMemory};
use crate::group::{Aborter, Group};
use crate::mailbox::{Board, OwnStream};
use crate::plan::staging::{FLAG_BYTES, UP_BYTE};
use peerlane_device::abi::{Operation, Status, state, ticks};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Looks at the board within a deadline, and the bounds of the time between two.
const LOOKS: u32 = 32;
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// Between two times that flags are raised.
const RAISE_PAUSE: Duration = Duration::from_micros(200);

/// The thread, from the outside. It starts with the first call.
pub(crate) struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    watch: Option<Watch>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The number of the last call that was not captured.
    issued: u32,
    operation: Operation,
    captured: bool,
    /// Of all calls, and of the first.
    deadlines: [Duration; 2],
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment, so a panic elsewhere has left nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Monitor {
    /// Makes what the thread needs. It does not start before the first call.
    pub(crate) fn new(gpu: &GpuRef, rank: u32, group: &Group, config: &Config) -> Result<Monitor> {
        let operation = Operation::AllReduce;
        let deadlines = [config.deadline, config.first_deadline()];
        let state = State { issued: 0, operation, captured: false, deadlines, stop: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let own = &group.mailboxes.members[rank as usize];
        let watch = Watch {
            gpu: gpu.clone(),
            flags: own.staging,
            page: own.status,
            aborter: group.aborter(),
            shared: shared.clone(),
            stream: OwnStream::new(gpu)?,
        };
        Ok(Monitor { shared, thread: None, watch: Some(watch) })
    }

    /// Notes that call number `call` is about to be queued.
    ///
    /// # Errors
    /// There is no thread to be had: the call would have no deadline.
    pub(crate) fn began(&mut self, call: u32, captured: bool, operation: Operation) -> Result<()> {
        self.start(operation)?;
        let mut state = self.shared.lock();
        state.operation = operation;
        if captured {
            state.captured = true;
        } else {
            state.issued = call;
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The operation of the calls that were captured, if any were.
    pub(crate) fn captured(&self) -> Option<Operation> {
        let state = self.shared.lock();
        state.captured.then_some(state.operation)
    }

    /// Watches over calls that were captured before.
    ///
    /// # Errors
    /// As for [`Monitor::began`].
    pub(crate) fn watch_graphs(&mut self, operation: Operation) -> Result<()> {
        self.began(0, true, operation)
    }

    fn start(&mut self, operation: Operation) -> Result<()> {
        if let Some(watch) = self.watch.take() {
            let thread = std::thread::Builder::new().name("peerlane-monitor".into());
            let started =
                thread.spawn(move || watch.run()).map_err(|error| Error::Unsupported {
                    op: operation.name(),
                    reason: format!("no thread can be started to watch over the call: {error}"),
                })?;
            self.thread = Some(started);
        }
        if self.thread.is_none() {
            return Err(Error::Unsupported {
                op: operation.name(),
                reason: "no thread watches over the call".into(),
            });
        }
        Ok(())
    }

    pub(crate) fn set_deadline(&self, config: &Config) {
        self.shared.lock().deadlines = [config.deadline, config.first_deadline()];
        self.shared.changed.notify_all();
    }

    /// Ends the thread. The rank's streams have come to their ends.
    pub(crate) fn stop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread works with.
struct Watch {
    gpu: GpuRef,
    /// This rank's flags.
    flags: DevicePtr,
    /// This rank's status page.
    page: HostMemory,
    aborter: Aborter,
    shared: Arc<Shared>,
    /// Made before a call is: making one may wait for the device, which may wait for this thread.
    stream: OwnStream,
}

impl Watch {
    fn run(self) {
        let mut seen = self.board();
        let mut since = Instant::now();
        while let Some(deadline) = self.pause() {
            let board = self.board();
            let aborted = self.is_aborted();
            if board != seen || board.waits().is_none() || board.busy == 0 {
                (seen, since) = (board, Instant::now());
            }
            let reason = match aborted {
                true if board.busy != 0 => state::ABORTED,
                false if since.elapsed() >= deadline => state::TIMED_OUT,
                _ => continue,
            };
            self.record(&board, reason, since.elapsed());
            // Also if a kernel of this rank has failed: it has told the kernels of others, not their hosts.
            self.aborter.abort();
            self.raise();
        }
    }

    /// Waits until it is time to look; the deadline, or `None` if there is nothing left to do.
    fn pause(&self) -> Option<Duration> {
        let mut state = self.shared.lock();
        while !state.stop && !state.captured && self.board().done == state.issued {
            let woken = self.shared.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        let pause = match self.is_aborted() {
            true => RAISE_PAUSE,
            false => (state.deadlines[0] / LOOKS).clamp(SHORTEST_PAUSE, LONGEST_PAUSE),
        };
        if !state.stop {
            let woken = self.shared.changed.wait_timeout(state, pause);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        let first = self.board().done == 0;
        (!state.stop).then_some(state.deadlines[usize::from(first)])
    }

    fn board(&self) -> Board {
        // SAFETY: the page is alive until the thread has been joined; streams write single words,
        // and a board that is half old only looks like progress.
        unsafe { self.page.host.add(Board::OFFSET).cast::<Board>().read_volatile() }
    }

    /// Whether this rank's calls have failed, for whatever reason.
    fn is_aborted(&self) -> bool {
        let page = self.page.host.cast::<Status>();
        // SAFETY: as for `board`.
        unsafe {
            (&raw const (*page).abort).read_volatile() != 0
                || (&raw const (*page).state).read_volatile() != state::OK
        }
    }

    /// Leaves a record of what the rank waits for, unless there is one or it waits for nobody.
    fn record(&self, board: &Board, reason: u32, waited: Duration) {
        let page = self.page.host.cast::<Status>();
        let Some((phase, peer)) = board.waits() else { return };
        let operation = self.shared.lock().operation;
        // SAFETY: as for `board`. No kernel of this rank that could record runs beside the streams.
        unsafe {
            if (&raw const (*page).state).read_volatile() != state::OK {
                return;
            }
            (&raw mut (*page).operation).write_volatile(operation as u32);
            (&raw mut (*page).peer).write_volatile(peer);
            (&raw mut (*page).epoch).write_volatile(board.done.wrapping_add(1));
            (&raw mut (*page).phase).write_volatile(phase);
            (&raw mut (*page).waited).write_volatile(ticks(waited));
            fence(Ordering::Release);
            AtomicU32::from_ptr(&raw mut (*page).state).store(reason, Ordering::Release);
        }
    }

    /// Raises all of this rank's flags, once.
    fn raise(&self) {
        let stream = self.stream.stream;
        // What fails here leaves the streams to the driver, whose error the caller gets.
        // SAFETY: the flags are this rank's, and the staging area is alive until the thread has
        // been joined.
        let queued = unsafe { self.gpu.upload(self.flags, &[UP_BYTE; FLAG_BYTES], stream) };
        let _ = queued.and_then(|()| self.gpu.stream_synchronize(stream));
    }
}
