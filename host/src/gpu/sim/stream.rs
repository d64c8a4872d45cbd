//! Streams and events.
//!
//! Invariant: a stream does one thing at a time, in the order it was queued. A wait is for the
//! record that was the event's latest when the wait was queued; with none there is no wait.

use super::capture::CaptureId;
use super::engine::Engine;
use super::fail;
use super::work::{Entry, Mark, Node, Owner, Work};
use crate::error::Result;
use std::collections::VecDeque;

/// A stream.
pub(super) struct Queue {
    pub(super) device: u32,
    pub(super) capture: Option<CaptureId>,
    /// Its first piece of work is running.
    pub(super) busy: bool,
    /// Goes away once it is empty.
    pub(super) destroyed: bool,
    entries: VecDeque<Entry>,
}

impl Queue {
    pub(super) fn new(device: u32) -> Queue {
        Queue { device, capture: None, busy: false, destroyed: false, entries: VecDeque::new() }
    }

    pub(super) fn is_done(&self) -> bool {
        !self.busy && self.entries.is_empty()
    }
}

/// An event.
pub(super) enum EventState {
    /// Never recorded.
    New,
    /// Recorded on a stream; the latest record.
    Recorded(Mark),
    /// Recorded on a stream that was being captured, after these nodes.
    Captured(CaptureId, Vec<usize>),
}

impl Engine {
    /// Queues `work` on the stream, or adds it to the stream's capture.
    pub(super) fn queue(&mut self, key: u64, work: Work) {
        let Some(queue) = self.streams.get_mut(&key) else { return };
        if let Some(id) = queue.capture {
            let device = queue.device;
            if let Some(capture) = self.captures.get_mut(&id) {
                let after = capture.tails.remove(&key).unwrap_or_default();
                capture.tails.insert(key, vec![capture.nodes.len()]);
                capture.nodes.push(Node { device, work, after });
            }
        } else {
            self.push(key, Entry::Work(work));
        }
    }

    pub(super) fn push(&mut self, key: u64, entry: Entry) {
        if let Some(queue) = self.streams.get_mut(&key) {
            queue.entries.push_back(entry);
            self.stirred = true;
        }
    }

    pub(super) fn is_done(&self, key: u64) -> bool {
        self.streams.get(&key).is_none_or(Queue::is_done)
    }

    /// Records the event after everything queued on the stream.
    pub(super) fn record(&mut self, device: u32, event: u64, key: u64) -> Result<()> {
        let capture = self.streams.get(&key).and_then(|queue| queue.capture);
        let state = match capture.and_then(|id| Some((id, self.captures.get(&id)?))) {
            Some((id, capture)) => {
                EventState::Captured(id, capture.tails.get(&key).cloned().unwrap_or_default())
            }
            None => EventState::Recorded(Mark::default()),
        };
        match self.events.get_mut(&event) {
            Some((of, slot)) if *of == device => {
                if let EventState::Recorded(mark) = &state {
                    let mark = mark.clone();
                    *slot = state;
                    self.push(key, Entry::Record(mark));
                } else {
                    *slot = state;
                }
                Ok(())
            }
            _ => Err(fail::handle("cuEventRecord", device)),
        }
    }

    /// Makes the stream wait for the event's latest record.
    pub(super) fn wait(&mut self, device: u32, key: u64, event: u64) -> Result<()> {
        const CALL: &str = "cuStreamWaitEvent";
        let capturing = self.streams.get(&key).and_then(|queue| queue.capture);
        let Some((_, state)) = self.events.get(&event) else {
            return Err(fail::handle(CALL, device));
        };
        match (state, capturing) {
            (EventState::New, _) => Ok(()),
            (EventState::Recorded(mark), None) => {
                let mark = mark.clone();
                self.push(key, Entry::Wait(mark));
                Ok(())
            }
            (EventState::Recorded(_), Some(id)) => {
                self.invalidate(id);
                Err(fail::driver(CALL, device, fail::CAPTURE_ISOLATION))
            }
            (EventState::Captured(id, after), _) => {
                let (id, after) = (*id, after.clone());
                self.join(CALL, device, key, id, &after)
            }
        }
    }

    /// Whether the event's latest record is done, if it has one.
    pub(super) fn event_is_done(
        &self,
        call: &'static str,
        device: u32,
        event: u64,
    ) -> Result<bool> {
        match self.events.get(&event) {
            Some((of, _)) if *of != device => Err(fail::handle(call, device)),
            Some((_, EventState::New)) => Ok(true),
            Some((_, EventState::Recorded(mark))) => Ok(mark.is_set()),
            Some((_, EventState::Captured(..))) => {
                Err(fail::driver(call, device, fail::CAPTURED_EVENT))
            }
            None => Err(fail::handle(call, device)),
        }
    }

    /// Milliseconds between the latest records of two events.
    pub(super) fn elapsed_ms(&self, device: u32, start: u64, end: u64) -> Result<f32> {
        const CALL: &str = "cuEventElapsedTime";
        let time = |event: u64| match self.events.get(&event) {
            _ if !self.timed.contains(&event) => Err(fail::handle(CALL, device)),
            Some((of, EventState::Recorded(mark))) if *of == device => {
                mark.time().ok_or_else(|| fail::driver(CALL, device, fail::NOT_READY))
            }
            Some((of, EventState::Captured(..))) if *of == device => {
                Err(fail::driver(CALL, device, fail::CAPTURED_EVENT))
            }
            _ => Err(fail::handle(CALL, device)),
        };
        let (start, end) = (time(start)?, time(end)?);
        Ok((end as f64 - start as f64) as f32 / 1e6)
    }

    /// Starts what the stream can start.
    pub(super) fn pump_stream(&mut self, key: u64) {
        loop {
            let hold = self.machine().random.chance(self.machine().policy.hold);
            let Some(queue) = self.streams.get_mut(&key) else { return };
            if queue.busy {
                return;
            }
            match queue.entries.front() {
                None => {
                    if queue.destroyed {
                        self.streams.remove(&key);
                    }
                    return;
                }
                Some(Entry::Wait(mark)) if !mark.is_set() => return,
                Some(_) if hold => {
                    self.stirred = true;
                    return;
                }
                Some(_) => {}
            }
            match queue.entries.pop_front() {
                Some(Entry::Work(work)) => {
                    queue.busy = true;
                    let device = queue.device;
                    self.start(device, work, Owner::Stream(key));
                }
                Some(Entry::Record(mark)) => {
                    mark.set(self.machine().clock.get());
                    self.stirred = true;
                    self.completed += 1;
                }
                Some(Entry::Wait(_)) | None => self.completed += 1,
            }
        }
    }
}
