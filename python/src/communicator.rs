//! `peerlane.Communicator`: one rank of a group, as a Python object.
//!
//! Invariant: the interpreter is let go of wherever a call waits (meeting, synchronizing, adapting,
//! closing) and nowhere else; the lock around the library's communicator is never held while something
//! waits, so any thread may abort, close or ask at any time. Registering, adapting, recovering and shrinking hold it
//! while the ranks meet, which the deadline bounds.

use crate::collectives::{self, Reduction};
use crate::device::Device;
use crate::options::{self, Given};
use crate::prepared::PreparedAllReduce;
use crate::registration::{self, Registration};
use crate::work::Kept;
use crate::{error, memory};
use peerlane::gpu::Stream;
use peerlane::trace;
use peerlane::{Aborter, Config, Error, Family, Processes, Transport};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyString, PyTuple};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// How long the ranks wait for each other to join, unless the caller says.
const PATIENCE: Duration = Duration::from_secs(120);

type Inner = Mutex<Option<peerlane::Communicator>>;

/// One rank of a group of GPUs. The calls queue work on a stream and return at once.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct Communicator {
    /// Empty once closed.
    inner: Inner,
    /// Works while the rest is being closed.
    aborter: Aborter,
    pub(crate) gpu: Device,
    pub(crate) ordinal: u32,
    number: AtomicU32,
    world: AtomicU32,
    mailbox: AtomicUsize,
    generation: AtomicU64,
    /// The arguments of torch's question for the current stream, for a real GPU.
    pub(crate) stream_arguments: Option<Py<PyTuple>>,
    /// Tensors of asynchronous calls that nobody else refers to.
    pub(crate) kept: Kept,
}

#[pymethods]
impl Communicator {
    #[new]
    #[pyo3(
        signature = (rank, world_size, name, device, *, deadline=None, patience=None, mailbox_bytes=None, staging_bytes=None, chunk_bytes=None, max_blocks=None, algorithm=None, route=None, fixed=None, exact=None, tuning=None, transport=None, sizing=None, first_deadline=None, checked=None),
        text_signature = "(rank, world_size, name, device, *, deadline=10.0, patience=120.0, mailbox_bytes=None, staging_bytes=None, chunk_bytes=None, max_blocks=None, algorithm=None, route=None, fixed=False, exact=True, tuning='auto', transport=None, sizing=False, first_deadline=None, checked=False)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn new(
        py: Python<'_>,
        rank: &Bound<'_, PyAny>,
        world_size: &Bound<'_, PyAny>,
        name: &Bound<'_, PyAny>,
        device: &Bound<'_, PyAny>,
        deadline: Given<'_, '_>,
        patience: Given<'_, '_>,
        mailbox_bytes: Given<'_, '_>,
        staging_bytes: Given<'_, '_>,
        chunk_bytes: Given<'_, '_>,
        max_blocks: Given<'_, '_>,
        algorithm: Given<'_, '_>,
        route: Given<'_, '_>,
        fixed: Given<'_, '_>,
        exact: Given<'_, '_>,
        tuning: Given<'_, '_>,
        transport: Given<'_, '_>,
        sizing: Given<'_, '_>,
        first_deadline: Given<'_, '_>,
        checked: Given<'_, '_>,
    ) -> PyResult<Communicator> {
        const CALL: &str = "Communicator";
        let rank = options::whole32(CALL, "rank", rank)?;
        let world = options::whole32(CALL, "world_size", world_size)?;
        let wrong = |_| error::wrong_type(CALL, "name", "a str", error::kind(name));
        let name = name.cast::<PyString>().map_err(wrong)?.to_string();
        let patience = match patience {
            Some(seconds) => options::seconds(CALL, "patience", seconds)?,
            None => PATIENCE,
        };
        let agreed = Agreed {
            deadline,
            mailbox_bytes,
            staging_bytes,
            chunk_bytes,
            max_blocks,
            algorithm,
            route,
            fixed,
            exact,
            tuning,
            transport,
            sizing,
            first_deadline,
            checked,
        };
        let config = config(py, CALL, &agreed)?;
        let device = Device::open(CALL, "device", device)?;
        let meeting = Processes { name, world, patience };
        let joined = py.detach(|| {
            peerlane::Communicator::join_processes(&meeting, rank, &device.gpu, &config)
        });
        Communicator::wrap(py, device, joined.map_err(|e| error::raise(py, e))?)
    }

    /// All ranks of a group in this process, rank r on devices[r], for one thread to drive.
    #[staticmethod]
    #[pyo3(
        signature = (devices, *, deadline=None, mailbox_bytes=None, staging_bytes=None, chunk_bytes=None, max_blocks=None, algorithm=None, route=None, fixed=None, exact=None, tuning=None, transport=None, sizing=None, first_deadline=None, checked=None),
        text_signature = "(devices, *, deadline=10.0, mailbox_bytes=None, staging_bytes=None, chunk_bytes=None, max_blocks=None, algorithm=None, route=None, fixed=False, exact=True, tuning='auto', transport=None, sizing=False, first_deadline=None, checked=False)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn connect(
        py: Python<'_>,
        devices: &Bound<'_, PyAny>,
        deadline: Given<'_, '_>,
        mailbox_bytes: Given<'_, '_>,
        staging_bytes: Given<'_, '_>,
        chunk_bytes: Given<'_, '_>,
        max_blocks: Given<'_, '_>,
        algorithm: Given<'_, '_>,
        route: Given<'_, '_>,
        fixed: Given<'_, '_>,
        exact: Given<'_, '_>,
        tuning: Given<'_, '_>,
        transport: Given<'_, '_>,
        sizing: Given<'_, '_>,
        first_deadline: Given<'_, '_>,
        checked: Given<'_, '_>,
    ) -> PyResult<Vec<Communicator>> {
        const CALL: &str = "connect";
        let agreed = Agreed {
            deadline,
            mailbox_bytes,
            staging_bytes,
            chunk_bytes,
            max_blocks,
            algorithm,
            route,
            fixed,
            exact,
            tuning,
            transport,
            sizing,
            first_deadline,
            checked,
        };
        let config = config(py, CALL, &agreed)?;
        let devices = Device::open_all(CALL, devices)?;
        let gpus: Vec<_> = devices.iter().map(|device| device.gpu.clone()).collect();
        let ranks = py.detach(|| peerlane::Communicator::connect(&gpus, &config));
        let ranks = ranks.map_err(|e| error::raise(py, e))?;
        let pairs = devices.into_iter().zip(ranks);
        pairs.map(|(device, rank)| Communicator::wrap(py, device, rank)).collect()
    }

    /// This rank's number.
    #[getter]
    fn rank(&self) -> u32 {
        self.number()
    }

    /// Number of ranks.
    #[getter]
    fn world_size(&self) -> u32 {
        self.world()
    }

    /// How often the ranks have recovered or shrunk.
    #[getter]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// This rank's GPU.
    #[getter]
    fn device(&self) -> &str {
        &self.gpu.name
    }

    /// Bytes of device memory that this rank's mailbox takes.
    #[getter]
    fn mailbox_bytes(&self) -> usize {
        self.mailbox.load(Ordering::Relaxed)
    }

    /// What carries data from rank `from_rank` to rank `to_rank`: 'p2p' or 'host'.
    fn transport(
        &self,
        py: Python<'_>,
        from_rank: &Bound<'_, PyAny>,
        to_rank: &Bound<'_, PyAny>,
    ) -> PyResult<&'static str> {
        const CALL: &str = "transport";
        let from = options::whole32(CALL, "from_rank", from_rank)?;
        let to = options::whole32(CALL, "to_rank", to_rank)?;
        let found = self.queue(py, CALL, |rank| rank.transport(from, to))?;
        Ok(found.name())
    }

    /// Every rank ends with the reduction of all ranks' tensors, in place unless there is an out.
    #[pyo3(
        signature = (tensor, out=None, *, op=None, wire=None, contribution=None, dtype=None, algorithm=None, stream=None, registration=None),
        text_signature = "($self, tensor, out=None, *, op='sum', wire='native', contribution=True, dtype=None, algorithm=None, stream=None, registration=None)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn all_reduce(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        out: Given<'_, '_>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        contribution: Given<'_, '_>,
        dtype: Given<'_, '_>,
        algorithm: Given<'_, '_>,
        stream: Given<'_, '_>,
        registration: Given<'_, '_>,
    ) -> PyResult<()> {
        let how = Reduction { op, wire, contribution, dtype, algorithm };
        let Some(registration) = registration else {
            return collectives::all_reduce(self, py, tensor, out, &how, stream);
        };
        if let Some(out) = out {
            let expected = "None beside a registration, which is reduced in place";
            return Err(error::value("all_reduce", "out", expected, error::kind(out)));
        }
        if let Some(algorithm) = algorithm {
            let expected = "None beside a registration, which is reduced in one way";
            return Err(error::value("all_reduce", "algorithm", expected, error::shown(algorithm)));
        }
        registration::all_reduce(self, py, tensor, registration, &how, stream)
    }

    /// Lets every rank reach this tensor of every other. All ranks call it, each from its own thread or process.
    fn register(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<Registration> {
        registration::register(slf, tensor)
    }

    /// Ends the use of a registration. All ranks call it; it waits for this rank's GPU.
    fn deregister(&self, py: Python<'_>, registration: &Bound<'_, Registration>) -> PyResult<()> {
        registration::deregister(self, py, registration.get())
    }

    /// register, for one thread that drives all ranks.
    #[staticmethod]
    fn register_all(
        py: Python<'_>,
        ranks: Vec<Bound<'_, Communicator>>,
        tensors: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Registration>> {
        registration::register_all(py, &ranks, &tensors)
    }

    /// deregister, for one thread that drives all ranks.
    #[staticmethod]
    fn deregister_all(
        py: Python<'_>,
        ranks: Vec<Bound<'_, Communicator>>,
        registrations: Vec<Bound<'_, Registration>>,
    ) -> PyResult<()> {
        registration::deregister_all(py, &ranks, &registrations)
    }

    /// An all-reduce in place whose options are fixed, for callers to whom every microsecond counts.
    #[pyo3(
        signature = (*, op=None, wire=None, retry=None),
        text_signature = "($self, *, op='sum', wire='native', retry=None)"
    )]
    fn prepare_all_reduce(
        slf: &Bound<'_, Communicator>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        retry: Given<'_, '_>,
    ) -> PyResult<PreparedAllReduce> {
        const CALL: &str = "prepare_all_reduce";
        let how = (options::reduce_op(CALL, op)?, options::wire(CALL, wire)?);
        let retry = retry.filter(|retry| !retry.is_none());
        if let Some(other) = retry.filter(|retry| !retry.is_callable()) {
            return Err(error::wrong_type(CALL, "retry", "a callable or None", error::kind(other)));
        }
        Ok(PreparedAllReduce::new(slf.clone().unbind(), how, retry.cloned().map(Bound::unbind)))
    }

    /// Rank r ends with the reduction of all ranks' r-th parts.
    #[pyo3(
        signature = (tensor, out, *, op=None, wire=None, contribution=None, dtype=None, stream=None),
        text_signature = "($self, tensor, out, *, op='sum', wire='native', contribution=True, dtype=None, stream=None)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn reduce_scatter(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        contribution: Given<'_, '_>,
        dtype: Given<'_, '_>,
        stream: Given<'_, '_>,
    ) -> PyResult<()> {
        let how = Reduction { op, wire, contribution, dtype, algorithm: None };
        collectives::reduce_scatter(self, py, tensor, out, &how, stream)
    }

    /// Every rank ends with all ranks' tensors, one after the other in rank order.
    #[pyo3(signature = (tensor, out, *, stream=None))]
    fn all_gather(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        stream: Given<'_, '_>,
    ) -> PyResult<()> {
        collectives::all_gather(self, py, tensor, out, stream)
    }

    /// Every rank ends with the root's tensor, in place.
    #[pyo3(signature = (tensor, root, *, route=None, stream=None))]
    fn broadcast(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        route: Given<'_, '_>,
        stream: Given<'_, '_>,
    ) -> PyResult<()> {
        collectives::broadcast(self, py, tensor, (root, route), stream)
    }

    /// The root ends with the tensors of all ranks that have one, joined along their last dimension.
    #[pyo3(signature = (tensor, out, root, widths, *, stream=None))]
    fn gather(
        &self,
        py: Python<'_>,
        tensor: Given<'_, '_>,
        out: Given<'_, '_>,
        root: &Bound<'_, PyAny>,
        widths: &Bound<'_, PyAny>,
        stream: Given<'_, '_>,
    ) -> PyResult<()> {
        collectives::gather(self, py, (tensor, out), root, widths, stream)
    }

    /// Holds the stream until every rank has reached its barrier.
    #[pyo3(signature = (*, stream=None))]
    fn barrier(&self, py: Python<'_>, stream: Given<'_, '_>) -> PyResult<()> {
        let stream = self.stream(py, "barrier", stream, None)?;
        self.queue(py, "barrier", |rank| rank.barrier(stream))
    }

    /// Waits until everything queued on the stream is done, then raises what went wrong.
    #[pyo3(signature = (stream=None))]
    fn synchronize(&self, py: Python<'_>, stream: Given<'_, '_>) -> PyResult<()> {
        let stream = self.stream(py, "synchronize", stream, None)?;
        self.queue(py, "synchronize", |_| Ok(()))?;
        let begin = trace::is_recording().then(trace::now);
        let waited = py.detach(|| self.gpu.gpu.stream_synchronize(stream));
        if let Some(begin) = begin {
            trace::finish("synchronize", begin, [("rank".into(), self.number().into())].into());
        }
        waited.map_err(|e| error::raise(py, e))?;
        self.sweep();
        self.kept.sweep();
        self.queue(py, "synchronize", |rank| rank.health())
    }

    /// Lets the sizes of mailboxes follow the calls since the last time; whether there is new memory.
    fn adapt(&self, py: Python<'_>) -> PyResult<bool> {
        let adapted = py.detach(|| {
            let mut guard = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let rank = guard.as_mut().ok_or(Error::Closed { op: "adapt", rank: self.number() })?;
            let adapted = rank.adapt()?;
            self.mailbox.store(rank.mailbox_bytes(), Ordering::Relaxed);
            Ok(adapted)
        });
        adapted.map(|adapted| adapted.changed()).map_err(|e: Error| error::raise(py, e))
    }

    /// `adapt` for all ranks of a group of `connect`, in rank order, by one thread.
    #[staticmethod]
    fn adapt_all(py: Python<'_>, ranks: Vec<Py<Communicator>>) -> PyResult<bool> {
        let ranks: Vec<&Communicator> = ranks.iter().map(Py::get).collect();
        let twice = |(index, rank): (usize, &&Communicator)| {
            ranks[..index].iter().any(|other| ptr::eq(*other, *rank))
        };
        if ranks.iter().enumerate().any(twice) {
            return Err(error::value("adapt_all", "ranks", "each rank once", "one twice"));
        }
        let adapted = py.detach(|| {
            let locks = ranks.iter().map(|rank| rank.inner.lock());
            let guards = locks.map(|lock| lock.unwrap_or_else(PoisonError::into_inner));
            let mut guards: Vec<_> = guards.collect();
            let open = guards.iter_mut().zip(&ranks).map(|(guard, rank)| {
                guard.as_mut().ok_or(Error::Closed { op: "adapt_all", rank: rank.number() })
            });
            let mut open = open.collect::<Result<Vec<_>, Error>>()?;
            let adapted = peerlane::Communicator::adapt_all(&mut open)?;
            for (rank, communicator) in ranks.iter().zip(&open) {
                rank.mailbox.store(communicator.mailbox_bytes(), Ordering::Relaxed);
            }
            Ok(adapted)
        });
        adapted.map(|adapted| adapted.changed()).map_err(|e: Error| error::raise(py, e))
    }

    /// How many calls of this rank have been queued.
    #[getter]
    fn calls(&self, py: Python<'_>) -> PyResult<u64> {
        self.queue(py, "calls", |rank| Ok(rank.calls()))
    }

    /// Brings the communicator back after an abort, a time-out or any other error of its calls. All ranks call it.
    fn recover(&self, py: Python<'_>) -> PyResult<()> {
        Communicator::regroup(py, "recover", &[self], |ranks| ranks[0].recover())
    }

    /// `recover` for all ranks of a group of `connect`, in rank order, by one thread.
    #[staticmethod]
    fn recover_all(py: Python<'_>, ranks: Vec<Py<Communicator>>) -> PyResult<()> {
        let ranks: Vec<&Communicator> = ranks.iter().map(Py::get).collect();
        Communicator::regroup(py, "recover_all", &ranks, peerlane::Communicator::recover_all)
    }

    /// Goes on without the ranks in `without`; all others call it.
    fn shrink(&self, py: Python<'_>, without: &Bound<'_, PyAny>) -> PyResult<()> {
        let without = options::ranks("shrink", "without", without)?;
        Communicator::regroup(py, "shrink", &[self], |ranks| ranks[0].shrink(&without))
    }

    /// `shrink` for all ranks that are left of a group of `connect`, in rank order, by one thread.
    #[staticmethod]
    fn shrink_all(
        py: Python<'_>,
        ranks: Vec<Py<Communicator>>,
        without: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        const CALL: &str = "shrink_all";
        let without = options::ranks(CALL, "without", without)?;
        let ranks: Vec<&Communicator> = ranks.iter().map(Py::get).collect();
        let shrink = |open: &mut [&mut peerlane::Communicator]| {
            peerlane::Communicator::shrink_all(open, &without)
        };
        Communicator::regroup(py, CALL, &ranks, shrink)
    }

    /// What this rank's calls have brought, and the sizes in force.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let usage = self.queue(py, "usage", |rank| Ok(rank.usage()))?;
        let facts = PyDict::new(py);
        for family in Family::ALL {
            let (of, counts) = (PyDict::new(py), usage.of(family));
            of.set_item("calls", counts.calls)?;
            of.set_item("bytes", counts.bytes)?;
            of.set_item("largest", counts.largest)?;
            of.set_item("largest_since", counts.largest_since)?;
            of.set_item("several_turns", counts.several_turns)?;
            facts.set_item(family.name(), of)?;
        }
        facts.set_item("captured", usage.captured)?;
        facts.set_item("adapts", usage.adapts)?;
        facts.set_item("resizes", usage.resizes)?;
        facts.set_item("mailbox_bytes", usage.sizes.mailbox_bytes)?;
        facts.set_item("staging_bytes", usage.sizes.staging_bytes)?;
        Ok(facts)
    }

    /// Raises what went wrong so far; never waits.
    fn health(&self, py: Python<'_>) -> PyResult<()> {
        self.queue(py, "health", |rank| rank.health())
    }

    /// How long this rank's waits may last from its next call on.
    fn set_deadline(&self, py: Python<'_>, seconds: &Bound<'_, PyAny>) -> PyResult<()> {
        let deadline = options::seconds("set_deadline", "seconds", seconds)?;
        self.queue(py, "set_deadline", |rank| {
            rank.set_deadline(deadline);
            Ok(())
        })
    }

    /// Ends every wait of every rank; their calls raise from then on.
    fn abort(&self) {
        self.aborter.abort();
    }

    /// Waits for everything queued on this rank's GPU and leaves the group.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(mut rank) = self.lock(py).take() else { return Ok(()) };
        let closed = py.detach(move || rank.close());
        self.kept.release();
        closed.map_err(|e| error::raise(py, e))
    }

    /// An array in this rank's memory, which must be simulated.
    fn empty<'py>(
        &self,
        shape: &Bound<'py, PyAny>,
        dtype: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        memory::empty(&self.gpu, shape, dtype)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Closes. An exception that is already on its way is not replaced by one from closing, which
    /// it usually explains.
    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let closed = self.close(py);
        if kind.is_none() { closed } else { Ok(()) }
    }

    fn __repr__(&self) -> String {
        format!(
            "<peerlane.Communicator rank {} of {} on {}>",
            self.number(),
            self.world(),
            self.gpu.name
        )
    }
}

impl Communicator {
    fn wrap(py: Python<'_>, gpu: Device, rank: peerlane::Communicator) -> PyResult<Communicator> {
        let ordinal = gpu.gpu.properties().ordinal;
        let stream_arguments =
            if gpu.simulated() { None } else { Some(PyTuple::new(py, [ordinal])?.unbind()) };
        Ok(Communicator {
            number: rank.rank().into(),
            world: rank.world_size().into(),
            mailbox: rank.mailbox_bytes().into(),
            generation: rank.generation().into(),
            ordinal,
            gpu,
            stream_arguments,
            aborter: rank.aborter(),
            inner: Mutex::new(Some(rank)),
            kept: Kept::default(),
        })
    }

    /// Takes the library's communicator: this one is closed from now on, and describes its GPU only.
    pub(crate) fn take(
        &self,
        py: Python<'_>,
        op: &'static str,
    ) -> PyResult<peerlane::Communicator> {
        let taken = self.lock(py).take();
        taken.ok_or_else(|| error::raise(py, Error::Closed { op, rank: self.number() }))
    }

    /// Undoes `take`.
    pub(crate) fn put(&self, py: Python<'_>, taken: peerlane::Communicator) {
        *self.lock(py) = Some(taken);
    }

    /// Lets go of memory of simulated GPUs that nothing uses any more.
    pub(crate) fn sweep(&self) {
        if let Some(machine) = &self.gpu.machine {
            machine.sweep(self.ordinal);
        }
    }

    /// This rank's number.
    #[inline]
    pub(crate) fn number(&self) -> u32 {
        self.number.load(Ordering::Relaxed)
    }

    /// Number of ranks.
    #[inline]
    pub(crate) fn world(&self) -> u32 {
        self.world.load(Ordering::Relaxed)
    }

    /// Notes what recovering or shrinking has changed.
    fn follow(&self, rank: &peerlane::Communicator) {
        self.number.store(rank.rank(), Ordering::Relaxed);
        self.world.store(rank.world_size(), Ordering::Relaxed);
        self.mailbox.store(rank.mailbox_bytes(), Ordering::Relaxed);
        self.generation.store(rank.generation(), Ordering::Relaxed);
    }

    /// As `waiting_all`, for a call that changes what the ranks are.
    fn regroup(
        py: Python<'_>,
        call: &'static str,
        ranks: &[&Communicator],
        work: impl FnOnce(&mut [&mut peerlane::Communicator]) -> peerlane::Result<()> + Send,
    ) -> PyResult<()> {
        Communicator::waiting_all(py, call, ranks, |open| {
            let outcome = work(open);
            ranks.iter().zip(open.iter()).for_each(|(rank, open)| rank.follow(open));
            outcome
        })
    }

    /// The lock. Another thread holds it for the length of a launch at most.
    #[inline]
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Option<peerlane::Communicator>> {
        match self.inner.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
            }
        }
    }

    /// Does something with the library's communicator, unless it is closed.
    #[inline]
    pub(crate) fn queue<T>(
        &self,
        py: Python<'_>,
        call: &'static str,
        work: impl FnOnce(&mut peerlane::Communicator) -> peerlane::Result<T>,
    ) -> PyResult<T> {
        let mut guard = self.lock(py);
        let done = match guard.as_mut() {
            Some(rank) => work(rank),
            None => Err(Error::Closed { op: call, rank: self.number() }),
        };
        drop(guard);
        done.map_err(|e| error::raise(py, e))
    }

    /// As `queue`, for a call that waits for the other ranks: the interpreter is let go of, and the lock is held meanwhile. Aborting
    /// needs none.
    pub(crate) fn waiting<T: Send>(
        &self,
        py: Python<'_>,
        call: &'static str,
        work: impl FnOnce(&mut peerlane::Communicator) -> peerlane::Result<T> + Send,
    ) -> PyResult<T> {
        Communicator::waiting_all(py, call, &[self], |ranks| work(ranks[0]))
    }

    /// As `waiting`, with all ranks of a thread.
    pub(crate) fn waiting_all<T: Send>(
        py: Python<'_>,
        call: &'static str,
        ranks: &[&Communicator],
        work: impl FnOnce(&mut [&mut peerlane::Communicator]) -> peerlane::Result<T> + Send,
    ) -> PyResult<T> {
        let inner: Vec<_> = ranks.iter().map(|rank| (rank.number(), &rank.inner)).collect();
        let twice = |at: usize| inner[..at].iter().any(|(_, other)| ptr::eq(*other, inner[at].1));
        if (0..inner.len()).any(twice) {
            return Err(error::value(call, "ranks", "each rank once", "one of them twice"));
        }
        let done = py.detach(|| {
            let locks = inner
                .iter()
                .map(|(rank, inner)| (*rank, inner.lock().unwrap_or_else(PoisonError::into_inner)));
            let mut locked: Vec<_> = locks.collect();
            let open = locked
                .iter_mut()
                .map(|(rank, inner)| inner.as_mut().ok_or(Error::Closed { op: call, rank: *rank }));
            work(&mut open.collect::<peerlane::Result<Vec<_>>>()?)
        });
        done.map_err(|e| error::raise(py, e))
    }

    /// The stream of a call.
    #[inline]
    pub(crate) fn stream(
        &self,
        py: Python<'_>,
        call: &str,
        given: Given<'_, '_>,
        tensors: Option<u64>,
    ) -> PyResult<Stream> {
        let device = self.stream_arguments.as_ref().map(|device| (self.ordinal, device.bind(py)));
        options::stream(call, given, tensors, device)
    }
}

impl Drop for Communicator {
    /// Closing waits for the GPU; other threads may run meanwhile, unless the interpreter itself is
    /// on its way out.
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(rank) = inner.take() {
            let mut rank = Some(rank);
            Python::try_attach(|py| py.detach(|| drop(rank.take())));
        }
    }
}

/// What the ranks must agree on, as the caller put it.
struct Agreed<'a, 'py> {
    deadline: Given<'a, 'py>,
    mailbox_bytes: Given<'a, 'py>,
    staging_bytes: Given<'a, 'py>,
    chunk_bytes: Given<'a, 'py>,
    max_blocks: Given<'a, 'py>,
    algorithm: Given<'a, 'py>,
    route: Given<'a, 'py>,
    fixed: Given<'a, 'py>,
    exact: Given<'a, 'py>,
    tuning: Given<'a, 'py>,
    transport: Given<'a, 'py>,
    sizing: Given<'a, 'py>,
    first_deadline: Given<'a, 'py>,
    checked: Given<'a, 'py>,
}

/// The configuration: what the caller says, else what the environment says, else the default.
fn config(py: Python<'_>, call: &str, given: &Agreed<'_, '_>) -> PyResult<Config> {
    let mut config = Config::from_environment().map_err(|e| error::raise(py, e))?;
    if let Some(seconds) = given.deadline {
        config.deadline = options::seconds(call, "deadline", seconds)?;
    }
    if let Some(bytes) = given.mailbox_bytes {
        config.mailbox_bytes = options::whole(call, "mailbox_bytes", bytes)?;
    }
    if let Some(bytes) = given.staging_bytes {
        let bytes = options::whole(call, "staging_bytes", bytes)?;
        config.staging_bytes = Some(bytes).filter(|bytes| *bytes != 0);
    }
    if let Some(bytes) = given.chunk_bytes {
        config.chunk_bytes = Some(options::whole(call, "chunk_bytes", bytes)?);
    }
    if let Some(blocks) = given.max_blocks {
        config.max_blocks = Some(options::whole32(call, "max_blocks", blocks)?);
    }
    if given.algorithm.is_some() {
        config.algorithm = options::algorithm(call, given.algorithm)?;
    }
    if given.route.is_some() {
        config.route = options::route(call, given.route)?;
    }
    if let Some(fixed) = given.fixed {
        config.fixed = options::truth(call, "fixed", fixed)?;
    }
    if let Some(exact) = given.exact {
        config.exact = options::truth(call, "exact", exact)?;
    }
    if let Some(tuning) = given.tuning {
        config.tuning = options::tuning(call, tuning)?;
    }
    if let Some(name) = given.transport {
        let choices = Transport::ALL.map(|transport| (transport.name(), transport));
        config.transport = options::choose(call, "transport", name, &choices)?;
    }
    if let Some(sizing) = given.sizing {
        config.sizing = options::sizing(call, sizing)?;
    }
    if let Some(seconds) = given.first_deadline {
        config.first_deadline = Some(options::seconds(call, "first_deadline", seconds)?);
    }
    if let Some(checked) = given.checked {
        config.checked = options::truth(call, "checked", checked)?;
    }
    Ok(config)
}
