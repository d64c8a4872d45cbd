//! Real GPUs, through the CUDA driver.
//!
//! Invariant: a program that holds this module starts on any machine. Nothing here touches the
//! driver before [`devices`] or [`device()`] is called; without one they return
//! [`Error::NoDriver`]. No call changes the caller's current context.
//!
//! `driver` finds the library, `call` is the one way to call it, `context` makes a device current,
//! `modules` loads the kernels, `device` holds one GPU, `gpu` implements [`Gpu`](super::Gpu) for it,
//! `memory_ops` what streams do to words by themselves, `shared` what is said about memory of several
//! processes.

mod call;
mod context;
mod device;
mod driver;
mod gpu;
mod memory_ops;
mod modules;
mod properties;
mod shared;
mod symbols;

#[cfg(test)]
mod tests;

pub use device::CudaGpu;
pub use driver::{load, version};
pub use modules::VARIANT_VARIABLE;
pub use shared::EXPORT_VARIABLE;

use crate::error::{Error, Result};
use crate::gpu::GpuRef;
use call::cu;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What tells the driver how many hardware queues each GPU gets.
pub(crate) const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
/// The most that it understands.
pub(crate) const MOST_CONNECTIONS: usize = 32;
/// What it takes by itself.
const USUAL_CONNECTIONS: usize = 8;

/// Every GPU that the driver shows, in its order. Empty if there is a driver but no GPU.
///
/// # Errors
/// [`Error::NoDriver`] if there is no driver.
pub fn devices() -> Result<Vec<GpuRef>> {
    (0..count()?).map(|ordinal| Ok(share(ordinal)? as GpuRef)).collect()
}

/// The GPU with this index, as [`open`] gives it.
///
/// # Errors
/// As [`open`].
pub fn device(ordinal: u32) -> Result<GpuRef> {
    Ok(open(ordinal)?)
}

/// The GPU with this index. Two calls with one index give the same [`CudaGpu`] while the first is
/// held, so the ranks that share a GPU also share its kernels.
///
/// # Errors
/// [`Error::NoDriver`] if there is no driver, [`Error::InvalidArgument`] if there is no such GPU.
pub fn open(ordinal: u32) -> Result<Arc<CudaGpu>> {
    check_ordinal("cuda::open", "ordinal", ordinal)?;
    share(ordinal)
}

/// Gives every GPU 32 hardware queues instead of 8, unless the environment says otherwise.
///
/// Streams that share a queue wait for each other. Ranks that share a GPU spin on each other's
/// kernels, so with more ranks than queues a kernel may wait for one that is queued behind it, and
/// both end at their deadline. The driver reads the setting once, in [`load`].
///
/// # Safety
/// No other thread runs: call it first in `main`. It changes the process's environment, which is
/// sound only while nothing else reads it.
pub unsafe fn prepare_environment() {
    if std::env::var_os(CONNECTIONS).is_none() {
        // SAFETY: no other thread runs, as the caller promises.
        unsafe { std::env::set_var(CONNECTIONS, MOST_CONNECTIONS.to_string()) };
    }
}

/// How many hardware queues each GPU has. Set after the driver has read it, the variable says too
/// much; docs/c.md says when to set it.
fn connections() -> usize {
    let set = std::env::var(CONNECTIONS).ok().and_then(|text| text.parse().ok());
    set.unwrap_or(USUAL_CONNECTIONS).clamp(1, MOST_CONNECTIONS)
}

/// How many GPUs the driver shows.
fn count() -> Result<u32> {
    match load() {
        Err(Error::Driver { code: call::NO_DEVICE, .. }) => return Ok(0),
        answer => answer?,
    }
    let mut count = 0;
    // SAFETY: `count` outlives the call.
    unsafe { cu!(0, cuDeviceGetCount(&mut count)) }?;
    Ok(count as u32)
}

/// That there is a GPU with this index.
fn check_ordinal(op: &'static str, argument: &'static str, ordinal: u32) -> Result<()> {
    let count = count()?;
    if ordinal < count {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        op,
        argument,
        expected: match count {
            0 => "a GPU, of which the driver shows none".into(),
            1 => "0, the driver shows 1 GPU".into(),
            _ => format!("0 to {}, the driver shows {count} GPUs", count - 1),
        },
        got: ordinal.to_string(),
    })
}

/// The one [`CudaGpu`] of a GPU that exists.
fn share(ordinal: u32) -> Result<Arc<CudaGpu>> {
    static OPEN: Mutex<Option<HashMap<u32, Weak<CudaGpu>>>> = Mutex::new(None);
    let mut guard = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let open = guard.get_or_insert_default();
    if let Some(gpu) = open.get(&ordinal).and_then(Weak::upgrade) {
        return Ok(gpu);
    }
    let gpu = Arc::new(CudaGpu::open(ordinal)?);
    open.insert(ordinal, Arc::downgrade(&gpu));
    Ok(gpu)
}
