//! One way to call the driver: [`cu!`] names the function and yields a [`Result`].
//!
//! Invariant: no code that a driver returns becomes a Rust enum. cust_raw declares `CUresult` as an
//! enum of the codes that CUDA 11.6 knew; a later driver returns others, and such a value in that
//! enum would be undefined behaviour. So every function is called as one that returns a `u32`.

use super::driver::SHARED_OBJECT_INIT_FAILED;
use crate::error::{Error, Result};
use cust::sys;
use std::ffi::{CStr, c_char};

/// `CUDA_ERROR_INVALID_VALUE`.
pub(super) const INVALID_VALUE: u32 = 1;
/// `CUDA_ERROR_NO_DEVICE`.
pub(super) const NO_DEVICE: u32 = 100;
/// `CUDA_ERROR_NO_BINARY_FOR_GPU`.
pub(super) const NO_BINARY_FOR_GPU: u32 = 209;
/// `CUDA_ERROR_PEER_ACCESS_UNSUPPORTED`.
pub(super) const PEER_ACCESS_UNSUPPORTED: u32 = 217;
/// `CUDA_ERROR_INVALID_PTX`.
pub(super) const INVALID_PTX: u32 = 218;
/// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`.
pub(super) const UNSUPPORTED_PTX_VERSION: u32 = 222;
/// `CUDA_ERROR_NOT_READY`.
pub(super) const NOT_READY: u32 = 600;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
pub(super) const PEER_ACCESS_ALREADY_ENABLED: u32 = 704;

/// `CUDA_ERROR_NOT_SUPPORTED`.
pub(super) const NOT_SUPPORTED: u32 = 801;
/// `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED`.
pub(super) const CAPTURE_UNSUPPORTED: u32 = 900;
/// `CUDA_ERROR_TOO_MANY_PEERS`.
pub(super) const TOO_MANY_PEERS: u32 = 711;

/// A driver function that takes `Arguments`.
pub(super) trait Call<Arguments> {
    /// Calls it and returns its code.
    ///
    /// # Safety
    /// As the driver's documentation of the function says.
    unsafe fn code(self, arguments: Arguments) -> u32;
}

macro_rules! call_with {
    ($($argument:ident)*) => {
        impl<$($argument),*> Call<($($argument,)*)>
            for unsafe extern "C" fn($($argument),*) -> sys::CUresult
        {
            #[inline(always)]
            #[allow(non_snake_case, reason = "an argument has the name of its type")]
            unsafe fn code(self, ($($argument,)*): ($($argument,)*)) -> u32 {
                // SAFETY: `CUresult` is `repr(u32)`, so both types are the same function in C.
                let call = unsafe {
                    std::mem::transmute::<
                        unsafe extern "C" fn($($argument),*) -> sys::CUresult,
                        unsafe extern "C" fn($($argument),*) -> u32,
                    >(self)
                };
                // SAFETY: the caller keeps to the function's documentation.
                unsafe { call($($argument),*) }
            }
        }
    };
}
call_with!();
call_with!(A);
call_with!(A B);
call_with!(A B C);
call_with!(A B C D);
call_with!(A B C D E);
call_with!(A B C D E F G H I J K);

/// The type that the compiler finds for one argument.
macro_rules! inferred {
    ($argument:expr) => {
        _
    };
}
pub(super) use inferred;

/// The code that a driver function returns: `code!(cuFunction(arguments))`. Unsafe.
macro_rules! code {
    ($name:ident($($argument:expr),*)) => {{
        use $crate::gpu::cuda::call::Call;
        let call: unsafe extern "C" fn(
            $($crate::gpu::cuda::call::inferred!($argument)),*
        ) -> cust::sys::CUresult = cust::sys::$name;
        call.code(($($argument,)*))
    }};
}
pub(super) use code;

/// Calls a driver function for a device: `cu!(ordinal, cuFunction(arguments))?`. Unsafe.
macro_rules! cu {
    ($device:expr, $name:ident($($argument:expr),*)) => {
        $crate::gpu::cuda::call::check(
            $device,
            stringify!($name),
            $crate::gpu::cuda::call::code!($name($($argument),*)),
        )
    };
}
pub(super) use cu;

/// Turns a code into a result.
#[inline]
pub(super) fn check(device: u32, call: &'static str, code: u32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(error(device, call, code)) }
}

/// The error for a code that is not 0.
#[cold]
pub(super) fn error(device: u32, call: &'static str, code: u32) -> Error {
    Error::Driver { call, device, code, name: error_name(code) }
}

/// The driver's name for a code, or ours where no driver is there to ask.
pub(super) fn error_name(code: u32) -> String {
    type GetErrorName = unsafe extern "C" fn(sys::CUresult, *mut *const c_char) -> sys::CUresult;
    // SAFETY: `CUresult` is `repr(u32)`, so both types are the same function in C; as a `u32` the
    // argument may be any code.
    let get_error_name = unsafe {
        std::mem::transmute::<GetErrorName, unsafe extern "C" fn(u32, *mut *const c_char) -> u32>(
            sys::cuGetErrorName,
        )
    };
    let mut name = std::ptr::null();
    // SAFETY: `name` outlives the call.
    if unsafe { get_error_name(code, &mut name) } == 0 && !name.is_null() {
        // SAFETY: the driver answered with a constant C string.
        return unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    }
    match code {
        SHARED_OBJECT_INIT_FAILED => "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED",
        34 => "CUDA_ERROR_STUB_LIBRARY",
        _ => "an error that this driver has no name for",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_name() {
        assert_eq!(error_name(303), "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED");
        assert_eq!(error_name(34), "CUDA_ERROR_STUB_LIBRARY");
        assert_eq!(error_name(54_321), "an error that this driver has no name for");
    }

    #[test]
    fn an_error_names_call_device_and_code() {
        assert_eq!(check(2, "cuMemAlloc_v2", 0), Ok(()));
        assert_eq!(
            check(2, "cuInit", 303).unwrap_err().to_string(),
            "cuInit on GPU 2: CUDA_ERROR_SHARED_OBJECT_INIT_FAILED (303)"
        );
    }
}
