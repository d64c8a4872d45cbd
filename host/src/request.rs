//! What a caller asks of a communicator: one struct per collective.
//!
//! Sizes are in elements where the element type matters (reductions) and in bytes where it does
//! not. Every rank that takes part must bring the same sizes, types, root and options.

use crate::algorithm::{Algorithm, Route};
use crate::gpu::{DevicePtr, Event};
use peerlane_device::abi::{DType, ReduceOp, Wire};

/// Every rank ends with the reduction of all ranks' tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AllReduce {
    /// `count` elements to read, aligned to the element.
    pub src: DevicePtr,
    /// `count` elements to write, aligned to the element; `src` itself for in place.
    pub dst: DevicePtr,
    /// Elements in the tensor.
    pub count: usize,
    /// Element type.
    pub dtype: DType,
    /// How values are combined.
    pub op: ReduceOp,
    /// How f32 elements travel; other types always travel as they are.
    pub wire: Wire,
    /// `false`: this rank adds nothing (its `src` is not read) and still receives the result. An
    /// average still divides by the world size. The only field in which ranks may differ.
    pub contribution: bool,
    /// Overrides the plan's choice.
    pub algorithm: Option<Algorithm>,
}

impl AllReduce {
    /// Sums `count` elements in place.
    pub const fn in_place(tensor: DevicePtr, count: usize, dtype: DType) -> AllReduce {
        AllReduce {
            src: tensor,
            dst: tensor,
            count,
            dtype,
            op: ReduceOp::Sum,
            wire: Wire::Native,
            contribution: true,
            algorithm: None,
        }
    }
}

/// Every rank's registered tensor, or a part of it, ends as the reduction of all ranks', in place and without a
/// mailbox. The registration is a second argument of the call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AllReduceRegistered {
    /// Bytes of the registered tensors before the part: a multiple of 16, the same on every rank.
    pub offset: usize,
    /// Elements in the part.
    pub count: usize,
    /// Element type.
    pub dtype: DType,
    /// How values are combined.
    pub op: ReduceOp,
    /// How f32 elements are rounded, before they are combined and after. Over bf16, results have the bits of an
    /// [`AllReduce`] with this wire, but as many bytes travel as over native.
    pub wire: Wire,
    /// As in [`AllReduce::contribution`].
    pub contribution: bool,
}

impl AllReduceRegistered {
    /// Sums the first `count` elements.
    pub const fn new(count: usize, dtype: DType) -> AllReduceRegistered {
        AllReduceRegistered {
            offset: 0,
            count,
            dtype,
            op: ReduceOp::Sum,
            wire: Wire::Native,
            contribution: true,
        }
    }
}

/// A part of a tensor that becomes ready by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its first element.
    pub first: usize,
    /// Its elements: some rows, usually.
    pub count: usize,
    /// Recorded where the producer has finished it.
    pub ready: Event,
}

/// Rank r ends with the reduction of all ranks' r-th parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReduceScatter {
    /// `count` x world size elements to read.
    pub src: DevicePtr,
    /// `count` elements to write; may be this rank's own part of `src`.
    pub dst: DevicePtr,
    /// Elements in one part.
    pub count: usize,
    /// Element type.
    pub dtype: DType,
    /// How values are combined.
    pub op: ReduceOp,
    /// How f32 elements travel; other types always travel as they are.
    pub wire: Wire,
    /// As in [`AllReduce::contribution`].
    pub contribution: bool,
}

/// Every rank ends with all ranks' tensors, one after the other in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllGather {
    /// `bytes` bytes to read, with any alignment.
    pub src: DevicePtr,
    /// `bytes` x world size bytes to write, with any alignment; `src` may be this rank's part.
    pub dst: DevicePtr,
    /// Bytes that each rank brings.
    pub bytes: usize,
}

/// Every rank ends with the root's bytes, in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broadcast {
    /// `bytes` bytes to read (root) or write (others), with any alignment.
    pub data: DevicePtr,
    /// Size of the tensor.
    pub bytes: usize,
    /// The rank that has the data.
    pub root: u32,
    /// Overrides the plan's choice.
    pub route: Option<Route>,
}

impl Broadcast {
    /// Sends the root's `bytes` bytes to all ranks.
    pub const fn new(data: DevicePtr, bytes: usize, root: u32) -> Broadcast {
        Broadcast { data, bytes, root, route: None }
    }
}

/// The root ends with the members' tensors joined along their last dimension.
///
/// Only members and the root call it. Rank r brings a tensor of `rows` x `widths[r]` bytes; the
/// root writes one of `rows` x (sum of the members' widths), in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather<'a> {
    /// This rank's rows, contiguous, with any alignment. Not read where its width is 0.
    pub src: DevicePtr,
    /// The joined tensor. Used on the root only.
    pub dst: DevicePtr,
    /// Rows in every tensor.
    pub rows: usize,
    /// Bytes per row that each rank brings, by rank; 0 for a rank that brings nothing or that is
    /// no member. As many as there are ranks.
    pub widths: &'a [usize],
    /// The rank that receives. It may bring nothing.
    pub root: u32,
}
