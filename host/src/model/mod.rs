//! How long collectives would take on machines that are not here: link models and a virtual clock.
//!
//! Pure: no GPU, no threads, no randomness. [`fabric`] says how GPUs are connected, [`schedule`] what an
//! algorithm sends and waits for, [`clock`] how long that takes. The constants come from measurements on
//! two H200s where there are any (docs/scaling.md); what is assumed is marked so where it stands.
//!
//! Invariant: a prediction is a function of its arguments. It is a model's answer, and whoever
//! prints it says so.

pub mod clock;
pub mod fabric;
pub mod schedule;
#[cfg(test)]
mod tests;

pub use clock::{Costs, Load};
pub use fabric::{Fabric, Preset};
pub use schedule::{Cut, Schedule};

use crate::algorithm::{Algorithm, Route};
use crate::choice::{Choice, Links};
use crate::communicator::Config;
use crate::layout;
use crate::plan::{self, Shape};

/// Blocks that an H200 holds of an all-reduce kernel: two on each multiprocessor, as many as a mailbox has
/// lanes.
const BLOCKS: u32 = 256;

impl Costs {
    /// What calls in a CUDA graph cost on H200s.
    ///
    /// The launch is that of an empty kernel, measured. The gap, the speed of taking and the latency of
    /// [`Preset::NvSwitch`] are the least-squares fit (relative errors) of this model to one-shot
    /// all-reduces of 2 KiB to 64 MiB on two H200s; `tests::constants_fit_the_measurements` holds them to it.
    /// What copies cost was measured as `benches/stream_ops.py` does: a small copy and its flag are seen 8.7 us (other
    /// runs: 10) later, of which 2.1 count as the step; a flag between two copies takes 2.2 us; the sum of a call of
    /// 8 KiB ends 5.3 us after its data have come; a call's first copy begins some 8 us after the caller's stream.
    pub const H200: Costs = Costs {
        launch_us: 0.57,
        gap_us: 0.43,
        take_gbs: 1940.0,
        copy_us: 6.6,
        kernel_us: 5.3,
        flag_us: 2.2,
        fork_us: 8.0,
    };
}

/// What the model says of one call.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// From the launch to the last rank's last step, microseconds.
    pub time_us: f64,
    /// Transfers that must follow one another, were the tensor one chunk.
    pub steps: u32,
    /// Bytes, as they travel, out of the rank that sends most.
    pub sent_bytes: u64,
    /// What went through each port of the fabric.
    pub loads: Vec<Load>,
}

/// The shape that a communicator with default settings has on `fabric`, and the hub next to rank 0.
pub fn shape(fabric: &Fabric) -> Shape {
    let world = fabric.world();
    // The default is enough for 16 ranks; `layout` tests it.
    let layout = layout::choose(world, Config::default().mailbox_bytes)
        .unwrap_or_else(|| unreachable!("{world} ranks fit the default mailbox"));
    let shape = Shape::new(world, layout, BLOCKS);
    Shape { islands: fabric.islands(), hub: 1 % world, ..shape }
}

/// What is chosen, where nothing was measured, for an all-reduce of `bytes` bytes among `world` GPUs that NVLink
/// connects.
pub fn usual(world: u32, bytes: usize) -> Algorithm {
    let shape = shape(&Preset::NvSwitch.fabric(world));
    Choice::modelled(&shape, &Links::of(shape.class), true).all_reduce(bytes)
}

/// Predicts an all-reduce of `bytes` bytes, as they travel, on a usual machine with `world` GPUs.
///
/// # Panics
/// If `world` is not 1 to 16.
pub fn predict(algorithm: Algorithm, preset: Preset, world: u32, bytes: usize) -> Prediction {
    predict_on(algorithm, &preset.fabric(world), &Costs::H200, bytes)
}

/// Predicts an all-reduce of `bytes` bytes, as they travel, on any machine.
pub fn predict_on(
    algorithm: Algorithm,
    fabric: &Fabric,
    costs: &Costs,
    bytes: usize,
) -> Prediction {
    let (shape, bytes) = (shape(fabric), bytes as u64);
    let cut = Cut::of(algorithm, &shape, bytes);
    let schedule = Schedule::all_reduce(algorithm, &shape, bytes, cut);
    let whole = Schedule::all_reduce(algorithm, &shape, bytes, Cut::WHOLE);
    sum_up(&schedule, whole.depth(), fabric, costs)
}

/// Predicts a broadcast of `bytes` bytes from `root`.
pub fn predict_broadcast(
    route: Route,
    fabric: &Fabric,
    costs: &Costs,
    root: u32,
    bytes: usize,
) -> Prediction {
    let shape = shape(fabric);
    let schedule = Schedule::broadcast(route, &shape, root, bytes as u64);
    // Each level of a tree is a transfer.
    let steps = plan::roles::spread(&shape, route.spread(), root).height();
    sum_up(&schedule, steps, fabric, costs)
}

fn sum_up(schedule: &Schedule, steps: u32, fabric: &Fabric, costs: &Costs) -> Prediction {
    let timeline = clock::run(schedule, fabric, costs);
    Prediction {
        time_us: timeline.total_us,
        steps,
        sent_bytes: schedule.sent().into_iter().max().unwrap_or(0),
        loads: timeline.loads,
    }
}
