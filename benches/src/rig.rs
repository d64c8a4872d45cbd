//! One GPU with all that a kernel needs to run without a communicator, and a way to time it.
//!
//! Invariant: a rig is rank 0 of a world of one unless its arguments are changed to name others,
//! and its mailbox has a lane for every block that the GPU holds at once.

use crate::median;
use peerlane::gpu::{DevicePtr, Event, GpuRef, Graph, HostMemory, Stream};
use peerlane::plan::Shape;
use peerlane::{Error, Result};
use peerlane_device::abi::{
    Args, FREE, Kernel, Layout, MAX_RANKS, MAX_THREADS, Operation, Status, state, ticks,
};
use std::time::Duration;

/// A wait in a lone kernel that lasts longer than this is a mistake.
const DEADLINE: Duration = Duration::from_secs(2);
/// Slots of a lane and their units, as `layout::choose` makes them for two ranks.
const SLOTS: u32 = 4;
const SLOT_UNITS: u32 = 2048;

/// How long one of several equal pieces of work took.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Timing {
    /// The fastest repetition, in microseconds.
    pub least_us: f64,
    /// The median of all repetitions, in microseconds.
    pub median_us: f64,
}

impl Timing {
    /// What repetitions that took `samples` microseconds amount to.
    pub fn of(samples: &mut [f64]) -> Timing {
        let least_us = samples.iter().copied().fold(f64::INFINITY, f64::min);
        Timing { least_us, median_us: median(samples) }
    }
}

/// One GPU, set up for lone kernels.
pub struct Rig {
    gpu: GpuRef,
    stream: Stream,
    start: Event,
    end: Event,
    mailbox: DevicePtr,
    status: HostMemory,
    src: DevicePtr,
    dst: DevicePtr,
    layout: Layout,
}

impl Rig {
    /// Sets `gpu` up for tensors of at most `bytes` bytes, all zero.
    pub fn new(gpu: &GpuRef, bytes: usize) -> Result<Rig> {
        gpu.load_kernels()?;
        let mut lanes = u32::MAX;
        for kernel in Kernel::ALL {
            lanes = lanes.min(gpu.resident_blocks(*kernel, MAX_THREADS)?);
        }
        let Some(layout) = Layout::new(lanes, SLOTS, SLOT_UNITS) else {
            let reason = format!("a mailbox for {lanes} blocks is too large");
            return Err(Error::Unsupported { op: "Rig::new", reason });
        };
        let rig = Rig {
            gpu: gpu.clone(),
            stream: gpu.stream_create()?,
            start: gpu.event_create_timed()?,
            end: gpu.event_create_timed()?,
            mailbox: gpu.alloc(layout.mailbox_bytes(2))?,
            status: gpu.alloc_host(size_of::<Status>())?,
            src: gpu.alloc(bytes)?,
            dst: gpu.alloc(bytes)?,
            layout,
        };
        let words = layout.first_slot as usize;
        let slots = layout.mailbox_bytes(2) - words;
        // SAFETY: every range was allocated with this size.
        unsafe {
            gpu.fill(rig.mailbox, 0, words, rig.stream)?;
            gpu.fill(rig.mailbox.offset(words), FREE as u8, slots, rig.stream)?;
            gpu.fill(rig.src, 0, bytes, rig.stream)?;
            gpu.fill(rig.dst, 0, bytes, rig.stream)?;
        }
        gpu.stream_synchronize(rig.stream)?;
        Ok(rig)
    }

    /// The GPU.
    pub fn gpu(&self) -> &GpuRef {
        &self.gpu
    }

    /// Where the mailbox is, for another rig's [`Args::peers`].
    pub fn mailbox(&self) -> u64 {
        self.mailbox.0
    }

    /// The tensors that [`Rig::args`] reads and writes.
    pub fn tensors(&self) -> (DevicePtr, DevicePtr) {
        (self.src, self.dst)
    }

    /// What the plan needs to know of a rig.
    pub fn shape(&self) -> Shape {
        Shape::new(1, self.layout, self.layout.lanes)
    }

    /// Arguments of a call that moves nothing.
    pub fn args(&self, operation: Operation) -> Args {
        let mut peers = [0; MAX_RANKS];
        peers[0] = self.mailbox.0;
        Args {
            peers,
            src: self.src.0,
            dst: self.dst.0,
            status: self.status.device.0,
            deadline: ticks(DEADLINE),
            operation: operation as u32,
            ..Args::new(0, 1, self.layout)
        }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// `args` came from [`Rig::args`], with sizes that fit the rig and peers that are rigs too.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.gpu.launch(kernel, blocks, threads, args, self.stream) }
    }

    /// Queues a copy of `bytes` bytes from one tensor to the other, by the copy engine or whatever
    /// the driver takes.
    ///
    /// # Safety
    /// Both tensors have that size.
    pub unsafe fn copy(&self, bytes: usize) -> Result<()> {
        // SAFETY: the rig's own tensors, which do not overlap.
        unsafe { self.gpu.copy(self.dst, self.src, bytes, self.stream) }
    }

    /// Waits for everything queued. An error names what a kernel recorded.
    pub fn finish(&self) -> Result<()> {
        self.gpu.stream_synchronize(self.stream)?;
        let status = self.status();
        if status.state == state::OK {
            return Ok(());
        }
        Err(Error::Unsupported {
            op: Operation::from_code(status.operation).map_or("a kernel", Operation::name),
            reason: format!(
                "it ended with state {} in phase {}, waiting for rank {}",
                status.state, status.phase, status.peer
            ),
        })
    }

    /// The status page as the kernels left it.
    pub fn status(&self) -> Status {
        // SAFETY: the page is as large as a `Status`, which zeroed memory is too, and lives as long
        // as the rig.
        unsafe { self.status.host.cast::<Status>().read_volatile() }
    }

    /// Times what `queue` queues: `calls` times in a graph, the graph `repeats` times, so that the
    /// host is not in the measurement.
    pub fn time(&self, calls: u32, repeats: u32, queue: impl Fn() -> Result<()>) -> Result<Timing> {
        let graph = self.record(calls, queue)?;
        // The first repetition uploads the graph and warms the caches.
        let samples: Result<Vec<f64>> = (0..=repeats)
            .map(|_| {
                self.replay(graph)?;
                self.finish()?;
                Ok(self.elapsed_us()? / calls as f64)
            })
            .collect();
        // SAFETY: recorded above; `finish` waited for it, or the device is lost.
        unsafe { self.forget(graph)? };
        Ok(Timing::of(&mut samples?[1..]))
    }

    /// Records `calls` times what `queue` queues.
    pub fn record(&self, calls: u32, queue: impl Fn() -> Result<()>) -> Result<Graph> {
        self.gpu.capture_begin(self.stream)?;
        // A capture must be ended whatever happened in it.
        let queued = (0..calls).try_for_each(|_| queue());
        let graph = self.gpu.capture_end(self.stream)?;
        queued?;
        Ok(graph)
    }

    /// Queues a graph between the rig's two events.
    pub fn replay(&self, graph: Graph) -> Result<()> {
        self.gpu.event_record(self.start, self.stream)?;
        self.gpu.graph_launch(graph, self.stream)?;
        self.gpu.event_record(self.end, self.stream)
    }

    /// Microseconds that the last graph took. It must be done.
    pub fn elapsed_us(&self) -> Result<f64> {
        Ok(self.gpu.event_elapsed_ms(self.start, self.end)? as f64 * 1e3)
    }

    /// Destroys a graph.
    ///
    /// # Safety
    /// [`Rig::record`] of this rig made it; it is not running and not used again.
    pub unsafe fn forget(&self, graph: Graph) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.gpu.graph_destroy(graph) }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Nothing can be reported from here, and a bench is over anyway.
        let _ = self.gpu.stream_synchronize(self.stream);
        // SAFETY: all of it was made in `new`, nothing queued uses it, and it is not used again.
        let _ = unsafe {
            self.gpu
                .free(self.mailbox)
                .and(self.gpu.free(self.src))
                .and(self.gpu.free(self.dst))
                .and(self.gpu.free_host(self.status))
                .and(self.gpu.event_destroy(self.start))
                .and(self.gpu.event_destroy(self.end))
                .and(self.gpu.stream_destroy(self.stream))
        };
    }
}
