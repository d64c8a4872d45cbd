//! One real GPU: [`CudaGpu`], and what the methods of [`Gpu`] have in common.
//!
//! Invariant: every question to the driver is asked with the device's primary context current, and
//! leaves the caller's context as it was. `gpu.rs` implements [`Gpu`] with what is here.

use super::call::{check, code, cu};
use super::context::{Context, Entered};
use super::modules::Kernels;
use super::properties;
use super::shared::Table;
use crate::error::{Error, Result};
use crate::gpu::{Event, Gpu, Graph, Properties, Stream};
use cust::sys::{self, CUdevice_P2PAttribute as P2p};
use peerlane_device::abi::Kernel;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// A real GPU. [`devices`](super::devices) and [`open`](super::open) make them.
pub struct CudaGpu {
    pub(super) properties: Properties,
    /// A wait for a word can also wait for what a peer wrote before the word.
    pub(super) can_flush: bool,
    pub(super) kernels: OnceLock<Kernels>,
    /// Those of checked calls, once one may be made.
    pub(super) checked: OnceLock<Kernels>,
    /// The contexts of the GPUs whose memory is mapped here. They are kept alive because a mapping
    /// ends with the context it leads to. Held while kernels are loaded, too.
    peers: Mutex<Vec<Context>>,
    shared: Mutex<Table>,
    pub(super) context: Context,
}

impl CudaGpu {
    /// Opens the GPU with this index. The driver is loaded and has such a device.
    pub(super) fn open(ordinal: u32) -> Result<CudaGpu> {
        let context = Context::of(ordinal)?;
        let properties = properties::read(&context)?;
        let can_flush = properties::can_flush(&context)?;
        Ok(CudaGpu {
            properties,
            can_flush,
            kernels: OnceLock::new(),
            checked: OnceLock::new(),
            peers: Mutex::default(),
            shared: Mutex::default(),
            context,
        })
    }

    /// The architecture of the PTX that [`Gpu::load_kernels`] loaded; `None` before it did.
    pub fn ptx_variant(&self) -> Option<&'static str> {
        self.kernels.get().map(Kernels::variant)
    }

    /// Why [`Gpu::load_kernels`] did not load a better variant, one line for each that the driver
    /// refused. Empty if it took the best one that the GPU can run.
    pub fn ptx_refusals(&self) -> &[String] {
        self.kernels.get().map_or(&[], Kernels::refusals)
    }

    #[inline]
    pub(super) fn enter(&self) -> Result<Entered> {
        self.context.enter()
    }

    #[inline]
    pub(super) fn ordinal(&self) -> u32 {
        self.context.ordinal()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Context>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What memory was made in other ways than by `alloc`.
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loaded kernel, that of checked calls if `checked`.
    #[inline]
    pub(super) fn function(
        &self,
        op: &'static str,
        kernel: Kernel,
        checked: bool,
    ) -> Result<sys::CUfunction> {
        let kernels = if checked { &self.checked } else { &self.kernels };
        match kernels.get() {
            Some(kernels) => Ok(kernels.function(kernel)),
            None => Err(Error::Unsupported {
                op,
                reason: format!(
                    "the{} kernels of GPU {} are not loaded; load_{}kernels comes first",
                    if checked { " checked" } else { "" },
                    self.ordinal(),
                    if checked { "checked_" } else { "" }
                ),
            }),
        }
    }

    /// How many blocks of `threads` threads of a kernel this GPU holds at once.
    pub(super) fn blocks_of(&self, function: sys::CUfunction, threads: u32) -> Result<u32> {
        let _entered = self.enter()?;
        let mut blocks = 0;
        // SAFETY: `blocks` outlives the call and `function` belongs to the current context.
        unsafe {
            cu!(
                self.ordinal(),
                cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &mut blocks,
                    function,
                    threads as i32,
                    0
                )
            )
        }?;
        Ok(blocks as u32 * self.properties.multiprocessors)
    }

    /// Refuses what cannot be recorded. The driver would refuse it as well, and end the recording.
    pub(super) fn not_capturing(&self, op: &'static str, stream: Stream) -> Result<()> {
        if !self.is_capturing(stream)? {
            return Ok(());
        }
        Err(Error::Unsupported { op, reason: "the stream is being captured".into() })
    }

    pub(super) fn event_with(&self, flags: sys::CUevent_flags) -> Result<Event> {
        let _entered = self.enter()?;
        let mut event = null_mut();
        // SAFETY: `event` outlives the call.
        unsafe { cu!(self.ordinal(), cuEventCreate(&mut event, flags as u32)) }?;
        Ok(Event(event as u64))
    }

    pub(super) fn p2p(&self, attribute: P2p, peer: u32) -> Result<i32> {
        let mut value = 0;
        let device = self.context.device();
        // SAFETY: `value` outlives the call. A device handle is its ordinal.
        unsafe {
            cu!(self.ordinal(), cuDeviceGetP2PAttribute(&mut value, attribute, device, peer as i32))
        }?;
        Ok(value)
    }

    /// Whether the driver knows `address`, and as which kind of memory.
    pub(super) fn memory_type(&self, address: u64) -> Result<Option<u32>> {
        let _entered = self.enter()?;
        let mut attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let mut kind = 0_u32;
        let mut places = [(&raw mut kind).cast()];
        // The call for several attributes takes any address, and leaves 0 for one that it does not know; the call for
        // one attribute fails, which compute-sanitizer reports.
        // SAFETY: one attribute, which is one 32-bit number, and `kind` outlives the call. The address is looked up, not
        // followed.
        unsafe {
            cu!(
                self.ordinal(),
                cuPointerGetAttributes(1, &mut attribute, places.as_mut_ptr(), address)
            )
        }?;
        Ok((kind != 0).then_some(kind))
    }

    pub(super) fn pointer_ordinal(&self, address: u64) -> Result<u32> {
        let _entered = self.enter()?;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        let mut ordinal = 0_i32;
        // SAFETY: this attribute is one `int`, and `ordinal` outlives the call.
        unsafe {
            cu!(
                self.ordinal(),
                cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address)
            )
        }?;
        Ok(ordinal as u32)
    }

    pub(super) fn stream_ordinal(&self, stream: Stream) -> Result<u32> {
        let _entered = self.enter()?;
        let (mut context, mut popped) = (null_mut(), null_mut());
        let mut device = 0;
        // SAFETY: the places outlive the calls; what is pushed is popped again.
        unsafe {
            cu!(self.ordinal(), cuStreamGetCtx(raw_stream(stream), &mut context))?;
            if context == self.context.raw()? {
                return Ok(self.ordinal());
            }
            cu!(self.ordinal(), cuCtxPushCurrent_v2(context))?;
            let code = code!(cuCtxGetDevice(&mut device));
            cu!(self.ordinal(), cuCtxPopCurrent_v2(&mut popped))?;
            check(self.ordinal(), "cuCtxGetDevice", code)?;
        }
        Ok(device as u32)
    }
}

impl Drop for CudaGpu {
    fn drop(&mut self) {
        for kernels in self.kernels.get().into_iter().chain(self.checked.get()) {
            if let Ok(_entered) = self.enter() {
                // SAFETY: the context is current, and who queued a kernel holds the GPU until it ends.
                unsafe { kernels.unload() };
            }
        }
    }
}

/// The driver's handle of a stream.
#[inline]
pub(super) fn raw_stream(stream: Stream) -> sys::CUstream {
    stream.0 as usize as sys::CUstream
}

/// The driver's handle of an event.
#[inline]
pub(super) fn raw_event(event: Event) -> sys::CUevent {
    event.0 as usize as sys::CUevent
}

/// The driver's handle of an executable graph.
#[inline]
pub(super) fn raw_graph(graph: Graph) -> sys::CUgraphExec {
    graph.0 as usize as sys::CUgraphExec
}
