//! Kernels alone on one GPU, and two GPUs bouncing a message: what each costs without the rest.
//!
//! A kernel of a collective in a world of one waits for nobody: what is left is reading its tensor,
//! the books of the pipes and writing the result.

use crate::median;
use crate::rig::{Rig, Timing};
use peerlane::Result;
use peerlane::plan::{self, Grid};
use peerlane_device::abi::{Args, DType, Format, Kernel, Operation, Status, Wire, probe};
use std::time::Duration;

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

    /// How the library would launch it for `bytes` bytes, given every block that `rig` holds.
    pub fn grid(&self, rig: &Rig, bytes: usize) -> Grid {
        plan::grid(&rig.shape(), self.format, bytes)
    }

    /// Its arguments for `bytes` bytes.
    pub fn args(&self, rig: &Rig, bytes: usize) -> Args {
        let mut args = rig.args(self.operation);
        args.bytes = bytes as u64;
        args.part_bytes = plan::part_bytes(1, bytes) as u64;
        args.chunk_units = self.grid(rig, bytes).chunk_units;
        if self.operation == Operation::Gather {
            (args.rows, args.widths[0]) = (1, bytes as u64);
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

/// Two rigs that write into each other's mailboxes.
pub struct Pair<'a> {
    rigs: [&'a Rig; 2],
    /// The first round that neither side has seen.
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

    /// One step: the time in which 2 KiB and a flag go from each side to the other and are checked,
    /// from `repeats` launches of `rounds` steps each, by the GPUs' own clocks.
    pub fn ping_pong(&mut self, rounds: u32, repeats: u32) -> Result<Timing> {
        let mut samples = Vec::new();
        // The first launch warms up and is not counted.
        for _ in 0..=repeats {
            let steps = self.bounce(rounds)?;
            samples.push(steps.as_nanos() as f64 / 1e3 / rounds as f64);
        }
        let least_us = samples[1..].iter().copied().fold(f64::INFINITY, f64::min);
        Ok(Timing { least_us, median_us: median(&mut samples[1..]) })
    }

    /// The slower side's time for `rounds` rounds.
    fn bounce(&mut self, rounds: u32) -> Result<Duration> {
        for (rank, rig) in self.rigs.iter().enumerate() {
            let mut args = rig.args(Operation::Probe);
            args.peers[..2].copy_from_slice(&self.rigs.map(Rig::mailbox));
            (args.rank, args.world, args.peer) = (rank as u32, 2, 1 - rank as u32);
            (args.mode, args.rounds, args.rows) =
                (probe::PING_PONG, rounds, self.next_round as u64);
            // SAFETY: both peers are rigs whose mailboxes the other has mapped.
            unsafe { rig.launch(Kernel::Probe, 1, 32, &args)? };
        }
        self.next_round += rounds;
        // Both are waited for before either error is returned.
        let ends = self.rigs.map(Rig::finish);
        ends.into_iter().collect::<Result<()>>()?;
        let slower = self.rigs.map(|rig| read_probe(&rig.status())).into_iter().max();
        Ok(Duration::from_nanos(slower.unwrap_or(0)))
    }
}

fn read_probe(status: &Status) -> u64 {
    status.probe_ns
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
    fn two_gpus_bounce_a_message() {
        let rigs = rigs(2, 1);
        let timing = Pair::new([&rigs[0], &rigs[1]]).unwrap().ping_pong(4, 2).unwrap();
        assert!(timing.least_us > 0.0 && timing.least_us <= timing.median_us, "{timing:?}");
    }
}
