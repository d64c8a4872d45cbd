//! Kernels alone on one GPU, and two GPUs bouncing a message: what each costs without the rest.
//!
//! A kernel of a collective in a world of one waits for nobody: what is left is reading its tensor,
//! the books of the pipes and writing the result.

use crate::rig::{Rig, Timing};
use peerlane::Result;
use peerlane::gpu::Graph;
use peerlane::plan::{self, Grid};
use peerlane_device::abi::{Args, DType, Format, Kernel, Operation, Wire, probe};

/// A kernel that runs alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Solo {
    /// The kernel.
    pub kernel: Kernel,
    /// What it does.
    pub operation: Operation,
    /// How it cuts its message.
    pub format: Format,
    /// Bytes of memory that it reads and writes for each byte of the tensor.
    pub traffic: u64,
}

impl Solo {
    /// The kernels worth timing alone: every local reduction, and one of each collective.
    pub fn all() -> Vec<Solo> {
        let local = DType::ALL.map(|dtype| {
            Solo::new(Kernel::local_reduce(dtype), Operation::LocalReduce, Format::Full, 3)
        });
        let one_shot = Format::ALL.map(|format| {
            let kernel = Kernel::all_reduce_one_shot(DType::Bf16, Wire::Native, format);
            Solo::new(kernel, Operation::AllReduce, format, 2)
        });
        let (dtype, wire, full) = (DType::Bf16, Wire::Native, Format::Full);
        let others = [
            Solo::new(Kernel::all_reduce_two_shot(dtype, wire), Operation::AllReduce, full, 2),
            Solo::new(Kernel::reduce_scatter(dtype, wire), Operation::ReduceScatter, full, 2),
            Solo::new(Kernel::all_gather(full), Operation::AllGather, full, 2),
            Solo::new(Kernel::gather(full), Operation::Gather, full, 2),
        ];
        [&local[..], &one_shot, &others].concat()
    }

    fn new(kernel: Kernel, operation: Operation, format: Format, traffic: u64) -> Solo {
        Solo { kernel, operation, format, traffic }
    }

    /// Units in a message of `bytes` bytes.
    fn units(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.format.payload())
    }

    /// How the library would launch it for `bytes` bytes, given every block that `rig` holds.
    pub fn grid(&self, rig: &Rig, bytes: usize) -> Grid {
        plan::grid(&rig.shape(), self.units(bytes))
    }

    /// Its arguments for `bytes` bytes.
    pub fn args(&self, rig: &Rig, bytes: usize) -> Args {
        let mut args = rig.args(self.operation);
        let units = self.units(bytes);
        args.units = units as u32;
        args.tail = (bytes - units.saturating_sub(1) * self.format.payload()) as u32;
        args.shard_bytes = bytes as u64;
        args.part_units = plan::part_units(1, units) as u32;
        let grid = self.grid(rig, bytes);
        (args.block_units, args.chunk_units) = (grid.block_units, grid.chunk_units);
        if self.operation == Operation::LocalReduce {
            // Two tensors, one of which the sum replaces.
            (args.world, args.peers[0], args.peers[1]) = (2, args.dst, args.src);
        }
        if self.operation == Operation::Gather {
            (args.rows, args.table[0]) = (1, bytes as u64);
        }
        args
    }

    /// Queues it once.
    ///
    /// # Safety
    /// The rig's tensors have `bytes` bytes.
    pub unsafe fn queue(&self, rig: &Rig, bytes: usize) -> Result<()> {
        let (grid, args) = (self.grid(rig, bytes), self.args(rig, bytes));
        // SAFETY: the sizes fit, as the caller says, and the rig is the only rank.
        unsafe { rig.launch(self.kernel, grid.blocks, grid.threads, &args) }
    }
}

/// Queues the cheapest kernel there is: a local reduction of nothing, by one warp.
pub fn queue_nothing(rig: &Rig) -> Result<()> {
    let args = rig.args(Operation::LocalReduce);
    // SAFETY: with zero bytes no address is followed.
    unsafe { rig.launch(Kernel::LocalReduceF32, 1, 32, &args) }
}

/// Queues a barrier of one rank: the fixed work of a collective's kernel.
pub fn queue_barrier(rig: &Rig) -> Result<()> {
    let args = rig.args(Operation::Barrier);
    // SAFETY: it touches the rig's own mailbox only.
    unsafe { rig.launch(Kernel::Barrier, 1, 32, &args) }
}

/// Two rigs that write into each other's mailboxes: ranks 0 and 1 of a world of two.
pub struct Pair<'a> {
    rigs: [&'a Rig; 2],
    /// The first round of the probe that neither side has seen.
    next_round: u32,
}

impl<'a> Pair<'a> {
    /// Maps both GPUs into each other. The rigs must not have been in a pair before.
    pub fn new(rigs: [&'a Rig; 2]) -> Result<Pair<'a>> {
        for (rig, other) in [(rigs[0], rigs[1]), (rigs[1], rigs[0])] {
            let peer = other.gpu().properties().ordinal;
            if peer != rig.gpu().properties().ordinal {
                rig.gpu().enable_peer(peer)?;
            }
        }
        Ok(Pair { rigs, next_round: 1 })
    }

    /// One barrier of the two: a kernel, and an empty packet each way. From `repeats` graphs of
    /// `calls` barriers.
    pub fn barrier(&mut self, calls: u32, repeats: u32) -> Result<Timing> {
        let record = |rank: usize| {
            let (rig, args) = (self.rigs[rank], self.args(rank, Operation::Barrier));
            // SAFETY: both peers are rigs whose mailboxes the other has mapped.
            rig.record(calls, || unsafe { rig.launch(Kernel::Barrier, 1, 32, &args) })
        };
        let graphs = [record(0)?, record(1)?];
        let samples: Result<Vec<f64>> =
            (0..=repeats).map(|_| Ok(self.replay(graphs)? / calls as f64)).collect();
        for (rig, graph) in self.rigs.iter().zip(graphs) {
            // SAFETY: recorded above; `replay` waited for it, or the device is lost.
            unsafe { rig.forget(graph)? };
        }
        Ok(Timing::of(&mut samples?[1..]))
    }

    /// Runs a graph on each side; the slower one's microseconds.
    fn replay(&self, graphs: [Graph; 2]) -> Result<f64> {
        self.rigs.iter().zip(graphs).try_for_each(|(rig, graph)| rig.replay(graph))?;
        self.finish()?;
        Ok(self.rigs[0].elapsed_us()?.max(self.rigs[1].elapsed_us()?))
    }

    /// One step of the probe: 2 KiB and a flag go from each side to the other and are checked. From
    /// `repeats` launches of `rounds` steps each, by the GPUs' own clocks.
    pub fn probe(&mut self, rounds: u32, repeats: u32) -> Result<Timing> {
        // The first launch warms up and is not counted.
        let samples: Result<Vec<f64>> =
            (0..=repeats).map(|_| Ok(self.bounce(rounds)? / rounds as f64)).collect();
        Ok(Timing::of(&mut samples?[1..]))
    }

    /// The slower side's microseconds for `rounds` rounds.
    fn bounce(&mut self, rounds: u32) -> Result<f64> {
        for (rank, rig) in self.rigs.iter().enumerate() {
            let mut args = self.args(rank, Operation::Probe);
            args.mode = probe::PING_PONG;
            (args.rounds, args.rows) = (rounds, self.next_round as u64);
            // SAFETY: both peers are rigs whose mailboxes the other has mapped.
            unsafe { rig.launch(Kernel::Probe, 1, 32, &args)? };
        }
        self.next_round += rounds;
        self.finish()?;
        let slower = self.rigs.map(|rig| rig.status().probe_ns).into_iter().max();
        Ok(slower.unwrap_or(0) as f64 / 1e3)
    }

    /// The arguments of one side.
    fn args(&self, rank: usize, operation: Operation) -> Args {
        let mut args = self.rigs[rank].args(operation);
        args.peers[..2].copy_from_slice(&self.rigs.map(Rig::mailbox));
        (args.rank, args.world, args.peer) = (rank as u32, 2, 1 - rank as u32);
        args
    }

    /// Waits for both sides, and only then says whether either failed.
    fn finish(&self) -> Result<()> {
        self.rigs.map(Rig::finish).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerlane::gpu::sim;

    const BYTES: usize = 4096 + 48;

    fn rigs(devices: u32, seed: u64) -> Vec<Rig> {
        let config = sim::Config { devices, seed, multiprocessors: 2, ..Default::default() };
        sim::devices(&config).iter().map(|gpu| Rig::new(gpu, 2 * BYTES).unwrap()).collect()
    }

    #[test]
    fn every_kernel_runs_alone() {
        let rig = &rigs(1, 1)[0];
        let stream = rig.gpu().stream_create().unwrap();
        let (src, dst) = rig.tensors();
        let input: Vec<u8> = (0..BYTES).map(|i| (i % 63) as u8).collect();
        for solo in Solo::all() {
            let mut output = vec![0; BYTES];
            // SAFETY: both tensors have more than `BYTES` bytes.
            unsafe {
                rig.gpu().upload(src, &input, stream).unwrap();
                rig.gpu().fill(dst, 0, BYTES, stream).unwrap();
                rig.gpu().stream_synchronize(stream).unwrap();
                solo.queue(rig, BYTES).unwrap();
                rig.finish().unwrap();
                rig.gpu().download(&mut output, dst, stream).unwrap();
            }
            // A sum of one tensor, or of one and zero, is that tensor.
            assert!(output == input, "{:?}", solo.kernel);
        }
        // SAFETY: made above and idle.
        unsafe { rig.gpu().stream_destroy(stream).unwrap() };
    }

    #[test]
    fn graphs_are_timed() {
        let rig = &rigs(1, 1)[0];
        for queue in [queue_nothing, queue_barrier] {
            let timing = rig.time(3, 2, || queue(rig)).unwrap();
            assert!(timing.least_us > 0.0 && timing.least_us <= timing.median_us, "{timing:?}");
        }
    }

    #[test]
    fn two_gpus_meet() {
        for seed in 0..20 {
            let rigs = rigs(2, seed);
            let mut pair = Pair::new([&rigs[0], &rigs[1]]).unwrap();
            let timing = pair.barrier(5, 2).unwrap();
            assert!(timing.least_us > 0.0 && timing.least_us <= timing.median_us, "{timing:?}");
            pair.probe(1, 2).unwrap();
        }
    }
}
