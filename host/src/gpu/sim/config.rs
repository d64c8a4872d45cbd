//! What a simulated machine is like, and what it says about itself.
//!
//! Invariant: two worlds made from equal configurations behave the same.

use super::fault::Fault;
use peerlane_device::abi::MAX_RANKS;

/// A simulated machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Config {
    /// GPUs in the machine.
    pub devices: u32,
    /// Everything that is left to chance follows from it: schedule, store buffers, paces.
    pub seed: u64,
    /// Whether signals and slots reach memory late, out of order and torn, as the hardware's
    /// memory model allows. Without it every store is visible at once.
    pub weak: bool,
    /// Multiprocessors that each GPU reports.
    pub multiprocessors: u32,
    /// Bytes of memory of each GPU.
    pub memory_bytes: u64,
    /// Hardware queues that each GPU reports. Simulated streams wait for each other in no case.
    pub hardware_queues: usize,
    /// Whether a thread of the machine's own moves it, so that kernels run while no caller waits.
    /// Ranks in other processes need that. Schedules are not repeatable then.
    ///
    /// Waiting takes real time in such a machine, and in any machine while memory that it exported
    /// or imported is there: another process may be about to write what is waited for. For the same
    /// reason no kernel counts as hung there.
    pub autonomous: bool,
    /// Pairs of GPUs that cannot reach each other, in either direction.
    pub unreachable: Vec<(u32, u32)>,
    /// Ordered pairs of GPUs of which the first cannot reach the second, whatever the second can.
    pub one_way: Vec<(u32, u32)>,
    /// Ordered pairs of GPUs: what the first stores into the memory of the second, in units or
    /// words, is lost, though access is offered. Drivers have been seen that do this.
    pub lossy: Vec<(u32, u32)>,
    /// What goes wrong, and when. Without any the machine behaves as if there were no such thing.
    pub faults: Vec<Fault>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            devices: 8,
            seed: 1,
            weak: true,
            multiprocessors: 16,
            memory_bytes: 8 << 30,
            hardware_queues: 4 * MAX_RANKS,
            autonomous: false,
            unreachable: Vec::new(),
            one_way: Vec::new(),
            lossy: Vec::new(),
            faults: Vec::new(),
        }
    }
}

impl Config {
    /// Whether one GPU can map another's memory.
    pub(super) fn reaches(&self, from: u32, to: u32) -> bool {
        let either_way = |&(a, b): &(u32, u32)| (a, b) == (from, to) || (b, a) == (from, to);
        !self.unreachable.iter().any(either_way) && !self.one_way.contains(&(from, to))
    }
}

/// What a world has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// The seed that the world was made with.
    pub seed: u64,
    /// Turns that lanes have taken.
    pub steps: u64,
    /// Kernels started.
    pub launches: u64,
    /// Simulated nanoseconds since the world began.
    pub clock_ns: u64,
    /// A hash over every turn: equal traces mean equal interleavings.
    pub trace: u64,
}
