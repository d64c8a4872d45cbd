//! `peerlane.TensorExporter` and `peerlane.TensorImporter`: tensors between processes, without a copy on the importer's side.
//!
//! Invariant: an exporter's lock is taken only without the interpreter's. Objects of tensors that are kept by name are kept as
//! long, so that Python gives none of their identities away.

use crate::device::Device;
use crate::dlpack;
use crate::error;
use crate::options::{self, Given};
use peerlane::Error;
use peerlane::transfer::{Descriptor, Exporter, Importer, Limits, Mapped, View};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The side that exports.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct TensorExporter {
    arena: Mutex<Option<Exporter>>,
    handle: String,
    kept: Mutex<HashMap<u64, Py<PyAny>>>,
}

impl TensorExporter {
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        call: &'static str,
        action: impl FnOnce(&mut Exporter) -> peerlane::Result<R> + Send,
    ) -> PyResult<R> {
        let done = py.detach(|| {
            // Every change of an arena is whole before it can panic.
            let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
            arena.as_mut().map(action)
        });
        let Some(done) = done else { return Err(error::closed(py, call)) };
        done.map_err(|e| error::raise(py, e))
    }
}

#[pymethods]
impl TensorExporter {
    #[new]
    #[pyo3(signature = (*, least=None, most=None, named=None, checksums=false))]
    fn new(
        py: Python<'_>,
        least: Given<'_, '_>,
        most: Given<'_, '_>,
        named: Given<'_, '_>,
        checksums: bool,
    ) -> PyResult<TensorExporter> {
        const CALL: &str = "transfer create";
        let bytes = |argument, given: Given<'_, '_>, usual| {
            given.map_or(Ok(usual), |given| options::whole(CALL, argument, given).map(|n| n as u64))
        };
        let usual = Limits::default();
        let limits = Limits {
            least: bytes("least", least, usual.least)?,
            most: bytes("most", most, usual.most)?,
            named: bytes("named", named, usual.named)?,
            checksums,
        };
        let arena = py.detach(|| Exporter::create(limits)).map_err(|e| error::raise(py, e))?;
        let handle = arena.handle();
        Ok(TensorExporter { arena: Mutex::new(Some(arena)), handle, kept: Mutex::default() })
    }

    /// The text by which importers open it.
    #[getter]
    fn handle(&self) -> &str {
        &self.handle
    }

    /// Copies a tensor into the arena; returns its descriptor.
    #[pyo3(signature = (tensor, *, name=None, owner=None))]
    fn export<'py>(
        &self,
        py: Python<'py>,
        tensor: &Bound<'py, PyAny>,
        name: Option<u64>,
        owner: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        const CALL: &str = "transfer export";
        let read = dlpack::Read::of(CALL, tensor)?;
        let (element, shape) = (read.element, read.shape);
        let mut room = Vec::new();
        let payload = read.bytes(&mut room);
        let exported = self.with(py, CALL, |arena| match name {
            None => arena.export(payload, element, shape).map(|made| (made, true)),
            Some(name) => {
                let made = arena.export_named(name, payload, element, shape)?;
                Ok((made, arena.named(name).is_some()))
            }
        })?;
        if let (Some(name), (_, true)) = (name, &exported) {
            self.keep(py, name, owner.unwrap_or(tensor))?;
        }
        Ok(written(py, &exported.0))
    }

    /// The descriptor of the tensor that is kept under a name.
    fn find<'py>(&self, py: Python<'py>, name: u64) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let found = self.with(py, "transfer find", |arena| Ok(arena.named(name)))?;
        Ok(found.map(|descriptor| written(py, &descriptor)))
    }

    /// Gives up everything exported so far but what has a name.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, "transfer clear", |arena| {
            arena.clear();
            Ok(())
        })
    }

    /// What the arena has and has had, in bytes and segments.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let usage = self.with(py, "transfer usage", |arena| Ok(arena.usage()))?;
        let facts = PyDict::new(py);
        facts.set_item("reserved", usage.reserved)?;
        facts.set_item("used", usage.used)?;
        facts.set_item("peak", usage.peak)?;
        facts.set_item("named", usage.named)?;
        facts.set_item("segments", usage.segments)?;
        Ok(facts)
    }

    /// Ends it. Views stay as they are.
    fn close(&self, py: Python<'_>) {
        let arena = py.detach(|| self.arena.lock().unwrap_or_else(PoisonError::into_inner).take());
        drop(arena);
        let kept = std::mem::take(&mut *self.kept());
        // Without the lock: they may end, and run anything.
        drop(kept);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }
}

impl TensorExporter {
    /// Keeps the object of a tensor that is kept by name, and lets those go that are not any more.
    fn keep(&self, py: Python<'_>, name: u64, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut kept = self.kept();
        if kept.get(&name).is_some_and(|object| object.is(tensor)) {
            return Ok(());
        }
        let replaced = kept.insert(name, tensor.clone().unbind());
        let names: Vec<u64> = kept.keys().copied().collect();
        drop(kept);
        // From here on without the lock: objects may end, and run anything.
        drop(replaced);
        let gone = self.with(py, "transfer export", |arena| {
            Ok(names.into_iter().filter(|name| arena.named(*name).is_none()).collect::<Vec<_>>())
        })?;
        let mut kept = self.kept();
        let objects: Vec<_> = gone.iter().filter_map(|name| kept.remove(name)).collect();
        drop(kept);
        drop(objects);
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<u64, Py<PyAny>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn written<'py>(py: Python<'py>, descriptor: &Descriptor) -> Bound<'py, PyBytes> {
    let mut bytes = Vec::with_capacity(128);
    descriptor.write(&mut bytes);
    PyBytes::new(py, &bytes)
}

/// The side that imports.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct TensorImporter {
    importer: Importer,
}

#[pymethods]
impl TensorImporter {
    #[new]
    fn new(py: Python<'_>, handle: &str, index: u32) -> PyResult<TensorImporter> {
        let importer = Importer::open(handle, index).map_err(|e| error::raise(py, e))?;
        Ok(TensorImporter { importer })
    }

    /// The tensor of a descriptor, where it is.
    #[pyo3(name = "import_")]
    fn import(&self, py: Python<'_>, descriptor: &[u8]) -> PyResult<TensorView> {
        let read = Descriptor::read(descriptor).map_err(Error::from);
        let view = read.and_then(|descriptor| self.importer.import(&descriptor));
        Ok(TensorView { view: view.map_err(|e| error::raise(py, e))? })
    }
}

/// That a taker asks for neither a copy nor another device.
fn as_it_is(copy: Option<bool>, wanted: Option<(i32, i32)>, own: (i32, i32)) -> PyResult<()> {
    if copy == Some(true) || wanted.is_some_and(|device| device != own) {
        let expected =
            "__dlpack__: expected to give this memory as it is, got copy=True or another device";
        return Err(PyBufferError::new_err(expected));
    }
    Ok(())
}

/// A tensor in an exporter's memory.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct TensorView {
    view: View,
}

#[pymethods]
impl TensorView {
    /// Its sizes.
    #[getter]
    fn shape(&self) -> Vec<u64> {
        self.view.shape().to_vec()
    }

    /// Its bytes, without gaps.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.view.bytes()
    }

    /// The part of it with the indices from first to before last in dimension dim.
    fn narrow(&self, py: Python<'_>, dim: usize, first: u64, last: u64) -> PyResult<TensorView> {
        let view = self.view.clone().narrow(dim, first..last);
        Ok(TensorView { view: view.map_err(|e| error::raise(py, e))? })
    }

    /// For from_dlpack of numpy, torch and others.
    #[pyo3(signature = (stream=None, *, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Given<'_, '_>,
        max_version: Given<'_, '_>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        // A capsule of version 0, which every version takes; and host memory has no streams.
        let _ = (stream, max_version);
        as_it_is(copy, dl_device, (dlpack::HOST, 0))?;
        let address = self.view.as_ptr().addr() as u64;
        let place = dlpack::Place { address, device: dlpack::HOST, ordinal: 0 };
        dlpack::give(py, &self.view, place, Box::new(self.view.clone()))
    }

    /// Host memory.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::HOST, 0)
    }

    /// The same for a GPU, which reads it where it lies. Pins its pages.
    fn map(&self, py: Python<'_>, device: &Bound<'_, PyAny>) -> PyResult<MappedTensor> {
        let Device { gpu, name, machine } = Device::open("TensorView.map", "device", device)?;
        let ordinal = machine.is_none().then(|| gpu.properties().ordinal);
        let view = self.view.clone();
        let mapped = py.detach(|| Mapped::new(view, gpu)).map_err(|e| error::raise(py, e))?;
        Ok(MappedTensor { kept: Arc::new(Kept(Some(mapped))), name, ordinal })
    }
}

/// A mapping whose end waits for the GPU without the interpreter's lock: a peer for which that GPU waits may need it.
struct Kept(Option<Mapped>);

impl Kept {
    fn mapped(&self) -> &Mapped {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mapped = &mut self.0;
        // Without an interpreter to attach to, it is dropped as the field that it is.
        Python::try_attach(|py| py.detach(|| drop(mapped.take())));
    }
}

/// A tensor in an exporter's memory that a GPU reads.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct MappedTensor {
    kept: Arc<Kept>,
    name: String,
    /// A real GPU's.
    ordinal: Option<u32>,
}

#[pymethods]
impl MappedTensor {
    /// The GPU.
    #[getter]
    fn device(&self) -> &str {
        &self.name
    }

    /// Where the GPU finds its first element.
    #[getter]
    fn data_ptr(&self) -> u64 {
        self.kept.mapped().device_ptr().0
    }

    /// For from_dlpack of torch and others. What is made of it is only to be read.
    #[pyo3(signature = (stream=None, *, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Given<'_, '_>,
        max_version: Given<'_, '_>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        // Nothing was queued that a stream could wait for.
        let _ = (stream, max_version);
        let own = self.__dlpack_device__()?;
        as_it_is(copy, dl_device, own)?;
        let place = dlpack::Place { address: self.data_ptr(), device: own.0, ordinal: own.1 };
        dlpack::give(py, self.kept.mapped().view(), place, Box::new(self.kept.clone()))
    }

    /// Its GPU's.
    fn __dlpack_device__(&self) -> PyResult<(i32, i32)> {
        let Some(ordinal) = self.ordinal else {
            let refusal = format!("{}: DLPack has no simulated GPUs", self.name);
            return Err(PyBufferError::new_err(refusal));
        };
        Ok((dlpack::CUDA, ordinal as i32))
    }
}
