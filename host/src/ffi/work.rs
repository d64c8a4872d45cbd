//! Calls beside the caller's stream, for C: the work that a call returns, and events for chunks.
//!
//! Invariant: a handle of a work outlives anything: its communicator and its GPU may be destroyed
//! before it. Freeing it neither ends the call nor waits for it, so the tensors are the caller's to keep.

use super::arguments::{device, items, place, present, stream};
use super::collectives::{all_reduce_request, broadcast_request, reduce_scatter_request};
use super::comm::peerlane_comm;
use super::gpu::peerlane_gpu;
use super::status::{guard, peerlane_status};
use super::types::{
    peerlane_broadcast_options, peerlane_dtype, peerlane_op, peerlane_reduce_options,
};
use crate::collectives::invalid;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::gpu::Event;
use crate::request::{AllGather, Chunk, Gather};
use crate::work::Work;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

/// An asynchronous call. It may outlive its communicator.
pub struct peerlane_work {
    work: Work,
}

impl peerlane_work {
    fn handle(work: Work) -> *mut peerlane_work {
        Box::into_raw(Box::new(peerlane_work { work }))
    }
}

/// A part of a tensor that becomes ready by itself.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct peerlane_chunk {
    /// Its first element.
    pub first_element: usize,
    /// Its elements: some rows, usually.
    pub count: usize,
    /// A CUevent (cudaEvent_t), or one of `peerlane_event_create`, recorded where the producer has
    /// finished it. Not NULL.
    pub ready: *mut c_void,
}

/// Makes an asynchronous call and puts its work into `work`, which is NULL unless it succeeds.
///
/// # Safety
/// `comm` is NULL or a handle, and `work` is NULL or leads to room for one.
unsafe fn begin(
    op: &'static str,
    comm: *mut peerlane_comm,
    work: *mut *mut peerlane_work,
    call: impl FnOnce(&mut Communicator) -> Result<Work>,
) -> Result<()> {
    // SAFETY: the caller's contract.
    let (work, comm) =
        unsafe { (place(op, "work", work, null_mut())?, present(op, "comm", comm)?) };
    *work = peerlane_work::handle(call(&mut comm.alone())?);
    Ok(())
}

/// `peerlane_all_reduce` beside `stream`: begins once `stream` has come to it, and runs on a stream
/// of the communicator's own while `stream` goes on. The tensors stay alive and untouched until the
/// work is done, whatever becomes of its handle. On failure *work is NULL.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_all_reduce_async(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    stream: *mut c_void,
    work: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("all_reduce_async", |name| {
        // SAFETY: the header asks for handles and room for one, for options or NULL, and of tensors
        // and stream what the communicator asks.
        unsafe {
            begin(name, comm, work, |comm| {
                let call = all_reduce_request(name, src, dst, count, dtype, op, options)?;
                comm.all_reduce_async(&call, self::stream(stream))
            })
        }
    })
}

/// `peerlane_reduce_scatter` beside `stream`, as `peerlane_all_reduce_async`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_reduce_scatter_async(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    stream: *mut c_void,
    work: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("reduce_scatter_async", |name| {
        // SAFETY: as in `peerlane_all_reduce_async`.
        unsafe {
            begin(name, comm, work, |comm| {
                let call = reduce_scatter_request(name, src, dst, count, dtype, op, options)?;
                comm.reduce_scatter_async(&call, self::stream(stream))
            })
        }
    })
}

/// `peerlane_all_gather` beside `stream`, as `peerlane_all_reduce_async`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_all_gather_async(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
    work: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("all_gather_async", |op| {
        let call = AllGather { src: device(src), dst: device(dst), bytes };
        // SAFETY: as in `peerlane_all_reduce_async`.
        unsafe { begin(op, comm, work, |comm| comm.all_gather_async(&call, self::stream(stream))) }
    })
}

/// `peerlane_broadcast` beside `stream`, as `peerlane_all_reduce_async`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_broadcast_async(
    comm: *mut peerlane_comm,
    data: *mut c_void,
    bytes: usize,
    root: u32,
    options: *const peerlane_broadcast_options,
    stream: *mut c_void,
    work: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("broadcast_async", |op| {
        // SAFETY: as in `peerlane_all_reduce_async`.
        unsafe {
            begin(op, comm, work, |comm| {
                let call = broadcast_request(op, data, bytes, root, options)?;
                comm.broadcast_async(&call, self::stream(stream))
            })
        }
    })
}

/// `peerlane_gather` beside `stream`, as `peerlane_all_reduce_async`. `widths` may be reused when the
/// call returns.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_gather_async(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    rows: usize,
    widths: *const usize,
    width_count: usize,
    root: u32,
    stream: *mut c_void,
    work: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("gather_async", |op| {
        // SAFETY: as in `peerlane_all_reduce_async`, and for `width_count` numbers.
        unsafe {
            begin(op, comm, work, |comm| {
                let widths = items(op, "widths", widths, width_count)?;
                let call = Gather { src: device(src), dst: device(dst), rows, widths, root };
                comm.gather_async(&call, self::stream(stream))
            })
        }
    })
}

/// Reduces a tensor in chunks as a producer finishes them: one all-reduce a chunk, in the order of
/// `chunks`, each once its event has come, on a stream of the communicator's own. All ranks bring
/// the same chunks; what no chunk names stays as it is. The events are recorded before the call is
/// made and stay until it returns. `works` has room for `chunk_count` handles, one a chunk. On failure
/// all of them are NULL, and chunks before the one that failed may have been queued: the tensors
/// stay until the communicator is closed.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_all_reduce_chunks(
    comm: *mut peerlane_comm,
    src: *const c_void,
    dst: *mut c_void,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    chunks: *const peerlane_chunk,
    chunk_count: usize,
    works: *mut *mut peerlane_work,
) -> peerlane_status {
    guard("all_reduce_chunks", |name| {
        // SAFETY: the header asks for `chunk_count` chunks, and a handle.
        let (chunks, comm) =
            unsafe { (items(name, "chunks", chunks, chunk_count)?, present(name, "comm", comm)?) };
        // SAFETY: the header asks for room for `chunk_count` handles.
        let places = (0..chunks.len()).map(|index| unsafe {
            let at = if works.is_null() { works } else { works.add(index) };
            place(name, "works", at, null_mut())
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        let chunks = chunks.iter().enumerate().map(|(index, chunk)| chunk.read(name, index));
        let chunks = chunks.collect::<Result<Vec<_>>>()?;
        // SAFETY: the header asks for options or NULL, and of tensors what the communicator asks.
        let works = unsafe {
            let call = all_reduce_request(name, src, dst, count, dtype, op, options)?;
            comm.alone().all_reduce_chunks(&call, &chunks)?
        };
        for (place, work) in places.into_iter().zip(works) {
            *place = peerlane_work::handle(work);
        }
        Ok(())
    })
}

impl peerlane_chunk {
    fn read(&self, op: &'static str, index: usize) -> Result<Chunk> {
        if self.ready.is_null() {
            let got = format!("NULL in chunk {index}");
            return Err(invalid(op, "chunks.ready", "an event".into(), got));
        }
        let ready = event(self.ready);
        Ok(Chunk { first: self.first_element, count: self.count, ready })
    }
}

/// Whether the call is done, well or not; `peerlane_work_wait` says which. Does not wait. An error if
/// the call was captured in a graph.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_work_query(
    work: *const peerlane_work,
    done: *mut bool,
) -> peerlane_status {
    guard("work_query", |op| {
        // SAFETY: the header asks for a handle, and room for the answer.
        let (work, done) = unsafe { (present(op, "work", work)?, place(op, "done", done, false)?) };
        *done = work.work.query()?;
        Ok(())
    })
}

/// Makes `stream`, one of the same GPU, wait for the call. The host does not wait. Inside a capture this
/// is how the call's stream is joined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_work_wait_on(
    work: *const peerlane_work,
    stream: *mut c_void,
) -> peerlane_status {
    guard("work_wait_on", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "work", work)? }.work.wait_on(self::stream(stream))
    })
}

/// Waits on the host until the call is done, and says whether it and all calls before it went well.
/// Says the same however often it is asked. An error if the call was captured in a graph.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_work_wait(work: *const peerlane_work) -> peerlane_status {
    guard("work_wait", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "work", work)? }.work.wait()
    })
}

/// Frees the handle; the call goes on if it is not done, and its tensors must stay until it is. Fine
/// with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_work_free(work: *mut peerlane_work) {
    if work.is_null() {
        return;
    }
    guard("work_free", |_| {
        // SAFETY: the header asks for a handle, which is not used again.
        drop(unsafe { Box::from_raw(work) });
        Ok(())
    });
}

/// Makes an event, for `peerlane_all_reduce_chunks`. Events of the CUDA runtime or of a framework do
/// just as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_event_create(
    gpu: *const peerlane_gpu,
    event: *mut *mut c_void,
) -> peerlane_status {
    guard("event_create", |op| {
        // SAFETY: the header asks for a handle, and room for an event.
        let (gpu, event) =
            unsafe { (present(op, "gpu", gpu)?, place(op, "event", event, null_mut())?) };
        *event = gpu.gpu.event_create()?.0 as *mut c_void;
        Ok(())
    })
}

/// Records an event of `peerlane_event_create` behind everything queued on `stream`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_event_record(
    gpu: *const peerlane_gpu,
    event: *mut c_void,
    stream: *mut c_void,
) -> peerlane_status {
    guard("event_record", |op| {
        // SAFETY: the header asks for a handle.
        let gpu = unsafe { present(op, "gpu", gpu)? };
        if event.is_null() {
            return Err(invalid(op, "event", "an event".into(), "NULL"));
        }
        gpu.gpu.event_record(self::event(event), self::stream(stream))
    })
}

/// Destroys an event of `peerlane_event_create`; what waits for its record still does. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_event_destroy(
    gpu: *const peerlane_gpu,
    event: *mut c_void,
) -> peerlane_status {
    guard("event_destroy", |op| {
        // SAFETY: the header asks for a handle.
        let gpu = unsafe { present(op, "gpu", gpu)? };
        if event.is_null() {
            return Ok(());
        }
        // SAFETY: the header asks for an event of ours that is not used again.
        unsafe { gpu.gpu.event_destroy(self::event(event)) }
    })
}

/// A `CUevent`.
fn event(pointer: *mut c_void) -> Event {
    Event(pointer as u64)
}
