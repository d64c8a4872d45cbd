//! The options of a call: operator, wire, contribution, element type, root, stream.
//!
//! Invariant: a default or a literal costs a comparison of pointers. Python interns the literals of
//! a program, so the slow path is for strings made at run time and for mistakes.

use crate::error;
use crate::torch::Torch;
use peerlane::gpu::Stream;
use peerlane::{Algorithm, DType, ReduceOp, Route, Sizing, Tuning, Wire};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString, PyTuple};
use std::path::PathBuf;
use std::time::Duration;

/// An argument that may be left out.
pub(crate) type Given<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// The choice whose name a string is.
#[cold]
pub(crate) fn choose<T: Copy>(
    call: &str,
    argument: &str,
    given: &Bound<'_, PyAny>,
    choices: &[(&'static str, T)],
) -> PyResult<T> {
    let names = || choices.iter().map(|(name, _)| format!("'{name}'")).collect::<Vec<_>>();
    let Ok(text) = given.cast::<PyString>() else {
        let expected = format!("one of {}", names().join(", "));
        return Err(error::wrong_type(call, argument, expected, error::kind(given)));
    };
    let text = text.to_string();
    let found = choices.iter().find(|(name, _)| *name == text);
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let expected = format!("one of {}", names().join(", "));
        error::value(call, argument, expected, error::shown(given))
    })
}

/// `op`: how values are combined.
#[inline]
pub(crate) fn reduce_op(call: &str, given: Given<'_, '_>) -> PyResult<ReduceOp> {
    match given {
        None => Ok(ReduceOp::Sum),
        Some(text) if text.is(intern!(text.py(), "sum")) => Ok(ReduceOp::Sum),
        Some(text) => choose(call, "op", text, &ReduceOp::ALL.map(|op| (op.name(), op))),
    }
}

/// `wire`: how float32 elements travel.
#[inline]
pub(crate) fn wire(call: &str, given: Given<'_, '_>) -> PyResult<Wire> {
    match given {
        None => Ok(Wire::Native),
        Some(text) if text.is(intern!(text.py(), "native")) => Ok(Wire::Native),
        Some(text) if text.is(intern!(text.py(), "bf16")) => Ok(Wire::Bf16),
        Some(text) => choose(call, "wire", text, &[("native", Wire::Native), ("bf16", Wire::Bf16)]),
    }
}

/// `algorithm`: how an all-reduce is carried out; none if that goes by size.
#[inline]
pub(crate) fn algorithm(call: &str, given: Given<'_, '_>) -> PyResult<Option<Algorithm>> {
    let names = || Algorithm::ALL.map(|algorithm| (algorithm.name(), Some(algorithm)));
    given.map_or(Ok(None), |given| auto_or(call, "algorithm", given, &names()))
}

/// `route`: how a broadcast is carried out; none if that goes by size.
#[inline]
pub(crate) fn route(call: &str, given: Given<'_, '_>) -> PyResult<Option<Route>> {
    let names = || Route::ALL.map(|route| (route.name(), Some(route)));
    given.map_or(Ok(None), |given| auto_or(call, "route", given, &names()))
}

/// The choice whose name a string is, or none if it is 'auto'.
fn auto_or<T: Copy>(
    call: &str,
    argument: &str,
    given: &Bound<'_, PyAny>,
    names: &[(&'static str, Option<T>)],
) -> PyResult<Option<T>> {
    let choices: Vec<_> = [("auto", None)].into_iter().chain(names.iter().copied()).collect();
    choose(call, argument, given, &choices)
}

/// `dtype`: what the elements are, where the object cannot say it.
#[inline]
pub(crate) fn dtype(call: &str, given: Given<'_, '_>) -> PyResult<Option<DType>> {
    const NAMES: [(&str, DType); 3] =
        [("float32", DType::F32), ("float16", DType::F16), ("bfloat16", DType::Bf16)];
    given.map(|text| choose(call, "dtype", text, &NAMES)).transpose()
}

/// The name that Python uses for an element type.
pub(crate) const fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
    }
}

/// `contribution`: whether the rank adds its tensor.
#[inline]
pub(crate) fn contribution(call: &str, given: Given<'_, '_>) -> PyResult<bool> {
    given.map_or(Ok(true), |given| truth(call, "contribution", given))
}

/// True or False.
#[inline]
pub(crate) fn truth(call: &str, argument: &str, given: &Bound<'_, PyAny>) -> PyResult<bool> {
    let truth = given.cast::<PyBool>().map(|truth| truth.is_true());
    truth.map_err(|_| error::wrong_type(call, argument, "a bool", error::kind(given)))
}

/// `tuning`: where the table of measured choices comes from.
pub(crate) fn tuning(call: &str, given: &Bound<'_, PyAny>) -> PyResult<Tuning> {
    let expected = "'auto', 'off' or a path";
    let Ok(path) = given.extract::<PathBuf>() else {
        return Err(error::wrong_type(call, "tuning", expected, error::kind(given)));
    };
    match path.to_str() {
        Some(text) => {
            let wrong = |_| error::value(call, "tuning", expected, error::shown(given));
            text.parse().map_err(wrong)
        }
        None => Ok(Tuning::File(path)),
    }
}

/// `sizing`: whether sizes may follow the workload, or between which bytes of a mailbox.
pub(crate) fn sizing(call: &str, given: &Bound<'_, PyAny>) -> PyResult<Option<Sizing>> {
    if let Ok(truth) = given.cast::<PyBool>() {
        return Ok(truth.is_true().then(Sizing::default));
    }
    let Ok((least_mailbox_bytes, most_mailbox_bytes)) = given.extract() else {
        let expected = "a bool, or the least and the most bytes of a mailbox";
        return Err(error::wrong_type(call, "sizing", expected, error::kind(given)));
    };
    Ok(Some(Sizing { least_mailbox_bytes, most_mailbox_bytes, ..Sizing::default() }))
}

/// A number that counts or names something.
pub(crate) fn whole(call: &str, argument: &str, given: &Bound<'_, PyAny>) -> PyResult<usize> {
    given.extract::<usize>().map_err(|wrong| {
        let expected = "an int of 0 or more";
        if wrong.is_instance_of::<pyo3::exceptions::PyOverflowError>(given.py()) {
            return error::value(call, argument, expected, error::shown(given));
        }
        error::wrong_type(call, argument, expected, error::kind(given))
    })
}

/// The same as 32 bits.
pub(crate) fn whole32(call: &str, argument: &str, given: &Bound<'_, PyAny>) -> PyResult<u32> {
    let number = whole(call, argument, given)?;
    u32::try_from(number)
        .map_err(|_| error::value(call, argument, format_args!("at most {}", u32::MAX), number))
}

/// Rank numbers, one after the other.
pub(crate) fn ranks(call: &str, argument: &str, given: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let wrong = |_| error::wrong_type(call, argument, "rank numbers", error::kind(given));
    let each = given.try_iter().map_err(wrong)?;
    each.map(|rank| whole32(call, argument, &rank?)).collect()
}

/// A time in seconds.
pub(crate) fn seconds(call: &str, argument: &str, given: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let Ok(seconds) = given.extract::<f64>() else {
        return Err(error::wrong_type(call, argument, "seconds, as a number", error::kind(given)));
    };
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
    duration
        .ok_or_else(|| error::value(call, argument, "seconds, more than 0", error::shown(given)))
}

/// `stream`: the caller's, else the one that the tensor came with, else torch's current stream on
/// the GPU (`device` holds its index), else the GPU's default stream.
#[inline]
pub(crate) fn stream(
    call: &str,
    given: Given<'_, '_>,
    tensors: Option<u64>,
    device: Option<(u32, &Bound<'_, PyTuple>)>,
) -> PyResult<Stream> {
    match (given, tensors, device) {
        (Some(given), ..) => explicit_stream(call, given),
        (None, Some(stream), _) => Ok(Stream(stream)),
        (None, None, Some((ordinal, device))) => match Torch::loaded(device.py())? {
            Some(torch) => torch.current_stream(ordinal, device),
            None => Ok(Stream::default()),
        },
        (None, None, None) => Ok(Stream::default()),
    }
}

fn explicit_stream(call: &str, given: &Bound<'_, PyAny>) -> PyResult<Stream> {
    if let Ok(handle) = given.extract::<u64>() {
        return Ok(Stream(handle));
    }
    let handle = given.getattr(intern!(given.py(), "cuda_stream"));
    handle.and_then(|handle| handle.extract()).map(Stream).map_err(|_| {
        let expected = "a torch.cuda.Stream, the int of a CUDA stream, or None";
        error::wrong_type(call, "stream", expected, error::kind(given))
    })
}
