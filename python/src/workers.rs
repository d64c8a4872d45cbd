//! `peerlane.Workers`: a thread for each rank of this process, which runs recorded lists without the interpreter.
//!
//! Invariant: whatever a list names, tensors and functions, is referred to from here until no run of it can need it any more: by the list, and by
//! the workers from a run to the next `synchronize`. The interpreter's lock is not held while a run is waited for, so that callbacks get it.

use crate::collectives::{Reduction, all_gather_request, broadcast_request, in_place_request};
use crate::communicator::Communicator;
use crate::error;
use crate::options::{self, Given};
use crate::tensor::{Need, Tensor};
use peerlane::Error;
use peerlane::workers::{List, Operation, Options, Recorded};
use pyo3::prelude::*;
use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The ranks of this process, each with its thread.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct Workers {
    /// Empty once closed.
    inner: Mutex<Option<peerlane::workers::Workers>>,
    aborter: peerlane::Aborter,
    ranks: Arc<[Py<Communicator>]>,
    /// What was run since all was done.
    running: Mutex<Vec<Py<WorkList>>>,
    raised: Arc<Raised>,
}

/// The exception of a callback.
type Raised = Mutex<Option<PyErr>>;

#[pymethods]
impl Workers {
    #[new]
    #[pyo3(
        signature = (ranks, *, spin=None, near=true),
        text_signature = "(ranks, *, spin=None, near=True)"
    )]
    fn new(
        py: Python<'_>,
        ranks: Vec<Py<Communicator>>,
        spin: Given<'_, '_>,
        near: bool,
    ) -> PyResult<Workers> {
        const CALL: &str = "Workers";
        let spin = spin.map(|spin| options::seconds(CALL, "spin", spin)).transpose()?;
        let mut taken = Vec::with_capacity(ranks.len());
        for rank in &ranks {
            match rank.get().take(py, CALL) {
                Ok(communicator) => taken.push(communicator),
                Err(error) => {
                    // A refusal changes nothing.
                    ranks.iter().zip(taken).for_each(|(rank, taken)| rank.get().put(py, taken));
                    return Err(error);
                }
            }
        }
        let options = Options { spin, near };
        let started = py.detach(|| peerlane::workers::Workers::start(taken, options));
        let inner = started.map_err(|e| error::raise(py, e))?;
        Ok(Workers {
            aborter: inner.aborter(),
            inner: Mutex::new(Some(inner)),
            ranks: ranks.into(),
            running: Mutex::default(),
            raised: Arc::default(),
        })
    }

    /// An empty list for these ranks.
    fn list(&self) -> WorkList {
        WorkList {
            ranks: self.ranks.clone(),
            raised: self.raised.clone(),
            recording: Mutex::new(Recording {
                list: List::new(self.ranks.len() as u32),
                recorded: None,
                kept: Vec::new(),
            }),
        }
    }

    /// Queues a list on all ranks; returns once all of it is queued.
    fn run(&self, py: Python<'_>, list: Py<WorkList>) -> PyResult<()> {
        const CALL: &str = "run";
        if !Arc::ptr_eq(&self.ranks, &list.get().ranks) {
            return Err(error::value(CALL, "list", "one of these workers", "one of others"));
        }
        let recorded = list.get().recorded();
        self.with(py, CALL, |workers| {
            // While nobody else has the workers: who synchronizes takes what was queued and nothing else.
            lock(&self.running).push(list);
            // SAFETY: the tensors were checked when they were recorded, and `running` refers to them.
            unsafe { workers.run(&recorded) }
        })
    }

    /// Waits until all that was queued is done on all ranks, then raises what went wrong.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        self.settle(py, "synchronize", peerlane::workers::Workers::synchronize)
    }

    /// Lets all ranks go on after an error, as Communicator.recover.
    fn recover(&self, py: Python<'_>) -> PyResult<()> {
        self.settle(py, "recover", |workers| {
            workers.on_each(|worker| worker.rank.recover().map(drop))
        })
    }

    /// The stream that a rank's operations are queued on, as a number.
    fn stream(&self, py: Python<'_>, rank: u32) -> PyResult<u64> {
        self.with(py, "stream", |workers| workers.stream(rank)).map(|stream| stream.0)
    }

    /// Whether a rank's thread stays on the cores near its GPU.
    fn is_near(&self, py: Python<'_>, rank: u32) -> PyResult<bool> {
        self.with(py, "is_near", |workers| workers.is_near(rank))
    }

    /// Ends all waits of all ranks, from any thread.
    fn abort(&self) {
        self.aborter.abort();
    }

    /// Waits for what is queued, ends the threads and closes the ranks.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        not_in_callback(py, "close")?;
        py.detach(|| drop(lock(&self.inner).take()));
        let done = std::mem::take(&mut *lock(&self.running));
        self.sweep();
        drop(done);
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.ranks.len()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_why))]
    fn __exit__(&self, py: Python<'_>, _why: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }
}

impl Workers {
    /// Does something with the workers, without the interpreter. What a callback has raised comes first.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        op: &'static str,
        action: impl FnOnce(&mut peerlane::workers::Workers) -> peerlane::Result<T> + Send,
    ) -> PyResult<T> {
        not_in_callback(py, op)?;
        let outcome = py.detach(|| match lock(&self.inner).as_mut() {
            Some(workers) => action(workers),
            None => Err(Error::Closed { op, rank: 0 }),
        });
        let raised = lock(&self.raised).take();
        outcome.map_err(|error| raised.unwrap_or_else(|| error::raise(py, error)))
    }

    /// Does something that waits for all that was queued, whether or not that went well, and lets go of it.
    fn settle(
        &self,
        py: Python<'_>,
        op: &'static str,
        wait: impl FnOnce(&mut peerlane::workers::Workers) -> peerlane::Result<()> + Send,
    ) -> PyResult<()> {
        let mut done = Vec::new();
        let waited = self.with(py, op, |workers| {
            done = std::mem::take(&mut *lock(&self.running));
            wait(workers)
        });
        self.sweep();
        // After the locks are free: a list's end may run any code.
        drop(done);
        waited
    }

    fn sweep(&self) {
        self.ranks.iter().for_each(|rank| rank.get().sweep());
    }
}

thread_local! {
    /// Whether this thread is in a callback, for whose end the workers' lock is held.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

fn not_in_callback(py: Python<'_>, op: &'static str) -> PyResult<()> {
    if !IN_CALLBACK.get() {
        return Ok(());
    }
    let reason =
        "expected a thread of the program's own, got a callback, which would wait for itself";
    Err(error::raise(py, Error::Unsupported { op, reason: reason.into() }))
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut inner = lock(&self.inner).take();
        // Closing waits for the GPUs, unless the interpreter itself is on its way out.
        Python::try_attach(|py| py.detach(|| drop(inner.take())));
    }
}

/// Operations of all ranks, in the order in which they are queued.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct WorkList {
    ranks: Arc<[Py<Communicator>]>,
    raised: Arc<Raised>,
    recording: Mutex<Recording>,
}

struct Recording {
    list: List,
    /// The list as it was last run, unless it has grown since.
    recorded: Option<Recorded>,
    /// What it names.
    kept: Vec<Py<PyAny>>,
}

#[pymethods]
impl WorkList {
    /// Every rank's tensor becomes the reduction of all ranks', in place.
    #[pyo3(
        signature = (tensors, *, op=None, wire=None, dtype=None),
        text_signature = "($self, tensors, *, op='sum', wire='native', dtype=None)"
    )]
    fn all_reduce(
        &self,
        tensors: Vec<Bound<'_, PyAny>>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        dtype: Given<'_, '_>,
    ) -> PyResult<()> {
        let how = Reduction { op, wire, contribution: None, dtype, algorithm: None };
        let calls = self.each("all_reduce", "tensors", &tensors, |rank, tensor| {
            in_place_request(rank, "all_reduce", tensor, &how).map(Operation::AllReduce)
        })?;
        self.add(0, calls, &tensors)
    }

    /// Every rank's out becomes all ranks' tensors, one after the other in rank order.
    fn all_gather(
        &self,
        tensors: Vec<Bound<'_, PyAny>>,
        outs: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        const CALL: &str = "all_gather";
        self.count(CALL, "tensors", tensors.len())?;
        self.count(CALL, "outs", outs.len())?;
        let ranks = self.ranks.iter().zip(tensors.iter().zip(&outs));
        let calls = ranks.map(|(rank, (tensor, out))| {
            all_gather_request(rank.get(), tensor, out).map(|(call, _)| Operation::AllGather(call))
        });
        self.add(0, calls.collect::<PyResult<_>>()?, tensors.iter().chain(&outs))
    }

    /// Every rank's tensor becomes that of rank root.
    #[pyo3(signature = (tensors, root, *, route=None))]
    fn broadcast(
        &self,
        tensors: Vec<Bound<'_, PyAny>>,
        root: &Bound<'_, PyAny>,
        route: Given<'_, '_>,
    ) -> PyResult<()> {
        let calls = self.each("broadcast", "tensors", &tensors, |rank, tensor| {
            broadcast_request(rank, tensor, (root, route))
                .map(|(call, _)| Operation::Broadcast(call))
        })?;
        self.add(0, calls, &tensors)
    }

    /// No rank's stream goes on before all have come here.
    fn barrier(&self) -> PyResult<()> {
        self.add(0, vec![Operation::Barrier; self.ranks.len()], [])
    }

    /// Copies a tensor of one rank's GPU to another of the same size there.
    fn copy(
        &self,
        py: Python<'_>,
        rank: usize,
        out: &Bound<'_, PyAny>,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        const CALL: &str = "copy";
        let of = self.rank(CALL, rank)?.bind(py).get();
        let src = Tensor::read(&of.place(CALL, "tensor"), tensor, Need::Bytes)?;
        let dst = Tensor::read_writable(&of.place(CALL, "out"), out, Need::Bytes)?;
        if dst.bytes() != src.bytes() {
            let expected = format!("{} bytes, as tensor has", src.bytes());
            return Err(error::value(CALL, "out", expected, dst.bytes()));
        }
        dst.apart(CALL, &src, None)?;
        let copy = Operation::Copy { dst: dst.at(), src: src.at(), bytes: src.bytes() };
        self.add(rank, vec![copy], [out, tensor])
    }

    /// Calls function(rank, stream) on that rank's thread, when everything before it has been queued there.
    fn callback(&self, py: Python<'_>, rank: usize, function: Py<PyAny>) -> PyResult<()> {
        const CALL: &str = "callback";
        self.rank(CALL, rank)?;
        let bound = function.bind(py);
        if !bound.is_callable() {
            return Err(error::wrong_type(CALL, "function", "a callable", error::kind(bound)));
        }
        let (raised, called) = (self.raised.clone(), function.clone_ref(py));
        let callback = Operation::callback(move |worker| {
            let (number, stream) = (worker.rank.rank(), worker.stream().0);
            IN_CALLBACK.set(true);
            let outcome = Python::attach(|py| called.call1(py, (number, stream)).map(drop));
            IN_CALLBACK.set(false);
            outcome.map_err(|error| {
                let reason = format!("a callback of rank {number} raised: {error}");
                lock(&raised).get_or_insert(error);
                Error::Unsupported { op: CALL, reason }
            })
        });
        self.add(rank, vec![callback], [bound])
    }

    /// How many operations the longest rank has.
    fn __len__(&self) -> usize {
        let recorded = self.recorded();
        (0..recorded.world_size()).map(|rank| recorded.len(rank)).max().unwrap_or_default()
    }
}

impl WorkList {
    /// An operation for each rank, of its tensor.
    fn each(
        &self,
        call: &'static str,
        argument: &'static str,
        tensors: &[Bound<'_, PyAny>],
        mut make: impl FnMut(&Communicator, &Bound<'_, PyAny>) -> PyResult<Operation>,
    ) -> PyResult<Vec<Operation>> {
        self.count(call, argument, tensors.len())?;
        self.ranks.iter().zip(tensors).map(|(rank, tensor)| make(rank.get(), tensor)).collect()
    }

    fn count(&self, call: &str, argument: &str, count: usize) -> PyResult<()> {
        if count == self.ranks.len() { Ok(()) } else { Err(self.few(call, argument, count)) }
    }

    fn few(&self, call: &str, argument: &str, count: usize) -> PyErr {
        error::value(call, argument, format!("{}, one a rank", self.ranks.len()), count)
    }

    fn rank(&self, call: &str, rank: usize) -> PyResult<&Py<Communicator>> {
        let world = self.ranks.len();
        self.ranks
            .get(rank)
            .ok_or_else(|| error::value(call, "rank", format!("below {world}"), rank))
    }

    /// Adds an operation to each rank from `first` on.
    fn add<'a, 'py: 'a>(
        &self,
        first: usize,
        operations: Vec<Operation>,
        kept: impl IntoIterator<Item = &'a Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let kept: Vec<Py<PyAny>> = kept.into_iter().map(|object| object.clone().unbind()).collect();
        let mut recording = lock(&self.recording);
        recording.recorded = None;
        recording.kept.extend(kept);
        let mut ranks = (first as u32..).zip(operations);
        let added =
            ranks.try_for_each(|(rank, operation)| recording.list.on(rank, operation).map(drop));
        drop(recording);
        added.map_err(|error| Python::attach(|py| error::raise(py, error)))
    }

    /// The list as it is now.
    fn recorded(&self) -> Recorded {
        let mut recording = lock(&self.recording);
        let Recording { list, recorded, .. } = &mut *recording;
        recorded.get_or_insert_with(|| list.clone().finish()).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked there has left a whole value.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
