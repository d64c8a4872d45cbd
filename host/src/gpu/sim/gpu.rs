//! A simulated GPU behind `trait Gpu`.
//!
//! Invariant: what a call can refuse it refuses before it changes anything, as the driver does;
//! what only the running kernel shows makes the device unusable, as an illegal access does.

use super::context::Machine;
use super::engine::{Engine, default_stream};
use super::fail;
use super::kernel::Body;
use super::stream::{EventState, Queue};
use super::work::{Launch, Work};
use super::world::Shared;
use crate::error::{Error, Result};
use crate::gpu::{
    Backend, DevicePtr, Event, Gpu, Graph, HostMemory, PeerAccess, Properties, Stream,
};
use peerlane_device::abi::{Args, Kernel, MAX_THREADS};
use std::sync::Arc;

/// Blocks that a multiprocessor holds at once, however large.
const RESIDENT_BLOCKS: u32 = 2;

/// One GPU of a simulated machine.
pub(super) struct SimGpu {
    world: Arc<Shared>,
    properties: Properties,
}

impl SimGpu {
    pub(super) fn new(world: &Arc<Shared>, ordinal: u32) -> SimGpu {
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

    fn ordinal(&self) -> u32 {
        self.properties.ordinal
    }

    fn error(&self, call: &'static str, code: fail::Code) -> Error {
        fail::driver(call, self.ordinal(), code)
    }

    /// The key of a stream of this device, if the device still works.
    fn stream(&self, engine: &Engine, call: &'static str, stream: Stream) -> Result<u64> {
        engine.check(self.ordinal())?;
        let key = if stream.0 == 0 { default_stream(self.ordinal()) } else { stream.0 };
        match engine.streams.get(&key) {
            Some(queue) if queue.device == self.ordinal() && !queue.destroyed => Ok(key),
            _ => Err(fail::handle(call, self.ordinal())),
        }
    }

    /// Checks that this GPU may use `bytes` bytes of its own memory.
    fn own(
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

    /// Checks that `dst` is this GPU's or a peer's whose access is enabled.
    fn reachable(&self, machine: &Machine, dst: DevicePtr, bytes: usize) -> Result<()> {
        let memory = machine.memory.borrow();
        match memory.owner(dst.0) {
            Some(to) if !memory.peer_enabled(self.ordinal(), to) => Err(Error::Unreachable {
                from: self.ordinal(),
                to,
                reason: "its peer access is not enabled".into(),
            }),
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
    fn finish<T>(
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

    fn peer(&self, call: &'static str, peer: u32) -> Result<bool> {
        if peer >= self.world.config.devices || peer == self.ordinal() {
            return Err(self.error(call, fail::INVALID_DEVICE));
        }
        Ok(self.world.config.reaches(self.ordinal(), peer))
    }
}

impl Gpu for SimGpu {
    fn backend(&self) -> Backend {
        Backend::Sim
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        const CALL: &str = "cuMemAlloc";
        if bytes == 0 {
            return Err(self.error(CALL, fail::INVALID_VALUE));
        }
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let mut memory = state.engine.machine().memory.borrow_mut();
        let left = self.properties.memory_bytes.saturating_sub(memory.used(self.ordinal()));
        let fits = bytes as u64 <= left;
        let base = fits.then(|| memory.alloc(self.ordinal(), bytes, false)).flatten();
        base.map(DevicePtr).ok_or_else(|| self.error(CALL, fail::OUT_OF_MEMORY))
    }

    unsafe fn free(&self, memory: DevicePtr) -> Result<()> {
        self.world.enter().engine.free(self.ordinal(), memory.0, false)
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostMemory> {
        const CALL: &str = "cuMemHostAlloc";
        if bytes == 0 {
            return Err(self.error(CALL, fail::INVALID_VALUE));
        }
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let base = state.engine.machine().memory.borrow_mut().alloc(self.ordinal(), bytes, true);
        let base = base.ok_or_else(|| self.error(CALL, fail::OUT_OF_MEMORY))?;
        Ok(HostMemory { host: base as *mut u8, device: DevicePtr(base), bytes })
    }

    unsafe fn free_host(&self, memory: HostMemory) -> Result<()> {
        self.world.enter().engine.free(self.ordinal(), memory.device.0, true)
    }

    unsafe fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<()> {
        const CALL: &str = "cuMemcpyHtoDAsync";
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        if src.is_empty() {
            return Ok(());
        }
        self.own(engine.machine(), CALL, dst, src.len())?;
        engine.queue(key, Work::Write { dst: dst.0, data: src.into() });
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr, stream: Stream) -> Result<()> {
        const CALL: &str = "cuMemcpyDtoHAsync";
        self.finish(CALL, stream, |engine| {
            if dst.is_empty() {
                return Ok(());
            }
            self.own(engine.machine(), CALL, src, dst.len())?;
            // SAFETY: checked; no lane runs while the lock is held, and `dst` is the caller's.
            unsafe {
                std::ptr::copy_nonoverlapping(src.0 as *const u8, dst.as_mut_ptr(), dst.len());
            }
            Ok(())
        })
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<()> {
        const CALL: &str = "cuMemsetD8Async";
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        if bytes == 0 {
            return Ok(());
        }
        self.own(engine.machine(), CALL, dst, bytes)?;
        engine.queue(key, Work::Fill { dst: dst.0, value, bytes });
        Ok(())
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        const CALL: &str = "cuMemcpyAsync";
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        if bytes == 0 {
            return Ok(());
        }
        self.own(engine.machine(), CALL, src, bytes)?;
        self.reachable(engine.machine(), dst, bytes)?;
        engine.queue(key, Work::Copy { dst: dst.0, src: src.0, bytes });
        Ok(())
    }

    fn owner_of(&self, memory: DevicePtr) -> Option<u32> {
        self.world.enter().engine.machine().memory.borrow().owner(memory.0)
    }

    fn owner_of_stream(&self, stream: Stream) -> Option<u32> {
        if stream.0 == 0 {
            return Some(self.ordinal());
        }
        let state = self.world.enter();
        let queue = state.engine.streams.get(&stream.0).filter(|queue| !queue.destroyed);
        queue.map(|queue| queue.device)
    }

    fn stream_create(&self) -> Result<Stream> {
        let engine = &mut self.world.enter().engine;
        engine.check(self.ordinal())?;
        let key = engine.handle();
        engine.streams.insert(key, Queue::new(self.ordinal()));
        Ok(Stream(key))
    }

    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        match engine.streams.get_mut(&stream.0) {
            Some(queue) if queue.device == self.ordinal() && !queue.destroyed => {
                queue.destroyed = true;
                engine.stirred = true;
                Ok(())
            }
            _ => Err(fail::handle("cuStreamDestroy", self.ordinal())),
        }
    }

    fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        self.finish("cuStreamSynchronize", stream, |_| Ok(()))
    }

    fn stream_query(&self, stream: Stream) -> Result<bool> {
        const CALL: &str = "cuStreamQuery";
        {
            let engine = &mut self.world.enter().engine;
            let key = self.stream(engine, CALL, stream)?;
            engine.refuse_capture(CALL, key)?;
            if engine.is_done(key) {
                return Ok(true);
            }
        }
        self.world.nudge();
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        Ok(engine.is_done(key))
    }

    fn event_create(&self) -> Result<Event> {
        let engine = &mut self.world.enter().engine;
        engine.check(self.ordinal())?;
        let event = engine.handle();
        engine.events.insert(event, (self.ordinal(), EventState::New));
        Ok(Event(event))
    }

    unsafe fn event_destroy(&self, event: Event) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let known = engine.events.remove(&event.0);
        known.map(drop).ok_or_else(|| fail::handle("cuEventDestroy", self.ordinal()))
    }

    fn event_record(&self, event: Event, stream: Stream) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuEventRecord", stream)?;
        engine.record(self.ordinal(), event.0, key)
    }

    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuStreamWaitEvent", stream)?;
        engine.wait(self.ordinal(), key, event.0)
    }

    fn event_elapsed_ms(&self, start: Event, end: Event) -> Result<f32> {
        let engine = &self.world.enter().engine;
        engine.check(self.ordinal())?;
        engine.elapsed_ms(self.ordinal(), start.0, end.0)
    }

    fn peer_access(&self, peer: u32) -> Result<PeerAccess> {
        let access = self.peer("cuDeviceCanAccessPeer", peer)?;
        Ok(PeerAccess { access, native_atomics: false, performance_rank: i32::from(!access) })
    }

    fn enable_peer(&self, peer: u32) -> Result<()> {
        if !self.peer("cuCtxEnablePeerAccess", peer)? {
            return Err(Error::Unreachable {
                from: self.ordinal(),
                to: peer,
                reason: "the simulated machine has no link between them".into(),
            });
        }
        let state = self.world.enter();
        state.engine.machine().memory.borrow_mut().enable_peer(self.ordinal(), peer);
        Ok(())
    }

    fn load_kernels(&self) -> Result<()> {
        self.world.enter().engine.check(self.ordinal())
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        args: &Args,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: the simulator checks every access; the addresses may be anything.
        let body = move |lane, args: &Args| unsafe {
            peerlane_device::kernels::run(kernel, lane, args);
        };
        self.launch_body(kernel.symbol(), Arc::new(body), (blocks, threads), args, stream)
    }

    fn resident_blocks(&self, _: Kernel, threads: u32) -> Result<u32> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(
                self.error("cuOccupancyMaxActiveBlocksPerMultiprocessor", fail::INVALID_VALUE)
            );
        }
        Ok(RESIDENT_BLOCKS * self.properties.multiprocessors)
    }

    fn capture_begin(&self, stream: Stream) -> Result<()> {
        const CALL: &str = "cuStreamBeginCapture";
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, CALL, stream)?;
        if stream.0 == 0 {
            return Err(self.error(CALL, fail::CAPTURE_UNSUPPORTED));
        }
        engine.capture_begin(self.ordinal(), key)
    }

    fn capture_end(&self, stream: Stream) -> Result<Graph> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuStreamEndCapture", stream)?;
        engine.capture_end(self.ordinal(), key).map(Graph)
    }

    fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuStreamIsCapturing", stream)?;
        Ok(engine.streams.get(&key).is_some_and(|queue| queue.capture.is_some()))
    }

    fn graph_launch(&self, graph: Graph, stream: Stream) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuGraphLaunch", stream)?;
        engine.graph_launch(self.ordinal(), graph.0, key)
    }

    unsafe fn graph_destroy(&self, graph: Graph) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let known = engine.graphs.remove(&graph.0);
        known.map(drop).ok_or_else(|| fail::handle("cuGraphExecDestroy", self.ordinal()))
    }
}
