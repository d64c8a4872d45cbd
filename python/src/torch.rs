//! What Peerlane asks of torch tensors, with everything that can be looked up once looked up once.
//!
//! Invariant: torch is never imported from here; it is used once the program has done so. A call
//! with a plain tensor makes one pointer comparison to recognise it and one C call for each fact.

use crate::device::Place;
use crate::error;
use crate::exchange::{Described, Description, Exchange};
use crate::tensor::{Need, Tensor};
use peerlane::DType;
use peerlane::gpu::Stream;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

/// The parts of torch that calls use.
pub(crate) struct Torch {
    tensor: Py<PyAny>,
    parameter: Py<PyAny>,
    dtypes: [(Py<PyAny>, DType); 3],
    /// Absent in a build without CUDA, which has no GPU tensors either.
    current_stream: Option<Py<PyAny>>,
    /// Absent before torch 2.10.
    exchange: Option<Exchange>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// Torch, if a call has used it before.
    #[inline]
    pub(crate) fn cached(py: Python<'_>) -> Option<&'static Torch> {
        TORCH.get(py)
    }

    /// Torch, if the program has imported it.
    #[inline]
    pub(crate) fn loaded(py: Python<'_>) -> PyResult<Option<&'static Torch>> {
        match TORCH.get(py) {
            Some(torch) => Ok(Some(torch)),
            None => Torch::find(py),
        }
    }

    #[cold]
    fn find(py: Python<'_>) -> PyResult<Option<&'static Torch>> {
        let modules = py.import("sys")?.getattr("modules")?;
        let Some(torch) = modules.cast::<PyDict>()?.get_item("torch")? else { return Ok(None) };
        TORCH.get_or_try_init(py, || Torch::from_module(&torch)).map(Some)
    }

    fn from_module(torch: &Bound<'_, PyAny>) -> PyResult<Torch> {
        let part = |name: &str| torch.getattr(name).map(Bound::unbind);
        Ok(Torch {
            tensor: part("Tensor")?,
            parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
            dtypes: [
                (part("bfloat16")?, DType::Bf16),
                (part("float16")?, DType::F16),
                (part("float32")?, DType::F32),
            ],
            current_stream: torch
                .getattr("_C")?
                .getattr_opt("_cuda_getCurrentRawStream")?
                .map(Bound::unbind),
            exchange: Exchange::of(&torch.getattr("Tensor")?)?,
        })
    }

    /// Whether the object is a tensor, by its exact type.
    #[inline]
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        class == self.tensor.as_ptr() || class == self.parameter.as_ptr()
    }

    /// Whether the object is a tensor of any class.
    pub(crate) fn is_any(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        object.is_instance(self.tensor.bind(object.py()))
    }

    /// Describes a tensor by torch's own table, if there is one.
    pub(crate) fn look(&self, tensor: &Bound<'_, PyAny>) -> Option<Description> {
        self.exchange.as_ref().filter(|_| self.is_plain(tensor))?.look(tensor)
    }

    /// The raw stream that torch would queue work on; `device` holds the GPU's index.
    #[inline]
    pub(crate) fn current_stream(
        &self,
        ordinal: u32,
        device: &Bound<'_, PyTuple>,
    ) -> PyResult<Stream> {
        if let Some(stream) = self.exchange.as_ref().and_then(|exchange| exchange.stream(ordinal)) {
            return Ok(stream);
        }
        let Some(current) = &self.current_stream else { return Ok(Stream::default()) };
        current.bind(device.py()).call1(device)?.extract().map(Stream)
    }

    fn dtype(&self, tensor: &Bound<'_, PyAny>) -> PyResult<Option<DType>> {
        let dtype = tensor.getattr(intern!(tensor.py(), "dtype"))?;
        Ok(self.dtypes.iter().find(|(known, _)| dtype.is(known)).map(|(_, dtype)| *dtype))
    }

    /// What a tensor says about its memory.
    #[inline]
    pub(crate) fn read(
        &self,
        place: &Place<'_>,
        object: &Bound<'_, PyAny>,
        need: Need,
    ) -> PyResult<Tensor> {
        if let Some(exchange) = &self.exchange
            && let Some(found) = exchange.describe(object, place.real_ordinal())
            && let Some(tensor) = Torch::accept(place, object, need, &found)?
        {
            return Ok(tensor);
        }
        let py = object.py();
        let (dtype, item) = match need {
            Need::Elements(declared) => {
                let dtype = place.element(object, self.dtype(object)?, declared)?;
                (Some(dtype), dtype.bytes())
            }
            Need::Bytes | Need::Rows => {
                (None, object.call_method0(intern!(py, "element_size"))?.extract()?)
            }
        };
        self.check_device(place, object)?;
        if !object.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            return Err(place.not_contiguous());
        }
        let count = object.call_method0(intern!(py, "numel"))?.extract()?;
        let address = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let last = if need == Need::Rows {
            last_dimension(&object.getattr(intern!(py, "shape"))?)?
        } else {
            0
        };
        let tensor = Tensor { address, count, item, dtype, last, stream: None, writable: true };
        if place.simulated() {
            place.check_owner(object, &tensor)?;
        }
        Ok(tensor)
    }

    /// A tensor that torch has described, if its element type needs no second look.
    #[inline]
    fn accept(
        place: &Place<'_>,
        object: &Bound<'_, PyAny>,
        need: Need,
        found: &Described,
    ) -> PyResult<Option<Tensor>> {
        let dtype = match (need, found.dtype) {
            (Need::Elements(None), Some(dtype)) => Some(dtype),
            (Need::Elements(_), _) => return Ok(None),
            (Need::Bytes | Need::Rows, _) => None,
        };
        let &Described { address, count, item, last, .. } = found;
        let tensor = Tensor { address, count, item, dtype, last, stream: None, writable: true };
        if place.simulated() {
            place.check_owner(object, &tensor)?;
        }
        Ok(Some(tensor))
    }

    /// On a real GPU, that the tensor is there. On a simulated one, that it is in host memory, of
    /// which simulated memory is a part.
    #[inline]
    fn check_device(&self, place: &Place<'_>, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = object.py();
        let on_gpu = object.getattr(intern!(py, "is_cuda"))?.is_truthy()?;
        if on_gpu && !place.simulated() {
            let index: i64 = object.call_method0(intern!(py, "get_device"))?.extract()?;
            if index == i64::from(place.ordinal()) {
                return Ok(());
            }
        } else if !on_gpu && place.simulated() {
            return Ok(());
        }
        let got = format!("a tensor on {}", object.getattr("device")?);
        let expected = format!("a tensor on {}", place.device);
        Err(if on_gpu && !place.simulated() {
            error::value(place.call, place.argument, expected, got)
        } else {
            error::wrong_type(place.call, place.argument, expected, got)
        })
    }
}

/// The last entry of a shape; a scalar is one row of one element.
pub(crate) fn last_dimension(shape: &Bound<'_, PyAny>) -> PyResult<usize> {
    let shape = shape.cast::<PyTuple>()?;
    match shape.len() {
        0 => Ok(1),
        dimensions => shape.get_item(dimensions - 1)?.extract(),
    }
}
