//! `peerlane.PreparedAllReduce`: the call that inference makes a hundred times per token.
//!
//! Invariant: it is `Communicator.all_reduce` in place with the options given when it was made; what
//! is left out is reading them again.

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
}

impl PreparedAllReduce {
    /// Calls `op` over `wire` on `rank`.
    pub(crate) fn new(rank: Py<Communicator>, op: ReduceOp, wire: Wire) -> PreparedAllReduce {
        PreparedAllReduce { rank, op, wire }
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
        collectives::all_reduce_in_place(
            self.rank.get(),
            py,
            tensor,
            (self.op, self.wire),
            contribution,
        )
    }
}
