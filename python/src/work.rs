//! `peerlane.Work`: an asynchronous call as a Python object, and the tensors of such calls.
//!
//! Invariant: a tensor of an asynchronous call is referred to from here until the GPU is done with
//! it: by its [`Work`], and by the communicator ([`Kept`]) if the work goes first. So its memory
//! goes back to nobody meanwhile, and torch's `record_stream` is not needed: the caching allocator
//! gives a block away only after the last reference is gone. Nothing is asked of the GPU where a
//! work is dropped: that may be in the middle of a capture, which a query of an event would end.

use crate::communicator::Communicator;
use crate::error;
use crate::options::Given;
use peerlane::gpu::{Event as RawEvent, GpuRef, Stream};
use peerlane::{Error, Result};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An asynchronous call.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct Work {
    rank: Py<Communicator>,
    work: Arc<peerlane::Work>,
    /// Empty once the call is known to be done.
    tensors: Mutex<Vec<Py<PyAny>>>,
}

impl Work {
    pub(crate) fn new(
        rank: Py<Communicator>,
        work: peerlane::Work,
        tensors: Vec<Py<PyAny>>,
    ) -> Work {
        Work { rank, work: Arc::new(work), tensors: Mutex::new(tensors) }
    }

    /// Whether the call is done; if it is, its tensors are let go.
    fn settle(&self) -> Result<bool> {
        let done = self.work.query()?;
        if done {
            // After the lock is free: a tensor's end may run any code.
            let tensors = std::mem::take(&mut *lock(&self.tensors));
            drop(tensors);
        }
        Ok(done)
    }
}

#[pymethods]
impl Work {
    /// Whether the call is done, well or not.
    fn query(&self, py: Python<'_>) -> PyResult<bool> {
        self.settle().map_err(|e| error::raise(py, e))
    }

    /// Makes the stream wait for the call; the host does not wait.
    #[pyo3(signature = (stream=None))]
    fn wait(&self, py: Python<'_>, stream: Given<'_, '_>) -> PyResult<()> {
        const CALL: &str = "wait";
        let rank = self.rank.get();
        let stream = rank.stream(py, CALL, stream, None)?;
        rank.check_stream(CALL, stream)?;
        self.work.wait_on(stream).map_err(|e| error::raise(py, e))
    }

    /// Waits on the host, then raises what went wrong in it or in any call before it.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        let waited = py.detach(|| self.work.wait());
        // What keeps a finished call from being settled is what `waited` says.
        let _ = self.settle();
        waited.map_err(|e| error::raise(py, e))
    }

    fn __repr__(&self) -> String {
        format!("<peerlane.Work of rank {}>", self.rank.get().number())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let tensors = std::mem::take(&mut *lock(&self.tensors));
        if !tensors.is_empty() {
            self.rank.get().kept.keep(Some(self.work.clone()), tensors);
        }
    }
}

/// Tensors whose works are gone, and which the GPU may still use. None once the communicator is closed, when
/// it uses none.
pub(crate) struct Kept(Mutex<Option<Vec<Tensors>>>);

impl Default for Kept {
    fn default() -> Kept {
        Kept(Mutex::new(Some(Vec::new())))
    }
}

struct Tensors {
    /// None if only the communicator's end says that they are free.
    work: Option<Arc<peerlane::Work>>,
    _objects: Vec<Py<PyAny>>,
}

impl Tensors {
    fn may_be_in_use(&self) -> bool {
        let Some(work) = &self.work else { return true };
        match work.query() {
            Ok(done) => !done,
            // Part of a graph, whose tensors are the caller's to keep.
            Err(Error::Unsupported { .. }) => false,
            Err(_) => true,
        }
    }
}

impl Kept {
    /// Keeps tensors until `work` is done; without one until the communicator is closed.
    pub(crate) fn keep(&self, work: Option<Arc<peerlane::Work>>, tensors: Vec<Py<PyAny>>) {
        self.put(Tensors { work, _objects: tensors });
    }

    fn put(&self, tensors: Tensors) {
        let mut unkept = Some(tensors);
        if let Some(all) = lock(&self.0).as_mut() {
            all.extend(unkept.take());
        }
        // Not under the lock: a tensor's end may run any code, which may drop works.
        drop(unkept);
    }

    /// Whether it has none.
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).as_ref().is_none_or(Vec::is_empty)
    }

    /// Lets go of the tensors that are free. Not for the middle of a capture.
    pub(crate) fn sweep(&self) {
        // Not under the lock, as in `put`.
        let all = lock(&self.0).as_mut().map(std::mem::take).unwrap_or_default();
        all.into_iter().filter(Tensors::may_be_in_use).for_each(|still| self.put(still));
    }

    /// Lets go of all: the communicator is closed, which has waited for its GPU.
    pub(crate) fn release(&self) {
        let all = lock(&self.0).take();
        drop(all);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A push or a take is done or not, whatever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event, for `Communicator.all_reduce_chunks` without torch.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct Event {
    gpu: GpuRef,
    event: RawEvent,
}

impl Event {
    /// Makes one and records it on `stream`.
    pub(crate) fn record(gpu: &GpuRef, stream: Stream) -> Result<Event> {
        let event = Event { gpu: gpu.clone(), event: gpu.event_create()? };
        gpu.event_record(event.event, stream)?;
        Ok(event)
    }
}

#[pymethods]
impl Event {
    /// The CUevent, under the name that torch.cuda.Event has for it.
    #[getter]
    fn cuda_event(&self) -> u64 {
        self.event.0
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `record` and not used again: what waits for its record needs it no more.
        // Nothing is left to report to.
        let _ = unsafe { self.gpu.event_destroy(self.event) };
    }
}
