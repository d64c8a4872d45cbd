//! The collectives for C: arguments in, the communicator's call out.
//!
//! Invariant: nothing is decided here. What C brought is looked up and passed on; all checks of
//! sizes, addresses and ranks are the communicator's.

use super::arguments::{device, items, present, stream};
use super::comm::peerlane_comm;
use super::status::{guard, peerlane_status};
use super::types::{
    dtype, peerlane_broadcast_options, peerlane_dtype, peerlane_op, peerlane_reduce_options,
    reduce_op,
};
use crate::error::Result;
use crate::request::{AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Reduces `count` elements of all ranks into every rank's `dst`. `src` and `dst` are aligned to
/// the element; they may be the same. `options` may be NULL.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_all_reduce(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    stream: *mut c_void,
) -> peerlane_status {
    guard("all_reduce", |name| {
        // SAFETY: the header asks for a handle, for options or NULL, and of tensors and stream what
        // the communicator asks.
        unsafe {
            let comm = present(name, "comm", comm)?;
            let call = all_reduce_request(name, src, dst, count, dtype, op, options)?;
            comm.alone().all_reduce(&call, self::stream(stream))
        }
    })
}

/// An all-reduce's arguments, looked up.
///
/// # Safety
/// `options` is NULL or leads to options as large as they say.
pub(super) unsafe fn all_reduce_request(
    name: &'static str,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
) -> Result<AllReduce> {
    // SAFETY: the caller's contract.
    let options = unsafe { peerlane_reduce_options::read(name, options)? };
    Ok(AllReduce {
        src: device(src),
        dst: device(dst),
        count,
        dtype: self::dtype(name, dtype)?,
        op: reduce_op(name, op)?,
        wire: options.wire,
        contribution: options.contribution,
        algorithm: options.algorithm,
    })
}

/// Reduces world size x `count` elements of all ranks; rank r's `dst` gets the r-th part, `count`
/// elements. `dst` may be this rank's own part of `src`. `options` may be NULL.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_reduce_scatter(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    stream: *mut c_void,
) -> peerlane_status {
    guard("reduce_scatter", |name| {
        // SAFETY: the header asks for a handle, for options or NULL, and of tensors and stream what
        // the communicator asks.
        unsafe {
            let comm = present(name, "comm", comm)?;
            let call = reduce_scatter_request(name, src, dst, count, dtype, op, options)?;
            comm.alone().reduce_scatter(&call, self::stream(stream))
        }
    })
}

/// A reduce-scatter's arguments, looked up.
///
/// # Safety
/// `options` is NULL or leads to options as large as they say.
pub(super) unsafe fn reduce_scatter_request(
    name: &'static str,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
) -> Result<ReduceScatter> {
    // SAFETY: the caller's contract.
    let options = unsafe { peerlane_reduce_options::read(name, options)? };
    let options = options.without_algorithm(name)?;
    Ok(ReduceScatter {
        src: device(src),
        dst: device(dst),
        count,
        dtype: self::dtype(name, dtype)?,
        op: reduce_op(name, op)?,
        wire: options.wire,
        contribution: options.contribution,
    })
}

/// Copies every rank's `bytes` bytes to every rank's `dst`, in rank order: world size x `bytes`
/// bytes. `src` may be this rank's part of `dst`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_all_gather(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> peerlane_status {
    guard("all_gather", |op| {
        // SAFETY: the header asks for a handle.
        let comm = unsafe { present(op, "comm", comm)? };
        let call = AllGather { src: device(src), dst: device(dst), bytes };
        // SAFETY: the header asks of tensors and stream what the communicator asks.
        unsafe { comm.alone().all_gather(&call, self::stream(stream)) }
    })
}

/// Copies the root's `bytes` bytes to every rank's `data`. `options` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_broadcast(
    comm: *mut peerlane_comm,
    data: *mut c_void,
    bytes: usize,
    root: u32,
    options: *const peerlane_broadcast_options,
    stream: *mut c_void,
) -> peerlane_status {
    guard("broadcast", |op| {
        // SAFETY: the header asks for a handle, for options or NULL, and of tensors and stream what
        // the communicator asks.
        unsafe {
            let comm = present(op, "comm", comm)?;
            let call = broadcast_request(op, data, bytes, root, options)?;
            comm.alone().broadcast(&call, self::stream(stream))
        }
    })
}

/// A broadcast's arguments, looked up.
///
/// # Safety
/// `options` is NULL or leads to options as large as they say.
pub(super) unsafe fn broadcast_request(
    op: &'static str,
    data: *mut c_void,
    bytes: usize,
    root: u32,
    options: *const peerlane_broadcast_options,
) -> Result<Broadcast> {
    // SAFETY: the caller's contract.
    let route = unsafe { peerlane_broadcast_options::read(op, options)? };
    Ok(Broadcast { route, ..Broadcast::new(device(data), bytes, root) })
}

/// Joins the ranks' tensors along their last dimension in the root's `dst`. Rank r brings `rows`
/// rows of `widths[r]` bytes in `src`; the root's `dst` has `rows` rows of all widths together, in
/// rank order. A rank whose width is 0 brings nothing and, unless it is the root, need not call.
/// `widths` are `width_count` = world size numbers. `dst` is used on the root only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gather(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    rows: usize,
    widths: *const usize,
    width_count: usize,
    root: u32,
    stream: *mut c_void,
) -> peerlane_status {
    guard("gather", |op| {
        // SAFETY: the header asks for a handle and for `width_count` numbers.
        let (comm, widths) =
            unsafe { (present(op, "comm", comm)?, items(op, "widths", widths, width_count)?) };
        let call = Gather { src: device(src), dst: device(dst), rows, widths, root };
        // SAFETY: the header asks of tensors and stream what the communicator asks.
        unsafe { comm.alone().gather(&call, self::stream(stream)) }
    })
}

/// Holds `stream` until every rank has queued its barrier and reached it. The host does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_barrier(
    comm: *mut peerlane_comm,
    stream: *mut c_void,
) -> peerlane_status {
    guard("barrier", |op| {
        // SAFETY: the header asks for a handle.
        let comm = unsafe { present(op, "comm", comm)? };
        comm.alone().barrier(self::stream(stream))
    })
}
