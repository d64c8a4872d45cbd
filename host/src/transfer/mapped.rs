//! A view that a GPU reads where it lies, over its bus.
//!
//! Invariant: the pages are the GPU's for as long as this lives, and the view's for as long as they are the GPU's; what is queued on the
//! GPU has ended before they are given back.

use super::View;
use super::segment::PAGE;
use crate::collectives::invalid;
use crate::error::Result;
use crate::gpu::{DevicePtr, GpuRef, HostMemory};
use crate::trace;

const OP: &str = "transfer map";

/// A [`View`] in memory that a GPU has pinned and reaches.
pub struct Mapped {
    view: View,
    gpu: GpuRef,
    memory: HostMemory,
    offset: usize,
}

impl Mapped {
    /// Pins the pages that `view` lies in and maps them into `gpu`. In one process only one view of a page can be mapped
    /// at a time.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a view without elements; what the driver says if it
    /// does not pin them.
    pub fn new(view: View, gpu: GpuRef) -> Result<Mapped> {
        let _span = trace::span!("map", bytes = view.bytes());
        if view.bytes() == 0 {
            return Err(invalid(OP, "view", "at least one element".into(), "none"));
        }
        let offset = view.as_ptr().addr() % PAGE;
        let bytes = (offset + reach(&view)).next_multiple_of(PAGE);
        let first = view.as_ptr().wrapping_sub(offset).cast_mut();
        // SAFETY: a segment is whole pages, and the view, which is kept, keeps them mapped.
        let memory = unsafe { gpu.register_host(first, bytes) }?;
        Ok(Mapped { view, gpu, memory, offset })
    }

    /// What it shows.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Where kernels of its GPU find the first element. They may only read.
    pub fn device_ptr(&self) -> DevicePtr {
        self.memory.device.offset(self.offset)
    }
}

/// From the first byte of the first element to behind the last one.
fn reach(view: &View) -> usize {
    let mut last = 0;
    for (size, stride) in view.shape().iter().zip(view.strides()) {
        last += (size - 1) * stride;
    }
    ((last + 1) * u64::from(view.element().bytes)) as usize
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let ended = self.gpu.synchronize();
        // SAFETY: nothing uses it any more, as was waited for.
        let given_back = ended.and_then(|()| unsafe { self.gpu.unregister_host(self.memory) });
        if given_back.is_err() {
            // Such as while a graph is captured. The pages may be in use, or the GPU's still: they stay where they are.
            std::mem::forget(self.view.clone());
        }
    }
}
