//! Trait [`Gpu`] for real GPUs.
//!
//! Invariant: every method makes the device's primary context current, does one thing, and leaves
//! the caller's context as it was. [`Gpu::launch`] allocates nothing, locks nothing and makes no
//! system call of its own.

use super::call::{
    self, NOT_READY, PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_UNSUPPORTED, check, code, cu,
};
use super::check_ordinal;
use super::context::Context;
use super::device::{CudaGpu, raw_event, raw_graph, raw_stream};
use super::modules::Kernels;
use super::shared::{EXPORT_VARIABLE, wants_parts};
use crate::error::{Error, Result};
use crate::gpu::{
    Allocation, Backend, DevicePtr, Event, Exported, Gpu, Graph, HostMemory, MemoryOp, PeerAccess,
    Properties, Stream,
};
use cust::sys::{self, CUdevice_P2PAttribute as P2p};
use peerlane_device::abi::{Args, Kernel, flags};
use std::ptr::null_mut;

impl Gpu for CudaGpu {
    fn backend(&self) -> Backend {
        Backend::Cuda
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        let _entered = self.enter()?;
        let mut memory = 0;
        // SAFETY: `memory` outlives the call.
        unsafe { cu!(self.ordinal(), cuMemAlloc_v2(&mut memory, bytes)) }?;
        Ok(DevicePtr(memory))
    }

    unsafe fn free(&self, memory: DevicePtr) -> Result<()> {
        // SAFETY: the caller says that nothing uses the memory.
        unsafe { self.free_device(memory) }
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostMemory> {
        let _entered = self.enter()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let (mut host, mut device) = (null_mut(), 0);
        // SAFETY: `host` outlives the call.
        unsafe { cu!(self.ordinal(), cuMemHostAlloc(&mut host, bytes, flags)) }?;
        // SAFETY: the driver just gave `bytes` bytes there, and nobody else knows of them.
        unsafe { host.cast::<u8>().write_bytes(0, bytes) };
        // SAFETY: `device` outlives the call.
        let mapped =
            unsafe { cu!(self.ordinal(), cuMemHostGetDevicePointer_v2(&mut device, host, 0)) };
        if let Err(error) = mapped {
            // SAFETY: nobody else knows of the memory. The first error is the one to report.
            unsafe { code!(cuMemFreeHost(host)) };
            return Err(error);
        }
        Ok(HostMemory { host: host.cast(), device: DevicePtr(device), bytes })
    }

    unsafe fn free_host(&self, memory: HostMemory) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller says that nothing uses the memory.
        unsafe { cu!(self.ordinal(), cuMemFreeHost(memory.host.cast())) }
    }

    fn alloc_shared(&self, bytes: usize) -> Result<DevicePtr> {
        let asked = std::env::var(EXPORT_VARIABLE).ok();
        self.allocate_shared(bytes, wants_parts(asked.as_deref())?)
    }

    fn export(&self, memory: DevicePtr) -> Result<Exported> {
        self.export_shared(memory)
    }

    fn export_any(&self, base: DevicePtr) -> Result<Exported> {
        self.export_allocation(base)
    }

    fn allocation(&self, memory: DevicePtr) -> Result<Allocation> {
        self.allocation_of(memory)
    }

    fn import(&self, exported: Exported, bytes: usize, owner: u32) -> Result<DevicePtr> {
        self.import_shared(&exported, bytes, owner)
    }

    unsafe fn release(&self, imported: DevicePtr) -> Result<()> {
        // SAFETY: the caller says that nothing uses the memory.
        unsafe { self.release_import(imported) }
    }

    unsafe fn register_host(&self, at: *mut u8, bytes: usize) -> Result<HostMemory> {
        // SAFETY: the memory stays there, as the caller says.
        unsafe { self.register(at, bytes) }
    }

    unsafe fn unregister_host(&self, memory: HostMemory) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller says that nothing uses the memory.
        unsafe { cu!(self.ordinal(), cuMemHostUnregister(memory.host.cast())) }
    }

    unsafe fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<()> {
        // A recorded copy would read `src` when the graph runs.
        self.not_capturing("upload", stream)?;
        let pinned = self.memory_type(src.as_ptr() as u64)?.is_some();
        let _entered = self.enter()?;
        let raw = raw_stream(stream);
        // SAFETY: `dst` has the room, as the caller says. The driver copies pageable memory aside
        // before it returns; memory that it knows it may read later, so that is waited for.
        unsafe {
            cu!(self.ordinal(), cuMemcpyHtoDAsync_v2(dst.0, src.as_ptr().cast(), src.len(), raw))?;
            if pinned {
                cu!(self.ordinal(), cuStreamSynchronize(raw))?;
            }
        }
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr, stream: Stream) -> Result<()> {
        self.not_capturing("download", stream)?;
        let _entered = self.enter()?;
        let raw = raw_stream(stream);
        // SAFETY: `src` has the bytes, as the caller says, and `dst` is borrowed until they are
        // there: if the copy cannot be waited for, the context is lost and writes nothing more.
        unsafe {
            cu!(
                self.ordinal(),
                cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), src.0, dst.len(), raw)
            )?;
            cu!(self.ordinal(), cuStreamSynchronize(raw))
        }
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `dst` has the room, as the caller says.
        unsafe { cu!(self.ordinal(), cuMemsetD8Async(dst.0, value, bytes, raw_stream(stream))) }
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let _entered = self.enter()?;
        // Addresses are unified, so the driver sees which GPUs they are on.
        // SAFETY: both have `bytes` bytes, as the caller says.
        unsafe { cu!(self.ordinal(), cuMemcpyAsync(dst.0, src.0, bytes, raw_stream(stream))) }
    }

    fn owner_of(&self, memory: DevicePtr) -> Option<u32> {
        const DEVICE: u32 = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;
        match self.memory_type(memory.0) {
            Ok(Some(DEVICE)) => self.pointer_ordinal(memory.0).ok(),
            _ => None,
        }
    }

    fn owner_of_stream(&self, stream: Stream) -> Option<u32> {
        self.stream_ordinal(stream).ok()
    }

    fn stream_create(&self) -> Result<Stream> {
        let _entered = self.enter()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut stream = null_mut();
        // SAFETY: `stream` outlives the call.
        unsafe { cu!(self.ordinal(), cuStreamCreate(&mut stream, flags)) }?;
        Ok(Stream(stream as u64))
    }

    fn hardware_queues(&self) -> usize {
        super::connections()
    }

    fn stream_create_urgent(&self) -> Result<Stream> {
        let _entered = self.enter()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let (mut stream, mut greatest) = (null_mut(), 0);
        // SAFETY: both places outlive the calls; the first takes null for what is not asked.
        unsafe {
            cu!(self.ordinal(), cuCtxGetStreamPriorityRange(null_mut(), &mut greatest))?;
            cu!(self.ordinal(), cuStreamCreateWithPriority(&mut stream, flags, greatest))?;
        }
        Ok(Stream(stream as u64))
    }

    unsafe fn stream_memory(&self, stream: Stream, operations: &[MemoryOp]) -> Result<()> {
        // SAFETY: the caller answers for the addresses.
        unsafe { self.queue_memory_ops(stream, operations) }
    }

    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller says that the stream is ours and not used again.
        unsafe { cu!(self.ordinal(), cuStreamDestroy_v2(raw_stream(stream))) }
    }

    fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        self.not_capturing("stream_synchronize", stream)?;
        let _entered = self.enter()?;
        // SAFETY: the call takes a stream and no pointer.
        unsafe { cu!(self.ordinal(), cuStreamSynchronize(raw_stream(stream))) }
    }

    fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the call takes no argument; it waits for the current context, which is this GPU's.
        unsafe { cu!(self.ordinal(), cuCtxSynchronize()) }
    }

    fn stream_query(&self, stream: Stream) -> Result<bool> {
        self.not_capturing("stream_query", stream)?;
        let _entered = self.enter()?;
        // SAFETY: the call takes a stream and no pointer.
        match unsafe { code!(cuStreamQuery(raw_stream(stream))) } {
            NOT_READY => Ok(false),
            code => check(self.ordinal(), "cuStreamQuery", code).map(|()| true),
        }
    }

    fn event_create(&self) -> Result<Event> {
        self.event_with(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn event_create_timed(&self) -> Result<Event> {
        self.event_with(sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    unsafe fn event_destroy(&self, event: Event) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller says that the event is ours and not used again.
        unsafe { cu!(self.ordinal(), cuEventDestroy_v2(raw_event(event))) }
    }

    fn event_record(&self, event: Event, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the call takes handles and no pointer.
        unsafe { cu!(self.ordinal(), cuEventRecord(raw_event(event), raw_stream(stream))) }
    }

    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the call takes handles and no pointer.
        unsafe { cu!(self.ordinal(), cuStreamWaitEvent(raw_stream(stream), raw_event(event), 0)) }
    }

    fn event_query(&self, event: Event) -> Result<bool> {
        let _entered = self.enter()?;
        // SAFETY: the call takes an event and no pointer.
        match unsafe { code!(cuEventQuery(raw_event(event))) } {
            NOT_READY => Ok(false),
            code => check(self.ordinal(), "cuEventQuery", code).map(|()| true),
        }
    }

    fn event_synchronize(&self, event: Event) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the call takes an event and no pointer.
        unsafe { cu!(self.ordinal(), cuEventSynchronize(raw_event(event))) }
    }

    fn event_elapsed_ms(&self, start: Event, end: Event) -> Result<f32> {
        let _entered = self.enter()?;
        let mut elapsed = 0.0;
        let (start, end) = (raw_event(start), raw_event(end));
        // SAFETY: `elapsed` outlives the call.
        unsafe { cu!(self.ordinal(), cuEventElapsedTime(&mut elapsed, start, end)) }?;
        Ok(elapsed)
    }

    fn peer_access(&self, peer: u32) -> Result<PeerAccess> {
        check_ordinal("peer_access", "peer", peer)?;
        if peer == self.ordinal() {
            // The driver answers this for two different devices only.
            return Ok(PeerAccess { access: true, native_atomics: true, performance_rank: 0 });
        }
        let mut can_access = 0;
        let device = self.context.device();
        // SAFETY: `can_access` outlives the call. A device handle is its ordinal.
        unsafe {
            cu!(self.ordinal(), cuDeviceCanAccessPeer(&mut can_access, device, peer as i32))
        }?;
        Ok(PeerAccess {
            access: can_access != 0,
            native_atomics: self.p2p(P2p::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED, peer)?
                != 0,
            performance_rank: self.p2p(P2p::CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK, peer)?,
        })
    }

    fn enable_peer(&self, peer: u32) -> Result<()> {
        check_ordinal("enable_peer", "peer", peer)?;
        let mut peers = self.lock();
        if peer == self.ordinal() || peers.iter().any(|context| context.ordinal() == peer) {
            return Ok(());
        }
        let context = Context::of(peer)?;
        let raw = context.raw()?;
        let _entered = self.enter()?;
        // SAFETY: the context is retained, and kept below for as long as the mapping may be used.
        match unsafe { code!(cuCtxEnablePeerAccess(raw, 0)) } {
            0 | PEER_ACCESS_ALREADY_ENABLED => peers.push(context),
            PEER_ACCESS_UNSUPPORTED => {
                return Err(Error::Unreachable {
                    from: self.ordinal(),
                    to: peer,
                    reason: call::error_name(PEER_ACCESS_UNSUPPORTED),
                });
            }
            code => return Err(call::error(self.ordinal(), "cuCtxEnablePeerAccess", code)),
        }
        Ok(())
    }

    fn load_kernels(&self) -> Result<()> {
        let _one_at_a_time = self.lock();
        if self.kernels.get().is_none() {
            let kernels = Kernels::load(&self.context, &self.properties)?;
            self.kernels.get_or_init(|| kernels);
        }
        Ok(())
    }

    fn load_checked_kernels(&self, threads: u32) -> Result<u32> {
        const OP: &str = "load_checked_kernels";
        {
            let _one_at_a_time = self.lock();
            if self.checked.get().is_none() {
                let kernels = Kernels::load_checked(&self.context)?;
                self.checked.get_or_init(|| kernels);
            }
        }
        let blocks = |kernel: &Kernel| self.blocks_of(self.function(OP, *kernel, true)?, threads);
        let fewest = |least: u32, blocks: Result<u32>| Ok(least.min(blocks?));
        Kernel::ALL.iter().map(blocks).try_fold(u32::MAX, fewest)
    }

    #[inline]
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        args: &Args,
        stream: Stream,
    ) -> Result<()> {
        let checked = args.flags & flags::CHECKED != 0;
        let function = self.function("launch", kernel, checked)?;
        let _entered = self.enter()?;
        let mut parameters = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: every kernel takes one `Args` by value, which the driver copies before it
        // returns and does not write. The caller answers for the addresses in it.
        unsafe {
            cu!(
                self.ordinal(),
                cuLaunchKernel(
                    function,
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    raw_stream(stream),
                    parameters.as_mut_ptr(),
                    null_mut()
                )
            )
        }
    }

    fn resident_blocks(&self, kernel: Kernel, threads: u32) -> Result<u32> {
        self.blocks_of(self.function("resident_blocks", kernel, false)?, threads)
    }

    fn capture_begin(&self, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the call takes a stream and no pointer.
        unsafe { cu!(self.ordinal(), cuStreamBeginCapture_v2(raw_stream(stream), mode)) }
    }

    fn capture_end(&self, stream: Stream) -> Result<Graph> {
        let _entered = self.enter()?;
        let (mut graph, mut executable) = (null_mut(), null_mut());
        // SAFETY: `graph` outlives the call.
        unsafe { cu!(self.ordinal(), cuStreamEndCapture(raw_stream(stream), &mut graph)) }?;
        // SAFETY: `executable` outlives the call; `graph` is what the driver just made, is not
        // used after it is destroyed, and need not outlive what was instantiated from it.
        unsafe {
            let made = cu!(self.ordinal(), cuGraphInstantiateWithFlags(&mut executable, graph, 0));
            code!(cuGraphDestroy(graph));
            made?;
        }
        Ok(Graph(executable as u64))
    }

    fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let _entered = self.enter()?;
        const NONE: u32 = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as u32;
        let mut status = NONE;
        // SAFETY: the status is a 32-bit enum in C, and `status` outlives the call.
        unsafe {
            cu!(self.ordinal(), cuStreamIsCapturing(raw_stream(stream), (&raw mut status).cast()))
        }?;
        Ok(status != NONE)
    }

    fn beside_captures(&self, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // Of recordings that mind whatever any thread does, as torch's: a query would end them.
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let _entered = self.enter()?;
        // SAFETY: `mode` outlives the call, which takes it and puts the one until now in its place.
        unsafe { cu!(self.ordinal(), cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        let outcome = action();
        // SAFETY: as above.
        unsafe { cu!(self.ordinal(), cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        outcome
    }

    fn graph_launch(&self, graph: Graph, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the call takes handles and no pointer.
        unsafe { cu!(self.ordinal(), cuGraphLaunch(raw_graph(graph), raw_stream(stream))) }
    }

    unsafe fn graph_destroy(&self, graph: Graph) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller says that the graph is ours and not used again.
        unsafe { cu!(self.ordinal(), cuGraphExecDestroy(raw_graph(graph))) }
    }
}
