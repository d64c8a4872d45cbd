//! One rank of a measurement: its buffers, its stream, and the contenders that run on them.
//!
//! Invariant: every contender gets the same buffers, stream, graph and events, so that a difference
//! in time is a difference between the contenders.

use super::job::Job;
use crate::check::POISON;
use peerlane::gpu::{DevicePtr, Event, GpuRef, Graph, Stream};
use peerlane::{Algorithm, Operation, Route};
use std::collections::BTreeMap;

/// Why a measurement could not be made.
pub(crate) type Fail = Box<dyn std::error::Error + Send + Sync>;

/// One rank's end of an implementation of the collectives.
pub(crate) trait Contender: Send {
    /// Queues the job's collective, from `src` to `dst`. A broadcast works on `dst` alone.
    ///
    /// # Safety
    /// Both have the sizes that the job says, and stay alive until the stream is done.
    unsafe fn call(
        &mut self,
        job: &Job,
        src: DevicePtr,
        dst: DevicePtr,
        stream: Stream,
    ) -> Result<(), Fail>;

    /// An error that a call left behind on the GPU.
    fn health(&self) -> Result<(), Fail>;

    /// Whether its results are documented to the bit.
    fn is_exact(&self) -> bool;

    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// Whether it finds its input in the output.
    fn is_in_place(&self) -> bool {
        false
    }

    /// How it would carry out an all-reduce, where that decides the order of additions.
    fn algorithm(&self, _job: &Job) -> Option<Algorithm> {
        None
    }

    /// How it would carry out a broadcast, where that is known.
    fn route(&self, _job: &Job) -> Option<Route> {
        None
    }
}

/// How calls are timed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Calls in a sample.
    pub(crate) calls: usize,
    /// Samples of each contender.
    pub(crate) replays: usize,
    /// Issue calls one by one instead of replaying a graph.
    pub(crate) eager: bool,
}

/// One rank.
pub(crate) struct Rank {
    pub(crate) rank: u32,
    pub(crate) contenders: Vec<Box<dyn Contender>>,
    gpu: GpuRef,
    stream: Stream,
    start: Event,
    stop: Event,
    src: DevicePtr,
    dst: DevicePtr,
    /// By contender.
    graphs: BTreeMap<usize, Graph>,
}

impl Rank {
    /// A rank with buffers of these sizes.
    pub(crate) fn new(
        rank: u32,
        gpu: GpuRef,
        src_bytes: usize,
        dst_bytes: usize,
    ) -> peerlane::Result<Rank> {
        let (stream, start, stop) =
            (gpu.stream_create()?, gpu.event_create_timed()?, gpu.event_create_timed()?);
        // At least a byte, so that a barrier's buffers exist like any other's.
        let (src, dst) = (gpu.alloc(src_bytes.max(1))?, gpu.alloc(dst_bytes.max(1))?);
        let (contenders, graphs) = (Vec::new(), BTreeMap::new());
        Ok(Rank { rank, contenders, gpu, stream, start, stop, src, dst, graphs })
    }

    /// Writes the input where the contender finds it, and poisons the output.
    pub(crate) fn load(&self, contender: usize, job: &Job, input: &[u8]) -> Result<(), Fail> {
        let is_source = job.op == Operation::Broadcast && self.rank == job.root
            || self.contenders[contender].is_in_place();
        // SAFETY: both buffers were made for the largest job.
        unsafe {
            self.gpu.upload(self.src, &input[..job.src_bytes()], self.stream)?;
            if is_source {
                self.gpu.upload(self.dst, &input[..job.dst_bytes()], self.stream)?;
            } else {
                self.gpu.fill(self.dst, POISON, job.dst_bytes(), self.stream)?;
            }
        }
        Ok(())
    }

    /// Queues one call.
    pub(crate) fn call(&mut self, contender: usize, job: &Job) -> Result<(), Fail> {
        // SAFETY: both buffers were made for the largest job, and `Drop` waits for the stream.
        unsafe { self.contenders[contender].call(job, self.src, self.dst, self.stream) }
    }

    /// Waits, then compares the output.
    pub(crate) fn verify(
        &self,
        contender: usize,
        job: &Job,
        expected: &[u8],
    ) -> Result<(), String> {
        let who = &self.contenders[contender];
        let mut found = vec![0; expected.len()];
        // SAFETY: the output holds at least what is expected of it.
        unsafe { self.gpu.download(&mut found, self.dst, self.stream) }
            .map_err(|e| e.to_string())?;
        who.health().map_err(|error| error.to_string())?;
        let verdict = job.compare(&found, expected, who.is_exact());
        verdict.map_err(|reason| format!("{}, rank {}: {reason}", who.name(), self.rank))
    }

    /// Its output.
    pub(crate) fn output(&self) -> DevicePtr {
        self.dst
    }

    /// Writes a byte all over the input and the output.
    pub(crate) fn fill(&self, byte: u8, src_bytes: usize, dst_bytes: usize) -> Result<(), Fail> {
        // SAFETY: the caller says the sizes with which the buffers were made, or smaller ones.
        unsafe {
            self.gpu.fill(self.src, byte, src_bytes, self.stream)?;
            self.gpu.fill(self.dst, byte, dst_bytes, self.stream)?;
        }
        Ok(())
    }

    /// Records a graph of `calls` calls for each of these contenders, in place of all graphs before.
    pub(crate) fn capture(
        &mut self,
        contenders: &[usize],
        job: &Job,
        calls: usize,
    ) -> Result<(), Fail> {
        self.forget_graphs()?;
        for contender in contenders {
            self.gpu.capture_begin(self.stream)?;
            let queued = (0..calls).try_for_each(|_| self.call(*contender, job));
            // A stream must not be left capturing.
            let graph = self.gpu.capture_end(self.stream);
            queued?;
            self.graphs.insert(*contender, graph?);
        }
        Ok(())
    }

    /// Queues one sample: a batch that is not timed, and the one that is. The first keeps the GPU
    /// busy until the rest is queued, so that no launch and no late rank is measured.
    pub(crate) fn queue(
        &mut self,
        contender: usize,
        job: &Job,
        timing: &Timing,
    ) -> Result<(), Fail> {
        self.batch(contender, job, timing)?;
        self.gpu.event_record(self.start, self.stream)?;
        self.batch(contender, job, timing)?;
        self.gpu.event_record(self.stop, self.stream)?;
        Ok(())
    }

    fn batch(&mut self, contender: usize, job: &Job, timing: &Timing) -> Result<(), Fail> {
        if timing.eager {
            return (0..timing.calls).try_for_each(|_| self.call(contender, job));
        }
        let graph = *self.graphs.get(&contender).ok_or("a contender without a graph")?;
        Ok(self.gpu.graph_launch(graph, self.stream)?)
    }

    /// Waits for a sample; microseconds per call.
    pub(crate) fn finish(&self, contender: usize, timing: &Timing) -> Result<f64, Fail> {
        self.gpu.stream_synchronize(self.stream)?;
        self.contenders[contender].health()?;
        let milliseconds = self.gpu.event_elapsed_ms(self.start, self.stop)?;
        Ok(f64::from(milliseconds) * 1e3 / timing.calls as f64)
    }

    fn forget_graphs(&mut self) -> peerlane::Result<()> {
        self.gpu.stream_synchronize(self.stream)?;
        for graph in std::mem::take(&mut self.graphs).into_values() {
            // SAFETY: the graph came from `capture` and its stream is done.
            unsafe { self.gpu.graph_destroy(graph)? };
        }
        Ok(())
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // What fails here has been reported where it failed first.
        let _ = self.forget_graphs();
        // SAFETY: `new` made these, nothing else uses them, and the stream is done.
        unsafe {
            let _ = self.gpu.event_destroy(self.start);
            let _ = self.gpu.event_destroy(self.stop);
            let _ = self.gpu.stream_destroy(self.stream);
            let _ = self.gpu.free(self.src);
            let _ = self.gpu.free(self.dst);
        }
    }
}
