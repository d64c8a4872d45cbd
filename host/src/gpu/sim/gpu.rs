//! A simulated GPU behind `trait Gpu`.
//!
//! Invariant: what a call can refuse it refuses before it changes anything, as the driver does;
//! what only the running kernel shows makes the device unusable, as an illegal access does.

use super::config::Config;
use super::device::SimGpu;
use super::fail;
use super::memory::Origin;
use super::stream::{EventState, Queue};
use super::work::Work;
use crate::error::{Error, Result};
use crate::gpu::{
    Allocation, Backend, DevicePtr, Event, Exported, Gpu, Graph, HostMemory, MemoryOp, PeerAccess,
    Properties, Stream,
};
use peerlane_device::abi::{Args, Kernel, MAX_THREADS};
use std::sync::Arc;

/// Blocks that a multiprocessor holds at once, however large.
const RESIDENT_BLOCKS: u32 = 2;

impl Gpu for SimGpu {
    fn backend(&self) -> Backend {
        Backend::Sim
    }

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn simulation(&self) -> Option<Config> {
        Some(self.world.config.clone())
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        self.allocate(bytes, |memory| memory.alloc(self.ordinal(), bytes, Origin::Alloc))
    }

    unsafe fn free(&self, memory: DevicePtr) -> Result<()> {
        self.take_back("free", "memory", memory, Origin::Alloc)
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostMemory> {
        const CALL: &str = "cuMemHostAlloc";
        if bytes == 0 {
            return Err(self.error(CALL, fail::INVALID_VALUE));
        }
        let state = self.world.enter();
        state.engine.check(self.ordinal())?;
        let mut memory = state.engine.machine().memory.borrow_mut();
        let base = memory.alloc(self.ordinal(), bytes, Origin::AllocHost);
        let base = base.ok_or_else(|| self.error(CALL, fail::OUT_OF_MEMORY))?;
        Ok(HostMemory { host: base as *mut u8, device: DevicePtr(base), bytes })
    }

    unsafe fn free_host(&self, memory: HostMemory) -> Result<()> {
        self.take_back("free_host", "memory", memory.device, Origin::AllocHost)
    }

    fn alloc_shared(&self, bytes: usize) -> Result<DevicePtr> {
        self.allocate(bytes, |memory| memory.alloc_shared(self.ordinal(), bytes))
    }

    fn export(&self, memory: DevicePtr) -> Result<Exported> {
        self.export_file(memory)
    }

    fn allocation(&self, memory: DevicePtr) -> Result<Allocation> {
        self.allocation_of(memory)
    }

    fn import(&self, exported: Exported, bytes: usize, owner: u32) -> Result<DevicePtr> {
        self.import_file(&exported, bytes, owner)
    }

    unsafe fn release(&self, imported: DevicePtr) -> Result<()> {
        self.take_back("release", "imported", imported, Origin::Import)
    }

    unsafe fn register_host(&self, at: *mut u8, bytes: usize) -> Result<HostMemory> {
        self.register(at, bytes)
    }

    unsafe fn unregister_host(&self, memory: HostMemory) -> Result<()> {
        self.take_back("unregister_host", "memory", memory.device, Origin::RegisterHost)
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

    fn hardware_queues(&self) -> usize {
        self.world.config.hardware_queues
    }

    fn stream_create(&self) -> Result<Stream> {
        let engine = &mut self.world.enter().engine;
        engine.check(self.ordinal())?;
        let key = engine.handle();
        engine.streams.insert(key, Queue::new(self.ordinal()));
        Ok(Stream(key))
    }

    fn stream_create_urgent(&self) -> Result<Stream> {
        self.stream_create()
    }

    unsafe fn stream_memory(&self, stream: Stream, operations: &[MemoryOp]) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let key = self.stream(engine, "cuStreamBatchMemOp", stream)?;
        for operation in operations {
            let work = match *operation {
                MemoryOp::Wait(at, value) => Work::Await { at: at.0, value },
                MemoryOp::Write(to, value) => Work::Store { dst: to.0, value },
            };
            engine.queue(key, work);
        }
        Ok(())
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

    fn synchronize(&self) -> Result<()> {
        self.world.wait(self.ordinal(), |engine| {
            if let Err(error) = engine.check(self.ordinal()) {
                return Some(Err(error));
            }
            let own = engine.streams.iter().filter(|(_, queue)| queue.device == self.ordinal());
            own.map(|(&key, _)| key).all(|key| engine.is_done(key)).then_some(Ok(()))
        })
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

    fn event_create_timed(&self) -> Result<Event> {
        let event = self.event_create()?;
        self.world.enter().engine.timed.insert(event.0);
        Ok(event)
    }

    unsafe fn event_destroy(&self, event: Event) -> Result<()> {
        let engine = &mut self.world.enter().engine;
        let known = engine.events.remove(&event.0);
        engine.timed.remove(&event.0);
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

    fn event_query(&self, event: Event) -> Result<bool> {
        const CALL: &str = "cuEventQuery";
        let is_done = || {
            let engine = &self.world.enter().engine;
            engine.check(self.ordinal())?;
            engine.event_is_done(CALL, self.ordinal(), event.0)
        };
        if is_done()? {
            return Ok(true);
        }
        self.world.nudge();
        is_done()
    }

    fn event_synchronize(&self, event: Event) -> Result<()> {
        self.world.wait(self.ordinal(), |engine| {
            let checked = engine.check(self.ordinal());
            let is_done = checked
                .and_then(|()| engine.event_is_done("cuEventSynchronize", self.ordinal(), event.0));
            match is_done {
                Ok(false) => None,
                answer => Some(answer.map(drop)),
            }
        })
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

    fn load_checked_kernels(&self, threads: u32) -> Result<u32> {
        // The same ones: they look whether they are asked for it.
        self.resident_blocks(Kernel::Barrier, threads)
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
