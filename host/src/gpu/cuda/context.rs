//! The primary context of a device, and making it current.
//!
//! Invariant: a caller's current context is the same after a call into Peerlane as before it.
//! Primary contexts are the ones that the CUDA runtime and PyTorch use, so memory, streams and
//! events are common with them.

use super::call::{code, cu};
use crate::error::Result;
use cust::sys;
use std::marker::PhantomData;
use std::ptr::null_mut;

/// A device's primary context, kept alive.
pub(super) struct Context {
    ordinal: u32,
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: the driver allows every call on a context from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of the device with this ordinal.
    pub(super) fn retain(ordinal: u32) -> Result<Context> {
        let mut device = 0;
        let mut raw = null_mut();
        // SAFETY: both places outlive the calls.
        unsafe {
            cu!(ordinal, cuDeviceGet(&mut device, ordinal as i32))?;
            cu!(ordinal, cuDevicePrimaryCtxRetain(&mut raw, device))?;
        }
        Ok(Context { ordinal, device, raw })
    }

    /// The index of the device among those of this process.
    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The driver's handle of the device.
    pub(super) fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// The driver's handle of the context.
    pub(super) fn raw(&self) -> sys::CUcontext {
        self.raw
    }

    /// Makes the context current until the guard is dropped; costs one query if it already is.
    #[inline]
    pub(super) fn enter(&self) -> Result<Entered> {
        let mut current = null_mut();
        // SAFETY: `current` outlives the call.
        unsafe { cu!(self.ordinal, cuCtxGetCurrent(&mut current)) }?;
        let pushed = current != self.raw;
        if pushed {
            // SAFETY: `raw` is retained for as long as `self` lives.
            unsafe { cu!(self.ordinal, cuCtxPushCurrent_v2(self.raw)) }?;
        }
        Ok(Entered { pushed, thread: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it gives back what `retain` took. A failure means that the driver is going down
        // with the process, which releases everything.
        unsafe { code!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

/// Keeps a context current on this thread. Dropping it brings back the one before.
#[must_use = "the context is current only while the guard lives"]
pub(super) struct Entered {
    pushed: bool,
    /// A context is current on one thread, so the guard stays there.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = null_mut();
            // SAFETY: `popped` outlives the call; guards end in the reverse order of their making,
            // so the top of the stack is what `enter` pushed.
            unsafe { code!(cuCtxPopCurrent_v2(&mut popped)) };
        }
    }
}
