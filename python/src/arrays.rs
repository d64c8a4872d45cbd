//! Tensors that describe themselves: numpy arrays in simulated memory, and whatever has
//! `__cuda_array_interface__`.
//!
//! Invariant: an address is believed only if the GPU says that the whole range is its memory.

use crate::device::Place;
use crate::error;
use crate::tensor::{Need, Tensor};
use crate::torch::last_dimension;
use peerlane::DType;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// What an array says about its memory.
pub(crate) fn read(place: &Place<'_>, object: &Bound<'_, PyAny>, need: Need) -> PyResult<Tensor> {
    let py = object.py();
    if let Some(facts) = object.getattr_opt(intern!(py, "__cuda_array_interface__"))? {
        return describe(place, object, facts.cast::<PyDict>()?, need);
    }
    if place.simulated()
        && let Some(facts) = object.getattr_opt(intern!(py, "__array_interface__"))?
    {
        return describe(place, object, facts.cast::<PyDict>()?, need);
    }
    let expected = if place.simulated() {
        format!("an array in memory of {}, as Communicator.empty makes it", place.device)
    } else {
        format!("a tensor on {}", place.device)
    };
    Err(error::wrong_type(place.call, place.argument, expected, error::kind(object)))
}

/// Reads the two array interfaces, which agree in all that matters here.
fn describe(
    place: &Place<'_>,
    object: &Bound<'_, PyAny>,
    facts: &Bound<'_, PyDict>,
    need: Need,
) -> PyResult<Tensor> {
    let entry = |name: &str| {
        let found = facts.get_item(name)?;
        found.ok_or_else(|| place.wrong(format!("{name} in the array interface"), "none"))
    };
    let (address, read_only): (u64, bool) = entry("data")?.extract()?;
    let typestr: String = entry("typestr")?.extract()?;
    let shape = entry("shape")?;
    let item = item_bytes(place, &typestr)?;
    let dimensions: Vec<usize> = shape.extract()?;
    let count = dimensions.iter().product();
    if let Some(strides) = facts.get_item("strides")?.filter(|strides| !strides.is_none())
        && count != 0
        && !is_contiguous(&dimensions, strides.cast::<PyTuple>()?, item)?
    {
        return Err(place.not_contiguous());
    }
    let dtype = match need {
        Need::Elements(declared) => {
            Some(place.element(object, element(object, &typestr)?, declared)?)
        }
        Need::Bytes | Need::Rows => None,
    };
    let last = if need == Need::Rows { last_dimension(&shape)? } else { 0 };
    let stream = facts.get_item("stream")?.filter(|stream| !stream.is_none());
    let tensor = Tensor {
        address,
        count,
        item,
        dtype,
        last,
        stream: stream.map(|stream| stream.extract()).transpose()?.map(own_stream),
        writable: !read_only,
    };
    place.check_owner(object, &tensor)?;
    Ok(tensor)
}

/// 1 stands for the default stream in the interface; it is 0 in this library.
fn own_stream(handle: u64) -> u64 {
    if handle == 1 { 0 } else { handle }
}

/// The bytes of one element, from a typestr such as `<f4`.
fn item_bytes(place: &Place<'_>, typestr: &str) -> PyResult<usize> {
    let bytes = typestr.get(2..).and_then(|digits| digits.parse().ok());
    bytes.ok_or_else(|| place.wrong("elements of a fixed size".into(), typestr))
}

/// The element type, if it is one that can be reduced. numpy knows bfloat16 only as two bytes of
/// something, but the dtype that ml_dtypes makes of them has a name.
fn element(object: &Bound<'_, PyAny>, typestr: &str) -> PyResult<Option<DType>> {
    match typestr {
        "<f4" => Ok(Some(DType::F32)),
        "<f2" => Ok(Some(DType::F16)),
        "<V2" | "|V2" => {
            let name =
                object.getattr_opt("dtype")?.map(|dtype| dtype.getattr("name")).transpose()?;
            let name = name.map(|name| name.extract::<String>()).transpose()?;
            Ok((name.as_deref() == Some("bfloat16")).then_some(DType::Bf16))
        }
        _ => Ok(None),
    }
}

fn is_contiguous(
    dimensions: &[usize],
    strides: &Bound<'_, PyTuple>,
    item: usize,
) -> PyResult<bool> {
    let mut expected = item;
    for (&size, stride) in dimensions.iter().zip(strides.extract::<Vec<isize>>()?).rev() {
        if size != 1 && stride != expected as isize {
            return Ok(false);
        }
        expected *= size;
    }
    Ok(true)
}
