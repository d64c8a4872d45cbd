//! One simulated GPU: what its calls check before they change anything.
//!
//! Invariant: what a call can refuse it refuses here, as the driver does, and has done nothing.

use super::context::Machine;
use super::engine::{Engine, default_stream};
use super::fail;
use super::kernel::Body;
use super::memory::Memory;
use super::mover::Handle;
use super::work::{Launch, Work};
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Properties, Stream};
use peerlane_device::abi::{Args, MAX_THREADS};
use std::sync::Arc;

/// One GPU of a simulated machine.
pub(super) struct SimGpu {
    pub(super) world: Arc<Handle>,
    pub(super) properties: Properties,
}

impl SimGpu {
    pub(super) fn new(world: &Arc<Handle>, ordinal: u32) -> SimGpu {
        let config = &world.config;
        let properties = Properties {
            ordinal,
            name: "Peerlane simulated GPU".into(),
            uuid: format!("GPU-50656572-6c61-6e65-5349-4d{ordinal:010x}"),
            pci_bus_id: format!("0000:{:02x}:00.0", 0x18 + 8 * ordinal),
            compute_capability: (9, 0),
            multiprocessors: config.multiprocessors,
            memory_bytes: config.memory_bytes,
        };
        SimGpu { world: Arc::clone(world), properties }
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.properties.ordinal
    }

    pub(super) fn error(&self, call: &'static str, code: fail::Code) -> Error {
        fail::driver(call, self.ordinal(), code)
    }

    /// The key of a stream of this device, if the device still works.
    pub(super) fn stream(
        &self,
        engine: &Engine,
        call: &'static str,
        stream: Stream,
    ) -> Result<u64> {
        engine.check(self.ordinal())?;
        let key = if stream.0 == 0 { default_stream(self.ordinal()) } else { stream.0 };
        match engine.streams.get(&key) {
            Some(queue) if queue.device == self.ordinal() && !queue.destroyed => Ok(key),
            _ => Err(fail::handle(call, self.ordinal())),
        }
    }

    /// Device memory that `alloc` makes, if this GPU has room for `bytes` more bytes.
    pub(super) fn allocate(
        &self,
        bytes: usize,
        alloc: impl FnOnce(&mut Memory) -> Option<u64>,
    ) -> Result<DevicePtr> {
        const CALL: &str = "cuMemAlloc";
        if bytes == 0 {
            return Err(self.error(CALL, fail::INVALID_VALUE));
        }
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let mut memory = state.engine.machine().memory.borrow_mut();
        let left = self.properties.memory_bytes.saturating_sub(memory.used(self.ordinal()));
        let base = (bytes as u64 <= left).then(|| alloc(&mut memory)).flatten();
        base.map(DevicePtr).ok_or_else(|| self.error(CALL, fail::OUT_OF_MEMORY))
    }

    /// Checks that this GPU may use `bytes` bytes of its own memory.
    pub(super) fn own(
        &self,
        machine: &Machine,
        call: &'static str,
        at: DevicePtr,
        bytes: usize,
    ) -> Result<()> {
        let memory = machine.memory.borrow();
        let found = memory.find(self.ordinal(), at.0, bytes);
        let foreign = memory.owner(at.0).is_some_and(|owner| owner != self.ordinal());
        let reason = match found {
            Ok(_) if foreign => "it is a peer's memory".to_owned(),
            Ok(_) => return Ok(()),
            Err(reason) => reason,
        };
        Err(Error::InvalidArgument {
            op: call,
            argument: "address",
            expected: format!("{bytes} bytes of memory of GPU {}", self.ordinal()),
            got: format!("{:#x}: {reason}", at.0),
        })
    }

    /// Checks that `dst` is this GPU's, or a peer's that it imported or whose access is enabled.
    pub(super) fn reachable(&self, machine: &Machine, dst: DevicePtr, bytes: usize) -> Result<()> {
        let memory = machine.memory.borrow();
        match memory.owner(dst.0) {
            Some(to)
                if !memory.peer_enabled(self.ordinal(), to)
                    && !memory.imported(self.ordinal(), dst.0) =>
            {
                Err(Error::Unreachable {
                    from: self.ordinal(),
                    to,
                    reason: "its peer access is not enabled".into(),
                })
            }
            Some(to) if to != self.ordinal() => {
                let invalid = |_| self.error("cuMemcpyAsync", fail::INVALID_VALUE);
                memory.find(self.ordinal(), dst.0, bytes).map(drop).map_err(invalid)
            }
            _ => {
                drop(memory);
                self.own(machine, "cuMemcpyAsync", dst, bytes)
            }
        }
    }

    /// Queues a kernel whose lanes run `body`.
    pub(super) fn launch_body(
        &self,
        name: &'static str,
        body: Body,
        (blocks, threads): (u32, u32),
        args: &Args,
        stream: Stream,
    ) -> Result<()> {
        const CALL: &str = "cuLaunchKernel";
        if blocks == 0 || threads == 0 {
            return Err(self.error(CALL, fail::INVALID_VALUE));
        }
        if threads > MAX_THREADS {
            return Err(self.error(CALL, fail::OUT_OF_RESOURCES));
        }
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        let device = self.ordinal();
        let launch = Launch { name, device, blocks, threads, args: *args, body };
        engine.queue(key, Work::Launch(Arc::new(launch)));
        Ok(())
    }

    /// Waits until `stream` has nothing left, then asks `then`.
    pub(super) fn finish<T>(
        &self,
        call: &'static str,
        stream: Stream,
        mut then: impl FnMut(&mut Engine) -> Result<T>,
    ) -> Result<T> {
        let key = {
            let engine = &mut self.world.enter().engine;
            let key = self.stream(engine, call, stream)?;
            engine.refuse_capture(call, key)?;
            key
        };
        self.world.wait(self.ordinal(), |engine| {
            if let Err(error) = engine.check(self.ordinal()) {
                return Some(Err(error));
            }
            engine.is_done(key).then(|| then(engine))
        })
    }

    pub(super) fn peer(&self, call: &'static str, peer: u32) -> Result<bool> {
        if peer >= self.world.config.devices || peer == self.ordinal() {
            return Err(self.error(call, fail::INVALID_DEVICE));
        }
        Ok(self.world.config.reaches(self.ordinal(), peer))
    }
}
