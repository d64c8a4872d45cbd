//! Recording streams into graphs.
//!
//! Invariant: a capture is a graph whose nodes depend on earlier nodes only. A stream joins it by
//! waiting for an event recorded inside, and must be waited for before the capture ends.

use super::engine::{Engine, GraphEntry};
use super::fail;
use super::work::{Entry, GraphPlan, Mark, Node, Work};
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names a capture, also after its end.
pub(super) type CaptureId = u64;

/// A capture under way.
pub(super) struct Capture {
    origin: u64,
    pub(super) nodes: Vec<Node>,
    /// For each stream in the capture, the nodes that its next node depends on.
    pub(super) tails: BTreeMap<u64, Vec<usize>>,
    invalid: bool,
}

impl Capture {
    /// Whether every stream has been waited for, directly or not, by the origin.
    fn is_joined(&self) -> bool {
        let mut reached = vec![false; self.nodes.len()];
        let mut open = self.tails.get(&self.origin).cloned().unwrap_or_default();
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut reached[node], true) {
                open.extend(&self.nodes[node].after);
            }
        }
        self.tails.values().flatten().all(|&node| reached[node])
    }
}

impl Engine {
    pub(super) fn capture_begin(&mut self, device: u32, key: u64) -> Result<()> {
        let id = self.handle();
        match self.streams.get_mut(&key) {
            Some(queue) if queue.capture.is_none() => queue.capture = Some(id),
            _ => return Err(fail::driver("cuStreamBeginCapture", device, fail::ILLEGAL_STATE)),
        }
        let tails = BTreeMap::from([(key, Vec::new())]);
        self.captures.insert(id, Capture { origin: key, nodes: Vec::new(), tails, invalid: false });
        Ok(())
    }

    pub(super) fn capture_end(&mut self, device: u32, key: u64) -> Result<u64> {
        const CALL: &str = "cuStreamEndCapture";
        let id = self.streams.get(&key).and_then(|queue| queue.capture);
        let Some(id) = id else {
            return Err(fail::driver(CALL, device, fail::ILLEGAL_STATE));
        };
        if self.captures.get(&id).is_some_and(|capture| capture.origin != key) {
            return Err(fail::driver(CALL, device, fail::CAPTURE_UNMATCHED));
        }
        for queue in self.streams.values_mut().filter(|queue| queue.capture == Some(id)) {
            queue.capture = None;
        }
        match self.captures.remove(&id) {
            Some(capture) if !capture.invalid => {
                if !capture.is_joined() {
                    return Err(fail::driver(CALL, device, fail::CAPTURE_UNJOINED));
                }
                let plan = Arc::new(GraphPlan::new(capture.nodes));
                let graph = self.handle();
                self.graphs.insert(graph, GraphEntry { plan, last: None });
                Ok(graph)
            }
            _ => Err(fail::driver(CALL, device, fail::CAPTURE_INVALIDATED)),
        }
    }

    /// The stream goes on after nodes of a capture, and thereby belongs to it.
    pub(super) fn join(
        &mut self,
        call: &'static str,
        device: u32,
        key: u64,
        id: CaptureId,
        after: &[usize],
    ) -> Result<()> {
        let (Some(capture), Some(queue)) = (self.captures.get_mut(&id), self.streams.get_mut(&key))
        else {
            return Err(fail::driver(call, device, fail::CAPTURED_EVENT));
        };
        if let Some(other) = queue.capture
            && other != id
        {
            self.invalidate(id);
            self.invalidate(other);
            return Err(fail::driver(call, device, fail::CAPTURE_MERGE));
        }
        queue.capture = Some(id);
        let tail = capture.tails.entry(key).or_default();
        tail.extend(after);
        tail.sort_unstable();
        tail.dedup();
        Ok(())
    }

    /// A call that a capture cannot bear; its end will say so.
    pub(super) fn invalidate(&mut self, id: CaptureId) {
        if let Some(capture) = self.captures.get_mut(&id) {
            capture.invalid = true;
        }
    }

    /// An error if the stream is being captured, for calls that wait for it.
    pub(super) fn refuse_capture(&mut self, call: &'static str, key: u64) -> Result<()> {
        let Some(queue) = self.streams.get(&key) else { return Ok(()) };
        let (device, Some(id)) = (queue.device, queue.capture) else { return Ok(()) };
        self.invalidate(id);
        Err(fail::driver(call, device, fail::CAPTURE_UNSUPPORTED))
    }

    /// Queues a graph, after its own previous launch.
    pub(super) fn graph_launch(&mut self, device: u32, graph: u64, key: u64) -> Result<()> {
        let Some(entry) = self.graphs.get_mut(&graph) else {
            return Err(fail::handle("cuGraphLaunch", device));
        };
        let work = Work::Graph(Arc::clone(&entry.plan));
        let capturing = self.streams.get(&key).is_some_and(|queue| queue.capture.is_some());
        if capturing {
            self.queue(key, work);
            return Ok(());
        }
        let done = Mark::default();
        if let Some(previous) = entry.last.replace(done.clone()) {
            self.push(key, Entry::Wait(previous));
        }
        self.push(key, Entry::Work(work));
        self.push(key, Entry::Record(done));
        Ok(())
    }
}
