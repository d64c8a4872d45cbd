//! From C's arguments to Rust's: what is checked on the way in.
//!
//! Invariant: NULL, a number that names nothing and text that is not UTF-8 become errors that name
//! the argument. Everything here that follows a pointer is `unsafe` for one reason: the pointer is
//! not NULL and yet leads nowhere.

use crate::collectives::invalid;
use crate::error::Result;
use crate::gpu::{DevicePtr, Stream};
use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;

/// The number that C passed for an enum: any number, until it is looked up.
pub(super) fn bits<E: Copy>(value: MaybeUninit<E>) -> u32 {
    const { assert!(size_of::<E>() == 4, "an enum of C is 32 bits wide here") };
    // SAFETY: the size was compared, and C always passes 32 bits of something.
    unsafe { std::mem::transmute_copy(&value) }
}

/// What `value` stands for in `choices`.
pub(super) fn choose<E: Copy + std::fmt::Debug, T: Copy>(
    op: &'static str,
    argument: &'static str,
    value: MaybeUninit<E>,
    choices: &[(E, T)],
) -> Result<T> {
    let number = |choice: E| bits(MaybeUninit::new(choice));
    let came = bits(value);
    if let Some((_, found)) = choices.iter().find(|(choice, _)| number(*choice) == came) {
        return Ok(*found);
    }
    let names = choices.iter().map(|(choice, _)| format!("{choice:?} ({})", number(*choice)));
    let expected = format!("one of {}", names.collect::<Vec<_>>().join(", "));
    Err(invalid(op, argument, expected, came))
}

/// What a pointer to something that exists points to.
///
/// # Safety
/// `pointer` is NULL or leads to a `T` that nobody changes during the call.
pub(super) unsafe fn present<'a, T>(
    op: &'static str,
    argument: &'static str,
    pointer: *const T,
) -> Result<&'a T> {
    // SAFETY: the caller's contract.
    unsafe { pointer.as_ref() }.ok_or_else(|| null::<T>(op, argument))
}

/// The place for a result, which holds `before` until the call has succeeded.
///
/// # Safety
/// `pointer` is NULL or leads to room for a `T` that nobody else uses during the call.
pub(super) unsafe fn place<'a, T>(
    op: &'static str,
    argument: &'static str,
    pointer: *mut T,
    before: T,
) -> Result<&'a mut T> {
    if pointer.is_null() {
        return Err(null::<T>(op, argument));
    }
    // SAFETY: the caller's contract; it is written before it is seen as a `T`.
    unsafe {
        pointer.write(before);
        Ok(&mut *pointer)
    }
}

/// `len` things in a row.
///
/// # Safety
/// `pointer` is NULL or leads to `len` of them that nobody changes during the call.
pub(super) unsafe fn items<'a, T>(
    op: &'static str,
    argument: &'static str,
    pointer: *const T,
    len: usize,
) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    fits::<T>(op, argument, len)?;
    // SAFETY: the caller's contract.
    unsafe { present(op, argument, pointer)? };
    // SAFETY: the caller's contract; it is not NULL, and the size was checked.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// Room for `bytes` bytes.
///
/// # Safety
/// `pointer` is NULL or leads to `bytes` bytes that nobody else uses during the call.
pub(super) unsafe fn room<'a>(
    op: &'static str,
    argument: &'static str,
    pointer: *mut c_void,
    bytes: usize,
) -> Result<&'a mut [u8]> {
    if bytes == 0 {
        return Ok(&mut []);
    }
    fits::<u8>(op, argument, bytes)?;
    if pointer.is_null() {
        return Err(null::<u8>(op, argument));
    }
    // C may never have written there, and a slice of bytes must not be of such memory.
    // SAFETY: the caller's contract; it is not NULL, the size was checked, and it is written first.
    unsafe {
        pointer.cast::<u8>().write_bytes(0, bytes);
        Ok(std::slice::from_raw_parts_mut(pointer.cast(), bytes))
    }
}

/// NUL-terminated UTF-8.
///
/// # Safety
/// `pointer` is NULL or leads to NUL-terminated text that nobody changes during the call.
pub(super) unsafe fn text<'a>(
    op: &'static str,
    argument: &'static str,
    pointer: *const c_char,
) -> Result<&'a str> {
    // SAFETY: the caller's contract.
    unsafe { present(op, argument, pointer)? };
    // SAFETY: the caller's contract; it is not NULL.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| {
        invalid(op, argument, "UTF-8 text".into(), format!("{:?}", text.to_string_lossy()))
    })
}

/// A struct whose first field is its size in the caller's header; `None` if NULL came.
///
/// There is one version of each such struct so far. A later library takes the smaller ones too.
///
/// # Safety
/// `pointer` is NULL or leads to as many readable bytes as the `size_t` there says.
pub(super) unsafe fn sized<T: Copy>(
    op: &'static str,
    argument: &'static str,
    pointer: *const T,
) -> Result<Option<T>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract; such structs begin with their size.
    let size = unsafe { pointer.cast::<usize>().read() };
    check_size::<T>(op, argument, size)?;
    // SAFETY: the caller's contract; it has the size of a `T`.
    Ok(Some(unsafe { pointer.read() }))
}

/// That the caller's header and this library mean the same struct.
pub(super) fn check_size<T>(op: &'static str, argument: &'static str, size: usize) -> Result<()> {
    if size == size_of::<T>() {
        return Ok(());
    }
    let expected = format!("{} bytes, as {} has in this library", size_of::<T>(), name::<T>());
    Err(invalid(op, argument, expected, size))
}

/// An address in device memory that is used if `bytes` are not 0.
pub(super) fn address(
    op: &'static str,
    argument: &'static str,
    pointer: *const c_void,
    bytes: usize,
) -> Result<DevicePtr> {
    if pointer.is_null() && bytes != 0 {
        return Err(invalid(op, argument, "a device address".into(), "NULL"));
    }
    Ok(device(pointer))
}

/// An address in device memory; the callee checks it.
pub(super) fn device(pointer: *const c_void) -> DevicePtr {
    DevicePtr(pointer as u64)
}

/// A `CUstream`.
pub(super) fn stream(pointer: *mut c_void) -> Stream {
    Stream(pointer as u64)
}

/// That `len` of them can lie in a row in memory.
fn fits<T>(op: &'static str, argument: &'static str, len: usize) -> Result<()> {
    if len.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= isize::MAX as usize) {
        return Ok(());
    }
    Err(invalid(op, argument, "a size that memory can have".into(), len))
}

fn null<T>(op: &'static str, argument: &'static str) -> crate::Error {
    invalid(op, argument, format!("a pointer to {}", name::<T>()), "NULL")
}

/// A type's name as C has it: without the path, and as C spells what it has other names for.
fn name<T>() -> &'static str {
    let full = std::any::type_name::<T>();
    if full.starts_with('*') {
        return "a handle";
    }
    match full.rsplit("::").next().unwrap_or(full) {
        "i8" => "text",
        "u8" => "bytes",
        "u32" => "uint32_t",
        "usize" => "size_t",
        own => own,
    }
}
