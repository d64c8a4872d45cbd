//! `peerlane.Registration`: a tensor that all ranks reach, as a Python object.
//!
//! Invariant: the tensor is referred to until it is deregistered or its communicator is closed: by its [`Registration`],
//! and by the communicator if that goes first.

use crate::collectives::Reduction;
use crate::communicator::Communicator;
use crate::options::{self, Given};
use crate::tensor::{Need, Tensor};
use crate::{error, work};
use peerlane::{AllReduceRegistered, DType};
use pyo3::prelude::*;
use std::sync::Mutex;

/// A tensor of each rank that all ranks reach.
#[pyclass(frozen, weakref, module = "peerlane")]
pub(crate) struct Registration {
    rank: Py<Communicator>,
    inner: peerlane::Registration,
    /// Empty once it is deregistered.
    tensor: Mutex<Option<Py<PyAny>>>,
}

#[pymethods]
impl Registration {
    /// Bytes of each rank's tensor.
    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.bytes()
    }

    fn __repr__(&self) -> String {
        let (bytes, rank) = (self.inner.bytes(), self.rank.get().number());
        format!("<peerlane.Registration of {bytes} bytes of rank {rank}>")
    }
}

impl Registration {
    fn new(
        rank: &Bound<'_, Communicator>,
        inner: peerlane::Registration,
        tensor: &Bound<'_, PyAny>,
    ) -> Registration {
        let tensor = Mutex::new(Some(tensor.clone().unbind()));
        Registration { rank: rank.clone().unbind(), inner, tensor }
    }

    fn forget(&self) {
        // After the lock is free: a tensor's end may run any code.
        let tensor = work::lock(&self.tensor).take();
        drop(tensor);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let tensor = work::lock(&self.tensor).take();
        if let Some(tensor) = tensor {
            self.rank.get().kept.keep(None, vec![tensor]);
        }
    }
}

/// Registers one rank's tensor together with all others.
pub(crate) fn register(
    rank: &Bound<'_, Communicator>,
    tensor: &Bound<'_, PyAny>,
) -> PyResult<Registration> {
    const CALL: &str = "register";
    let (py, own) = (rank.py(), rank.get());
    let read = Tensor::read_writable(&own.place(CALL, "tensor"), tensor, Need::Bytes)?;
    let (at, bytes) = (read.at(), read.bytes());
    // SAFETY: the tensor is kept until it is deregistered or the communicator is closed.
    let made = own.waiting(py, CALL, |rank| unsafe { rank.register(at, bytes) })?;
    Ok(Registration::new(rank, made, tensor))
}

/// Ends a registration together with all other ranks.
pub(crate) fn deregister(
    rank: &Communicator,
    py: Python<'_>,
    ended: &Registration,
) -> PyResult<()> {
    rank.waiting(py, "deregister", |rank| rank.deregister(&ended.inner))?;
    ended.forget();
    Ok(())
}

/// Registers the tensors of all ranks of one thread.
pub(crate) fn register_all(
    py: Python<'_>,
    ranks: &[Bound<'_, Communicator>],
    tensors: &[Bound<'_, PyAny>],
) -> PyResult<Vec<Registration>> {
    const CALL: &str = "register_all";
    let read = |(rank, tensor): (&Bound<'_, Communicator>, &Bound<'_, PyAny>)| {
        let place = rank.get().place(CALL, "tensors");
        let tensor = Tensor::read_writable(&place, tensor, Need::Bytes)?;
        Ok((tensor.at(), tensor.bytes()))
    };
    same_number(CALL, "tensors", ranks, tensors.len())?;
    let places = ranks.iter().zip(tensors).map(read).collect::<PyResult<Vec<_>>>()?;
    let owners: Vec<_> = ranks.iter().map(|rank| rank.get()).collect();
    let made = Communicator::waiting_all(py, CALL, &owners, |ranks| {
        // SAFETY: as in `register`.
        unsafe { peerlane::Communicator::register_all(ranks, &places) }
    })?;
    let all = ranks.iter().zip(made).zip(tensors);
    Ok(all.map(|((rank, made), tensor)| Registration::new(rank, made, tensor)).collect())
}

/// Ends the registrations of all ranks of one thread.
pub(crate) fn deregister_all(
    py: Python<'_>,
    ranks: &[Bound<'_, Communicator>],
    ended: &[Bound<'_, Registration>],
) -> PyResult<()> {
    const CALL: &str = "deregister_all";
    same_number(CALL, "registrations", ranks, ended.len())?;
    let all: Vec<_> = ended.iter().map(|one| one.get().inner.clone()).collect();
    let owners: Vec<_> = ranks.iter().map(|rank| rank.get()).collect();
    Communicator::waiting_all(py, CALL, &owners, |ranks| {
        peerlane::Communicator::deregister_all(ranks, &all)
    })?;
    ended.iter().for_each(|one| one.get().forget());
    Ok(())
}

fn same_number(
    call: &str,
    argument: &str,
    ranks: &[Bound<'_, Communicator>],
    got: usize,
) -> PyResult<()> {
    if got == ranks.len() {
        return Ok(());
    }
    Err(error::value(call, argument, format!("{}, one a rank", ranks.len()), got))
}

/// An all-reduce of a registered tensor, or of a part of it, in place.
pub(crate) fn all_reduce(
    rank: &Communicator,
    py: Python<'_>,
    tensor: &Bound<'_, PyAny>,
    registration: &Bound<'_, PyAny>,
    how: &Reduction<'_, '_>,
    stream: Given<'_, '_>,
) -> PyResult<()> {
    const CALL: &str = "all_reduce";
    let wrong = |_| {
        error::wrong_type(
            CALL,
            "registration",
            "a peerlane.Registration",
            error::kind(registration),
        )
    };
    let registration = registration.cast::<Registration>().map_err(wrong)?.get();
    let need = Need::Elements(options::dtype(CALL, how.dtype)?);
    let part = Tensor::read_writable(&rank.place(CALL, "tensor"), tensor, need)?;
    let (whole, bytes) = (registration.inner.tensor(), registration.inner.bytes() as u64);
    let offset = part.address.wrapping_sub(whole.0);
    if offset > bytes || part.bytes() as u64 > bytes - offset {
        let expected = format!("the registered {bytes} bytes at {:#x}, or a part of them", whole.0);
        let got = format!("{} bytes at {:#x}", part.bytes(), part.address);
        return Err(error::value(CALL, "tensor", expected, got));
    }
    let request = AllReduceRegistered {
        offset: offset as usize,
        count: part.count,
        dtype: part.dtype.unwrap_or(DType::F32),
        op: options::reduce_op(CALL, how.op)?,
        wire: options::wire(CALL, how.wire)?,
        contribution: options::contribution(CALL, how.contribution)?,
    };
    let stream = rank.stream(py, CALL, stream, part.stream)?;
    // SAFETY: the tensor lies in the registration, which keeps it.
    rank.queue(py, CALL, |rank| unsafe {
        rank.all_reduce_registered(&registration.inner, &request, stream)
    })
}
