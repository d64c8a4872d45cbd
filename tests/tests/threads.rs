//! Ranks that each have a thread of their own, as a program with one thread per GPU does.

use peerlane::cases::Rng;
use peerlane::gpu::GpuRef;
use peerlane::{Communicator, Config, Error, Meeting};
use peerlane_tests::{Machine, Memory, Rank, Script, random_jobs, small};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `scripts` one after the other as `rank`; returns what each left in the rank's memory.
fn live(
    meeting: &Meeting,
    rank: u32,
    gpu: &GpuRef,
    config: &Config,
    scripts: &[Script],
) -> Result<Vec<Vec<u8>>, Error> {
    let mut rank = Rank::new(Communicator::join(meeting, rank, gpu, config)?)?;
    let number = rank.communicator.rank() as usize;
    let images = scripts.iter().map(|script| &script.images[number].before);
    let memory = images.clone().map(|i| Memory::with_image(gpu, rank.stream, i));
    let memory = memory.collect::<Result<Vec<_>, _>>()?;
    for (script, memory) in scripts.iter().zip(&memory) {
        rank.issue_all(script, memory.base)?;
        rank.finish()?;
    }
    let found = memory.iter().zip(images).map(|(memory, image)| memory.read(image.len()));
    let found = found.collect::<Result<Vec<_>, _>>()?;
    rank.communicator.close()?;
    Ok(found)
}

/// What every rank leaves, `[rank][script]`.
fn live_together(world: u32, seed: u64, scripts: &[Script]) -> Vec<Vec<Vec<u8>>> {
    let machine = Machine::sim(world, seed);
    let meeting = Meeting::new(world, PATIENCE);
    // Real time passes while a thread is busy outside the simulated world.
    let config = Config { deadline: PATIENCE, ..small(world) };
    let gpus = machine.gpus(world);
    std::thread::scope(|scope| {
        let (meeting, config) = (&meeting, &config);
        let start = |(rank, gpu)| {
            scope.spawn(move || live(meeting, rank, gpu, config, scripts).expect("it goes well"))
        };
        let threads: Vec<_> = (0..).zip(&gpus).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    })
}

fn assert_right_in_threads(world: u32, iterations: u64) {
    for seed in 1..=iterations {
        let script = |part: u64| {
            let jobs = random_jobs(world, 10, 3000, &mut Rng::new(10 * seed + part, "threads"));
            Script::new(world, &jobs, seed)
        };
        let scripts: Vec<Script> = (0..3).map(script).collect();
        let found = live_together(world, seed, &scripts);
        for (index, script) in scripts.iter().enumerate() {
            let found: Vec<Vec<u8>> = found.iter().map(|rank| rank[index].clone()).collect();
            let verdict = script.verify(&found);
            verdict.unwrap_or_else(|reason| panic!("{world} ranks, seed {seed}: {reason}"));
        }
    }
}

#[test]
fn two_threads_are_right() {
    assert_right_in_threads(2, 6);
}

#[test]
fn four_threads_are_right() {
    assert_right_in_threads(4, 4);
}

#[test]
fn nine_threads_are_right() {
    assert_right_in_threads(9, 2);
}
