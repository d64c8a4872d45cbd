//! Device memory that processes share, and host memory that a GPU learns of.
//!
//! Invariant: what is taken back is undone step for step as it was made. The table of what was made
//! is looked at only by calls that make or take back memory.
//!
//! There are two ways to share. Memory of `cuMemAlloc` has a handle of 64 bytes that may travel in
//! any way, but some machines refuse it, such as containers that hide processes from each other.
//! There the memory is made from parts instead: physical memory, which is a file descriptor to other
//! processes, and addresses that it is mapped at. Within its process such memory is reached by its
//! own GPU only.

use super::call::{
    self, INVALID_VALUE, PEER_ACCESS_UNSUPPORTED, TOO_MANY_PEERS, check, code, cu, error_name,
};
use super::device::CudaGpu;
use crate::error::{Error, Result};
use crate::gpu::{Allocation, DevicePtr, Exported, Gpu, HostMemory, MemoryHandle};
use cust::sys;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

/// The environment variable that chooses how memory is exported: `vmm` for file descriptors.
/// Without it, those are the way only where the driver refuses the other.
pub const EXPORT_VARIABLE: &str = "PEERLANE_EXPORT";

/// Smaller allocations lie in blocks of this size, and an exported handle maps the whole block.
const BLOCK: usize = 2 << 20;
const HANDLE_BYTES: usize = 64;
const FILE_DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// How an address came about, for what was not simply allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// By `cuMemAlloc`; with its handle.
    Allocated(Vec<u8>),
    /// From parts; with the physical memory.
    Created { physical: u64, bytes: usize },
    /// By opening another process's handle.
    Opened,
    /// By mapping another process's physical memory.
    Mapped { bytes: usize },
}

/// Entries, not a map: a handle that is opened twice has the same address both times.
pub(super) type Table = Vec<(DevicePtr, Made)>;

impl CudaGpu {
    /// As `alloc_shared`; `parts` asks for memory made from parts.
    pub(super) fn allocate_shared(&self, bytes: usize, parts: bool) -> Result<DevicePtr> {
        if parts {
            return self.create(bytes);
        }
        let memory = self.alloc(self.whole(bytes, BLOCK)?)?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        let entered = self.enter()?;
        // SAFETY: `handle` outlives the call.
        let exported = unsafe { cu!(self.ordinal(), cuIpcGetMemHandle(&mut handle, memory.0)) };
        drop(entered);
        match exported {
            Ok(()) => {
                let handle = handle.reserved.map(|byte| byte as u8).to_vec();
                self.table().push((memory, Made::Allocated(handle)));
                Ok(memory)
            }
            Err(refusal) => {
                // SAFETY: nobody else knows of the memory.
                unsafe { self.free(memory) }?;
                self.create(bytes).map_err(|error| Error::Unsupported {
                    op: "alloc_shared",
                    reason: format!("{refusal}; {error}"),
                })
            }
        }
    }

    /// Makes memory from parts.
    fn create(&self, bytes: usize) -> Result<DevicePtr> {
        let _entered = self.enter()?;
        let properties = physical_properties(self.ordinal());
        let bytes = self.physical_bytes(bytes, self.ordinal())?;
        let mut physical = 0;
        // SAFETY: both places outlive the call.
        unsafe { cu!(self.ordinal(), cuMemCreate(&mut physical, bytes, &properties, 0)) }?;
        match self.map(physical, bytes) {
            Ok(memory) => {
                self.table().push((memory, Made::Created { physical, bytes }));
                Ok(memory)
            }
            Err(error) => {
                // SAFETY: nobody else knows of it. The first error is the one to report.
                unsafe { code!(cuMemRelease(physical)) };
                Err(error)
            }
        }
    }

    /// The size of physical memory of GPU `owner` for `bytes` bytes: exporter and importer must
    /// come to the same.
    fn physical_bytes(&self, bytes: usize, owner: u32) -> Result<usize> {
        let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        let properties = physical_properties(owner);
        let mut granularity = 0;
        // SAFETY: both places outlive the call.
        unsafe {
            cu!(self.ordinal(), cuMemGetAllocationGranularity(&mut granularity, &properties, least))
        }?;
        self.whole(bytes, granularity)
    }

    /// `bytes`, rounded up to a multiple of `block`.
    fn whole(&self, bytes: usize, block: usize) -> Result<usize> {
        let whole = bytes.checked_next_multiple_of(block).filter(|&whole| whole > 0);
        whole.ok_or_else(|| call::error(self.ordinal(), "cuMemAlloc_v2", INVALID_VALUE))
    }

    /// Maps physical memory for this GPU.
    fn map(&self, physical: u64, bytes: usize) -> Result<DevicePtr> {
        let access = sys::CUmemAccessDesc {
            location: location(self.ordinal()),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let own = self.ordinal();
        let mut at = 0;
        // SAFETY: `at` outlives the call.
        unsafe { cu!(own, cuMemAddressReserve(&mut at, bytes, 0, 0, 0)) }?;
        // SAFETY: the addresses were just reserved; `access` outlives the call.
        let mapped = unsafe {
            cu!(own, cuMemMap(at, bytes, 0, physical, 0))
                .and_then(|()| cu!(own, cuMemSetAccess(at, bytes, &access, 1)))
        };
        if let Err(error) = mapped {
            // SAFETY: nobody else knows of the addresses; if nothing is mapped there, the driver
            // says so and does nothing. The first error is the one to report.
            unsafe {
                code!(cuMemUnmap(at, bytes));
                code!(cuMemAddressFree(at, bytes));
            }
            return Err(error);
        }
        Ok(DevicePtr(at))
    }

    /// Undoes [`CudaGpu::map`].
    ///
    /// # Safety
    /// Nothing uses the memory any more.
    unsafe fn unmap(&self, memory: DevicePtr, bytes: usize) -> Result<()> {
        // SAFETY: `map` mapped all of it, and nothing uses it, as the caller says.
        unsafe {
            cu!(self.ordinal(), cuMemUnmap(memory.0, bytes))?;
            cu!(self.ordinal(), cuMemAddressFree(memory.0, bytes))
        }
    }

    /// As `free`.
    ///
    /// # Safety
    /// As for `free`.
    pub(super) unsafe fn free_device(&self, memory: DevicePtr) -> Result<()> {
        let made =
            self.take(memory, |made| matches!(made, Made::Allocated(_) | Made::Created { .. }));
        let _entered = self.enter()?;
        match made {
            // SAFETY: the caller says that nothing uses the memory; `physical` is ours.
            Some(Made::Created { physical, bytes }) => unsafe {
                let unmapped = self.unmap(memory, bytes);
                cu!(self.ordinal(), cuMemRelease(physical)).and(unmapped)
            },
            // SAFETY: the caller says that nothing uses the memory.
            _ => unsafe { cu!(self.ordinal(), cuMemFree_v2(memory.0)) },
        }
    }

    /// As `export`.
    pub(super) fn export_shared(&self, memory: DevicePtr) -> Result<Exported> {
        let made = self.table().iter().find(|(at, _)| *at == memory).map(|(_, made)| made.clone());
        match made {
            Some(Made::Allocated(handle)) => {
                Ok(Exported { handle: MemoryHandle::Ipc(handle), file: None })
            }
            Some(Made::Created { physical, .. }) => {
                let _entered = self.enter()?;
                let mut file = -1_i32;
                let to = (&raw mut file).cast();
                // SAFETY: for this kind of handle the driver writes one `int`, and `file` outlives
                // the call.
                unsafe {
                    cu!(
                        self.ordinal(),
                        cuMemExportToShareableHandle(to, physical, FILE_DESCRIPTOR, 0)
                    )
                }?;
                // SAFETY: the driver just opened it for us.
                let file = unsafe { OwnedFd::from_raw_fd(file) };
                Ok(Exported { handle: MemoryHandle::File, file: Some(file) })
            }
            _ => Err(self.not_from("export", "memory", "alloc_shared", memory)),
        }
    }

    /// As `export_any`.
    pub(super) fn export_allocation(&self, base: DevicePtr) -> Result<Exported> {
        let is_known = self.table().iter().any(|(at, _)| *at == base);
        if is_known {
            return self.export_shared(base);
        }
        let _entered = self.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: `handle` outlives the call. The driver checks the address.
        unsafe { cu!(self.ordinal(), cuIpcGetMemHandle(&mut handle, base.0)) }?;
        let handle = handle.reserved.map(|byte| byte as u8).to_vec();
        Ok(Exported { handle: MemoryHandle::Ipc(handle), file: None })
    }

    /// As `allocation`.
    pub(super) fn allocation_of(&self, memory: DevicePtr) -> Result<Allocation> {
        if self.owner_of(memory) != Some(self.ordinal()) {
            return Err(Error::InvalidArgument {
                op: "allocation",
                argument: "memory",
                expected: format!("memory of GPU {}", self.ordinal()),
                got: format!("{:#x}", memory.0),
            });
        }
        let _entered = self.enter()?;
        let number = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
        // True for memory of cuMemAlloc only: that of pools, or mapped from parts, is reached by those GPUs that
        // it was opened to.
        let capable = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
        let (mut base, mut bytes, mut id, mut is_plain) = (0, 0, 0_u64, 0_i32);
        // SAFETY: all places outlive the calls; the first attribute is a 64-bit number, the second at most an
        // `int`. The address is looked up, not followed.
        unsafe {
            cu!(self.ordinal(), cuMemGetAddressRange_v2(&mut base, &mut bytes, memory.0))?;
            cu!(self.ordinal(), cuPointerGetAttribute((&raw mut id).cast(), number, memory.0))?;
            cu!(
                self.ordinal(),
                cuPointerGetAttribute((&raw mut is_plain).cast(), capable, memory.0)
            )?;
        }
        Ok(Allocation { base: DevicePtr(base), bytes, id, peers_reach: is_plain != 0 })
    }

    /// As `import`.
    pub(super) fn import_shared(
        &self,
        exported: &Exported,
        bytes: usize,
        owner: u32,
    ) -> Result<DevicePtr> {
        if !self.peer_access(owner)?.access {
            return Err(self.unreachable(owner, "the driver cannot map its memory here".into()));
        }
        let entered = self.enter()?;
        let (memory, made) = match (&exported.handle, &exported.file) {
            (MemoryHandle::Ipc(handle), _) => {
                (self.open_handle(handle, bytes, owner)?, Made::Opened)
            }
            (MemoryHandle::File, Some(file)) => {
                let bytes = self.physical_bytes(bytes, owner)?;
                (self.map_file(file, bytes)?, Made::Mapped { bytes })
            }
            (MemoryHandle::File, None) => {
                return Err(bad_handle("a file descriptor beside the handle", "none".into()));
            }
        };
        drop(entered);
        self.table().push((memory, made));
        Ok(memory)
    }

    fn open_handle(&self, handle: &[u8], bytes: usize, owner: u32) -> Result<DevicePtr> {
        let Ok(handle) = <[u8; HANDLE_BYTES]>::try_from(handle) else {
            return Err(bad_handle("a handle of 64 bytes", format!("{} bytes", handle.len())));
        };
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut memory = 0;
        // SAFETY: `memory` outlives the call. The driver checks the handle.
        match unsafe { code!(cuIpcOpenMemHandle_v2(&mut memory, handle, flags)) } {
            code @ (PEER_ACCESS_UNSUPPORTED | TOO_MANY_PEERS) => {
                Err(self.unreachable(owner, error_name(code)))
            }
            code => {
                check(self.ordinal(), "cuIpcOpenMemHandle_v2", code)?;
                self.check_range(memory, bytes).inspect_err(|_| {
                    // SAFETY: opened above, and nobody else knows of it. The first error is the one to report.
                    unsafe { code!(cuIpcCloseMemHandle(memory)) };
                })?;
                Ok(DevicePtr(memory))
            }
        }
    }

    /// That what a handle has opened holds `bytes` bytes: the handle says nothing of its size, and who sent it
    /// could say anything.
    fn check_range(&self, memory: u64, bytes: usize) -> Result<()> {
        let (mut base, mut size) = (0, 0);
        // SAFETY: both places outlive the call. The address is looked up, not followed.
        unsafe { cu!(self.ordinal(), cuMemGetAddressRange_v2(&mut base, &mut size, memory)) }?;
        let left = base.checked_add(size as u64).and_then(|end| end.checked_sub(memory));
        if left.is_some_and(|left| left >= bytes as u64) {
            return Ok(());
        }
        Err(bad_handle(&format!("memory of {bytes} bytes"), format!("{size} bytes")))
    }

    fn map_file(&self, file: &OwnedFd, bytes: usize) -> Result<DevicePtr> {
        let file = file.as_raw_fd() as usize as *mut c_void;
        let mut physical = 0;
        // SAFETY: `physical` outlives the call; for this kind of handle the driver takes the
        // descriptor's number in the pointer's place, and opens the file once more.
        unsafe {
            cu!(
                self.ordinal(),
                cuMemImportFromShareableHandle(&mut physical, file, FILE_DESCRIPTOR)
            )
        }?;
        let memory = self.map(physical, bytes);
        // SAFETY: the handle is ours; what is mapped stays until it is unmapped.
        let released = unsafe { cu!(self.ordinal(), cuMemRelease(physical)) };
        let memory = memory?;
        if let Err(error) = released {
            // SAFETY: nobody else knows of the memory. The first error is the one to report.
            let _ = unsafe { self.unmap(memory, bytes) };
            return Err(error);
        }
        Ok(memory)
    }

    /// As `release`.
    ///
    /// # Safety
    /// As for `release`.
    pub(super) unsafe fn release_import(&self, imported: DevicePtr) -> Result<()> {
        let made = self.take(imported, |made| matches!(made, Made::Opened | Made::Mapped { .. }));
        let _entered = self.enter()?;
        match made {
            // SAFETY: the caller says that nothing uses the memory.
            Some(Made::Mapped { bytes }) => unsafe { self.unmap(imported, bytes) },
            // SAFETY: as above.
            Some(_) => unsafe { cu!(self.ordinal(), cuIpcCloseMemHandle(imported.0)) },
            None => Err(self.not_from("release", "imported", "import", imported)),
        }
    }

    /// As `register_host`.
    ///
    /// # Safety
    /// As for `register_host`.
    pub(super) unsafe fn register(&self, at: *mut u8, bytes: usize) -> Result<HostMemory> {
        let _entered = self.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        let host = at.cast::<c_void>();
        let mut device = 0;
        // SAFETY: the range stays mapped until it is unregistered, as the caller says.
        unsafe { cu!(self.ordinal(), cuMemHostRegister_v2(host, bytes, flags)) }?;
        // SAFETY: `device` outlives the call.
        let mapped =
            unsafe { cu!(self.ordinal(), cuMemHostGetDevicePointer_v2(&mut device, host, 0)) };
        if let Err(error) = mapped {
            // SAFETY: nothing uses the mapping yet. The first error is the one to report.
            unsafe { code!(cuMemHostUnregister(host)) };
            return Err(error);
        }
        Ok(HostMemory { host: at, device: DevicePtr(device), bytes })
    }

    /// Takes the first entry for `memory` of a kind out of the table.
    fn take(&self, memory: DevicePtr, kind: impl Fn(&Made) -> bool) -> Option<Made> {
        let mut table = self.table();
        let index = table.iter().position(|(at, made)| *at == memory && kind(made))?;
        Some(table.swap_remove(index).1)
    }

    fn unreachable(&self, to: u32, reason: String) -> Error {
        Error::Unreachable { from: self.ordinal(), to, reason }
    }

    fn not_from(
        &self,
        op: &'static str,
        argument: &'static str,
        source: &str,
        got: DevicePtr,
    ) -> Error {
        Error::InvalidArgument {
            op,
            argument,
            expected: format!("what {source} of GPU {} returned", self.ordinal()),
            got: format!("{:#x}", got.0),
        }
    }
}

/// Whether the environment asks for memory made from parts.
pub(super) fn wants_parts(value: Option<&str>) -> Result<bool> {
    match value {
        None => Ok(false),
        Some("vmm") => Ok(true),
        Some(other) => Err(Error::InvalidArgument {
            op: "alloc_shared",
            argument: EXPORT_VARIABLE,
            expected: "vmm, or that it is not set".into(),
            got: other.to_owned(),
        }),
    }
}

fn bad_handle(expected: &str, got: String) -> Error {
    Error::InvalidArgument { op: "import", argument: "exported", expected: expected.into(), got }
}

fn location(ordinal: u32) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: ordinal as i32,
    }
}

/// Physical memory of a GPU that can be exported as a file descriptor.
fn physical_properties(owner: u32) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FILE_DESCRIPTOR,
        location: location(owner),
        win32HandleMetaData: null_mut(),
        allocFlags: Default::default(),
    }
}
