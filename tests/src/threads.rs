//! Ranks that have a thread each, for tests of what they agree on.
//!
//! Invariant: the threads end with the call that started them, and a panic of one is a panic of the test.

use crate::group::{Memory, Rank};
use crate::machine::Machine;
use crate::script::Script;
use peerlane::{Communicator, Config, Error, Meeting};
use std::time::Duration;

/// Runs `live` as each rank of a group, on a thread each, and returns what they return.
///
/// # Panics
/// If a rank cannot join, or `live` panics.
pub fn threads<T: Send>(
    machine: &Machine,
    world: u32,
    config: &Config,
    live: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    let meeting = Meeting::new(world, Duration::from_secs(60));
    let gpus = machine.gpus(world);
    std::thread::scope(|scope| {
        let (meeting, live) = (&meeting, &live);
        let start = |(rank, gpu)| {
            scope.spawn(move || {
                let joined = Communicator::join(meeting, rank, gpu, config).expect("all join");
                live(&mut Rank::new(joined).expect("the GPU has streams"))
            })
        };
        let threads: Vec<_> = (0..).zip(&gpus).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    })
}

/// One rank's calls of a script, compared.
///
/// # Panics
/// If what is in memory is wrong.
pub fn run(rank: &mut Rank, script: &Script) -> Result<(), Error> {
    let number = rank.communicator.rank() as usize;
    let image = &script.images[number].before;
    let memory = Memory::with_image(&rank.gpu, rank.stream, image)?;
    let issued = rank.issue_all(script, memory.base);
    // The memory must not go while something on it is queued.
    rank.gpu.stream_synchronize(rank.stream)?;
    issued?;
    rank.communicator.health()?;
    script.verify_rank(number, &memory.read(image.len())?).expect("it is right");
    Ok(())
}
