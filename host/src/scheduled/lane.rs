//! A stream of a rank, and what has been put on it.
//!
//! Invariant: what is pending is queued before the next copy or kernel on the stream, and by the end of
//! each half of a turn.

use crate::error::Result;
use crate::gpu::{DevicePtr, Event, GpuRef, MemoryOp, Stream};
use crate::plan::staging::UP;

pub(super) struct Lane {
    pub(super) stream: Stream,
    pub(super) event: Event,
    /// Operations not queued yet.
    pub(super) pending: Vec<MemoryOp>,
    /// Used by this call.
    pub(super) used: bool,
    /// It has work that nobody has an event for.
    pub(super) fresh: bool,
    /// The word of the board that says what it waits for, if that is not 0.
    noted: Option<DevicePtr>,
}

impl Lane {
    pub(super) fn new(gpu: &GpuRef) -> Result<Lane> {
        let stream = gpu.stream_create_urgent()?;
        let event = match gpu.event_create() {
            Ok(event) => event,
            Err(error) => {
                // SAFETY: just made, and used by nobody.
                unsafe { gpu.stream_destroy(stream)? };
                return Err(error);
            }
        };
        let pending = Vec::with_capacity(32);
        Ok(Lane { stream, event, pending, used: false, fresh: false, noted: None })
    }

    /// Forgets what the last call left.
    pub(super) fn reset(&mut self) {
        (self.used, self.fresh, self.noted) = (false, false, None);
        self.pending.clear();
    }

    /// Waits for a flag and takes it down; meanwhile the word `at` of the board holds `note`.
    pub(super) fn await_flag(&mut self, flag: DevicePtr, at: DevicePtr, note: u32) {
        self.pending.extend([
            MemoryOp::Write(at, note),
            MemoryOp::Wait(flag, UP),
            MemoryOp::Write(flag, 0),
        ]);
        self.noted = Some(at);
    }

    /// Takes the note down, behind what was queued for what came: a store to the host takes 1.4 us.
    pub(super) fn clear_note(&mut self) {
        self.pending.extend(self.noted.take().map(|at| MemoryOp::Write(at, 0)));
    }

    /// Queues what is pending.
    ///
    /// # Safety
    /// The words are aligned, and alive until the stream has passed the operations.
    pub(super) unsafe fn queue(&mut self, gpu: &GpuRef) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        // SAFETY: passed on to the caller.
        let queued = unsafe { gpu.stream_memory(self.stream, &self.pending) };
        self.pending.clear();
        queued
    }

    /// # Safety
    /// The lane is not used again.
    pub(super) unsafe fn destroy(&self, gpu: &GpuRef) {
        // SAFETY: passed on to the caller. What fails here has failed before.
        unsafe {
            let _ = gpu.event_destroy(self.event);
            let _ = gpu.stream_destroy(self.stream);
        }
    }
}
