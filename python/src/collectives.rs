//! The collectives: from Python's arguments to the library's requests.
//!
//! Invariant: a call that raises has queued nothing. What is checked here is what only the Python
//! objects know; sizes, roots and agreement between ranks are the library's to check.

use crate::beside::Made;
use crate::communicator::Communicator;
use crate::device::Place;
use crate::error;
use crate::options::{self, Given};
use crate::tensor::{Need, Tensor};
use peerlane::gpu::DevicePtr;
use peerlane::{AllGather, AllReduce, Broadcast, DType, Gather, ReduceOp, ReduceScatter, Wire};
use pyo3::prelude::*;
use pyo3::types::PySequence;

/// How values are combined, as the caller put it.
pub(crate) struct Reduction<'a, 'py> {
    pub(crate) op: Given<'a, 'py>,
    pub(crate) wire: Given<'a, 'py>,
    pub(crate) contribution: Given<'a, 'py>,
    pub(crate) dtype: Given<'a, 'py>,
    /// Of an all-reduce.
    pub(crate) algorithm: Given<'a, 'py>,
}

/// Most ranks that a group can have.
const MOST: usize = 16;

impl Communicator {
    #[inline]
    pub(crate) fn place(&self, call: &'static str, argument: &'static str) -> Place<'_> {
        Place::new(call, argument, &self.gpu, self.ordinal)
    }
}

/// The element type of a tensor that was read for its elements.
fn element(tensor: &Tensor) -> DType {
    tensor.dtype.unwrap_or(DType::F32)
}

#[inline]
pub(crate) fn all_reduce<M: Made>(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    out: Given<'_, '_>,
    how: &Reduction<'_, '_>,
    stream: Given<'_, '_>,
) -> PyResult<M> {
    const CALL: &str = "all_reduce";
    let need = Need::Elements(options::dtype(CALL, how.dtype)?);
    let place = rank.place(CALL, "tensor");
    let (src, dst) = match out {
        None => {
            let src = Tensor::read_writable(&place, tensor, need)?;
            let dst = src.at();
            (src, dst)
        }
        Some(out) => {
            let src = Tensor::read(&place, tensor, need)?;
            let dst = Tensor::read_writable(&rank.place(CALL, "out"), out, need)?;
            dst.fits(CALL, &src, src.count, "as many as tensor has")?;
            dst.apart(CALL, &src, Some(0))?;
            (src, dst.at())
        }
    };
    let request = AllReduce {
        src: src.at(),
        dst,
        count: src.count,
        dtype: element(&src),
        op: options::reduce_op(CALL, how.op)?,
        wire: options::wire(CALL, how.wire)?,
        contribution: options::contribution(CALL, how.contribution)?,
        algorithm: options::algorithm(CALL, how.algorithm)?,
    };
    let stream = rank.stream(py, CALL, stream, src.stream)?;
    // SAFETY: both tensors lie on this rank's GPU and have `count` elements; that they stay alive
    // until the stream has passed is the caller's part, as with torch's own asynchronous calls.
    rank.queue(py, CALL, |rank| unsafe { M::all_reduce(rank, &request, stream) })
}

/// An all-reduce in place.
pub(crate) fn in_place_request(
    rank: &Communicator,
    call: &'static str,
    tensor: &Bound<'_, PyAny>,
    how: &Reduction<'_, '_>,
) -> PyResult<AllReduce> {
    let need = Need::Elements(options::dtype(call, how.dtype)?);
    let tensor = Tensor::read_writable(&rank.place(call, "tensor"), tensor, need)?;
    Ok(AllReduce {
        op: options::reduce_op(call, how.op)?,
        wire: options::wire(call, how.wire)?,
        contribution: options::contribution(call, how.contribution)?,
        ..AllReduce::in_place(tensor.at(), tensor.count, element(&tensor))
    })
}

/// The call of a prepared all-reduce.
#[inline]
pub(crate) fn all_reduce_in_place(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    (op, wire): (ReduceOp, Wire),
    contribution: Given<'_, '_>,
) -> PyResult<()> {
    const CALL: &str = "all_reduce";
    let place = rank.place(CALL, "tensor");
    let tensor = Tensor::read_writable(&place, tensor, Need::Elements(None))?;
    let request = AllReduce {
        op,
        wire,
        contribution: options::contribution(CALL, contribution)?,
        ..AllReduce::in_place(tensor.at(), tensor.count, element(&tensor))
    };
    let stream = rank.stream(py, CALL, None, tensor.stream)?;
    // SAFETY: as in `all_reduce`.
    rank.queue(py, CALL, |rank| unsafe { rank.all_reduce(&request, stream) })
}

pub(crate) fn reduce_scatter<M: Made>(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    how: &Reduction<'_, '_>,
    stream: Given<'_, '_>,
) -> PyResult<M> {
    const CALL: &str = "reduce_scatter";
    let need = Need::Elements(options::dtype(CALL, how.dtype)?);
    let src = Tensor::read(&rank.place(CALL, "tensor"), tensor, need)?;
    let dst = Tensor::read_writable(&rank.place(CALL, "out"), out, need)?;
    let world = rank.world() as usize;
    if !src.count.is_multiple_of(world) {
        let expected = format!("a number of elements that {world} ranks can share");
        return Err(error::value(CALL, "tensor", expected, src.count));
    }
    let count = src.count / world;
    dst.fits(CALL, &src, count, "one rank's part of tensor")?;
    dst.apart(CALL, &src, Some(rank.number() as usize * dst.bytes()))?;
    let request = ReduceScatter {
        src: src.at(),
        dst: dst.at(),
        count,
        dtype: element(&src),
        op: options::reduce_op(CALL, how.op)?,
        wire: options::wire(CALL, how.wire)?,
        contribution: options::contribution(CALL, how.contribution)?,
    };
    let stream = rank.stream(py, CALL, stream, src.stream)?;
    // SAFETY: as in `all_reduce`, with world times `count` elements to read.
    rank.queue(py, CALL, |rank| unsafe { M::reduce_scatter(rank, &request, stream) })
}

pub(crate) fn all_gather<M: Made>(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    stream: Given<'_, '_>,
) -> PyResult<M> {
    const CALL: &str = "all_gather";
    let (request, src) = all_gather_request(rank, tensor, out)?;
    let stream = rank.stream(py, CALL, stream, src.stream)?;
    // SAFETY: as in `all_reduce`, with world times `bytes` bytes to write.
    rank.queue(py, CALL, |rank| unsafe { M::all_gather(rank, &request, stream) })
}

/// An all-gather, and its input.
pub(crate) fn all_gather_request(
    rank: &Communicator,
    tensor: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<(AllGather, Tensor)> {
    const CALL: &str = "all_gather";
    let src = Tensor::read(&rank.place(CALL, "tensor"), tensor, Need::Bytes)?;
    let dst = Tensor::read_writable(&rank.place(CALL, "out"), out, Need::Bytes)?;
    let all = src.count.saturating_mul(rank.world() as usize);
    dst.fits(CALL, &src, all, "tensor's, times the world size")?;
    dst.apart(CALL, &src, Some(rank.number() as usize * src.bytes()))?;
    Ok((AllGather { src: src.at(), dst: dst.at(), bytes: src.bytes() }, src))
}

pub(crate) fn broadcast<M: Made>(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    (root, route): (&Bound<'_, PyAny>, Given<'_, '_>),
    stream: Given<'_, '_>,
) -> PyResult<M> {
    const CALL: &str = "broadcast";
    let (request, data) = broadcast_request(rank, tensor, (root, route))?;
    let stream = rank.stream(py, CALL, stream, data.stream)?;
    // SAFETY: as in `all_reduce`; the root's tensor is only read.
    rank.queue(py, CALL, |rank| unsafe { M::broadcast(rank, &request, stream) })
}

/// A broadcast, and its tensor.
pub(crate) fn broadcast_request(
    rank: &Communicator,
    tensor: &Bound<'_, PyAny>,
    (root, route): (&Bound<'_, PyAny>, Given<'_, '_>),
) -> PyResult<(Broadcast, Tensor)> {
    const CALL: &str = "broadcast";
    let root = options::whole32(CALL, "root", root)?;
    let route = options::route(CALL, route)?;
    let place = rank.place(CALL, "tensor");
    let data = if root == rank.number() {
        Tensor::read(&place, tensor, Need::Bytes)?
    } else {
        Tensor::read_writable(&place, tensor, Need::Bytes)?
    };
    Ok((Broadcast { route, ..Broadcast::new(data.at(), data.bytes(), root) }, data))
}

pub(crate) fn gather<M: Made>(
    rank: &Communicator,
    py: Python<'_>,
    (tensor, out): (Given<'_, '_>, Given<'_, '_>),
    root: &Bound<'_, PyAny>,
    widths: &Bound<'_, PyAny>,
    stream: Given<'_, '_>,
) -> PyResult<M> {
    const CALL: &str = "gather";
    let root = options::whole32(CALL, "root", root)?;
    let mut widths = read_widths(rank, widths)?;
    let own = widths[rank.number() as usize];
    let src = gathered(rank, "tensor", tensor, own, format_args!("widths[{}]", rank.number()))?;
    let dst = if rank.number() == root {
        let total = widths.iter().fold(0usize, |sum, width| sum.saturating_add(*width));
        gathered(rank, "out", out, total, format_args!("the sum of widths"))?
    } else if let Some(out) = out {
        let expected = format!("None on rank {}, since the root is {root}", rank.number());
        return Err(error::value(CALL, "out", expected, error::kind(out)));
    } else {
        None
    };
    if let (Some(src), Some(dst)) = (&src, &dst) {
        dst.fits(CALL, src, dst.last.saturating_mul(rows(src)), "tensor's rows of all widths")?;
        dst.apart(CALL, src, None)?;
    }
    if let Some(dst) = &dst
        && !dst.writable
    {
        return Err(error::value(CALL, "out", "a writable array", "a read-only one"));
    }
    let known = src.as_ref().or(dst.as_ref());
    let item = known.map_or(0, |tensor| tensor.item);
    for width in &mut widths {
        *width = width.saturating_mul(item);
    }
    let address = |tensor: &Option<Tensor>| tensor.as_ref().map_or(DevicePtr(0), Tensor::at);
    let request = Gather {
        src: address(&src),
        dst: address(&dst),
        rows: known.map_or(0, rows),
        widths: &widths[..rank.world() as usize],
        root,
    };
    let stream = rank.stream(py, CALL, stream, known.and_then(|tensor| tensor.stream))?;
    // SAFETY: as in `all_reduce`: `src` has `rows` rows of this rank's width, and the root's `dst`
    // as many of all widths together.
    rank.queue(py, CALL, |rank| unsafe { M::gather(rank, &request, stream) })
}

/// Rows of a tensor that was read for its rows.
fn rows(tensor: &Tensor) -> usize {
    tensor.count.checked_div(tensor.last).unwrap_or(0)
}

/// A tensor of a gather; none if there is nothing of its width to move.
fn gathered(
    rank: &Communicator,
    argument: &'static str,
    object: Given<'_, '_>,
    width: usize,
    whose: std::fmt::Arguments<'_>,
) -> PyResult<Option<Tensor>> {
    const CALL: &str = "gather";
    if width == 0 {
        return Ok(None);
    }
    let Some(object) = object else {
        let expected = format!("a tensor whose last dimension is {width} ({whose})");
        return Err(error::wrong_type(CALL, argument, expected, "None"));
    };
    let tensor = Tensor::read(&rank.place(CALL, argument), object, Need::Rows)?;
    if tensor.last != width {
        let expected = format!("a last dimension of {width} ({whose})");
        return Err(error::value(CALL, argument, expected, tensor.last));
    }
    Ok(Some(tensor))
}

/// One width for every rank, in elements, and 0 beyond the last rank.
fn read_widths(rank: &Communicator, widths: &Bound<'_, PyAny>) -> PyResult<[usize; MOST]> {
    const CALL: &str = "gather";
    let wrong = |_| error::wrong_type(CALL, "widths", "a sequence of ints", error::kind(widths));
    let sequence = widths.cast::<PySequence>().map_err(wrong)?;
    let (count, world) = (sequence.len()?, rank.world() as usize);
    if count != world {
        return Err(error::value(CALL, "widths", format!("{world} widths, one a rank"), count));
    }
    let mut read = [0; MOST];
    for (index, width) in read[..world].iter_mut().enumerate() {
        *width = options::whole(CALL, "widths", &sequence.get_item(index)?)?;
    }
    Ok(read)
}
