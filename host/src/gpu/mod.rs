//! What Peerlane needs of a GPU, and the two that offer it: [`cuda`] and [`sim`].
//!
//! Invariant: everything above this module works on either through `dyn Gpu` and cannot tell which
//! it has. Work on a stream is asynchronous and in order; a failed call has done nothing.
//! Addresses, streams, events and graphs are the driver's own 64-bit values, so a caller's
//! `CUstream` is a [`Stream`] as it is.

pub mod cuda;
pub mod sim;

use crate::error::Result;
use peerlane_device::abi::{Args, Kernel};
use std::sync::Arc;

/// An address in a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` further on.
    pub const fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

/// A stream: a `CUstream`, or a simulated one. 0 is the device's default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Stream(pub u64);

/// An event: a `CUevent`, or a simulated one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub u64);

/// An executable graph: a `CUgraphExec`, or a simulated one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// Pinned host memory that a GPU reads and writes too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// Where the host finds it.
    pub host: *mut u8,
    /// Where kernels find it.
    pub device: DevicePtr,
    /// Its size.
    pub bytes: usize,
}

// SAFETY: it is an address, not an access; whoever dereferences it says why that is sound.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

/// How another process finds device memory of this one. It travels with [`Exported::file`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum MemoryHandle {
    /// A `CUipcMemHandle`: 64 bytes.
    Ipc(Vec<u8>),
    /// The memory is what the file descriptor beside it refers to.
    File,
}

/// Device memory, ready to be mapped by another process.
#[derive(Debug)]
pub struct Exported {
    /// What the other process hands to [`Gpu::import`].
    pub handle: MemoryHandle,
    /// Passed to the other process with `SCM_RIGHTS`; there only for [`MemoryHandle::File`].
    pub file: Option<std::os::fd::OwnedFd>,
}

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Its first byte.
    pub base: DevicePtr,
    /// Its size.
    pub bytes: usize,
    /// No two allocations of a process have the same, whether or not one of them was freed before.
    pub id: u64,
    /// Whether every GPU of this process that has access to its GPU reaches it.
    pub peers_reach: bool,
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Properties {
    /// Index among the devices of this process.
    pub ordinal: u32,
    /// Marketing name.
    pub name: String,
    /// Stable identity, as `GPU-xxxxxxxx-...` for real ones.
    pub uuid: String,
    /// PCI bus address, as `0000:1b:00.0` for real ones.
    pub pci_bus_id: String,
    /// Compute capability, for example (9, 0).
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory_bytes: u64,
}

/// How one GPU reaches another's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PeerAccess {
    /// The driver allows mapping.
    pub access: bool,
    /// Atomic operations work across the link.
    pub native_atomics: bool,
    /// The driver's relative rank of the link; lower is faster.
    pub performance_rank: i32,
}

/// Something that a stream does to a word of memory by itself, without a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryOp {
    /// Holds the stream until the word at the address is the value.
    Wait(DevicePtr, u32),
    /// Stores the value once everything queued before is done and visible to all who can see the
    /// word: memory of this GPU, of a peer that is mapped into it, or mapped host memory. There is no cheaper
    /// store: the driver's calls for several operations refuse the flag that leaves the barrier out.
    Write(DevicePtr, u32),
}

/// Which kind of GPU a result came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// A real GPU.
    Cuda,
    /// A simulated one.
    Sim,
}

/// One GPU. Methods may be called from any thread.
pub trait Gpu: Send + Sync {
    /// Whether the GPU is real.
    fn backend(&self) -> Backend;
    /// What the GPU is.
    fn properties(&self) -> &Properties;
    /// What its machine is made from, if it is simulated: another process can make the same.
    fn simulation(&self) -> Option<sim::Config> {
        None
    }

    /// Allocates device memory, aligned to 256 bytes or better, with undefined content.
    fn alloc(&self, bytes: usize) -> Result<DevicePtr>;
    /// Frees what [`Gpu::alloc`] returned.
    ///
    /// # Safety
    /// No queued work uses the memory any more, and no peer does.
    unsafe fn free(&self, memory: DevicePtr) -> Result<()>;
    /// Allocates pinned host memory, zeroed. It is mapped into every GPU of this process, at the
    /// same address.
    fn alloc_host(&self, bytes: usize) -> Result<HostMemory>;
    /// Frees what [`Gpu::alloc_host`] returned.
    ///
    /// # Safety
    /// Neither queued work nor the host uses the memory any more.
    unsafe fn free_host(&self, memory: HostMemory) -> Result<()>;

    /// Allocates device memory that other processes can map. [`Gpu::free`] frees it, which waits
    /// for nobody: every importer has released it before.
    fn alloc_shared(&self, bytes: usize) -> Result<DevicePtr>;
    /// Describes memory of [`Gpu::alloc_shared`] to another process.
    fn export(&self, memory: DevicePtr) -> Result<Exported>;
    /// Describes an allocation to another process, however it was made, by its first byte.
    ///
    /// # Errors
    /// Not every kind of memory can be described.
    fn export_any(&self, base: DevicePtr) -> Result<Exported> {
        self.export(base)
    }
    /// The allocation of this GPU that `memory` lies in.
    fn allocation(&self, memory: DevicePtr) -> Result<Allocation>;
    /// Maps `bytes` bytes of GPU `owner` (an ordinal of this process) that another process has
    /// exported, so that kernels of this GPU reach them.
    ///
    /// # Errors
    /// [`Error::Unreachable`](crate::Error::Unreachable) if this GPU cannot reach `owner`.
    fn import(&self, exported: Exported, bytes: usize, owner: u32) -> Result<DevicePtr>;
    /// Unmaps what [`Gpu::import`] returned.
    ///
    /// # Safety
    /// No queued work of this process uses the memory any more.
    unsafe fn release(&self, imported: DevicePtr) -> Result<()>;
    /// Pins host memory that exists already and maps it into this GPU. Its content stays.
    ///
    /// # Safety
    /// The `bytes` bytes at `at`, both multiples of 4096, stay mapped until
    /// [`Gpu::unregister_host`].
    unsafe fn register_host(&self, at: *mut u8, bytes: usize) -> Result<HostMemory>;
    /// Undoes [`Gpu::register_host`].
    ///
    /// # Safety
    /// No queued work uses the memory any more.
    unsafe fn unregister_host(&self, memory: HostMemory) -> Result<()>;

    /// Queues a copy from the host. `src` may be reused when the call returns.
    ///
    /// # Safety
    /// `dst` points to at least `src.len()` bytes of this GPU's memory.
    unsafe fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<()>;
    /// Copies to the host after everything queued on `stream`, and waits for it.
    ///
    /// # Safety
    /// `src` points to at least `dst.len()` bytes of this GPU's memory.
    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr, stream: Stream) -> Result<()>;
    /// Queues filling `bytes` bytes with `value`.
    ///
    /// # Safety
    /// `dst` points to at least `bytes` bytes of this GPU's memory.
    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<()>;
    /// Queues a copy within this GPU, or from it to a peer whose access is enabled.
    ///
    /// # Safety
    /// Both point to at least `bytes` bytes, and the ranges do not overlap.
    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;

    /// The ordinal of the GPU that `memory` belongs to; `None` if it is no device memory.
    fn owner_of(&self, memory: DevicePtr) -> Option<u32>;
    /// The ordinal of the GPU that `stream` belongs to; `None` if there is no such stream.
    fn owner_of_stream(&self, stream: Stream) -> Option<u32>;

    /// Hardware queues of this GPU. All streams of the process share them, and streams in one queue wait
    /// for each other.
    fn hardware_queues(&self) -> usize;
    /// Makes a stream that does not wait for the default stream.
    fn stream_create(&self) -> Result<Stream>;
    /// As `stream_create`; where the GPU has to choose, the stream's work goes first.
    fn stream_create_urgent(&self) -> Result<Stream>;
    /// Destroys a stream; work queued on it still completes.
    ///
    /// # Safety
    /// The stream came from [`Gpu::stream_create`] and is not used again.
    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()>;
    /// Waits until everything queued on `stream` is done.
    fn stream_synchronize(&self, stream: Stream) -> Result<()>;
    /// Waits until everything queued on this GPU, on any stream, is done.
    fn synchronize(&self) -> Result<()>;
    /// Whether everything queued on `stream` is done.
    fn stream_query(&self, stream: Stream) -> Result<bool>;
    /// Queues operations on words of memory, one after the other. A wait has no deadline.
    ///
    /// # Safety
    /// Every address is that of an aligned word that this GPU may access.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the driver has no such operations, or
    /// cannot capture them.
    unsafe fn stream_memory(&self, stream: Stream, operations: &[MemoryOp]) -> Result<()>;
    /// Makes an event that orders streams. It keeps no time, which makes a record and a wait cheaper.
    fn event_create(&self) -> Result<Event>;
    /// Makes an event that [`Gpu::event_elapsed_ms`] takes.
    fn event_create_timed(&self) -> Result<Event>;
    /// Destroys an event.
    ///
    /// # Safety
    /// The event came from [`Gpu::event_create`] or its like and is not used again.
    unsafe fn event_destroy(&self, event: Event) -> Result<()>;
    /// Queues the event on `stream`.
    fn event_record(&self, event: Event, stream: Stream) -> Result<()>;
    /// Makes `stream` wait for the event's latest record.
    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()>;
    /// Whether the event's latest record is done; true if it has none.
    fn event_query(&self, event: Event) -> Result<bool>;
    /// Waits until the event's latest record is done.
    fn event_synchronize(&self, event: Event) -> Result<()>;
    /// Milliseconds between two events of [`Gpu::event_create_timed`] that are done.
    fn event_elapsed_ms(&self, start: Event, end: Event) -> Result<f32>;

    /// How this GPU reaches `peer`.
    fn peer_access(&self, peer: u32) -> Result<PeerAccess>;
    /// Maps `peer`'s memory into this GPU. Fine if it is already.
    fn enable_peer(&self, peer: u32) -> Result<()>;

    /// Makes every kernel ready to launch, so that no later launch pays for loading.
    fn load_kernels(&self) -> Result<()>;
    /// Makes the kernels of checked calls ready too. How many blocks of `threads` threads of any of them this GPU
    /// holds at once.
    fn load_checked_kernels(&self, threads: u32) -> Result<u32>;
    /// Queues a kernel of `blocks` blocks of `threads` threads: the checked one, if `args` ask for it.
    ///
    /// # Safety
    /// Every address that `kernel` derives from `args` is what `abi::Args` says it is.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        args: &Args,
        stream: Stream,
    ) -> Result<()>;
    /// How many blocks of `threads` threads of `kernel` this GPU holds at once.
    fn resident_blocks(&self, kernel: Kernel, threads: u32) -> Result<u32>;

    /// Begins recording what is queued on `stream` instead of running it.
    fn capture_begin(&self, stream: Stream) -> Result<()>;
    /// Ends recording and makes the record executable.
    fn capture_end(&self, stream: Stream) -> Result<Graph>;
    /// Whether `stream` is being recorded.
    fn is_capturing(&self, stream: Stream) -> Result<bool>;
    /// Does something on streams that are not recorded, as if no thread recorded any: drivers may else refuse it, and end the recording.
    fn beside_captures(&self, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        action()
    }
    /// Queues a recorded graph.
    fn graph_launch(&self, graph: Graph, stream: Stream) -> Result<()>;
    /// Destroys a graph.
    ///
    /// # Safety
    /// The graph came from [`Gpu::capture_end`], is not running and is not used again.
    unsafe fn graph_destroy(&self, graph: Graph) -> Result<()>;
}

/// A shared GPU.
pub type GpuRef = Arc<dyn Gpu>;
