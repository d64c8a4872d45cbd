//! Calls that run beside the caller's stream, and [`Work`], what the caller holds of them.
//!
//! Invariant: a communicator's asynchronous calls run on one stream of its own, in the order in which they
//! were made, and its other calls are ordered with them by events as any change of stream is. A [`Work`]
//! has an event to itself for as long as it lives; events come from a pool, so that calls make none once
//! there are as many as works at a time.

use crate::collectives::tensors;
use crate::communicator::{Communicator, Health};
use crate::error::{Error, Result};
use crate::gpu::{Event, GpuRef, Stream};
use crate::request::{AllGather, AllReduce, Broadcast, Chunk, Gather, ReduceScatter};
use peerlane_device::abi::Operation;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Events that nobody uses, of one GPU.
struct Pool {
    gpu: GpuRef,
    free: Mutex<Vec<Event>>,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        // A panic elsewhere has left a whole list: a push or a pop is done or not.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Pool>) -> Result<Lent> {
        let free = self.lock().pop();
        let event = free.map_or_else(|| self.gpu.event_create(), Ok)?;
        Ok(Lent { pool: self.clone(), event })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for event in std::mem::take(&mut *self.lock()) {
            // SAFETY: the pool made it, and nobody has it any more. Nothing is left to report to.
            let _ = unsafe { self.gpu.event_destroy(event) };
        }
    }
}

/// An event out of a pool. It may go back with work before it: who waits for that record still does.
struct Lent {
    pool: Arc<Pool>,
    event: Event,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.lock().push(self.event);
    }
}

/// A communicator's own stream.
pub(crate) struct Side {
    gpu: GpuRef,
    stream: Stream,
    pool: Arc<Pool>,
    /// Calls that are not part of a graph.
    made: u64,
    /// How many of them somebody waits, or has waited, for: each work settles all before it too, since they are
    /// on the same stream.
    settled: Arc<AtomicU64>,
}

impl Side {
    fn new(gpu: &GpuRef) -> Result<Side> {
        let pool = Arc::new(Pool { gpu: gpu.clone(), free: Mutex::default() });
        let stream = gpu.stream_create_urgent()?;
        Ok(Side { gpu: gpu.clone(), stream, pool, made: 0, settled: Arc::default() })
    }

    /// Whether a stream that is being captured may go on from here.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire) >= self.made
    }

    /// Notes that another stream waits for everything on `stream`.
    pub(crate) fn settle(&self, stream: Stream) {
        if stream == self.stream {
            self.settled.fetch_max(self.made, Ordering::Release);
        }
    }

    /// Notes that everything is done.
    pub(crate) fn settle_all(&self) {
        self.settle(self.stream);
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: made in `new` and not used again; queued work still completes.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}

/// An asynchronous call.
///
/// Dropping it neither ends the call nor waits for it: the call goes on, and its tensors must stay
/// until it is done.
#[must_use = "the tensors may be used only after the work is done"]
pub struct Work {
    done: Lent,
    health: Health,
    operation: Operation,
    /// It is part of a graph, which runs when that is launched.
    captured: bool,
    /// Which one it is of those that are not; 0, which settles nothing, if it is.
    number: u64,
    settled: Arc<AtomicU64>,
    outcome: OnceLock<Result<()>>,
}

impl Work {
    /// Whether the call is done, well or not; [`Work::wait`] says which.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the call was captured in a graph.
    pub fn query(&self) -> Result<bool> {
        self.ran()?;
        let done =
            self.outcome.get().is_some() || self.done.pool.gpu.event_query(self.done.event)?;
        if done {
            self.settle();
        }
        Ok(done)
    }

    /// Makes `stream` wait for the call. Inside a capture this is how the call's stream is joined.
    pub fn wait_on(&self, stream: Stream) -> Result<()> {
        self.done.pool.gpu.stream_wait(stream, self.done.event)?;
        self.settle();
        Ok(())
    }

    /// Waits until the call is done and says whether it and all calls before it went well. Says the
    /// same however often it is asked. Once the communicator is closed, its `close` has said it. Once it has
    /// recovered or shrunk, what went wrong before that.
    ///
    /// # Errors
    /// Those of [`Communicator::health`], and as for [`Work::query`].
    pub fn wait(&self) -> Result<()> {
        self.ran()?;
        if let Some(outcome) = self.outcome.get() {
            return outcome.clone();
        }
        self.done.pool.gpu.event_synchronize(self.done.event)?;
        self.settle();
        self.outcome.get_or_init(|| self.health.check()).clone()
    }

    fn settle(&self) {
        self.settled.fetch_max(self.number, Ordering::Release);
    }

    fn ran(&self) -> Result<()> {
        if !self.captured {
            return Ok(());
        }
        Err(Error::Unsupported {
            op: self.operation.name(),
            reason:
                "the call is part of a graph: wait for the stream that the graph was launched on"
                    .into(),
        })
    }
}

/// Asynchronous calls: each begins once `stream` has come to it, and runs on a stream of the
/// communicator's own, of high priority, while `stream` goes on.
///
/// # Safety
/// As for the calls without `_async`, except that tensors must stay alive and untouched until the work is
/// done, whatever becomes of the [`Work`].
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the impl")]
impl Communicator {
    /// [`Communicator::all_reduce`] beside `stream`.
    pub unsafe fn all_reduce_async(&mut self, call: &AllReduce, stream: Stream) -> Result<Work> {
        // SAFETY: passed on to the caller.
        let run = |own: &mut Self, side| unsafe { own.all_reduce(call, side) };
        self.beside(Operation::AllReduce, Start::After(stream), run)
    }

    /// [`Communicator::reduce_scatter`] beside `stream`.
    pub unsafe fn reduce_scatter_async(
        &mut self,
        call: &ReduceScatter,
        stream: Stream,
    ) -> Result<Work> {
        // SAFETY: passed on to the caller.
        let run = |own: &mut Self, side| unsafe { own.reduce_scatter(call, side) };
        self.beside(Operation::ReduceScatter, Start::After(stream), run)
    }

    /// [`Communicator::all_gather`] beside `stream`.
    pub unsafe fn all_gather_async(&mut self, call: &AllGather, stream: Stream) -> Result<Work> {
        // SAFETY: passed on to the caller.
        let run = |own: &mut Self, side| unsafe { own.all_gather(call, side) };
        self.beside(Operation::AllGather, Start::After(stream), run)
    }

    /// [`Communicator::broadcast`] beside `stream`.
    pub unsafe fn broadcast_async(&mut self, call: &Broadcast, stream: Stream) -> Result<Work> {
        // SAFETY: passed on to the caller.
        let run = |own: &mut Self, side| unsafe { own.broadcast(call, side) };
        self.beside(Operation::Broadcast, Start::After(stream), run)
    }

    /// [`Communicator::gather`] beside `stream`.
    pub unsafe fn gather_async(&mut self, call: &Gather<'_>, stream: Stream) -> Result<Work> {
        // SAFETY: passed on to the caller.
        let run = |own: &mut Self, side| unsafe { own.gather(call, side) };
        self.beside(Operation::Gather, Start::After(stream), run)
    }

    /// Reduces a tensor in chunks as a producer finishes them: one all-reduce a chunk, in the order of
    /// `chunks`, each once its event has come. Returns a work for each. All ranks bring the same
    /// chunks. What no chunk names stays as it is.
    ///
    /// The events are recorded before the call is made, on whatever streams of this rank's GPU. If that was in
    /// a capture, the chunks become part of the graph. Where that is refused, because earlier works are in
    /// flight, the communicator's stream stays in the capture, with nothing queued, until that ends.
    pub unsafe fn all_reduce_chunks(
        &mut self,
        call: &AllReduce,
        chunks: &[Chunk],
    ) -> Result<Vec<Work>> {
        const OP: &str = "all_reduce_chunks";
        self.ready(Operation::AllReduce)?;
        // A part of a tensor that is nowhere would be somewhere.
        tensors(OP, call)?;
        for (index, chunk) in chunks.iter().enumerate() {
            let end = chunk.first.checked_add(chunk.count);
            if end.is_none_or(|end| end > call.count) {
                return Err(Error::InvalidArgument {
                    op: OP,
                    argument: "chunks",
                    expected: format!("parts of a tensor of {} elements", call.count),
                    got: format!(
                        "chunk {index} of {} elements from {} on",
                        chunk.count, chunk.first
                    ),
                });
            }
        }
        let each = |chunk: &Chunk| {
            let offset = chunk.first * call.dtype.bytes();
            let (src, dst) = (call.src.offset(offset), call.dst.offset(offset));
            let src = if call.contribution { src } else { call.src };
            let part = AllReduce { src, dst, count: chunk.count, ..*call };
            // SAFETY: passed on to the caller.
            let run = |own: &mut Self, side| unsafe { own.all_reduce(&part, side) };
            self.beside(Operation::AllReduce, Start::Once(chunk.ready), run)
        };
        chunks.iter().map(each).collect()
    }

    /// Makes a call on the communicator's own stream.
    fn beside(
        &mut self,
        operation: Operation,
        start: Start,
        run: impl FnOnce(&mut Self, Stream) -> Result<()>,
    ) -> Result<Work> {
        self.ready(operation)?;
        if self.side.is_none() {
            self.side = Some(Side::new(self.gpu())?);
        }
        let Some(side) = &self.side else { return Err(self.closed(operation)) };
        let (gpu, own, settled) = (self.gpu().clone(), side.stream, side.settled.clone());
        let done = side.pool.take()?;
        let before = gpu.is_capturing(own)?;
        if let Start::After(stream) = start {
            self.owns_stream(operation.name(), stream)?;
            let after = gpu.is_capturing(stream)?;
            if before && !after {
                return Err(Error::Unsupported {
                    op: operation.name(),
                    reason: "an earlier asynchronous call is being captured, and the capture has not ended".into(),
                });
            }
            if after && !before {
                self.refuse_in_flight(operation.name())?;
            }
            gpu.event_record(done.event, stream)?;
            gpu.stream_wait(own, done.event)?;
        } else if let Start::Once(event) = start {
            gpu.stream_wait(own, event)?;
        }
        let captured = gpu.is_capturing(own)?;
        if captured && !before {
            // Only waiting for a chunk's event tells that it is part of a graph.
            self.refuse_in_flight(operation.name())?;
        }
        let queued = run(self, own);
        gpu.event_record(done.event, own)?;
        if let (Err(error), Start::After(stream)) = (&queued, start)
            && captured
        {
            // The capture can still end: its streams are joined.
            gpu.stream_wait(stream, done.event)?;
            return Err(error.clone());
        }
        queued?;
        let number = match &mut self.side {
            Some(side) if !captured => {
                side.made += 1;
                side.made
            }
            _ => 0,
        };
        let (health, outcome) = (self.health_handle(), OnceLock::new());
        Ok(Work { done, health, operation, captured, number, settled, outcome })
    }

    /// Refuses a capture of calls while earlier ones may still run and nothing orders the graph
    /// behind them.
    pub(crate) fn refuse_in_flight(&self, op: &'static str) -> Result<()> {
        if self.side.as_ref().is_none_or(Side::is_settled) {
            return Ok(());
        }
        Err(Error::Unsupported {
            op,
            reason: "an asynchronous call that nobody has waited for may still run; wait for its work, on a stream or on the host, before the capture".into(),
        })
    }
}

/// When an asynchronous call may begin.
#[derive(Clone, Copy)]
enum Start {
    /// After everything queued on a stream.
    After(Stream),
    /// After an event.
    Once(Event),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::sim;
    use crate::{Config, DType};

    #[test]
    fn works_that_come_and_go_share_an_event() {
        let gpu = sim::devices(&sim::Config::default())[0].clone();
        let config = Config { mailbox_bytes: 1 << 20, ..Config::default() };
        let mut rank =
            Communicator::connect(std::slice::from_ref(&gpu), &config).unwrap().remove(0);
        let tensor = gpu.alloc(64).unwrap();
        let call = AllReduce::in_place(tensor, 16, DType::F32);
        let mut held = Vec::new();
        for turn in 0..50 {
            // SAFETY: the tensor has the size and lives until the GPU does.
            let work = unsafe { rank.all_reduce_async(&call, Stream::default()).unwrap() };
            work.wait().unwrap();
            if turn % 20 == 0 {
                held.push(work);
            }
        }
        assert_eq!(held.len(), 3);
        let side = rank.side.as_ref().unwrap();
        assert!(side.is_settled());
        let free = side.pool.lock().len();
        assert_eq!(free, 1, "one event serves all works that are dropped");
        // An older work says nothing of a later call; a later one says it of all before.
        // SAFETY: as above.
        let begin = |rank: &mut Communicator| unsafe {
            rank.all_reduce_async(&call, Stream::default()).unwrap()
        };
        let [older, later] = [begin(&mut rank), begin(&mut rank)];
        older.wait().unwrap();
        assert!(!rank.side.as_ref().unwrap().is_settled());
        later.wait().unwrap();
        assert!(rank.side.as_ref().unwrap().is_settled());
        drop((older, later));
        drop(rank);
        // A work outlives its communicator.
        assert!(held.iter().all(|work| work.query() == Ok(true) && work.wait() == Ok(())));
    }
}
