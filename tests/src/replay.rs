//! What a rank that is a process does with a CUDA graph of its calls, when its test tells it to.

use crate::group::{Memory, Rank};
use peerlane::gpu::Graph;
use peerlane::{AllReduce, Communicator, DType, Error};

/// A graph with an all-reduce, and the tensor of it.
pub struct Recorded {
    graph: Graph,
    memory: Memory,
    count: usize,
}

/// The numbers of one rank's tensor: small whole ones, whose sums no order of additions changes.
fn image(count: usize, value: impl Fn(usize) -> u32) -> Vec<u8> {
    (0..count).flat_map(|index| (value(index) as f32).to_le_bytes()).collect()
}

fn before(communicator: &Communicator, count: usize) -> Vec<u8> {
    let number = communicator.rank();
    image(count, |index| number + 1 + (index % 7) as u32)
}

impl Recorded {
    /// Captures an all-reduce of `count` numbers.
    pub fn new(rank: &mut Rank, count: usize) -> Result<Recorded, Error> {
        let memory =
            Memory::with_image(&rank.gpu, rank.stream, &before(&rank.communicator, count))?;
        rank.gpu.stream_synchronize(rank.stream)?;
        rank.gpu.capture_begin(rank.stream)?;
        let call = AllReduce::in_place(memory.base, count, DType::F32);
        // SAFETY: the memory has that size and lives as long as the graph.
        let queued = unsafe { rank.communicator.all_reduce(&call, rank.stream) };
        let graph = rank.gpu.capture_end(rank.stream)?;
        queued.map(|()| Recorded { graph, memory, count })
    }

    /// Runs it and compares what it leaves.
    ///
    /// # Panics
    /// If that is wrong.
    pub fn replay(&self, rank: &Rank) -> Result<String, Error> {
        let communicator = &rank.communicator;
        self.memory.write(&before(communicator, self.count), rank.stream)?;
        rank.gpu.graph_launch(self.graph, rank.stream)?;
        rank.finish()?;
        let world = communicator.world_size();
        let sum = |index| world * (world + 1) / 2 + world * (index % 7) as u32;
        let after = image(self.count, sum);
        assert!(self.memory.read(after.len())? == after, "a replay has left another sum");
        Ok("replayed".into())
    }
}
