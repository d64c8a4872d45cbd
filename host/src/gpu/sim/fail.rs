//! The driver errors that the simulator gives, with the driver's own numbers and names.
//!
//! Invariant: a call that a real driver refuses is refused with the same code, or, where there is
//! more to say, with an error that names the argument, what was expected and what came.

use crate::error::Error;

/// A code and its name.
pub(super) type Code = (u32, &'static str);

pub(super) const INVALID_VALUE: Code = (1, "CUDA_ERROR_INVALID_VALUE");
pub(super) const OUT_OF_MEMORY: Code = (2, "CUDA_ERROR_OUT_OF_MEMORY");
pub(super) const INVALID_DEVICE: Code = (101, "CUDA_ERROR_INVALID_DEVICE");
pub(super) const INVALID_HANDLE: Code = (400, "CUDA_ERROR_INVALID_HANDLE");
pub(super) const ILLEGAL_STATE: Code = (401, "CUDA_ERROR_ILLEGAL_STATE");
pub(super) const NOT_READY: Code = (600, "CUDA_ERROR_NOT_READY");
pub(super) const OUT_OF_RESOURCES: Code = (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES");
pub(super) const ALREADY_REGISTERED: Code = (712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED");
pub(super) const CAPTURE_UNSUPPORTED: Code = (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
pub(super) const CAPTURE_INVALIDATED: Code = (901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED");
pub(super) const CAPTURE_MERGE: Code = (902, "CUDA_ERROR_STREAM_CAPTURE_MERGE");
pub(super) const CAPTURE_UNMATCHED: Code = (903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED");
pub(super) const CAPTURE_UNJOINED: Code = (904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED");
pub(super) const CAPTURE_ISOLATION: Code = (905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION");
pub(super) const CAPTURED_EVENT: Code = (907, "CUDA_ERROR_CAPTURED_EVENT");

pub(super) fn driver(call: &'static str, device: u32, (code, name): Code) -> Error {
    Error::Driver { call, device, code, name: name.to_owned() }
}

/// A stream, event or graph that does not exist, or is another device's.
pub(super) fn handle(call: &'static str, device: u32) -> Error {
    driver(call, device, INVALID_HANDLE)
}
