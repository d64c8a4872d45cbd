//! Memory that worlds share, and host memory that a GPU learns of.
//!
//! Invariant: as for every call, what can be refused is refused before anything changes. A world
//! knows of another only through memory: neither waits for the other to free, import or release.

use super::backing::Backing;
use super::device::SimGpu;
use super::fail;
use super::memory::Origin;
use crate::error::{Error, Result};
use crate::gpu::{Allocation, DevicePtr, Exported, HostMemory, MemoryHandle};
use std::os::fd::OwnedFd;

/// What registered host memory is aligned to, as the trait says.
const PAGE: usize = 4096;

impl SimGpu {
    /// Describes memory of `alloc_shared` to another world.
    pub(super) fn export_file(&self, memory: DevicePtr) -> Result<Exported> {
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let mut map = state.engine.machine().memory.borrow_mut();
        let Some(file) = map.export(self.ordinal(), memory.0) else {
            return Err(Error::InvalidArgument {
                op: "export",
                argument: "memory",
                expected: format!("what alloc_shared of GPU {} returned", self.ordinal()),
                got: map.describe(memory.0),
            });
        };
        let file = file.try_clone().map_err(|error| Error::Unsupported {
            op: "export",
            reason: format!("the file cannot be opened once more: {error}"),
        })?;
        Ok(Exported { handle: MemoryHandle::File, file: Some(file) })
    }

    /// The allocation of this GPU that `memory` lies in.
    pub(super) fn allocation_of(&self, memory: DevicePtr) -> Result<Allocation> {
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let map = state.engine.machine().memory.borrow();
        map.allocation(self.ordinal(), memory.0).ok_or_else(|| Error::InvalidArgument {
            op: "allocation",
            argument: "memory",
            expected: format!("memory of GPU {}", self.ordinal()),
            got: map.describe(memory.0),
        })
    }

    /// Maps what another world exported.
    pub(super) fn import_file(
        &self,
        exported: &Exported,
        bytes: usize,
        owner: u32,
    ) -> Result<DevicePtr> {
        let invalid = |argument, expected: String, got| Error::InvalidArgument {
            op: "import",
            argument,
            expected,
            got,
        };
        let (own, config) = (self.ordinal(), &self.world.config);
        if owner >= config.devices {
            let expected = format!("an ordinal below {}", config.devices);
            return Err(invalid("owner", expected, owner.to_string()));
        }
        if owner != own && !config.reaches(own, owner) {
            return Err(Error::Unreachable {
                from: own,
                to: owner,
                reason: "the simulated machine has no link between them".into(),
            });
        }
        let expected = || format!("a file of {bytes} bytes that a simulated GPU exported");
        let file = file_of(exported).map_err(|got| invalid("exported", expected(), got))?;
        let state = self.world.enter();
        state.engine.check(own)?;
        let backing = Backing::import(file, bytes);
        let backing = backing.map_err(|got| invalid("exported", expected(), got))?;
        let mut map = state.engine.machine().memory.borrow_mut();
        Ok(DevicePtr(map.add(backing, Origin::Import, owner, own)))
    }

    /// Lets kernels of this GPU touch host memory that the caller has.
    pub(super) fn register(&self, at: *mut u8, bytes: usize) -> Result<HostMemory> {
        const CALL: &str = "cuMemHostRegister";
        let aligned = |value: usize| value != 0 && value.is_multiple_of(PAGE);
        let base = at as u64;
        if !aligned(at.addr()) || !aligned(bytes) || base.checked_add(bytes as u64).is_none() {
            return Err(Error::InvalidArgument {
                op: "register_host",
                argument: "at and bytes",
                expected: format!("multiples of {PAGE} above 0"),
                got: format!("{base:#x} and {bytes}"),
            });
        }
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let mut map = state.engine.machine().memory.borrow_mut();
        if map.overlaps(&(base..base + bytes as u64)) {
            return Err(self.error(CALL, fail::ALREADY_REGISTERED));
        }
        map.add(
            Backing::borrowed(base, bytes),
            Origin::RegisterHost,
            self.ordinal(),
            self.ordinal(),
        );
        Ok(HostMemory { host: at, device: DevicePtr(base), bytes })
    }

    /// Takes back what one of this GPU's calls gave. It stays readable for stores on their way
    /// until no kernel runs.
    pub(super) fn take_back(
        &self,
        op: &'static str,
        argument: &'static str,
        memory: DevicePtr,
        origin: Origin,
    ) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        if engine.free(self.ordinal(), memory.0, origin) {
            return Ok(());
        }
        let source = match origin {
            Origin::Alloc => "alloc or alloc_shared",
            Origin::AllocHost => "alloc_host",
            Origin::Import => "import",
            Origin::RegisterHost => "register_host",
        };
        Err(Error::InvalidArgument {
            op,
            argument,
            expected: format!("what {source} of GPU {} returned", self.ordinal()),
            got: engine.machine().memory.borrow().describe(memory.0),
        })
    }
}

/// The file that came, or what came instead.
fn file_of(exported: &Exported) -> std::result::Result<&OwnedFd, String> {
    match (&exported.handle, &exported.file) {
        (MemoryHandle::File, Some(file)) => Ok(file),
        (MemoryHandle::File, None) => Err("no file".into()),
        (MemoryHandle::Ipc(bytes), _) => {
            Err(format!("the handle of a real GPU's memory, {} bytes", bytes.len()))
        }
    }
}
