//! Torch's own table of C functions for reading tensors: DLPack's exchange API, from torch 2.10 on.
//!
//! Invariant: nothing read through it outlives the call. What it cannot say, or says in a way that
//! is not expected here, is left to the attributes of the tensor, which also make the messages.
//!
//! One call through the table takes the place of six Python calls.

use peerlane::DType;
use peerlane::gpu::Stream;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::slice;

/// The version of the table that is understood; minor versions only add to it.
const MAJOR: u32 = 1;
const CPU: i32 = 1;
const CUDA: i32 = 2;

/// `DLTensor`.
#[repr(C)]
pub(crate) struct Description {
    pub(crate) data: *mut c_void,
    pub(crate) device: i32,
    pub(crate) ordinal: i32,
    pub(crate) dimensions: i32,
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
    pub(crate) shape: *const i64,
    pub(crate) strides: *const i64,
    pub(crate) byte_offset: u64,
}

/// `DLPackExchangeAPI`.
#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    describe: Option<unsafe extern "C" fn(*mut c_void, *mut Description) -> c_int>,
    stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// The functions of the table that calls use.
pub(crate) struct Exchange {
    describe: unsafe extern "C" fn(*mut c_void, *mut Description) -> c_int,
    stream: unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int,
}

/// What a tensor is.
pub(crate) struct Described {
    pub(crate) address: u64,
    pub(crate) count: usize,
    pub(crate) item: usize,
    /// `None` for a type that no reduction takes.
    pub(crate) dtype: Option<DType>,
    /// The last dimension; a scalar is one row of one element.
    pub(crate) last: usize,
}

impl Exchange {
    /// The table of a tensor class, if it has one of a version that is understood.
    pub(crate) fn of(class: &Bound<'_, PyAny>) -> PyResult<Option<Exchange>> {
        let Some(capsule) = class.getattr_opt("__dlpack_c_exchange_api__")? else {
            return Ok(None);
        };
        // SAFETY: a capsule of this name holds such a table, which lives as long as the process;
        // a capsule of another name yields null and an error, which is dropped.
        let table =
            unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
        if table.is_null() {
            drop(PyErr::take(class.py()));
            return Ok(None);
        }
        // SAFETY: as above; the version stands first in every version.
        let table = unsafe { &*table.cast::<Table>() };
        Ok(match (table.major, table.describe, table.stream) {
            (MAJOR, Some(describe), Some(stream)) => Some(Exchange { describe, stream }),
            _ => None,
        })
    }

    /// Describes a contiguous tensor on the GPU `ordinal`, or in host memory for `None`; nothing
    /// for any other.
    #[inline]
    pub(crate) fn describe(
        &self,
        tensor: &Bound<'_, PyAny>,
        ordinal: Option<u32>,
    ) -> Option<Described> {
        let found = self.look(tensor)?;
        let place = (found.device, found.ordinal);
        let wanted = ordinal.map_or((CPU, found.ordinal), |ordinal| (CUDA, ordinal as i32));
        let (count, last) = found.contiguous()?;
        (place == wanted && found.lanes == 1 && found.bits.is_multiple_of(8)).then(|| Described {
            address: found.data as u64 + found.byte_offset,
            count,
            item: usize::from(found.bits / 8),
            dtype: found.dtype(),
            last,
        })
    }

    /// Describes any tensor, for as long as nobody changes its shape.
    pub(crate) fn look(&self, tensor: &Bound<'_, PyAny>) -> Option<Description> {
        let mut found = MaybeUninit::<Description>::uninit();
        // SAFETY: the caller has checked that the object is of the class that the table is of.
        let failed = unsafe { (self.describe)(tensor.as_ptr().cast(), found.as_mut_ptr()) } != 0;
        if failed {
            drop(PyErr::take(tensor.py()));
            return None;
        }
        // SAFETY: the call has filled it.
        Some(unsafe { found.assume_init() })
    }

    /// The stream that torch would queue work on.
    #[inline]
    pub(crate) fn stream(&self, ordinal: u32) -> Option<Stream> {
        let mut stream = null_mut();
        // SAFETY: `stream` outlives the call.
        let failed = unsafe { (self.stream)(CUDA, ordinal as i32, &mut stream) } != 0;
        if failed {
            // SAFETY: the interpreter's lock is held by whoever makes a call.
            unsafe { ffi::PyErr_Clear() };
            return None;
        }
        Some(Stream(stream as u64))
    }
}

impl Description {
    fn dtype(&self) -> Option<DType> {
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        match (self.code, self.bits) {
            (FLOAT, 32) => Some(DType::F32),
            (FLOAT, 16) => Some(DType::F16),
            (BFLOAT, 16) => Some(DType::Bf16),
            _ => None,
        }
    }

    /// The number of elements and the last dimension, if they lie one after the other.
    #[inline]
    fn contiguous(&self) -> Option<(usize, usize)> {
        if self.dimensions == 0 {
            return Some((1, 1));
        }
        let dimensions = usize::try_from(self.dimensions).ok()?;
        // SAFETY: the table's owner keeps as many numbers there while the call lasts.
        let shape = unsafe { slice::from_raw_parts(self.shape, dimensions) };
        let last = usize::try_from(*shape.last()?).ok()?;
        if shape.contains(&0) {
            return Some((0, last));
        }
        let mut expected = 1;
        for index in (0..dimensions).rev() {
            // Without strides a tensor is contiguous.
            let stride = match self.strides.is_null() {
                true => expected,
                // SAFETY: as above.
                false => unsafe { *self.strides.add(index) },
            };
            if shape[index] != 1 && stride != expected {
                return None;
            }
            expected *= shape[index];
        }
        Some((usize::try_from(expected).ok()?, last))
    }
}
