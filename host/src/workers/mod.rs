//! One thread for each rank of this process: all of them queue a recorded list of operations at once.
//!
//! One thread that drives several ranks queues each operation on one after the other, 3 us a launch; from Python each is a call
//! besides. Here a list is recorded once, and every run is one wake-up of all threads, which do the rest side by side. See docs/workers.md.
//!
//! Invariant: what one rank's thread meets, an error or a panic, ends the waits of all ranks; a run returns when all threads have
//! returned, and the threads end with the group.
//!
//! ```no_run
//! # use peerlane::{AllReduce, Communicator, Config, DType, gpu::{DevicePtr, cuda}};
//! use peerlane::workers::{List, Operation, Options, Workers};
//!
//! # fn main() -> peerlane::Result<()> {
//! # let tensors = [DevicePtr(0); 2];
//! let mut workers = Workers::start(Communicator::connect(&cuda::devices()?, &Config::default())?, Options::default())?;
//! let mut list = List::new(workers.world_size());
//! for _ in 0..64 {
//!     list.on_all(|rank| Operation::AllReduce(AllReduce::in_place(tensors[rank as usize], 4096, DType::Bf16)));
//! }
//! let list = list.finish();
//! for _token in 0..100 {
//!     unsafe { workers.run(&list)? };
//!     workers.synchronize()?;
//! }
//! # Ok(())
//! # }
//! ```

mod list;
mod place;
#[cfg(test)]
mod tests;
mod thread;

pub use list::{List, Operation, Recorded};

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::{GpuRef, Stream};
use crate::group::{Aborter, Group};
use std::time::Duration;
use thread::{Job, Thread};

/// How the threads wait, and where they run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How long a thread looks for its next list, and who runs one for its end, before they sleep. `None`: 100 us where there is a core
    /// for each of them, else nothing.
    pub spin: Option<Duration>,
    /// Whether each thread stays on the cores that the system says are near its GPU, those among them that this process may use.
    pub near: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { spin: None, near: true }
    }
}

/// The ranks of a group that are in this process, each with its thread and its stream.
pub struct Workers {
    threads: Vec<Thread>,
    gpus: Vec<GpuRef>,
    streams: Vec<Stream>,
    aborter: Aborter,
    near: Vec<bool>,
}

impl Workers {
    /// Starts a thread for each rank. `ranks` are some or all of one group, in any order; lists count them from 0 in this order.
    ///
    /// # Errors
    /// No ranks, closed ones or ranks of several groups; no thread or stream to be had. The ranks are closed then.
    pub fn start(ranks: Vec<Communicator>, options: Options) -> Result<Workers> {
        let Some(aborter) = ranks.first().map(Communicator::aborter) else {
            return Err(invalid("workers", "ranks", "at least one", "none"));
        };
        let groups = ranks.iter().map(|rank| rank.group("workers").map(Group::number));
        let groups: Vec<u64> = groups.collect::<Result<_>>()?;
        if let Some(other) = groups.iter().position(|group| *group != groups[0]) {
            return Err(invalid(
                "workers",
                "ranks",
                "ranks of one group",
                format!("another's at {other}"),
            ));
        }
        let spin = options.spin.unwrap_or_else(|| thread::spin_for(ranks.len()));
        let gpus: Vec<GpuRef> = ranks.iter().map(|rank| rank.gpu().clone()).collect();
        let start = |(index, rank)| Thread::start(index, rank, spin, options.near);
        let threads: Vec<Thread> = (0..).zip(ranks).map(start).collect::<Result<_>>()?;
        let mut workers = Workers { threads, gpus, streams: Vec::new(), aborter, near: Vec::new() };
        for index in 0..workers.world_size() {
            let (stream, near) = workers.call(index, |worker| (worker.stream, worker.is_near))?;
            workers.streams.push(stream);
            workers.near.push(near);
        }
        Ok(workers)
    }

    /// How many ranks there are here.
    pub fn world_size(&self) -> u32 {
        self.threads.len() as u32
    }

    /// The stream that a rank's operations are queued on.
    pub fn stream(&self, index: u32) -> Result<Stream> {
        self.exists("stream", index)?;
        Ok(self.streams[index as usize])
    }

    /// A rank's GPU.
    pub fn gpu(&self, index: u32) -> Result<&GpuRef> {
        self.exists("gpu", index)?;
        Ok(&self.gpus[index as usize])
    }

    /// Whether a rank's thread stays near its GPU: the system may not say which cores these are, or they may not be this process's.
    pub fn is_near(&self, index: u32) -> Result<bool> {
        self.exists("is_near", index)?;
        Ok(self.near[index as usize])
    }

    /// What ends all waits of the group from another thread, while this one runs a list.
    pub fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    /// Queues a list on all ranks; returns once all of it is queued. The GPUs are not waited for.
    ///
    /// # Errors
    /// A list for another number of ranks, before anything is queued. Otherwise what the first of the ranks met that was not told by
    /// another: that rank's later operations are not queued, and the group is aborted until it [recovers](Communicator::recover).
    ///
    /// # Safety
    /// What the operations name has the sizes that they say, is memory that the rank's GPU reaches, and stays alive and untouched by others until
    /// the rank's stream has passed them.
    pub unsafe fn run(&mut self, list: &Recorded) -> Result<()> {
        if list.world_size() != self.world_size() {
            let expected = format!("one of {} ranks", self.world_size());
            return Err(invalid("run", "list", expected, format!("one of {}", list.world_size())));
        }
        self.all(|_| Job::Run(list.clone()))
    }

    /// Waits until all that was queued is done, on all ranks; returns what went wrong.
    pub fn synchronize(&mut self) -> Result<()> {
        self.on_each(|worker| worker.rank.synchronize(worker.stream))
    }

    /// Does something on every rank's thread at once, such as `rank.recover()`.
    pub fn on_each(
        &mut self,
        action: impl Fn(&mut Worker) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        let action = std::sync::Arc::new(action);
        self.all(|_| {
            let action = action.clone();
            Job::Call(Box::new(move |worker| action(worker)))
        })
    }

    /// Does something on one rank's thread, and returns what that returns.
    pub fn call<T: Send + 'static>(
        &mut self,
        index: u32,
        action: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T> {
        self.exists("call", index)?;
        let thread = &mut self.threads[index as usize];
        let (give, take) = std::sync::mpsc::sync_channel(1);
        thread.post(Job::Call(Box::new(move |worker| {
            // The other end is in the stack of who waits for this.
            let _ = give.send(action(worker));
            Ok(())
        })));
        thread.outcome()?;
        take.try_recv().map_err(|_| broken("the call has returned nothing"))
    }

    /// Waits for what is queued, ends the threads and gives the ranks back, in order.
    pub fn finish(mut self) -> Result<Vec<Communicator>> {
        self.threads.drain(..).map(Thread::finish).collect()
    }

    /// Gives every thread its job, then waits for all.
    fn all(&mut self, mut job: impl FnMut(u32) -> Job) -> Result<()> {
        for (index, thread) in (0..).zip(&mut self.threads) {
            thread.post(job(index));
        }
        // Who was told that another failed knows less.
        let told = |error: &Error| matches!(error, Error::Stopped { .. } | Error::Aborted { .. });
        // All are waited for, whatever the first ones met.
        let mut sum = Ok(());
        for thread in &mut self.threads {
            let outcome = thread.outcome();
            let better = match (&sum, &outcome) {
                (_, Ok(())) => false,
                (Ok(()), Err(_)) => true,
                (Err(first), Err(next)) => told(first) && !told(next),
            };
            if better {
                sum = outcome;
            }
        }
        sum
    }

    fn exists(&self, op: &'static str, index: u32) -> Result<()> {
        if index < self.world_size() {
            return Ok(());
        }
        Err(invalid(op, "index", format!("below {}", self.world_size()), index.to_string()))
    }
}

/// A rank as its thread has it.
pub struct Worker {
    /// Its end of the group.
    pub rank: Communicator,
    gpu: GpuRef,
    stream: Stream,
    is_near: bool,
}

impl Worker {
    /// What its operations are queued on. It is the thread's and goes with it.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}

fn invalid(
    op: &'static str,
    argument: &'static str,
    expected: impl Into<String>,
    got: impl Into<String>,
) -> Error {
    Error::InvalidArgument { op, argument, expected: expected.into(), got: got.into() }
}

fn broken(reason: impl Into<String>) -> Error {
    Error::Unsupported { op: "workers", reason: reason.into() }
}
