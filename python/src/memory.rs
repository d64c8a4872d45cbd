//! Arrays in the memory of simulated GPUs.
//!
//! Invariant: the memory outlives the array and everything that was queued with it; it is freed by
//! the machine once nothing is queued (`Machine::sweep`).

use crate::device::{Device, Machine};
use crate::error;
use crate::options::whole;
use peerlane::Error;
use peerlane::gpu::DevicePtr;
use pyo3::exceptions::PyModuleNotFoundError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyString};
use std::sync::Arc;

/// What keeps an array's memory: numpy holds it as the array's base.
#[pyclass(frozen, module = "peerlane._peerlane")]
struct Memory {
    machine: Arc<Machine>,
    ordinal: u32,
    address: DevicePtr,
    bytes: usize,
}

#[pymethods]
impl Memory {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let facts = PyDict::new(py);
        facts.set_item("version", 3)?;
        facts.set_item("shape", (self.bytes,))?;
        facts.set_item("typestr", "|u1")?;
        facts.set_item("data", (self.address.0, false))?;
        Ok(facts)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.machine.retire(self.ordinal, self.address);
    }
}

/// A numpy array in the memory of a simulated GPU.
pub(crate) fn empty<'py>(
    device: &Device,
    shape: &Bound<'py, PyAny>,
    dtype: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = shape.py();
    let Some(machine) = &device.machine else {
        let reason = format!("{} is a real GPU; make the tensor with torch or cupy", device.name);
        return Err(error::raise(py, Error::Unsupported { op: "empty", reason }));
    };
    let numpy = py.import("numpy")?;
    let dtype = numpy.call_method1("dtype", (storage(&numpy, dtype)?,))?;
    let item: usize = dtype.getattr("itemsize")?.extract()?;
    let dimensions = dimensions(shape)?;
    let bytes = dimensions.iter().try_fold(item, |bytes, size| bytes.checked_mul(*size));
    let bytes = bytes.filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(|| {
        error::value("empty", "shape", "a size that memory can have", error::shown(shape))
    })?;
    if bytes == 0 {
        return numpy.call_method1("empty", (dimensions, dtype));
    }
    let ordinal = device.gpu.properties().ordinal;
    machine.sweep(ordinal);
    let address = device.gpu.alloc(bytes).map_err(|e| error::raise(py, e))?;
    let memory = Bound::new(py, Memory { machine: machine.clone(), ordinal, address, bytes })?;
    let array = numpy.call_method1("asarray", (memory,))?;
    array.call_method1(intern!(py, "view"), (dtype,))?.call_method1("reshape", (dimensions,))
}

/// What numpy stores elements as: numpy itself has no bfloat16.
fn storage<'py>(
    numpy: &Bound<'py, PyAny>,
    dtype: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = dtype.py();
    if !dtype.cast::<PyString>().is_ok_and(|name| name == "bfloat16") {
        return Ok(dtype.clone());
    }
    match py.import("ml_dtypes") {
        Ok(types) => types.getattr("bfloat16"),
        Err(missing) if missing.is_instance_of::<PyModuleNotFoundError>(py) => {
            numpy.getattr("uint16")
        }
        Err(other) => Err(other),
    }
}

fn dimensions(shape: &Bound<'_, PyAny>) -> PyResult<Vec<usize>> {
    if shape.is_instance_of::<PyInt>() {
        return Ok(vec![whole("empty", "shape", shape)?]);
    }
    let sizes = shape.try_iter().map_err(|_| {
        error::wrong_type("empty", "shape", "an int or a sequence of ints", error::kind(shape))
    })?;
    sizes.map(|size| whole("empty", "shape", &size?)).collect()
}
