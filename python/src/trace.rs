//! `peerlane.trace`: spans of a program's own beside the library's.
//!
//! Invariant: a span that nobody records costs a look and nothing else, and one that is recorded changes nothing of what happens
//! inside it, exceptions included.

use crate::error;
use peerlane::trace::{self, Value};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

type Arguments = BTreeMap<Cow<'static, str>, Value>;

/// Something that takes time, for `with`.
#[pyclass(frozen, module = "peerlane.trace")]
pub(crate) struct Span {
    name: String,
    args: Arguments,
    /// When it began; 0: nobody records.
    begin: AtomicU64,
}

#[pymethods]
impl Span {
    #[new]
    #[pyo3(signature = (name, /, **args))]
    fn new(name: String, args: Option<&Bound<'_, PyDict>>) -> PyResult<Span> {
        Ok(Span { name, args: arguments(args)?, begin: AtomicU64::new(0) })
    }

    fn __enter__(this: Py<Span>) -> Py<Span> {
        let begin = if trace::is_recording() { trace::now() } else { 0 };
        this.get().begin.store(begin, Ordering::Relaxed);
        this
    }

    #[pyo3(signature = (*_why))]
    fn __exit__(&self, _why: &Bound<'_, PyAny>) -> bool {
        let begin = self.begin.swap(0, Ordering::Relaxed);
        if begin != 0 {
            trace::finish(self.name.clone(), begin, self.args.clone());
        }
        false
    }
}

/// A span's arguments: numbers of 0 or more as they are, all else as text.
fn arguments(given: Option<&Bound<'_, PyDict>>) -> PyResult<Arguments> {
    let Some(given) = given.filter(|_| trace::is_recording()) else { return Ok(Arguments::new()) };
    let mut found = Arguments::new();
    for (key, value) in given {
        let number = value.extract::<u64>().ok().filter(|_| value.is_instance_of::<PyInt>());
        // What a program says in a trace never fails it: nothing is raised that would not be raised untraced.
        let value = match number {
            Some(number) => Value::from(number),
            None => Value::from(value.str().map_or_else(|_| "?".into(), |text| text.to_string())),
        };
        found.insert(Cow::Owned(key.extract()?), value);
    }
    Ok(found)
}

/// Records into a new file in a directory until the process ends.
#[pyfunction]
pub(crate) fn trace_start(py: Python<'_>, directory: PathBuf) -> PyResult<()> {
    py.detach(|| trace::start(&directory)).map_err(|e| error::raise(py, e))
}

/// Writes what has been recorded until now.
#[pyfunction]
pub(crate) fn trace_flush(py: Python<'_>) {
    py.detach(trace::flush);
}

/// Whether this process records.
#[pyfunction]
pub(crate) fn trace_is_recording() -> bool {
    trace::is_recording()
}
