//! Descriptions in host memory as DLPack has them: read from any object, and given to any.
//!
//! Invariant: what was read is used only while the capsule that it came in lives; what is given lives until the taker's deleter,
//! or the capsule that nobody took, ends it.

use crate::error;
use crate::exchange::Description;
use crate::torch::Torch;
use peerlane::transfer::{Element, Shape, View};
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi::{self, PyObject};
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

const NAME: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
/// The version that is understood. Later minor ones only add.
const MAJOR: u32 = 1;
pub(crate) const HOST: i32 = 1;
pub(crate) const CUDA: i32 = 2;
/// Host memory that a GPU's driver has pinned.
const PINNED: i32 = 3;

/// `DLManagedTensor`.
#[repr(C)]
struct Managed {
    tensor: Description,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct ManagedVersioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: *const c_void,
    flags: u64,
    tensor: Description,
}

/// A tensor that was read.
pub(crate) struct Read<'py> {
    /// Keeps the memory: a capsule, or the tensor itself.
    _owner: Bound<'py, PyAny>,
    address: *const u8,
    strides: Vec<i64>,
    pub(crate) element: Element,
    pub(crate) shape: Shape,
}

impl<'py> Read<'py> {
    /// What an object with `__dlpack__` says about its memory.
    pub(crate) fn of(call: &str, object: &Bound<'py, PyAny>) -> PyResult<Read<'py>> {
        let expected = "a tensor in host memory, with __dlpack__";
        let place = |device: i32| {
            let fits = device == HOST || device == PINNED;
            let got = || format!("DLPack device {device}");
            if fits { Ok(()) } else { Err(error::value(call, "tensor", "host memory", got())) }
        };
        // Torch's table takes a tenth of the time that its `__dlpack__` does.
        if let Some(found) = Torch::loaded(object.py())?.and_then(|torch| torch.look(object)) {
            place(found.device)?;
            return Read::new(call, object.clone(), &found);
        }
        let Some(method) = object.getattr_opt("__dlpack__")? else {
            return Err(error::wrong_type(call, "tensor", expected, error::kind(object)));
        };
        let (device, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        place(device)?;
        // Only newer producers can say that a tensor is read-only, and older ones do not know the argument.
        let options = [("max_version", (MAJOR, 0))].into_py_dict(object.py())?;
        let capsule = match method.call((), Some(&options)) {
            Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => method.call0()?,
            answer => answer?,
        };
        let tensor = in_capsule(&capsule)?;
        // SAFETY: the capsule keeps it.
        Read::new(call, capsule, unsafe { &*tensor })
    }

    /// What stands in a description that `owner` keeps.
    fn new(call: &str, owner: Bound<'py, PyAny>, tensor: &Description) -> PyResult<Read<'py>> {
        let Description { data, dimensions, code, bits, lanes, byte_offset, .. } = *tensor;
        if lanes != 1 || !bits.is_multiple_of(8) || !(8..=128).contains(&bits) {
            let got = format!("{lanes} of {bits} bits");
            return Err(error::value(call, "tensor", "elements of 1 to 16 bytes", got));
        }
        let dimensions = usize::try_from(dimensions).unwrap_or_default();
        // SAFETY: the struct's owner keeps as many numbers there.
        let numbers = |from: *const i64| unsafe {
            if dimensions == 0 { &[] } else { std::slice::from_raw_parts(from, dimensions) }
        };
        let sizes: Vec<u64> = numbers(tensor.shape).iter().map(|size| *size as u64).collect();
        let shape = Shape::new(&sizes)
            .ok_or_else(|| error::value(call, "tensor", "8 dimensions at most", dimensions))?;
        let contiguous = tensor.strides.is_null();
        let strides = if contiguous { steps(&sizes) } else { numbers(tensor.strides).to_vec() };
        let address = data.cast::<u8>().wrapping_add(byte_offset as usize);
        let element = Element { code, bytes: bits / 8 };
        Ok(Read { _owner: owner, address, strides, element, shape })
    }

    /// Its elements one behind the other: where they are, or copied to `room`.
    pub(crate) fn bytes<'a>(&'a self, room: &'a mut Vec<u8>) -> &'a [u8] {
        let (sizes, item) = (self.shape.sizes(), usize::from(self.element.bytes));
        let count = self.shape.count().unwrap_or_default() as usize;
        if count == 0 {
            return &[];
        }
        let fits = |((size, stride), step): ((&u64, &i64), i64)| *size == 1 || *stride == step;
        if sizes.iter().zip(&self.strides).zip(steps(sizes)).all(fits) {
            // SAFETY: a contiguous tensor of so many elements, which the capsule keeps. Who writes it meanwhile tears it.
            return unsafe { std::slice::from_raw_parts(self.address, count * item) };
        }
        room.reserve(count * item);
        for index in 0..count as u64 {
            let (mut rest, mut at) = (index, 0);
            for (size, stride) in sizes.iter().zip(&self.strides).rev() {
                at += (rest % size) as i64 * stride;
                rest /= size;
            }
            let from = self.address.wrapping_offset(at as isize * item as isize);
            // SAFETY: an element of the tensor.
            room.extend(unsafe { std::slice::from_raw_parts(from, item) });
        }
        room
    }
}

/// The tensor in a capsule of either kind.
fn in_capsule(capsule: &Bound<'_, PyAny>) -> PyResult<*const Description> {
    // SAFETY: a capsule of a name holds the struct of that name; of another name it yields null and an error.
    let pointer = |name: &CStr| unsafe {
        match ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) {
            0 => null_mut(),
            _ => ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()),
        }
    };
    let (plain, versioned) = (pointer(NAME), pointer(VERSIONED).cast::<ManagedVersioned>());
    if !plain.is_null() {
        // SAFETY: as above.
        return Ok(unsafe { &raw const (*plain.cast::<Managed>()).tensor });
    }
    // SAFETY: as above; the version stands first in every version.
    if versioned.is_null() || unsafe { (*versioned).major } != MAJOR {
        return Err(PyBufferError::new_err("__dlpack__: expected a capsule of DLPack 0 or 1"));
    }
    // SAFETY: as above.
    Ok(unsafe { &raw const (*versioned).tensor })
}

/// The strides of a contiguous tensor.
fn steps(sizes: &[u64]) -> Vec<i64> {
    let mut step = 1_i64;
    let steps = sizes.iter().rev().map(|size| {
        let own = step;
        step = step.saturating_mul(*size as i64);
        own
    });
    let mut steps: Vec<i64> = steps.collect();
    steps.reverse();
    steps
}

/// What a capsule of ours points to: the struct first, so that it can be found by it.
#[repr(C)]
struct Given {
    managed: Managed,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _keeps: Box<dyn Send>,
}

/// Where a taker finds the first element.
pub(crate) struct Place {
    pub(crate) address: u64,
    pub(crate) device: i32,
    pub(crate) ordinal: i32,
}

/// A capsule with a view's elements at a place. Its memory is as the exporter left it until the taker is done with it, for which
/// `keeps` cares.
pub(crate) fn give(
    py: Python<'_>,
    view: &View,
    place: Place,
    keeps: Box<dyn Send>,
) -> PyResult<Py<PyAny>> {
    let numbers = |from: &[u64]| from.iter().map(|n| *n as i64).collect::<Vec<_>>();
    let (shape, strides) = (numbers(view.shape()), numbers(view.strides()));
    let tensor = Description {
        data: place.address as *mut c_void,
        device: place.device,
        ordinal: place.ordinal,
        dimensions: shape.len() as i32,
        code: view.element().code,
        bits: view.element().bytes * 8,
        lanes: 1,
        shape: null(),
        strides: null(),
        byte_offset: 0,
    };
    let managed = Managed { tensor, context: null_mut(), deleter: Some(release) };
    let given = Box::into_raw(Box::new(Given { managed, shape, strides, _keeps: keeps }));
    // SAFETY: just made; the vectors do not move while it lives.
    unsafe {
        (*given).managed.tensor.shape = (*given).shape.as_ptr();
        (*given).managed.tensor.strides = (*given).strides.as_ptr();
    }
    // SAFETY: a pointer that is not null, a name that lives for ever, and a destructor for such capsules.
    let capsule = unsafe { ffi::PyCapsule_New(given.cast(), NAME.as_ptr(), Some(drop_capsule)) };
    if capsule.is_null() {
        // SAFETY: nobody else has it.
        unsafe { release(given.cast()) };
        return Err(PyErr::take(py).unwrap_or_else(|| PyBufferError::new_err("no capsule")));
    }
    // SAFETY: a new reference.
    Ok(unsafe { Bound::from_owned_ptr(py, capsule) }.unbind())
}

/// The taker, or nobody, is done with it.
unsafe extern "C" fn release(managed: *mut Managed) {
    // SAFETY: made in `give`, of which it is the first field; DLPack calls this once.
    drop(unsafe { Box::from_raw(managed.cast::<Given>()) });
}

/// A capsule that was taken has another name, and is the taker's.
unsafe extern "C" fn drop_capsule(capsule: *mut PyObject) {
    // SAFETY: Python calls it with the capsule.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            release(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}
