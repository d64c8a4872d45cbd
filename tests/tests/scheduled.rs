//! All-reduces and broadcasts as scheduled steps: the bits of the fused kernels of the same pattern, in every
//! world, and what becomes of them when a peer does not come.

use peerlane::cases::{Rng, Values};
use peerlane::gpu::{Graph, sim};
use peerlane::reference::first_difference;
use peerlane::{
    Algorithm, Config, DType, Error, Format, Meeting, Pattern, ReduceOp, Route, Spread, Wire,
};
use peerlane_device::abi::flags;
use peerlane_tests::{Call, Group, Job, Machine, Memory, Rank, Script, random_jobs, small};
use std::time::{Duration, Instant};

/// The kernel that takes the same steps.
const fn fused(pattern: Pattern) -> Algorithm {
    match pattern {
        Pattern::TwoShot => Algorithm::TwoShot,
        Pattern::Ring => Algorithm::Ring,
        Pattern::Tree => Algorithm::Tree,
        Pattern::DoubleTree => Algorithm::DoubleTree,
        Pattern::Hierarchical => Algorithm::Hierarchical,
        Pattern::OneShot => Algorithm::OneShot(Format::Full),
    }
}

/// Small mailboxes, and chunks so small that a few KiB take many.
fn config(world: u32) -> Config {
    Config { staging_bytes: Some(96 << 10), chunk_bytes: Some(256), ..small(world) }
}

fn job(count: usize, algorithm: Algorithm) -> Job {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (algorithm, in_place, absent) = (Some(algorithm), false, 0);
    Job::plain(Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent })
}

/// Random all-reduces in `algorithm`.
fn jobs(world: u32, count: usize, most: usize, algorithm: Algorithm, seed: u64) -> Vec<Job> {
    let mut rng = Rng::new(seed, "scheduled");
    let mut job = || {
        let dtype = DType::ALL[rng.below(3) as usize];
        let op = ReduceOp::ALL[rng.below(4) as usize];
        let absent = if rng.below(3) == 0 { 1 << rng.below(world.into()) } else { 0 };
        let absent = if rng.below(8) == 0 { absent | 1 << rng.below(world.into()) } else { absent };
        let count = 1 + rng.below(most as u64) as usize;
        let (wire, algorithm, in_place) = (Wire::Native, Some(algorithm), rng.below(2) == 0);
        let call = Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent };
        let values = Values::ALL[rng.below(3) as usize];
        Job { call, values, shift: if rng.below(2) == 0 { 0 } else { rng.below(16) as usize } }
    };
    (0..count).map(|_| job()).collect()
}

fn run(group: &mut Group, script: &Script) -> Result<Vec<Vec<u8>>, Error> {
    let memory = group.load(script)?;
    group.issue(script, &memory)?;
    group.collect(&memory, script)
}

/// Compares what the ranks hold after the same calls, carried out in two ways. A NaN may be any NaN.
fn compare(script: &Script, fused: &[Vec<u8>], steps: &[Vec<u8>]) -> Result<(), String> {
    for (rank, (fused, steps)) in fused.iter().zip(steps).enumerate() {
        let mut patched = steps.clone();
        for (job, at) in script.jobs.iter().zip(script.computed(rank, |_| true)) {
            let Call::AllReduce { dtype, op, .. } = job.call else { continue };
            if let Some(i) = first_difference(dtype, op, &fused[at.clone()], &steps[at.clone()]) {
                return Err(format!("rank {rank}: element {i} of {job:?}"));
            }
            patched[at.clone()].copy_from_slice(&fused[at]);
        }
        if patched != *fused {
            return Err(format!("rank {rank} wrote beside its tensors"));
        }
    }
    for rank in 1..steps.len() {
        let (first, own) = (script.computed(0, |_| true), script.computed(rank, |_| true));
        for ((first, own), job) in first.zip(own).zip(&script.jobs) {
            if steps[rank][own] != steps[0][first] {
                return Err(format!("rank {rank} has other bits than rank 0: {job:?}"));
            }
        }
    }
    Ok(())
}

/// Runs random calls under `pattern` as steps and as one kernel each.
fn check(world: u32, devices: u32, pattern: Pattern, calls: usize, most: usize, seed: u64) {
    let config = config(world);
    let script = |algorithm| Script::new(world, &jobs(world, calls, most, algorithm, seed), seed);
    let (one, many) = (script(fused(pattern)), script(Algorithm::Scheduled(pattern)));
    let mut group = Group::connect(&Machine::sim(devices, seed), world, &config);
    let attempt = |script| run(&mut group, script).map_err(|error| error.to_string());
    let outcome = [&many, &one].map(attempt);
    let verdict = match outcome {
        [Ok(steps), Ok(kernel)] => {
            compare(&many, &kernel, &steps).and_then(|()| many.verify(&steps))
        }
        [Err(error), _] | [_, Err(error)] => Err(error),
    };
    assert_eq!(verdict, Ok(()), "{pattern:?}, {world} ranks, seed {seed}");
}

#[test]
fn steps_give_the_bits_of_the_kernel_in_every_world() {
    for world in 2..=9 {
        for pattern in Pattern::ALL {
            for seed in 1..=3 {
                check(world, world, pattern, 6, 1500, seed);
            }
        }
    }
}

#[test]
fn sixteen_ranks_are_right() {
    for pattern in Pattern::ALL {
        check(16, 16, pattern, 2, 1500, 1);
    }
}

#[test]
fn ranks_that_share_a_gpu_have_fewer_streams() {
    // Of 64 queues, 8 ranks on a GPU have streams for 5 each, 16 for one.
    for (world, devices) in [(2, 1), (3, 2), (8, 2), (8, 1), (16, 1)] {
        for pattern in Pattern::ALL {
            check(world, devices, pattern, 3, 700, 7);
        }
    }
}

/// What the ranks hold after their graphs have run once more.
fn replayed(
    group: &mut Group,
    graphs: &[Graph],
    memory: &[Memory],
    script: &Script,
) -> Vec<Vec<u8>> {
    for ((rank, memory), image) in group.ranks.iter().zip(memory).zip(&script.images) {
        memory.write(&image.before, rank.stream).unwrap();
    }
    for (rank, graph) in group.ranks.iter().zip(graphs) {
        rank.gpu.graph_launch(*graph, rank.stream).unwrap();
    }
    group.collect(memory, script).unwrap()
}

fn broadcast(bytes: usize, root: u32, spread: Spread) -> Job {
    Job::plain(Call::Broadcast { bytes, root, route: Some(Route::Scheduled(spread)) })
}

#[test]
fn broadcasts_bring_every_byte_from_every_root() {
    for world in 2..=8 {
        for spread in Spread::ALL {
            let sizes = [1, 255, 256, 257, 4096, 5001];
            let job = |(root, bytes): (u32, usize)| broadcast(bytes, root % world, spread);
            let jobs: Vec<Job> = (0..).zip(sizes).map(job).collect();
            let seed = 3 + u64::from(world);
            let mut group = Group::connect(&Machine::sim(world, seed), world, &config(world));
            group.check(&jobs, seed);
        }
    }
}

#[test]
fn broadcasts_replay_beside_reductions() {
    let (world, seed) = (4, 9);
    let mut jobs = jobs(world, 2, 900, Algorithm::Scheduled(Pattern::OneShot), seed);
    jobs.extend([broadcast(3001, 2, Spread::Tree), broadcast(1500, 1, Spread::DoubleTree)]);
    let script = Script::new(world, &jobs, seed);
    let mut group = Group::connect(&Machine::sim(world, seed), world, &config(world));
    let expected = run(&mut group, &script).unwrap();
    script.verify(&expected).unwrap();
    let memory = group.load(&script).unwrap();
    let graphs = group.capture(&script, &memory).unwrap();
    for _ in 0..2 {
        assert_eq!(replayed(&mut group, &graphs, &memory, &script), expected);
    }
}

/// Calls of one chunk, each along other edges than the one before.
fn short_calls() -> Vec<Job> {
    let reductions = Pattern::ALL.map(|pattern| job(1000, Algorithm::Scheduled(pattern)));
    let spreads = (0..).zip(Spread::ALL.into_iter().cycle().take(20));
    let broadcasts = spreads.map(|(root, spread)| broadcast(900, root % 4, spread));
    broadcasts.chain(reductions).collect()
}

#[test]
fn calls_along_other_edges_wait_until_the_staging_area_is_free() {
    let failures = |broken: u32| {
        let fails = |seed: u64| {
            let (deadline, chunk_bytes) = (Duration::from_millis(400), Some(4096));
            let config = Config { broken, deadline, chunk_bytes, ..config(4) };
            let mut group = Group::connect(&Machine::sim(4, seed), 4, &config);
            group.run(&Script::new(4, &short_calls(), seed)).is_err()
        };
        (1..=20).filter(|seed| fails(*seed)).count()
    };
    assert_eq!(failures(0), 0);
    assert!(failures(flags::BREAK_CREDIT) > 0);
}

#[test]
fn too_few_hardware_queues_are_refused() {
    let answer = |hardware_queues| {
        let config_of = sim::Config { devices: 2, hardware_queues, ..sim::Config::default() };
        let machine = Machine::simulated(&config_of);
        let script = Script::new(4, &[job(300, Algorithm::Scheduled(Pattern::Tree))], 1);
        let mut group = Group::connect(&machine, 4, &config(4));
        run(&mut group, &script).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(answer(8), Ok(()));
    let error = answer(7).unwrap_err();
    assert!(
        error.contains("4 hardware queues for each of the 2 ranks on GPU 0, which has 7"),
        "{error}"
    );
}

#[test]
fn random_sequences_mix_steps_and_kernels() {
    for seed in 1..=40 {
        let world = 2 + (seed % 4) as u32;
        let mut rng = Rng::new(seed, "mix");
        let mut all = random_jobs(world, 6, 2000, &mut rng);
        for job in jobs(world, 6, 700, Algorithm::Scheduled(Pattern::TwoShot), seed) {
            all.insert(rng.below(all.len() as u64 + 1) as usize, job);
        }
        let mut group = Group::connect(&Machine::sim(world, seed), world, &config(world));
        group.check(&all, seed);
    }
}

#[test]
fn threads_are_right() {
    for (pattern, seed) in Pattern::ALL.into_iter().zip(1..) {
        let world = 4;
        let machine = Machine::sim(world, seed);
        let meeting = Meeting::new(world, Duration::from_secs(20));
        let script =
            Script::new(world, &jobs(world, 5, 900, Algorithm::Scheduled(pattern), seed), seed);
        let found: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let rank = |(number, gpu): (usize, peerlane::gpu::GpuRef)| {
                let (meeting, script) = (&meeting, &script);
                scope.spawn(move || {
                    let config = config(world);
                    let joined =
                        peerlane::Communicator::join(meeting, number as u32, &gpu, &config);
                    let mut rank = Rank::new(joined.unwrap()).unwrap();
                    let image = &script.images[number].before;
                    let memory = Memory::with_image(&rank.gpu, rank.stream, image).unwrap();
                    rank.issue_all(script, memory.base).unwrap();
                    rank.finish().unwrap();
                    memory.read(image.len()).unwrap()
                })
            };
            let ranks: Vec<_> = machine.gpus(world).into_iter().enumerate().map(rank).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let one = Script::new(world, &jobs(world, 5, 900, fused(pattern), seed), seed);
        let mut group = Group::connect(&machine, world, &config(world));
        let kernel = run(&mut group, &one).unwrap();
        compare(&script, &kernel, &found).unwrap();
    }
}

#[test]
fn graphs_replay() {
    for pattern in Pattern::ALL {
        let (world, seed) = (3, 5);
        let script = |algorithm| Script::new(world, &jobs(world, 3, 900, algorithm, seed), seed);
        let (one, many) = (script(fused(pattern)), script(Algorithm::Scheduled(pattern)));
        let mut group = Group::connect(&Machine::sim(world, seed), world, &config(world));
        let kernel = run(&mut group, &one).unwrap();
        let memory = group.load(&many).unwrap();
        let graphs = group.capture(&many, &memory).unwrap();
        for _ in 0..3 {
            let found = replayed(&mut group, &graphs, &memory, &many);
            compare(&many, &kernel, &found).unwrap();
            // A call in between, in other chunks, finds the flags as it left them.
            let steps = run(&mut group, &many).unwrap();
            compare(&many, &kernel, &steps).unwrap();
        }
    }
}

#[test]
fn without_the_wait_for_room_a_slot_is_overwritten() {
    let failures = |broken: u32| {
        let fails = |seed: u64| {
            let config = Config { broken, deadline: Duration::from_millis(400), ..config(3) };
            let mut group = Group::connect(&Machine::sim(3, seed), 3, &config);
            let all = [job(6000, Algorithm::Scheduled(Pattern::TwoShot))];
            group.run(&Script::new(3, &all, seed)).is_err()
        };
        (1..=6).filter(|seed| fails(*seed)).count()
    };
    assert_eq!(failures(0), 0);
    assert!(failures(flags::BREAK_CREDIT) > 0);
}

/// A group of which not everybody calls.
struct Scene {
    group: Group,
    memory: Vec<Memory>,
    script: Script,
}

fn scene(world: u32, pattern: Pattern, deadline: Duration) -> Scene {
    let config = Config { deadline, ..config(world) };
    let group = Group::connect(&Machine::sim(world, 3), world, &config);
    let script = Script::new(world, &[job(5000, Algorithm::Scheduled(pattern))], 1);
    let memory = group.load(&script).unwrap();
    Scene { group, memory, script }
}

impl Scene {
    fn issue(&mut self, rank: usize) -> Result<(), Error> {
        self.group.ranks[rank].issue_all(&self.script, self.memory[rank].base)
    }
}

#[test]
fn a_rank_that_does_not_call_is_named_and_nobody_hangs() {
    for pattern in Pattern::ALL {
        let mut scene = scene(3, pattern, Duration::from_millis(150));
        (0..2).for_each(|rank| scene.issue(rank).unwrap());
        let outcome = |rank: &Rank| {
            rank.gpu.stream_synchronize(rank.stream).unwrap();
            rank.communicator.health().unwrap_err()
        };
        let errors = [outcome(&scene.group.ranks[0]), outcome(&scene.group.ranks[1])];
        let named = |error: &Error| matches!(error, Error::Timeout { operation: "all_reduce", .. });
        assert!(errors.iter().any(named), "{pattern:?}: {errors:?}");
        let known = |error: &Error| {
            named(error) || matches!(error, Error::Aborted { .. } | Error::Stopped { .. })
        };
        assert!(errors.iter().all(known), "{pattern:?}: {errors:?}");
        // Every later call says so, and closing neither hangs nor hides it.
        assert_eq!(scene.issue(0), Err(errors[0].clone()));
        let begun = Instant::now();
        for rank in &mut scene.group.ranks {
            let _ = rank.communicator.close();
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_timeout_names_the_rank_that_did_not_come() {
    let mut scene = scene(2, Pattern::TwoShot, Duration::from_millis(100));
    scene.issue(0).unwrap();
    let error = scene.group.ranks[0].communicator.close().unwrap_err();
    assert!(matches!(error, Error::Timeout { rank: 0, peer: 1, .. }), "{error:?}");
}

#[test]
fn closing_and_dropping_wait_no_longer_than_the_deadline() {
    let mut scene = scene(2, Pattern::Tree, Duration::from_millis(100));
    scene.issue(1).unwrap();
    scene.group.ranks[0].communicator.close().unwrap();
    let begun = Instant::now();
    drop(scene);
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_abort_ends_steps() {
    let mut scene = scene(3, Pattern::Ring, Duration::from_secs(3600));
    (0..2).for_each(|rank| scene.issue(rank).unwrap());
    scene.group.ranks[2].communicator.abort();
    for rank in &scene.group.ranks[..2] {
        rank.gpu.stream_synchronize(rank.stream).unwrap();
        let error = rank.communicator.health().unwrap_err();
        assert!(matches!(error, Error::Aborted { .. } | Error::Stopped { .. }), "{error:?}");
    }
}

#[test]
fn a_replay_that_is_left_alone_ends() {
    let mut scene = scene(2, Pattern::DoubleTree, Duration::from_millis(100));
    let graphs = scene.group.capture(&scene.script, &scene.memory).unwrap();
    let rank = &scene.group.ranks[0];
    rank.gpu.graph_launch(graphs[0], rank.stream).unwrap();
    rank.gpu.stream_synchronize(rank.stream).unwrap();
    let error = rank.communicator.health().unwrap_err();
    assert!(matches!(error, Error::Timeout { rank: 0, peer: 1, .. }), "{error:?}");
}

#[test]
fn a_call_beside_a_capture_is_refused() {
    let mut scene = scene(2, Pattern::TwoShot, Duration::from_secs(5));
    let rank = &mut scene.group.ranks[0];
    rank.gpu.capture_begin(rank.stream).unwrap();
    rank.issue_all(&scene.script, scene.memory[0].base).unwrap();
    let captured = std::mem::replace(&mut rank.stream, rank.gpu.stream_create().unwrap());
    let error = rank.issue_all(&scene.script, scene.memory[0].base).unwrap_err().to_string();
    assert!(error.contains("is being captured"), "{error}");
    rank.gpu.capture_end(captured).unwrap();
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let connect = |config: Config| {
        let gpus = Machine::sim(2, 1).gpus(2);
        peerlane::Communicator::connect(&gpus, &config).map(drop).unwrap_err().to_string()
    };
    let chunks = |bytes| connect(Config { chunk_bytes: Some(bytes), ..small(2) });
    assert_eq!(chunks(0), "connect: chunk_bytes: expected a multiple of 16 above 0, got 0");
    assert!(chunks(24).ends_with("got 24"));
    let staging = connect(Config { staging_bytes: Some(100), ..small(2) });
    assert_eq!(staging, "connect: staging_bytes: expected 0 or at least 24832, got 100");

    let call = |config: &Config, wire| {
        let mut group = Group::connect(&Machine::sim(2, 1), 2, config);
        let mut job = job(5000, Algorithm::Scheduled(Pattern::Tree));
        if let Call::AllReduce { wire: of, .. } = &mut job.call {
            *of = wire;
        }
        run(&mut group, &Script::new(2, &[job], 1)).unwrap_err().to_string()
    };
    let without = call(&small(2), Wire::Native);
    assert!(without.contains("Config with staging_bytes, got copy-tree"), "{without}");
    assert!(call(&config(2), Wire::Bf16).contains("wire: expected native: copy-tree"));
    let large = Config { chunk_bytes: Some(1 << 20), ..config(2) };
    assert!(call(&large, Wire::Native).contains("chunk_bytes: expected at most "));

    let mut group = Group::connect(&Machine::sim(2, 1), 2, &small(2));
    let script = Script::new(2, &[broadcast(900, 0, Spread::Tree)], 1);
    let error = run(&mut group, &script).unwrap_err().to_string();
    assert!(
        error.starts_with("broadcast: route: expected one that is one kernel, or a Config"),
        "{error}"
    );
}

#[test]
fn a_stream_that_waits_for_a_word_for_ever_is_an_error() {
    let gpu = sim::devices(&sim::Config::default())[0].clone();
    let (stream, memory) = (gpu.stream_create().unwrap(), gpu.alloc(4).unwrap());
    let wait = [peerlane::gpu::MemoryOp::Wait(memory, 1)];
    // SAFETY: the memory is a word.
    unsafe { gpu.stream_memory(stream, &wait).unwrap() };
    let error = gpu.stream_synchronize(stream).unwrap_err().to_string();
    assert!(error.contains("a stream waits for 1"), "{error}");
}
