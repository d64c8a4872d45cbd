//! `peerlane.PreparedAllReduce`: the call that inference makes a hundred times per token.
//!
//! Invariant: it is `Communicator.all_reduce` in place with the options given when it was made; what
//! is left out is reading them again. A call that fails is made once more if whoever made it says so.

use crate::collectives;
use crate::communicator::Communicator;
use crate::options::Given;
use peerlane::{ReduceOp, Wire};
use pyo3::prelude::*;

/// An all-reduce in place whose options are fixed.
#[pyclass(frozen, module = "peerlane")]
pub(crate) struct PreparedAllReduce {
    rank: Py<Communicator>,
    op: ReduceOp,
    wire: Wire,
    /// Is asked with the error whether to call again.
    retry: Option<Py<PyAny>>,
}

impl PreparedAllReduce {
    /// Calls `op` over `wire` on `rank`, and again after an error if `retry` says so.
    pub(crate) fn new(
        rank: Py<Communicator>,
        (op, wire): (ReduceOp, Wire),
        retry: Option<Py<PyAny>>,
    ) -> PreparedAllReduce {
        PreparedAllReduce { rank, op, wire, retry }
    }
}

#[pymethods]
impl PreparedAllReduce {
    /// `Communicator.all_reduce` of `tensor` on torch's current stream.
    #[pyo3(signature = (tensor, contribution=None), text_signature = "($self, tensor, contribution=True)")]
    fn run(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        contribution: Given<'_, '_>,
    ) -> PyResult<()> {
        let options = (self.op, self.wire);
        let call =
            || collectives::all_reduce_in_place(self.rank.get(), py, tensor, options, contribution);
        let outcome = call();
        let (Err(error), Some(retry)) = (&outcome, &self.retry) else { return outcome };
        if retry.call1(py, (error.value(py),))?.is_truthy(py)? { call() } else { outcome }
    }
}
