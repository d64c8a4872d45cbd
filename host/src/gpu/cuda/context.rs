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
use std::sync::OnceLock;

/// A device and its primary context, which is made at the first use and then kept alive: a context
/// takes hundreds of megabytes of the device, and a program that only asks what there is needs none.
pub(super) struct Context {
    ordinal: u32,
    device: sys::CUdevice,
    retained: OnceLock<Handle>,
}

/// The driver's handle of a context.
struct Handle(sys::CUcontext);

// SAFETY: the driver allows every call on a context from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Context {
    /// The device with this ordinal.
    pub(super) fn of(ordinal: u32) -> Result<Context> {
        let mut device = 0;
        // SAFETY: `device` outlives the call.
        unsafe { cu!(ordinal, cuDeviceGet(&mut device, ordinal as i32)) }?;
        Ok(Context { ordinal, device, retained: OnceLock::new() })
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
    #[inline]
    pub(super) fn raw(&self) -> Result<sys::CUcontext> {
        match self.retained.get() {
            Some(handle) => Ok(handle.0),
            None => self.retain(),
        }
    }

    #[cold]
    fn retain(&self) -> Result<sys::CUcontext> {
        let mut raw = null_mut();
        // SAFETY: `raw` outlives the call.
        unsafe { cu!(self.ordinal, cuDevicePrimaryCtxRetain(&mut raw, self.device)) }?;
        if self.retained.set(Handle(raw)).is_err() {
            // Another thread was faster. Both have the same context, and one hold is enough.
            self.release();
        }
        Ok(raw)
    }

    /// Gives one hold back. A failure means that the driver is going down with the process, which
    /// releases everything.
    fn release(&self) {
        // SAFETY: called once for each time that `retain` took hold.
        unsafe { code!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }

    /// Makes the context current until the guard is dropped; costs one query if it already is.
    #[inline]
    pub(super) fn enter(&self) -> Result<Entered> {
        let raw = self.raw()?;
        let mut current = null_mut();
        // SAFETY: `current` outlives the call.
        unsafe { cu!(self.ordinal, cuCtxGetCurrent(&mut current)) }?;
        let pushed = current != raw;
        if pushed {
            // SAFETY: the context is retained for as long as `self` lives.
            unsafe { cu!(self.ordinal, cuCtxPushCurrent_v2(raw)) }?;
        }
        Ok(Entered { pushed, thread: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.retained.get().is_some() {
            self.release();
        }
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
