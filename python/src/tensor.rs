//! A caller's tensor as Peerlane sees it, and the checks that all kinds of tensors share.
//!
//! Invariant: a [`Tensor`] lies on the communicator's GPU, is contiguous and aligned to its
//! elements. Nothing is kept of the Python object: the caller keeps it alive until the stream has
//! passed the call, as with every call of torch; for a call beside the stream, its `Work` does.

use crate::arrays;
use crate::device::Place;
use crate::error;
use crate::options::dtype_name;
use crate::torch::Torch;
use peerlane::DType;
use peerlane::gpu::DevicePtr;
use pyo3::prelude::*;

/// What a call has to know of a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// The element type, which the caller may have declared.
    Elements(Option<DType>),
    /// Only its bytes.
    Bytes,
    /// Its bytes and its last dimension.
    Rows,
}

impl Need {
    #[inline]
    fn is_bytes(self) -> bool {
        !matches!(self, Need::Elements(_))
    }
}

/// Where a tensor lies and what is in it.
pub(crate) struct Tensor {
    pub(crate) address: u64,
    pub(crate) count: usize,
    /// Bytes of one element.
    pub(crate) item: usize,
    /// Known if the call needs it.
    pub(crate) dtype: Option<DType>,
    /// The last dimension, if the call needs it.
    pub(crate) last: usize,
    /// The stream on which its content becomes valid, if it says.
    pub(crate) stream: Option<u64>,
    pub(crate) writable: bool,
}

impl Tensor {
    /// Reads what `object` says about its memory.
    #[inline]
    pub(crate) fn read(
        place: &Place<'_>,
        object: &Bound<'_, PyAny>,
        need: Need,
    ) -> PyResult<Tensor> {
        let tensor = match Torch::cached(object.py()) {
            Some(torch) if torch.is_plain(object) => torch.read(place, object, need)?,
            _ => Tensor::read_other(place, object, need)?,
        };
        // Bytes may lie anywhere.
        if need.is_bytes() || tensor.address.is_multiple_of(tensor.item as u64) {
            return Ok(tensor);
        }
        let expected = format!("an address aligned to {} bytes", tensor.item);
        let got = format!("{:#x}", tensor.address);
        Err(error::value(place.call, place.argument, expected, got))
    }

    #[cold]
    fn read_other(place: &Place<'_>, object: &Bound<'_, PyAny>, need: Need) -> PyResult<Tensor> {
        if let Some(torch) = Torch::loaded(object.py())?
            && torch.is_any(object)?
        {
            return torch.read(place, object, need);
        }
        arrays::read(place, object, need)
    }

    /// The same, for a tensor that the call writes.
    #[inline]
    pub(crate) fn read_writable(
        place: &Place<'_>,
        object: &Bound<'_, PyAny>,
        need: Need,
    ) -> PyResult<Tensor> {
        let tensor = Tensor::read(place, object, need)?;
        if tensor.writable {
            return Ok(tensor);
        }
        Err(error::value(place.call, place.argument, "a writable array", "a read-only one"))
    }

    /// Its address.
    #[inline]
    pub(crate) fn at(&self) -> DevicePtr {
        DevicePtr(self.address)
    }

    /// Its size.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.count * self.item
    }

    /// That this output holds as many elements of the same kind as `tensor` makes, `expected`.
    #[inline]
    pub(crate) fn fits(
        &self,
        call: &str,
        tensor: &Tensor,
        expected: usize,
        why: &str,
    ) -> PyResult<()> {
        if self.dtype != tensor.dtype {
            let name = |tensor: &Tensor| tensor.dtype.map_or("?", dtype_name);
            return Err(error::wrong_type(call, "out", name(tensor), name(self)));
        }
        if self.item != tensor.item {
            let expected = format!("elements of {} bytes, as in tensor", tensor.item);
            return Err(error::wrong_type(call, "out", expected, format!("{} bytes", self.item)));
        }
        if self.count != expected {
            let expected = format!("{expected} elements ({why})");
            return Err(error::value(call, "out", expected, self.count));
        }
        Ok(())
    }

    /// That this output and `tensor` are apart or, if the call can work in place, that the smaller
    /// is exactly the part of the larger that begins at `part`.
    #[inline]
    pub(crate) fn apart(&self, call: &str, tensor: &Tensor, part: Option<usize>) -> PyResult<()> {
        let (small, large) =
            if self.bytes() <= tensor.bytes() { (self, tensor) } else { (tensor, self) };
        let ends = |tensor: &Tensor| tensor.address + tensor.bytes() as u64;
        if part.is_some_and(|part| small.address == large.address + part as u64)
            || ends(small) <= large.address
            || ends(large) <= small.address
        {
            return Ok(());
        }
        let expected = match part {
            None => "memory that does not overlap tensor".into(),
            Some(0) => "memory that is tensor's or does not overlap it".into(),
            Some(part) => {
                format!("memory that does not overlap tensor, or this rank's part, {part} bytes on")
            }
        };
        let got = format!("{:#x} beside {:#x}", self.address, tensor.address);
        Err(error::value(call, "out", expected, got))
    }
}
