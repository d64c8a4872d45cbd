//! A rank's thread: it takes one job after the other, and says how each went.
//!
//! Invariant: of a thread and who posts to it, each writes its own counter: `posted` counts jobs given, `done` those whose outcome is there. Who
//! waits spins for a while and then parks; who counts unparks the other afterwards, so no wake-up is lost.

use super::list::Recorded;
use super::{Worker, broken, place};
use crate::communicator::Communicator;
use crate::error::Result;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread as Handle};
use std::time::{Duration, Instant};

/// How long threads that have cores of their own look before they sleep.
const SPIN: Duration = Duration::from_micros(100);
/// Looks between two at the clock.
const LOOKS: u32 = 32;

type Call = Box<dyn FnOnce(&mut Worker) -> Result<()> + Send>;

/// What a thread does.
pub(super) enum Job {
    Run(Recorded),
    Call(Call),
    End,
}

/// What a thread and who posts share.
struct Desk {
    posted: AtomicU64,
    done: AtomicU64,
    job: Mutex<Option<Job>>,
    outcome: Mutex<Result<()>>,
    /// Who waits for the outcome: any thread that has the group.
    waiter: Mutex<Handle>,
}

/// The thread of one rank, as the group has it.
pub(super) struct Thread {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<Worker>>,
    posted: u64,
    spin: Duration,
}

/// How long the threads of so many ranks spin unless told.
pub(super) fn spin_for(ranks: usize) -> Duration {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    if cores > ranks { SPIN } else { Duration::ZERO }
}

impl Thread {
    pub(super) fn start(
        index: u32,
        rank: Communicator,
        spin: Duration,
        near: bool,
    ) -> Result<Thread> {
        let desk = Arc::new(Desk {
            posted: AtomicU64::new(0),
            done: AtomicU64::new(0),
            job: Mutex::new(None),
            outcome: Mutex::new(Ok(())),
            waiter: Mutex::new(thread::current()),
        });
        // Before there is a thread, so that one that cannot be made is an error here.
        let gpu = rank.gpu().clone();
        let stream = gpu.stream_create()?;
        let worker = Worker { rank, gpu: gpu.clone(), stream, is_near: false };
        let shared = desk.clone();
        let named = thread::Builder::new().name(format!("peerlane rank {}", worker.rank.rank()));
        let started = named.spawn(move || work(index, worker, &shared, spin, near));
        let thread = started.map_err(|error| {
            // SAFETY: nothing was queued on it, and nobody has it any more. The first error is the one to report.
            let _ = unsafe { gpu.stream_destroy(stream) };
            broken(format!("cannot start a thread: {error}"))
        })?;
        Ok(Thread { desk, thread: Some(thread), posted: 0, spin })
    }

    /// Gives the thread its next job. The outcome of the last one was taken.
    pub(super) fn post(&mut self, job: Job) {
        *lock(&self.desk.waiter) = thread::current();
        *lock(&self.desk.job) = Some(job);
        self.posted += 1;
        self.desk.posted.store(self.posted, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Waits until the job is done.
    pub(super) fn outcome(&mut self) -> Result<()> {
        wait(self.spin, || self.desk.done.load(Ordering::Acquire) == self.posted);
        std::mem::replace(&mut *lock(&self.desk.outcome), Ok(()))
    }

    /// Ends the thread and takes its rank.
    pub(super) fn finish(mut self) -> Result<Communicator> {
        let worker = self.end().ok_or_else(|| broken("a rank's thread has ended by itself"))?;
        let Worker { mut rank, gpu, stream, .. } = worker;
        // It would order its next call behind that stream.
        rank.leave_stream(stream)?;
        // SAFETY: the thread made it, has ended, and the rank knows of it no more.
        unsafe { gpu.stream_destroy(stream)? };
        Ok(rank)
    }

    fn end(&mut self) -> Option<Worker> {
        self.post(Job::End);
        self.thread.take()?.join().ok()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if self.thread.is_none() {
            return;
        }
        if let Some(Worker { mut rank, gpu, stream, .. }) = self.end() {
            // Waits for what is queued; nothing is left to report to.
            let _ = rank.close();
            // SAFETY: the thread made it, and has ended.
            let _ = unsafe { gpu.stream_destroy(stream) };
        }
    }
}

fn work(index: u32, mut worker: Worker, desk: &Desk, spin: Duration, near: bool) -> Worker {
    worker.is_near = near && place::stay_near(&worker.rank.gpu().properties().pci_bus_id);
    for number in 1.. {
        wait(spin, || desk.posted.load(Ordering::Acquire) == number);
        let job = lock(&desk.job).take();
        let outcome = match job {
            None | Some(Job::End) => break,
            Some(Job::Run(list)) => guarded(&mut worker, |worker| {
                // SAFETY: who runs the list has promised it, and waits for the outcome.
                unsafe { list.run(index, worker) }
            }),
            Some(Job::Call(call)) => guarded(&mut worker, call),
        };
        *lock(&desk.outcome) = outcome;
        desk.done.store(number, Ordering::Release);
        lock(&desk.waiter).unpark();
    }
    worker
}

/// Does something; if that goes wrong, the other ranks need not wait for this one.
fn guarded(worker: &mut Worker, action: impl FnOnce(&mut Worker) -> Result<()>) -> Result<()> {
    // What a panic leaves half done is this rank's, which is aborted.
    let outcome = catch_unwind(AssertUnwindSafe(|| action(worker)));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let text = text.unwrap_or_else(|| "no text".into());
        Err(broken(format!("the thread of rank {} panicked: {text}", worker.rank.rank())))
    });
    if outcome.is_err() {
        worker.rank.abort();
    }
    outcome
}

fn wait(spin: Duration, is_there: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_there() {
        if begin.elapsed() >= spin {
            thread::park();
            continue;
        }
        for _ in 0..LOOKS {
            std::hint::spin_loop();
            if is_there() {
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked there has left a whole value.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
