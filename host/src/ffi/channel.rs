//! Channels, for C.
//!
//! Invariant: an end is behind a lock, so two threads that use it wait for each other; poisoning takes no lock, and so
//! ends a call that waits in another thread.

use super::arguments::{items, place, present, room, text};
use super::status::{guard, peerlane_status};
use crate::channel::{Info, Poisoner, Reader, Writer};
use crate::collectives::invalid;
use crate::error::Result;
use std::ffi::{CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The end of a channel that sends: one writer, up to 32 readers, a ring in shared memory.
pub struct peerlane_channel_writer {
    writer: Mutex<Writer>,
    poisoner: Poisoner,
    handle: CString,
}

/// The end of a channel that receives.
pub struct peerlane_channel_reader {
    reader: Mutex<Reader>,
    poisoner: Poisoner,
}

/// What stands before a payload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct peerlane_channel_message {
    /// Bytes of the payload.
    pub bytes: u64,
    /// Its number among all messages of the channel, counted from 1.
    pub sequence: u64,
    /// Whom it is for, a bit each.
    pub readers: u32,
    /// What the writer calls it.
    pub kind: u16,
    /// More of that.
    pub flags: u16,
}

/// All readers that are not forgotten, for `readers` of a message.
pub const PEERLANE_CHANNEL_EVERYBODY: u32 = 0xffff_ffff;

/// Makes a channel of `capacity` bytes, 4096 to 2^32, rounded up to a power of two, for `readers` readers, 1 to 32.
/// On failure *writer is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_create(
    capacity: u64,
    readers: u32,
    writer: *mut *mut peerlane_channel_writer,
) -> peerlane_status {
    guard("channel_create", |op| {
        // SAFETY: the header asks for room for a handle.
        let place = unsafe { place(op, "writer", writer, null_mut())? };
        let made = Writer::create(capacity, readers)?;
        let (poisoner, handle) = (made.poisoner(), made.handle());
        let handle = CString::new(handle).expect("a channel's handle holds no NUL");
        let writer = Mutex::new(made);
        *place = Box::into_raw(Box::new(peerlane_channel_writer { writer, poisoner, handle }));
        Ok(())
    })
}

/// The text by which a reader opens the channel, in any process of this user. Valid until the writer is closed; NULL
/// if NULL came.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_handle(
    writer: *const peerlane_channel_writer,
) -> *const c_char {
    // SAFETY: the header asks for a handle.
    unsafe { writer.as_ref() }.map_or(null(), |writer| writer.handle.as_ptr())
}

/// Opens the channel of `handle` as reader `index`, which nobody has done before. On failure *reader is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_open(
    handle: *const c_char,
    index: u32,
    reader: *mut *mut peerlane_channel_reader,
) -> peerlane_status {
    guard("channel_open", |op| {
        // SAFETY: the header asks for room for a handle, and for text.
        let (place, handle) =
            unsafe { (place(op, "reader", reader, null_mut())?, text(op, "handle", handle)?) };
        let opened = Reader::open(handle, index)?;
        let poisoner = opened.poisoner();
        let reader = Mutex::new(opened);
        *place = Box::into_raw(Box::new(peerlane_channel_reader { reader, poisoner }));
        Ok(())
    })
}

/// Sends a message of `bytes` bytes, and what was staged, to `readers`, a bit each. `kind` and `flags` are the caller's.
/// Waits for space for up to `timeout_ms` milliseconds; after PEERLANE_TIMEOUT nothing has changed. `sequence` may be
/// NULL.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "C has no better way to say it")]
pub unsafe extern "C" fn peerlane_channel_send(
    writer: *mut peerlane_channel_writer,
    readers: u32,
    kind: u16,
    flags: u16,
    payload: *const c_void,
    bytes: usize,
    timeout_ms: u64,
    sequence: *mut u64,
) -> peerlane_status {
    guard("channel_send", |op| {
        // SAFETY: the header asks for what `stage` asks for.
        let mut writer = unsafe {
            let message = (readers, (kind, flags), payload, bytes);
            stage(op, writer, message, timeout_ms, sequence)?
        };
        writer.publish();
        Ok(())
    })
}

/// As `peerlane_channel_send`, but readers see the message with the next publish or send.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as peerlane_channel_send")]
pub unsafe extern "C" fn peerlane_channel_stage(
    writer: *mut peerlane_channel_writer,
    readers: u32,
    kind: u16,
    flags: u16,
    payload: *const c_void,
    bytes: usize,
    timeout_ms: u64,
    sequence: *mut u64,
) -> peerlane_status {
    guard("channel_stage", |op| {
        // SAFETY: the header asks for what `stage` asks for.
        unsafe {
            let message = (readers, (kind, flags), payload, bytes);
            stage(op, writer, message, timeout_ms, sequence).map(drop)
        }
    })
}

/// Lets the readers see what was staged, with one wake-up at most for all of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_publish(
    writer: *mut peerlane_channel_writer,
) -> peerlane_status {
    guard("channel_publish", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { writing(op, writer)? }.publish();
        Ok(())
    })
}

/// Receives the next message into the `capacity` bytes at `payload`; waits for up to `timeout_ms` milliseconds, 0 for
/// none. A message that is larger is PEERLANE_INVALID_ARGUMENT: `message->bytes` says how large it is, and it stays the
/// next one. `message` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_recv(
    reader: *mut peerlane_channel_reader,
    payload: *mut c_void,
    capacity: usize,
    timeout_ms: u64,
    message: *mut peerlane_channel_message,
) -> peerlane_status {
    guard("channel_recv", |op| {
        // SAFETY: the header asks for a handle, and for room for a message or NULL.
        let (mut reader, message) = unsafe { (reading(op, reader)?, message.as_mut()) };
        let peek = reader.peek(Duration::from_millis(timeout_ms))?;
        let Info { kind, flags, length, sequence, readers, .. } = peek.info();
        let found = peerlane_channel_message { bytes: length, sequence, readers, kind, flags };
        message.into_iter().for_each(|place| *place = found);
        if length > capacity as u64 {
            let expected = format!("{length} bytes at least, as the next message has");
            return Err(invalid(op, "capacity", expected, capacity));
        }
        // SAFETY: the header asks for `capacity` bytes, which are at least as many.
        let payload = unsafe { room(op, "payload", payload, length as usize)? };
        peek.copy_to(payload)?;
        peek.accept();
        Ok(())
    })
}

/// For how many microseconds the writer's waits spin before they sleep; 20 unless told otherwise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_writer_set_spin(
    writer: *mut peerlane_channel_writer,
    spin_us: u64,
) -> peerlane_status {
    guard("channel_writer_set_spin", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { writing(op, writer)? }.set_spin(Duration::from_micros(spin_us));
        Ok(())
    })
}

/// As `peerlane_channel_writer_set_spin`, of a reader.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_reader_set_spin(
    reader: *mut peerlane_channel_reader,
    spin_us: u64,
) -> peerlane_status {
    guard("channel_reader_set_spin", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { reading(op, reader)? }.set_spin(Duration::from_micros(spin_us));
        Ok(())
    })
}

/// Goes on without a reader, dead or alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_forget(
    writer: *mut peerlane_channel_writer,
    reader: u32,
) -> peerlane_status {
    // SAFETY: the header asks for a handle.
    guard("channel_forget", |op| unsafe { writing(op, writer)? }.forget(reader))
}

/// Ends the channel at once, and every wait on every side, with PEERLANE_ABORTED. Any thread may call it, also while
/// another uses the writer. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_writer_poison(
    writer: *const peerlane_channel_writer,
    reason: u32,
) {
    // SAFETY: the header asks for a handle.
    unsafe { writer.as_ref() }.into_iter().for_each(|writer| writer.poisoner.poison(reason));
}

/// As `peerlane_channel_writer_poison`, by a reader.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_reader_poison(
    reader: *const peerlane_channel_reader,
    reason: u32,
) {
    // SAFETY: the header asks for a handle.
    unsafe { reader.as_ref() }.into_iter().for_each(|reader| reader.poisoner.poison(reason));
}

/// Closes the channel and frees the handle: readers receive what was sent before, then PEERLANE_CLOSED. No other call
/// may be using it. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_writer_close(writer: *mut peerlane_channel_writer) {
    // SAFETY: the header asks for a handle, which is not used again.
    unsafe { close("channel_writer_close", writer) };
}

/// Closes this end and frees the handle: sending to it is PEERLANE_CLOSED from then on. No other call may be using it.
/// Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_channel_reader_close(reader: *mut peerlane_channel_reader) {
    // SAFETY: the header asks for a handle, which is not used again.
    unsafe { close("channel_reader_close", reader) };
}

/// # Safety
/// `end` is NULL or came from `Box::into_raw`, and is not used again.
unsafe fn close<T>(op: &'static str, end: *mut T) {
    if end.is_null() {
        return;
    }
    guard(op, |_| {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(end) });
        Ok(())
    });
}

/// Puts a message into a batch. The lock is the caller's, so that nothing of another thread comes between.
///
/// # Safety
/// `writer` is NULL or a handle, the payload NULL or so many bytes, and `sequence` NULL or room for a number.
unsafe fn stage<'a>(
    op: &'static str,
    writer: *const peerlane_channel_writer,
    (readers, what, payload, bytes): (u32, (u16, u16), *const c_void, usize),
    timeout_ms: u64,
    sequence: *mut u64,
) -> Result<MutexGuard<'a, Writer>> {
    // SAFETY: the caller's contract.
    let (mut writer, payload, sequence) = unsafe {
        (writing(op, writer)?, items(op, "payload", payload.cast(), bytes)?, sequence.as_mut())
    };
    let number = writer.stage(readers, what, payload, Duration::from_millis(timeout_ms))?;
    sequence.into_iter().for_each(|place| *place = number);
    Ok(writer)
}

/// # Safety
/// `writer` is NULL or a handle.
unsafe fn writing<'a>(
    op: &'static str,
    writer: *const peerlane_channel_writer,
) -> Result<MutexGuard<'a, Writer>> {
    // SAFETY: the caller's contract.
    let writer = unsafe { present(op, "writer", writer)? };
    // Every change of an end is whole before it can panic.
    Ok(writer.writer.lock().unwrap_or_else(PoisonError::into_inner))
}

/// # Safety
/// `reader` is NULL or a handle.
unsafe fn reading<'a>(
    op: &'static str,
    reader: *const peerlane_channel_reader,
) -> Result<MutexGuard<'a, Reader>> {
    // SAFETY: the caller's contract.
    let reader = unsafe { present(op, "reader", reader)? };
    Ok(reader.reader.lock().unwrap_or_else(PoisonError::into_inner))
}
