//! How ranks go on after an error.

use crate::group::{Group, Rank};
use crate::job::random_jobs;
use crate::machine::small;
use crate::script::Script;
use peerlane::cases::Rng;
use peerlane::gpu::GpuRef;
use peerlane::{Communicator, Config, Error};
use std::time::Duration;

/// How they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// There was no error.
    Unneeded,
    /// The same communicators went on.
    Recovered,
    /// All ranks closed, and new communicators on the GPUs that are left went on.
    Closed,
}

/// Lets the ranks of a group that failed go on, on all GPUs but the one that has stopped, and makes calls.
///
/// # Errors
/// They do not.
pub(super) fn recovers(
    group: Group,
    gpus: &[GpuRef],
    stopped: Option<u32>,
    seed: u64,
) -> Result<After, String> {
    // Every rank closes; what ails it is known.
    drop(group);
    let is_well = |gpu: &&GpuRef| Some(gpu.properties().ordinal) != stopped;
    let left: Vec<GpuRef> = gpus.iter().filter(is_well).cloned().collect();
    if left.is_empty() {
        return Ok(After::Closed);
    }
    let mut group = connect(&left).map_err(|error| format!("connecting again: {error}"))?;
    let mut rng = Rng::new(seed, "recovery");
    let world = left.len() as u32;
    let jobs = random_jobs(world, 3, 2000, &mut rng);
    group.run(&Script::new(world, &jobs, seed)).map_err(|error| format!("afterwards: {error}"))?;
    Ok(After::Closed)
}

fn connect(gpus: &[GpuRef]) -> Result<Group, Error> {
    let world = gpus.len() as u32;
    let config = Config { deadline: Duration::from_millis(100), ..small(world) };
    let communicators = Communicator::connect(gpus, &config)?;
    let ranks = communicators.into_iter().map(Rank::new).collect::<Result<_, _>>()?;
    Ok(Group { ranks })
}
