//! The library's errors as Python exceptions.
//!
//! Invariant: every message names the call, the argument where there is one, what was expected and
//! what came. The classes are Python's, in `peerlane/errors.py`, and are looked up only when one is
//! raised.

use peerlane::Error;
use peerlane::channel::Fault;
use peerlane::transfer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyModule, PyType};
use std::fmt::Display;

/// The exception for an error of the library.
#[cold]
pub(crate) fn raise(py: Python<'_>, error: Error) -> PyErr {
    let class = match &error {
        Error::InvalidArgument { .. } => return PyValueError::new_err(error.to_string()),
        Error::Mismatch { .. } => "MismatchError",
        Error::Unsupported { .. } => "UnsupportedError",
        Error::NoDriver { .. } => "NoDriverError",
        Error::Driver { .. } => "DriverError",
        Error::Unreachable { .. } => "UnreachableError",
        Error::Timeout { .. } => "DeadlineError",
        Error::Aborted { .. } | Error::Stopped { .. } => "AbortedError",
        Error::PeerLost { .. } => "PeerLostError",
        Error::Corrupt { .. } => "CorruptError",
        Error::Rendezvous { .. } => "RendezvousError",
        Error::Closed { .. } => "ClosedError",
        Error::Channel { fault, .. } => match fault {
            Fault::Timeout { .. } => "DeadlineError",
            Fault::Died { .. } => "PeerLostError",
            Fault::Closed { .. } => "ClosedError",
            Fault::Poisoned { .. } => "AbortedError",
            Fault::Corrupt { .. } => "CorruptError",
            _ => "Error",
        },
        Error::Transfer { fault } => match fault {
            transfer::Fault::Stale { .. } | transfer::Fault::Gone { .. } => "ClosedError",
            transfer::Fault::Full { .. } | transfer::Fault::NoMemory(_) => "UnsupportedError",
            transfer::Fault::Corrupt { .. } => "CorruptError",
            _ => "Error",
        },
        _ => "Error",
    };
    instance(py, class, error.to_string())
}

/// An exception of the base class, for what has no class of its own.
#[cold]
pub(crate) fn other(py: Python<'_>, reason: impl Display) -> PyErr {
    instance(py, "Error", reason.to_string())
}

/// A call on something that was closed.
#[cold]
pub(crate) fn closed(py: Python<'_>, call: &str) -> PyErr {
    instance(py, "ClosedError", format!("{call}: it was closed"))
}

fn instance(py: Python<'_>, class: &str, message: String) -> PyErr {
    static ERRORS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let found = ERRORS
        .get_or_try_init(py, || py.import("peerlane.errors").map(Bound::unbind))
        .and_then(|errors| errors.bind(py).getattr(class))
        .and_then(|class| Ok(class.cast_into::<PyType>()?));
    match found {
        Ok(class) => PyErr::from_type(class, (message,)),
        Err(missing) => missing,
    }
}

/// A `ValueError`: the right kind of object that says something the call cannot work with.
#[cold]
pub(crate) fn value(
    call: &str,
    argument: &str,
    expected: impl Display,
    got: impl Display,
) -> PyErr {
    PyValueError::new_err(format!("{call}: {argument}: expected {expected}, got {got}"))
}

/// A `TypeError`: the wrong kind of object.
#[cold]
pub(crate) fn wrong_type(
    call: &str,
    argument: &str,
    expected: impl Display,
    got: impl Display,
) -> PyErr {
    PyTypeError::new_err(format!("{call}: {argument}: expected {expected}, got {got}"))
}

/// What an object of the wrong kind is called in a message.
pub(crate) fn kind(object: &Bound<'_, PyAny>) -> String {
    if object.is_none() {
        return "None".into();
    }
    object.get_type().fully_qualified_name().map_or_else(|_| "an object".into(), |n| n.to_string())
}

/// An object as it reads in Python, for messages about its value.
pub(crate) fn shown(object: &Bound<'_, PyAny>) -> String {
    object.repr().map_or_else(|_| kind(object), |text| text.to_string())
}
