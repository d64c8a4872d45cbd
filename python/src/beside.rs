//! The asynchronous calls of `peerlane.Communicator`.
//!
//! Invariant: their arguments are read and checked by the same functions as those of the calls on a
//! stream; what differs is which call of the library a checked request goes to ([`Made`]).

use crate::collectives::{self, Reduction};
use crate::communicator::Communicator;
use crate::error;
use crate::options::{self, Given};
use crate::work::{Event, Work};
use peerlane::gpu::{Event as RawEvent, Stream};
use peerlane::{
    AllGather, AllReduce, Broadcast, Chunk, Error, Family, Gather, ReduceScatter, Result,
};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PySequence, PyTuple};

type Library = peerlane::Communicator;

/// What a call returns: nothing if it is on a stream, a work if it is beside it.
///
/// # Safety
/// Of every function: as for the library's call.
pub(crate) trait Made: Sized {
    unsafe fn all_reduce(rank: &mut Library, call: &AllReduce, at: Stream) -> Result<Self>;
    unsafe fn reduce_scatter(rank: &mut Library, call: &ReduceScatter, at: Stream) -> Result<Self>;
    unsafe fn all_gather(rank: &mut Library, call: &AllGather, at: Stream) -> Result<Self>;
    unsafe fn broadcast(rank: &mut Library, call: &Broadcast, at: Stream) -> Result<Self>;
    unsafe fn gather(rank: &mut Library, call: &Gather<'_>, at: Stream) -> Result<Self>;
}

/// Implements [`Made`] by one method of the library for each.
macro_rules! made {
    ($made:ty: $($function:ident($request:ty) = $method:ident),*) => {
        impl Made for $made {
            $(#[inline]
            unsafe fn $function(rank: &mut Library, call: &$request, at: Stream) -> Result<Self> {
                // SAFETY: passed on to the caller.
                unsafe { rank.$method(call, at) }
            })*
        }
    };
}

made!((): all_reduce(AllReduce) = all_reduce, reduce_scatter(ReduceScatter) = reduce_scatter,
    all_gather(AllGather) = all_gather, broadcast(Broadcast) = broadcast, gather(Gather<'_>) = gather);
made!(peerlane::Work: all_reduce(AllReduce) = all_reduce_async,
    reduce_scatter(ReduceScatter) = reduce_scatter_async, all_gather(AllGather) = all_gather_async,
    broadcast(Broadcast) = broadcast_async, gather(Gather<'_>) = gather_async);

#[pymethods]
impl Communicator {
    /// all_reduce beside the stream.
    #[pyo3(
        signature = (tensor, out=None, *, op=None, wire=None, contribution=None, dtype=None, algorithm=None, stream=None),
        text_signature = "($self, tensor, out=None, *, op='sum', wire='native', contribution=True, dtype=None, algorithm=None, stream=None)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn all_reduce_async(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
        out: Given<'_, '_>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        contribution: Given<'_, '_>,
        dtype: Given<'_, '_>,
        algorithm: Given<'_, '_>,
        stream: Given<'_, '_>,
    ) -> PyResult<Work> {
        let how = Reduction { op, wire, contribution, dtype, algorithm };
        let (py, rank) = (slf.py(), slf.get());
        let work = collectives::all_reduce(rank, py, tensor, out, &how, stream)?;
        began(slf, work, &[Some(tensor), out])
    }

    /// reduce_scatter beside the stream.
    #[pyo3(
        signature = (tensor, out, *, op=None, wire=None, contribution=None, dtype=None, stream=None),
        text_signature = "($self, tensor, out, *, op='sum', wire='native', contribution=True, dtype=None, stream=None)"
    )]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn reduce_scatter_async(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        contribution: Given<'_, '_>,
        dtype: Given<'_, '_>,
        stream: Given<'_, '_>,
    ) -> PyResult<Work> {
        let how = Reduction { op, wire, contribution, dtype, algorithm: None };
        let (py, rank) = (slf.py(), slf.get());
        let work = collectives::reduce_scatter(rank, py, tensor, out, &how, stream)?;
        began(slf, work, &[Some(tensor), Some(out)])
    }

    /// all_gather beside the stream.
    #[pyo3(signature = (tensor, out, *, stream=None))]
    fn all_gather_async(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        stream: Given<'_, '_>,
    ) -> PyResult<Work> {
        let work = collectives::all_gather(slf.get(), slf.py(), tensor, out, stream)?;
        began(slf, work, &[Some(tensor), Some(out)])
    }

    /// broadcast beside the stream.
    #[pyo3(signature = (tensor, root, *, route=None, stream=None))]
    fn broadcast_async(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        route: Given<'_, '_>,
        stream: Given<'_, '_>,
    ) -> PyResult<Work> {
        let work = collectives::broadcast(slf.get(), slf.py(), tensor, (root, route), stream)?;
        began(slf, work, &[Some(tensor)])
    }

    /// gather beside the stream.
    #[pyo3(signature = (tensor, out, root, widths, *, stream=None))]
    fn gather_async(
        slf: &Bound<'_, Communicator>,
        tensor: Given<'_, '_>,
        out: Given<'_, '_>,
        root: &Bound<'_, PyAny>,
        widths: &Bound<'_, PyAny>,
        stream: Given<'_, '_>,
    ) -> PyResult<Work> {
        let (py, rank) = (slf.py(), slf.get());
        let work = collectives::gather(rank, py, (tensor, out), root, widths, stream)?;
        began(slf, work, &[tensor, out])
    }

    /// Reduces a tensor in place in chunks of rows, each once its event has come.
    #[pyo3(
        signature = (tensor, chunks, *, op=None, wire=None, contribution=None, dtype=None),
        text_signature = "($self, tensor, chunks, *, op='sum', wire='native', contribution=True, dtype=None)"
    )]
    fn all_reduce_chunks(
        slf: &Bound<'_, Communicator>,
        tensor: &Bound<'_, PyAny>,
        chunks: &Bound<'_, PyAny>,
        op: Given<'_, '_>,
        wire: Given<'_, '_>,
        contribution: Given<'_, '_>,
        dtype: Given<'_, '_>,
    ) -> PyResult<Vec<Work>> {
        const CALL: &str = "all_reduce_chunks";
        let (py, rank) = (slf.py(), slf.get());
        let how = Reduction { op, wire, contribution, dtype, algorithm: None };
        let request = collectives::in_place_request(rank, CALL, tensor, &how)?;
        let chunks = read_chunks(tensor, request.count, chunks)?;
        let mut begun = false;
        let made = rank.queue(py, CALL, |rank| {
            let before = reductions(rank);
            // SAFETY: the tensor lies on this rank's GPU and has `count` elements; it is referred to
            // until the works are done.
            let made = unsafe { rank.all_reduce_chunks(&request, &chunks) };
            // A refusal queued nothing of its own chunk, but chunks before it may run; an error of the driver may
            // have come in the middle of one.
            begun = reductions(rank) != before || made.as_ref().is_err_and(|e| !is_refusal(e));
            made
        });
        let works = made.inspect_err(|_| {
            if begun {
                rank.kept.keep(None, vec![tensor.clone().unbind()]);
            }
        })?;
        if let Some(first) = works.first() {
            let_go(rank, first);
        }
        Ok(works.into_iter().map(|work| wrap(slf, work, &[Some(tensor)])).collect())
    }

    /// An event recorded on the stream, for all_reduce_chunks without torch.
    #[pyo3(signature = (*, stream=None))]
    fn record_event(&self, py: Python<'_>, stream: Given<'_, '_>) -> PyResult<Event> {
        const CALL: &str = "record_event";
        let stream = self.stream(py, CALL, stream, None)?;
        self.check_stream(CALL, stream)?;
        Event::record(&self.gpu.gpu, stream).map_err(|e| error::raise(py, e))
    }
}

impl Communicator {
    /// That a stream is one of this rank's GPU.
    pub(crate) fn check_stream(&self, call: &str, stream: Stream) -> PyResult<()> {
        let owner = self.gpu.gpu.owner_of_stream(stream);
        if owner == Some(self.ordinal) {
            return Ok(());
        }
        let expected = format!("a stream of {}", self.gpu.name);
        let got = owner.map_or("no stream".into(), |gpu| format!("a stream of GPU {gpu}"));
        Err(error::value(call, "stream", expected, got))
    }
}

/// All-reduces of any kind that a rank has queued.
fn reductions(rank: &Library) -> u64 {
    let usage = rank.usage();
    [Family::AllReduce, Family::Scheduled].map(|family| usage.of(family).calls).iter().sum()
}

/// Whether a call queued nothing: its arguments are wrong, or the machine or the ranks cannot do it.
const fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidArgument { .. } | Error::Unsupported { .. } | Error::Mismatch { .. }
    )
}

/// A call that has begun, with the tensors it uses.
fn began(
    rank: &Bound<'_, Communicator>,
    work: peerlane::Work,
    tensors: &[Given<'_, '_>],
) -> PyResult<Work> {
    let_go(rank.get(), &work);
    Ok(wrap(rank, work, tensors))
}

/// Lets go of others' tensors: a work cannot do it when it is dropped. Not while `work` is being captured,
/// which is when the library's own stream is, and the work says so.
fn let_go(rank: &Communicator, work: &peerlane::Work) {
    // Nothing to let go of is the rule, and asking a work is a call of the driver.
    if !rank.kept.is_empty() && work.query().is_ok() {
        rank.kept.sweep();
    }
}

fn wrap(rank: &Bound<'_, Communicator>, work: peerlane::Work, tensors: &[Given<'_, '_>]) -> Work {
    let tensors = tensors.iter().flatten().map(|tensor| (*tensor).clone().unbind()).collect();
    Work::new(rank.clone().unbind(), work, tensors)
}

/// `chunks`: tuples of first row, rows and event.
fn read_chunks(
    tensor: &Bound<'_, PyAny>,
    count: usize,
    chunks: &Bound<'_, PyAny>,
) -> PyResult<Vec<Chunk>> {
    const CALL: &str = "all_reduce_chunks";
    const EXPECTED: &str = "a sequence of (first_row, rows, event)";
    let wrong = |object: &Bound<'_, PyAny>| {
        error::wrong_type(CALL, "chunks", EXPECTED, error::kind(object))
    };
    let rows = rows(tensor)?;
    let width = count.checked_div(rows).unwrap_or(0);
    let sequence = chunks.cast::<PySequence>().map_err(|_| wrong(chunks))?;
    let mut read = Vec::with_capacity(sequence.len()?);
    for (index, chunk) in sequence.try_iter()?.enumerate() {
        let chunk = chunk?;
        let parts = chunk.cast::<PyTuple>().map_err(|_| wrong(&chunk))?;
        if parts.len() != 3 {
            return Err(error::value(CALL, "chunks", EXPECTED, error::shown(&chunk)));
        }
        let first = options::whole(CALL, "chunks", &parts.get_item(0)?)?;
        let length = options::whole(CALL, "chunks", &parts.get_item(1)?)?;
        if first.checked_add(length).is_none_or(|end| end > rows) {
            let expected = format!("parts of a tensor of {rows} rows");
            let got = format!("chunk {index} of {length} rows from {first} on");
            return Err(error::value(CALL, "chunks", expected, got));
        }
        let ready = event(&parts.get_item(2)?)?;
        read.push(Chunk { first: first * width, count: length * width, ready });
    }
    Ok(read)
}

/// The first dimension of a tensor.
fn rows(tensor: &Bound<'_, PyAny>) -> PyResult<usize> {
    let py = tensor.py();
    let shape = match tensor.getattr_opt(intern!(py, "shape"))? {
        Some(shape) => shape,
        None => tensor.getattr("__cuda_array_interface__")?.get_item("shape")?,
    };
    let shape = shape.cast::<PyTuple>()?;
    if shape.is_empty() {
        return Err(error::value("all_reduce_chunks", "tensor", "a tensor with rows", "a scalar"));
    }
    shape.get_item(0)?.extract()
}

/// An event that has been recorded.
fn event(given: &Bound<'_, PyAny>) -> PyResult<RawEvent> {
    const CALL: &str = "all_reduce_chunks";
    let handle = match given.extract::<u64>() {
        Ok(handle) => Ok(handle),
        Err(_) => given.getattr(intern!(given.py(), "cuda_event")).and_then(|own| own.extract()),
    };
    let handle = handle.map_err(|_| {
        let expected = "a torch.cuda.Event, a peerlane.Event or the int of a CUDA event";
        error::wrong_type(CALL, "event", expected, error::kind(given))
    })?;
    if handle == 0 {
        // What torch says of an event before it is recorded.
        return Err(error::value(CALL, "event", "an event that was recorded", "0"));
    }
    Ok(RawEvent(handle))
}
