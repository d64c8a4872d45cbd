//! A GPU that does nothing: what is left of a call's cost on it is Peerlane's own.
//!
//! Invariant: no method on the path of a call allocates, locks or enters the system, and device
//! addresses are never followed. Host memory is real, since communicators read their status page.

use peerlane::error::{Error, Result};
use peerlane::gpu::{
    Allocation, Backend, DevicePtr, Event, Exported, Gpu, GpuRef, Graph, HostMemory, MemoryOp,
    PeerAccess, Properties, Stream,
};
use peerlane_device::abi::{Args, Kernel};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of an address or a handle below those that say whose it is.
const OWNER_SHIFT: u32 = 44;
/// Blocks of any kernel that fit: as many as an H200 has multiprocessors.
const MULTIPROCESSORS: u32 = 132;
/// Alignment of host memory: a page, as the driver gives.
const PAGE: usize = 4096;

/// A GPU whose memory is not there and whose kernels do nothing.
pub struct NullGpu {
    properties: Properties,
    /// The next address, stream or event: all are numbers from one counter.
    next: AtomicU64,
    launches: AtomicU64,
}

impl NullGpu {
    /// The GPU with this ordinal.
    pub fn new(ordinal: u32) -> NullGpu {
        let properties = Properties {
            ordinal,
            name: "null".into(),
            uuid: format!("NULL-{ordinal}"),
            pci_bus_id: format!("0000:{ordinal:02x}:00.0"),
            compute_capability: (9, 0),
            multiprocessors: MULTIPROCESSORS,
            memory_bytes: 1 << 40,
        };
        let first = (ordinal as u64 + 1) << OWNER_SHIFT;
        NullGpu { properties, next: AtomicU64::new(first), launches: AtomicU64::new(0) }
    }

    /// `count` GPUs, by ordinal.
    pub fn several(count: u32) -> Vec<Arc<NullGpu>> {
        (0..count).map(|ordinal| Arc::new(NullGpu::new(ordinal))).collect()
    }

    /// The same GPUs as communicators take them.
    pub fn refs(gpus: &[Arc<NullGpu>]) -> Vec<GpuRef> {
        gpus.iter().map(|gpu| gpu.clone() as GpuRef).collect()
    }

    /// Kernels launched so far.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Numbers that nobody has yet: the first of `count`.
    fn take(&self, count: usize) -> u64 {
        self.next.fetch_add(count.next_multiple_of(256) as u64, Ordering::Relaxed)
    }

    /// The ordinal in a number that some null GPU gave out.
    fn owner(number: u64) -> Option<u32> {
        (number >> OWNER_SHIFT).checked_sub(1).map(|ordinal| ordinal as u32)
    }

    fn host_layout(bytes: usize) -> Result<Layout> {
        Layout::from_size_align(bytes.max(1), PAGE).map_err(|_| Error::InvalidArgument {
            op: "alloc_host",
            argument: "bytes",
            expected: "a size that fits the address space".into(),
            got: bytes.to_string(),
        })
    }

    fn not_shared<T>(op: &'static str) -> Result<T> {
        Err(Error::Unsupported { op, reason: "the null GPU shares nothing".into() })
    }

    fn no_graphs<T>(op: &'static str) -> Result<T> {
        Err(Error::Unsupported { op, reason: "the null GPU records nothing".into() })
    }
}

impl Gpu for NullGpu {
    fn backend(&self) -> Backend {
        Backend::Sim
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        Ok(DevicePtr(self.take(bytes)))
    }

    unsafe fn free(&self, _: DevicePtr) -> Result<()> {
        Ok(())
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostMemory> {
        let layout = Self::host_layout(bytes)?;
        // SAFETY: the layout's size is not 0.
        let host = unsafe { alloc_zeroed(layout) };
        if host.is_null() {
            handle_alloc_error(layout);
        }
        Ok(HostMemory { host, device: DevicePtr(host as u64), bytes })
    }

    unsafe fn free_host(&self, memory: HostMemory) -> Result<()> {
        let layout = Self::host_layout(memory.bytes)?;
        // SAFETY: it came from `alloc_host`, which used the same layout.
        unsafe { dealloc(memory.host, layout) };
        Ok(())
    }

    fn alloc_shared(&self, _: usize) -> Result<DevicePtr> {
        Self::not_shared("alloc_shared")
    }

    fn export(&self, _: DevicePtr) -> Result<Exported> {
        Self::not_shared("export")
    }

    fn allocation(&self, memory: DevicePtr) -> Result<Allocation> {
        Ok(Allocation { base: memory, bytes: usize::MAX, id: memory.0, peers_reach: true })
    }

    fn import(&self, _: Exported, _: usize, _: u32) -> Result<DevicePtr> {
        Self::not_shared("import")
    }

    unsafe fn release(&self, _: DevicePtr) -> Result<()> {
        Self::not_shared("release")
    }

    unsafe fn register_host(&self, _: *mut u8, _: usize) -> Result<HostMemory> {
        Self::not_shared("register_host")
    }

    unsafe fn unregister_host(&self, _: HostMemory) -> Result<()> {
        Self::not_shared("unregister_host")
    }

    unsafe fn upload(&self, _: DevicePtr, _: &[u8], _: Stream) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], _: DevicePtr, _: Stream) -> Result<()> {
        dst.fill(0);
        Ok(())
    }

    unsafe fn fill(&self, _: DevicePtr, _: u8, _: usize, _: Stream) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, _: DevicePtr, _: DevicePtr, _: usize, _: Stream) -> Result<()> {
        Ok(())
    }

    fn owner_of(&self, memory: DevicePtr) -> Option<u32> {
        Self::owner(memory.0)
    }

    fn owner_of_stream(&self, stream: Stream) -> Option<u32> {
        Self::owner(stream.0)
    }

    fn hardware_queues(&self) -> usize {
        32
    }

    fn stream_create(&self) -> Result<Stream> {
        Ok(Stream(self.take(1)))
    }

    fn stream_create_urgent(&self) -> Result<Stream> {
        self.stream_create()
    }

    unsafe fn stream_memory(&self, _: Stream, operations: &[MemoryOp]) -> Result<()> {
        black_box(operations);
        Ok(())
    }

    unsafe fn stream_destroy(&self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn stream_synchronize(&self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn stream_query(&self, _: Stream) -> Result<bool> {
        Ok(true)
    }

    fn event_create(&self) -> Result<Event> {
        Ok(Event(self.take(1)))
    }

    fn event_create_timed(&self) -> Result<Event> {
        self.event_create()
    }

    unsafe fn event_destroy(&self, _: Event) -> Result<()> {
        Ok(())
    }

    fn event_record(&self, _: Event, _: Stream) -> Result<()> {
        Ok(())
    }

    fn stream_wait(&self, _: Stream, _: Event) -> Result<()> {
        Ok(())
    }

    fn event_query(&self, _: Event) -> Result<bool> {
        Ok(true)
    }

    fn event_synchronize(&self, _: Event) -> Result<()> {
        Ok(())
    }

    fn event_elapsed_ms(&self, _: Event, _: Event) -> Result<f32> {
        Ok(0.0)
    }

    fn peer_access(&self, _: u32) -> Result<PeerAccess> {
        Ok(PeerAccess { access: true, native_atomics: false, performance_rank: 0 })
    }

    fn enable_peer(&self, _: u32) -> Result<()> {
        Ok(())
    }

    fn load_kernels(&self) -> Result<()> {
        Ok(())
    }

    fn load_checked_kernels(&self, _: u32) -> Result<u32> {
        Ok(MULTIPROCESSORS)
    }

    #[inline]
    unsafe fn launch(&self, _: Kernel, _: u32, _: u32, args: &Args, _: Stream) -> Result<()> {
        // A driver reads the arguments, so they must have been built.
        black_box(args);
        self.launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn resident_blocks(&self, _: Kernel, _: u32) -> Result<u32> {
        Ok(MULTIPROCESSORS)
    }

    fn capture_begin(&self, _: Stream) -> Result<()> {
        Self::no_graphs("capture_begin")
    }

    fn capture_end(&self, _: Stream) -> Result<Graph> {
        Self::no_graphs("capture_end")
    }

    fn is_capturing(&self, _: Stream) -> Result<bool> {
        Ok(false)
    }

    fn graph_launch(&self, _: Graph, _: Stream) -> Result<()> {
        Self::no_graphs("graph_launch")
    }

    unsafe fn graph_destroy(&self, _: Graph) -> Result<()> {
        Self::no_graphs("graph_destroy")
    }
}
