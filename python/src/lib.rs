//! The extension module `peerlane._peerlane`: Peerlane's communicator for Python.
//!
//! Invariant: importing it touches no driver, no torch and no numpy; each is looked for when a call
//! first needs it. Nothing here decides anything about a collective: it reads what the Python
//! objects say about their memory, checks it, and hands it to the library.

mod arrays;
mod beside;
mod channel;
mod collectives;
mod communicator;
mod device;
mod dlpack;
mod error;
mod exchange;
mod memory;
mod options;
mod prepared;
mod registration;
mod tensor;
mod torch;
mod trace;
mod transfer;
mod work;
mod workers;

use pyo3::prelude::*;

/// The collectives' extension module; `peerlane/__init__.py` is its public face.
#[pymodule]
mod _peerlane {
    #[pymodule_export]
    use crate::channel::{ChannelMessage, ChannelReader, ChannelWriter};
    #[pymodule_export]
    use crate::communicator::Communicator;
    #[pymodule_export]
    use crate::prepared::PreparedAllReduce;
    #[pymodule_export]
    use crate::registration::Registration;
    #[pymodule_export]
    use crate::trace::{Span, trace_flush, trace_is_recording, trace_start};
    #[pymodule_export]
    use crate::transfer::{MappedTensor, TensorExporter, TensorImporter, TensorView};
    #[pymodule_export]
    use crate::work::{Event, Work};
    #[pymodule_export]
    use crate::workers::{WorkList, Workers};

    use crate::device::Device;
    use crate::error;
    use peerlane::selftest::{Program, serve, set_program};
    use peerlane::topology::Topology;
    use pyo3::prelude::*;
    use std::ffi::OsString;
    use std::path::PathBuf;

    /// Records from now on if the environment says so.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        peerlane::trace::start_from_environment();
        Ok(())
    }

    /// The version of the library.
    #[pyfunction]
    fn version() -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    /// Names the interpreter that may run peerlane.selftest, and the directory that holds the package. An
    /// interpreter that is part of another program is no such thing.
    #[pyfunction]
    fn _set_self_test_program(executable: Option<PathBuf>, directory: PathBuf) {
        let is_python = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().contains("python"))
        };
        if let Some(path) = executable.filter(is_python) {
            let arguments = ["-m", "peerlane.selftest"].map(OsString::from).to_vec();
            set_program(Program { path, arguments, directory: Some(directory) });
        }
    }

    /// Is the process that tests the GPUs for another; whether it made a report.
    #[pyfunction]
    fn _serve_self_test(py: Python<'_>) -> bool {
        py.detach(serve)
    }

    /// The GPUs, or all real ones, and how they reach each other.
    #[pyfunction]
    #[pyo3(signature = (devices=None))]
    fn topology<'py>(
        py: Python<'py>,
        devices: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let found = match devices {
            None => py.detach(peerlane::gpu::cuda::devices).map_err(|e| error::raise(py, e))?,
            Some(list) => {
                Device::open_all("topology", list)?.into_iter().map(|device| device.gpu).collect()
            }
        };
        let facts = py.detach(|| Topology::discover(&found)).map_err(|e| error::raise(py, e))?;
        let text = serde_json::to_string(&facts).map_err(|e| error::other(py, e))?;
        py.import("json")?.call_method1("loads", (text,))
    }
}
