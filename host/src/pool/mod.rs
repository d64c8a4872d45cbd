//! Memory that is allocated once and used again, in the order of streams.
//!
//! A [`Pool`] hands out [`Block`]s of device memory, of pinned host memory or of memory that other
//! processes can map, over any [`Gpu`]. Allocation by the driver takes tens of microseconds and may wait
//! for the whole GPU; a block that is used again costs an event.
//!
//! Invariants: two blocks that are alive never overlap. Work queued on a block's stream after
//! [`Pool::alloc`] runs after all work that was queued for the block's last holder before it let go.
//! The pool never holds more than its limit.
//!
//! [`Gpu`]: crate::gpu::Gpu

mod classes;
mod state;
mod stats;
#[cfg(test)]
mod tests;

pub use stats::Stats;

use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Exported, GpuRef, Stream};
use state::{Chunk, Memory, State};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the memory of a pool lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// On the GPU.
    Device,
    /// On the host, pinned and mapped into the GPU.
    Host,
    /// On the GPU, in memory that other processes can map.
    Shared,
}

/// What a pool may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where its memory lies.
    pub kind: Kind,
    /// Most bytes that it takes from the driver.
    pub limit: usize,
    /// Test only: hands blocks from one stream to another without waiting.
    #[doc(hidden)]
    pub broken: bool,
}

impl Config {
    /// A pool of `kind` that takes at most `limit` bytes.
    pub const fn new(kind: Kind, limit: usize) -> Config {
        Config { kind, limit, broken: false }
    }
}

/// Memory of one GPU that is used again. Clones share it; it goes with the last clone and block.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

impl Pool {
    /// An empty pool on `gpu`.
    pub fn new(gpu: &GpuRef, config: Config) -> Result<Pool> {
        let own = gpu.stream_create()?;
        let state = Mutex::new(State::default());
        Ok(Pool(Arc::new(Inner { gpu: gpu.clone(), config, own, state })))
    }

    /// A block of at least `bytes` bytes, with undefined content, for work on `stream`.
    ///
    /// An idle block of the same class is used again: one that was freed on `stream` if there is one, else
    /// the one that was freed first, and `stream` then waits for what was queued for it. With none, the
    /// driver is asked; where the limit is in the way, idle blocks of other classes go first, which waits
    /// on the host for work queued on them.
    ///
    /// # Errors
    /// If `bytes` is 0 or does not fit in the limit beside the blocks in use; if `stream` is being
    /// captured, since a graph runs again when the block may have another holder; if the driver has no
    /// memory.
    pub fn alloc(&self, bytes: usize, stream: Stream) -> Result<Block> {
        let inner = &self.0;
        let class = inner.class(bytes)?;
        if inner.gpu.is_capturing(stream)? {
            return Err(Error::Unsupported { op: OP, reason: CAPTURING.into() });
        }
        let mut state = inner.lock();
        let chunk = match state.take(class, stream) {
            Some(chunk) => {
                if let Err(error) = inner.order(&chunk, stream) {
                    state.put(class, chunk);
                    return Err(error);
                }
                state.stats.hits += 1;
                chunk
            }
            None => {
                let chunk = inner.grow(&mut state, bytes, class)?;
                state.stats.misses += 1;
                chunk
            }
        };
        state.taken(bytes, class);
        drop(state);
        Ok(Block { inner: inner.clone(), chunk, bytes, class, stream })
    }

    /// Takes memory from the driver for `blocks` blocks of `bytes` bytes, beyond those that are idle, so
    /// that later requests find it.
    ///
    /// # Errors
    /// As for [`Pool::alloc`]; blocks made until then stay.
    pub fn reserve(&self, bytes: usize, blocks: usize) -> Result<()> {
        let class = self.0.class(bytes)?;
        let mut state = self.0.lock();
        for _ in 0..blocks {
            let more = class.saturating_add(state.stats.reserved());
            if more > self.0.config.limit {
                return Err(self.0.too_large(bytes, state.stats.reserved(), "reserved"));
            }
            let chunk = self.0.create(class)?;
            state.put(class, chunk);
        }
        Ok(())
    }

    /// Gives idle blocks back to the driver, large ones first, until no more than `keep` bytes are
    /// reserved; the bytes given back. Waits on the host for work queued on them. Exported blocks stay,
    /// since other processes may have them mapped.
    pub fn trim(&self, keep: usize) -> Result<usize> {
        self.0.shrink(&mut self.0.lock(), keep)
    }

    /// Lets the pool follow the workload: gives back idle blocks that were needed neither since the last call nor between
    /// that and the one before, so that a phase of the workload that comes back finds its blocks. Returns the bytes given back. For callers that
    /// know when a round of work ends. Waits on the host for work queued on what it gives back. Exported blocks stay.
    pub fn adapt(&self) -> Result<usize> {
        let mut state = self.0.lock();
        let before = state.stats.reserved();
        let mut outcome = Ok(());
        for (class, chunk) in state.take_spare() {
            let given = self.0.give_up(&mut state, class, chunk);
            outcome = outcome.and(given);
        }
        outcome.map(|()| before - state.stats.reserved())
    }

    /// What the pool holds and has done.
    pub fn stats(&self) -> Stats {
        self.0.lock().stats
    }

    /// Where its memory lies.
    pub fn kind(&self) -> Kind {
        self.0.config.kind
    }

    /// Most bytes that it takes from the driver.
    pub fn limit(&self) -> usize {
        self.0.config.limit
    }
}

/// Memory of a pool. Dropped, it goes back: whatever its stream has queued by then still runs on it
/// before another holder's work does. Work on other streams must be ordered before that by the holder.
pub struct Block {
    inner: Arc<Inner>,
    chunk: Chunk,
    bytes: usize,
    class: usize,
    stream: Stream,
}

impl Block {
    /// Where kernels of the pool's GPU find it.
    pub fn device(&self) -> DevicePtr {
        self.chunk.memory.device()
    }

    /// Where the host finds it; `None` unless the pool is of [`Kind::Host`]. The host may touch it once
    /// the block's stream has been waited for after [`Pool::alloc`] ([`Block::wait`]), and as long as no
    /// queued work does.
    pub fn host(&self) -> Option<*mut u8> {
        match self.chunk.memory {
            Memory::Host(memory) => Some(memory.host),
            Memory::Device(_) => None,
        }
    }

    /// What was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the block holds.
    pub fn capacity(&self) -> usize {
        self.class
    }

    /// The stream on which it is used and freed.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Waits on the host for everything queued on the block's stream, the last holder's work with it.
    pub fn wait(&self) -> Result<()> {
        self.inner.gpu.stream_synchronize(self.stream)
    }

    /// Hands the block on to `stream`, which from now on waits for what is queued on the block's own.
    ///
    /// # Errors
    /// If either stream is being captured or is gone; the block is then as it was.
    pub fn move_to(&mut self, stream: Stream) -> Result<()> {
        let gpu = &self.inner.gpu;
        if gpu.is_capturing(self.stream)? || gpu.is_capturing(stream)? {
            return Err(Error::Unsupported { op: OP, reason: CAPTURING.into() });
        }
        gpu.event_record(self.chunk.event, self.stream)?;
        gpu.stream_wait(stream, self.chunk.event)?;
        self.stream = stream;
        Ok(())
    }

    /// Describes the block to another process. It is at the beginning of what that process maps.
    ///
    /// # Errors
    /// If the pool is not of [`Kind::Shared`].
    ///
    /// # Safety
    /// Every process that maps it releases it before the pool and its blocks are gone, and does not use it
    /// after the block is.
    pub unsafe fn export(&mut self) -> Result<Exported> {
        if self.inner.config.kind != Kind::Shared {
            let reason = "only a pool of shared memory has blocks to export".into();
            return Err(Error::Unsupported { op: OP, reason });
        }
        let exported = self.inner.gpu.export(self.device())?;
        self.chunk.exported = true;
        Ok(exported)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.inner.give_back(self.chunk, self.bytes, self.class, self.stream);
    }
}

/// The name of this module's calls in errors.
const OP: &str = "pool";
/// Why a capture is refused.
const CAPTURING: &str =
    "the stream is being captured: take blocks before, and keep them as long as the graph";

struct Inner {
    gpu: GpuRef,
    config: Config,
    /// Where the host waits for events: no work is ever queued on it.
    own: Stream,
    state: Mutex<State>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever held the lock and panicked has left the books whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn class(&self, bytes: usize) -> Result<usize> {
        let class =
            classes::class_of(self.config.kind, bytes).filter(|class| *class <= self.config.limit);
        class.ok_or_else(|| Error::InvalidArgument {
            op: OP,
            argument: "bytes",
            expected: format!(
                "1 to {} bytes, by the pool's limit of {}",
                classes::largest_within(self.config.kind, self.config.limit),
                self.config.limit
            ),
            got: bytes.to_string(),
        })
    }

    fn too_large(&self, bytes: usize, held: usize, how: &str) -> Error {
        let limit = self.config.limit;
        Error::InvalidArgument {
            op: OP,
            argument: "bytes",
            expected: format!(
                "a block of at most {} bytes: {held} of the limit of {limit} are {how}",
                classes::largest_within(self.config.kind, limit - held)
            ),
            got: bytes.to_string(),
        }
    }

    /// Makes `stream` wait for the chunk's last holder. Also where that was the same stream: its handle
    /// may since have been destroyed and given to a new one, and a wait for the own past costs nothing.
    fn order(&self, chunk: &Chunk, stream: Stream) -> Result<()> {
        if chunk.freed_on.is_none() || self.config.broken {
            return Ok(());
        }
        self.gpu.stream_wait(stream, chunk.event)
    }

    /// Waits on the host for the chunk's last holder.
    fn settle(&self, chunk: &Chunk) -> Result<()> {
        if chunk.freed_on.is_none() {
            return Ok(());
        }
        self.gpu.stream_wait(self.own, chunk.event)?;
        self.gpu.stream_synchronize(self.own)
    }

    /// New memory for a class, within the limit.
    fn grow(&self, state: &mut State, bytes: usize, class: usize) -> Result<Chunk> {
        let room = self.config.limit - class;
        let busy = state.stats.in_use + state.stats.retired;
        if busy > room {
            return Err(self.too_large(bytes, busy, "in use"));
        }
        self.shrink(state, room)?;
        if state.stats.reserved() > room {
            return Err(self.too_large(bytes, state.stats.reserved(), "in use"));
        }
        match self.create(class) {
            // The driver's memory may be short by what lies idle here.
            Err(Error::Driver { .. }) if state.stats.idle > 0 => {
                self.shrink(state, 0)?;
                self.create(class)
            }
            created => created,
        }
    }

    fn create(&self, class: usize) -> Result<Chunk> {
        let memory = match self.config.kind {
            Kind::Device => Memory::Device(self.gpu.alloc(class)?),
            Kind::Host => Memory::Host(self.gpu.alloc_host(class)?),
            Kind::Shared => Memory::Device(self.gpu.alloc_shared(class)?),
        };
        match self.gpu.event_create() {
            Ok(event) => Ok(Chunk { memory, event, freed_on: None, exported: false }),
            Err(error) => {
                // SAFETY: allocated above and used by nobody.
                unsafe { self.free(memory)? };
                Err(error)
            }
        }
    }

    /// Gives idle memory back until `keep` bytes or less are reserved.
    fn shrink(&self, state: &mut State, keep: usize) -> Result<usize> {
        let before = state.stats.reserved();
        while state.stats.reserved() > keep {
            let Some((class, chunk)) = state.take_largest() else { break };
            self.give_up(state, class, chunk)?;
        }
        Ok(before - state.stats.reserved())
    }

    /// Gives a chunk that was idle back to the driver.
    fn give_up(&self, state: &mut State, class: usize, chunk: Chunk) -> Result<()> {
        let done = self.settle(&chunk);
        // SAFETY: the last holder's stream is done with it.
        if let Err(error) = done.and_then(|()| unsafe { self.destroy(chunk) }) {
            state.retire(class, chunk);
            return Err(error);
        }
        state.stats.trimmed += 1;
        Ok(())
    }

    /// Makes a block idle. Where its stream cannot say when it is done with it, the memory stays
    /// unused until the pool goes.
    fn give_back(&self, mut chunk: Chunk, bytes: usize, class: usize, stream: Stream) {
        let mut state = self.lock();
        state.returned(bytes, class);
        let captured = self.gpu.is_capturing(stream).unwrap_or(true);
        if captured || self.gpu.event_record(chunk.event, stream).is_err() {
            state.retire(class, chunk);
        } else {
            chunk.freed_on = Some(stream);
            state.put(class, chunk);
        }
    }

    /// # Safety
    /// No queued work uses the memory any more.
    unsafe fn free(&self, memory: Memory) -> Result<()> {
        // SAFETY: passed on to the caller; `create` made it by the call that belongs to this one.
        unsafe {
            match memory {
                Memory::Device(memory) => self.gpu.free(memory),
                Memory::Host(memory) => self.gpu.free_host(memory),
            }
        }
    }

    /// # Safety
    /// As for `free`.
    unsafe fn destroy(&self, chunk: Chunk) -> Result<()> {
        // SAFETY: passed on to the caller; the event is the chunk's own and goes with it.
        unsafe {
            self.free(chunk.memory)?;
            // The memory is gone, and what is left of the chunk is no more than a handle.
            let _ = self.gpu.event_destroy(chunk.event);
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        // A GPU that cannot be waited for may still be writing: then the memory is left to the driver.
        if self.gpu.synchronize().is_err() {
            return;
        }
        for chunk in state.idle.into_values().flatten().chain(state.retired) {
            // SAFETY: every block is back, and the GPU has done all that was queued.
            let _ = unsafe { self.destroy(chunk) };
        }
        // SAFETY: `new` made it, and nothing else uses it.
        let _ = unsafe { self.gpu.stream_destroy(self.own) };
    }
}
