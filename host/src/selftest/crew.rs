//! A small communicator with memory and streams of its own, for the checks that are collectives.
//!
//! Invariant: one thread queues a call on every rank before it waits for any. After a fault a crew is not used
//! again.

use super::direct::difference;
use super::lab::{Direction, Fault, Lab};
use super::mode::SelfTest;
use crate::algorithm::Algorithm;
use crate::choice::Tuning;
use crate::communicator::{Communicator, Config};
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, GpuRef, Graph};
use crate::links::rig::Memory;
use crate::mailbox::OwnStream;
use crate::request::{AllGather, AllReduce};
use crate::transport::Transport;
use peerlane_device::abi::DType;

/// Blocks of a call: a few, so that other kernels find room beside it.
const BLOCKS: u32 = 4;
/// Bytes of a mailbox for each rank of the group.
const MAILBOX_BYTES: usize = 1 << 20;

/// One rank. Dropped in this order: a communicator needs its last stream until it is closed.
struct Rank<'a> {
    communicator: Communicator,
    stream: OwnStream,
    /// What it brings, then what it ends with.
    memory: Memory<'a>,
    gpu: &'a GpuRef,
}

/// The ranks of a communicator.
pub(super) struct Crew<'a> {
    ranks: Vec<Rank<'a>>,
    /// Their GPUs' positions.
    positions: Vec<usize>,
    /// Bytes that a rank brings at most.
    most: usize,
}

impl<'a> Crew<'a> {
    /// Ranks on the GPUs at `positions`. Where a GPU does not reach another, host memory carries the data: no link
    /// is tested there.
    pub(super) fn new(lab: &Lab<'a>, positions: &[usize]) -> Result<Crew<'a>> {
        let all = lab.gpus;
        let gpus: Vec<GpuRef> = positions.iter().map(|at| all[*at].clone()).collect();
        let config = Config {
            deadline: lab.settings.deadline,
            mailbox_bytes: positions.len() * MAILBOX_BYTES,
            max_blocks: Some(BLOCKS),
            tuning: Tuning::Off,
            transport: Transport::Auto,
            self_test: SelfTest::Off,
            ..Config::default()
        };
        let most = lab.settings.most_bytes;
        let communicators = Communicator::connect(&gpus, &config)?;
        let ranks = communicators.into_iter().zip(positions).map(|(communicator, at)| {
            let gpu = &all[*at];
            let memory = Memory::new(gpu, most * (1 + positions.len()))?;
            Ok(Rank { communicator, stream: OwnStream::new(gpu)?, memory, gpu })
        });
        Ok(Crew { ranks: ranks.collect::<Result<_>>()?, positions: positions.to_vec(), most })
    }

    /// Where a rank's result lies.
    fn result(&self, rank: usize) -> DevicePtr {
        self.ranks[rank].memory.at.offset(self.most)
    }

    /// Writes what the ranks bring, and makes where their results will be stale.
    pub(super) fn bring(&self, inputs: &[Vec<u8>]) -> Result<()> {
        for (at, (rank, input)) in self.ranks.iter().zip(inputs).enumerate() {
            let stream = rank.stream.stream;
            // SAFETY: nobody brings more than `most` bytes, and the results have room for all ranks'.
            unsafe {
                rank.gpu.upload(rank.memory.at, input, stream)?;
                rank.gpu.fill(self.result(at), 0xee, input.len() * inputs.len(), stream)?;
            }
            rank.gpu.stream_synchronize(stream)?;
        }
        Ok(())
    }

    fn all_reduce_of(&mut self, at: usize, count: usize, algorithm: Algorithm) -> Result<()> {
        let dst = self.result(at);
        let rank = &mut self.ranks[at];
        let call = AllReduce {
            src: rank.memory.at,
            dst,
            algorithm: Some(algorithm),
            ..AllReduce::in_place(dst, count, DType::F32)
        };
        // SAFETY: `most` bytes hold the tensors, which live until the rank's stream is done.
        unsafe { rank.communicator.all_reduce(&call, rank.stream.stream) }
    }

    /// Queues an all-reduce of `count` f32 on every rank.
    pub(super) fn all_reduce(&mut self, count: usize, algorithm: Algorithm) -> Result<()> {
        (0..self.ranks.len()).try_for_each(|at| self.all_reduce_of(at, count, algorithm))
    }

    /// Queues an all-gather of `bytes` bytes from each rank.
    pub(super) fn all_gather(&mut self, bytes: usize) -> Result<()> {
        for at in 0..self.ranks.len() {
            let dst = self.result(at);
            let rank = &mut self.ranks[at];
            let call = AllGather { src: rank.memory.at, dst, bytes };
            // SAFETY: the result has room for `most` bytes of every rank.
            unsafe { rank.communicator.all_gather(&call, rank.stream.stream)? };
        }
        Ok(())
    }

    /// Captures an all-reduce on every rank.
    pub(super) fn capture(&mut self, count: usize, algorithm: Algorithm) -> Result<Graphs<'a>> {
        let mut graphs = Graphs { graphs: Vec::new() };
        for at in 0..self.ranks.len() {
            let (gpu, stream) = (self.ranks[at].gpu, self.ranks[at].stream.stream);
            gpu.capture_begin(stream)?;
            let queued = self.all_reduce_of(at, count, algorithm);
            // A capture that began must end, whatever was queued.
            let graph = gpu.capture_end(stream);
            queued?;
            graphs.graphs.push((gpu, graph?));
        }
        Ok(graphs)
    }

    /// Queues a replay on every rank.
    pub(super) fn replay(&self, graphs: &Graphs<'a>) -> Result<()> {
        let mut both = self.ranks.iter().zip(&graphs.graphs);
        both.try_for_each(|(rank, (gpu, graph))| gpu.graph_launch(*graph, rank.stream.stream))
    }

    /// Waits for all ranks; which directions something did not come through.
    pub(super) fn settle(&self) -> Result<Vec<Fault>> {
        for rank in &self.ranks {
            rank.gpu.stream_synchronize(rank.stream.stream)?;
        }
        let mut faults = Vec::new();
        let mut others = None;
        for rank in &self.ranks {
            match rank.communicator.health() {
                Ok(()) => {}
                Err(Error::Timeout { rank, peer, operation, phase, waited, .. }) => {
                    let way = self.direction(peer as usize, rank as usize);
                    let reason = format!("{operation} waited {waited:?} for {phase}");
                    faults.push(Fault::new(way, reason));
                }
                // Another rank gave up first and says why.
                Err(Error::Aborted { .. } | Error::Stopped { .. }) => {}
                Err(other) => others = Some(other),
            }
        }
        others.map_or(Ok(faults), Err)
    }

    /// From one rank's GPU to another's.
    pub(super) fn direction(&self, from: usize, to: usize) -> Direction {
        (self.positions[from], self.positions[to])
    }

    /// Compares what every rank ends with: `parts[s]` is what it must have of rank s, or all of it if there is
    /// one. Bits that are wrong came from the rank whose part it is; of a sum, from any other.
    pub(super) fn compare(&self, parts: &[Vec<u8>], what: &str) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        let world = self.ranks.len();
        for (to, rank) in self.ranks.iter().enumerate() {
            let mut found = vec![0; parts.iter().map(Vec::len).sum()];
            // SAFETY: the result has that size.
            unsafe { rank.gpu.download(&mut found, self.result(to), rank.stream.stream)? };
            let mut rest = &found[..];
            for (part, expected) in parts.iter().enumerate() {
                let (mine, others) = rest.split_at(expected.len());
                rest = others;
                let Some(reason) = difference(expected, mine) else { continue };
                let whole = parts.len() == 1 || part == to;
                let senders = (0..world).filter(|from| *from != to && (whole || *from == part));
                faults.extend(
                    senders.map(|from| {
                        Fault::new(self.direction(from, to), format!("{what} {reason}"))
                    }),
                );
            }
        }
        Ok(faults)
    }
}

/// A captured call, a graph a rank.
pub(super) struct Graphs<'a> {
    graphs: Vec<(&'a GpuRef, Graph)>,
}

impl Drop for Graphs<'_> {
    fn drop(&mut self) {
        for (gpu, graph) in &self.graphs {
            // Neither failure can be reported from here.
            let _ = gpu.synchronize();
            // SAFETY: made by `capture`, not running any more and not used again.
            let _ = unsafe { gpu.graph_destroy(*graph) };
        }
    }
}

/// Numbers, as many as there are, and their sum in rank order, as bytes.
pub(super) fn summed(lab: &mut Lab<'_>, ranks: usize, count: usize) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut number = || (lab.rng.below(1 << 24) as f32 - 8_388_608.0) / 1024.0;
    let inputs: Vec<Vec<f32>> =
        (0..ranks).map(|_| (0..count).map(|_| number()).collect()).collect();
    let sum = |at: usize| inputs.iter().map(|input| input[at]).reduce(|a, b| a + b);
    let sums: Vec<f32> = (0..count).filter_map(sum).collect();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (inputs.iter().map(|input| bytes(input)).collect(), bytes(&sums))
}
