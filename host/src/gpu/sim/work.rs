//! What streams and graphs hold: the work itself, the marks that events leave, and graphs.
//!
//! Invariant: nothing in here changes once it is queued, except a mark, once, from unset to set.

use super::kernel::Body;
use peerlane_device::abi::Args;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kernel launch.
pub(super) struct Launch {
    pub(super) name: &'static str,
    pub(super) device: u32,
    pub(super) blocks: u32,
    pub(super) threads: u32,
    pub(super) args: Args,
    pub(super) body: Body,
}

/// What a stream or a graph node does.
#[derive(Clone)]
pub(super) enum Work {
    Launch(Arc<Launch>),
    Write {
        dst: u64,
        data: Arc<[u8]>,
    },
    Fill {
        dst: u64,
        value: u8,
        bytes: usize,
    },
    Copy {
        dst: u64,
        src: u64,
        bytes: usize,
    },
    /// Stores a word.
    Store {
        dst: u64,
        value: u32,
    },
    /// Lasts until the word has the value.
    Await {
        at: u64,
        value: u32,
    },
    Graph(Arc<GraphPlan>),
}

/// An entry of a stream's queue.
pub(super) enum Entry {
    Work(Work),
    Record(Mark),
    Wait(Mark),
}

/// Who is told when work is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    /// The stream with this key.
    Stream(u64),
    /// A node of the running graph in this slot.
    Node { graph: usize, node: usize },
}

/// One record of an event: unset until the stream has come to it, then the time when it did.
#[derive(Clone, Default)]
pub(super) struct Mark(Arc<AtomicU64>);

impl Mark {
    pub(super) fn set(&self, now: u64) {
        self.0.store(now + 1, Ordering::Relaxed);
    }

    pub(super) fn time(&self) -> Option<u64> {
        self.0.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(super) fn is_set(&self) -> bool {
        self.time().is_some()
    }
}

/// A node of a graph.
pub(super) struct Node {
    pub(super) device: u32,
    pub(super) work: Work,
    /// Nodes that must be done before; all have smaller indices.
    pub(super) after: Vec<usize>,
}

/// An executable graph.
pub(super) struct GraphPlan {
    pub(super) nodes: Vec<Node>,
    /// For each node, those that wait for it.
    before: Vec<Vec<usize>>,
}

impl GraphPlan {
    pub(super) fn new(nodes: Vec<Node>) -> GraphPlan {
        let mut before = vec![Vec::new(); nodes.len()];
        for (index, node) in nodes.iter().enumerate() {
            for &earlier in &node.after {
                before[earlier].push(index);
            }
        }
        GraphPlan { nodes, before }
    }
}

/// A graph that is running.
pub(super) struct GraphRun {
    pub(super) plan: Arc<GraphPlan>,
    pub(super) owner: Owner,
    /// For each node, how many it still waits for.
    missing: Vec<usize>,
    left: usize,
}

impl GraphRun {
    pub(super) fn new(plan: Arc<GraphPlan>, owner: Owner) -> GraphRun {
        let missing = plan.nodes.iter().map(|node| node.after.len()).collect();
        GraphRun { left: plan.nodes.len(), plan, owner, missing }
    }

    /// Nodes that wait for nothing.
    pub(super) fn roots(&self) -> Vec<usize> {
        (0..self.missing.len()).filter(|&node| self.missing[node] == 0).collect()
    }

    /// Notes that `node` is done; returns the nodes that can start now.
    pub(super) fn done(&mut self, node: usize) -> Vec<usize> {
        self.left -= 1;
        let mut startable = Vec::new();
        for &next in &self.plan.before[node] {
            self.missing[next] -= 1;
            if self.missing[next] == 0 {
                startable.push(next);
            }
        }
        startable
    }

    pub(super) fn is_done(&self) -> bool {
        self.left == 0
    }
}
