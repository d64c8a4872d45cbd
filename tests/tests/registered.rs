//! All-reduces of registered tensors: random sequences under random schedules, each part of the protocol left out
//! on purpose, and what registrations refuse.
//!
//! `PEERLANE_SEEDS` and `PEERLANE_SEED` as in `seeds.rs`. Every sequence chains calls on the same bytes, so a rank that
//! reads too early, or ends too early, computes with old values.

use peerlane::cases::{Rng, Values, elements};
use peerlane::gpu::{DevicePtr, GpuRef};
use peerlane::reference::{Order, Reduction, first_difference};
use peerlane::{
    Algorithm, AllReduce, AllReduceRegistered, Communicator, Config, DType, Error, Format, Meeting,
    ReduceOp, Registration, Transport, Wire,
};
use peerlane_device::abi::flags;
use peerlane_tests::{Group, Links, Machine, Rank, number_from_environment, small};
use std::time::{Duration, Instant};

/// Simulated time that a rank waits.
const DEADLINE: Duration = Duration::from_millis(100);

/// Registers a tensor of each rank of a group that one thread drives.
fn register(group: &mut Group, tensors: &[(DevicePtr, usize)]) -> Result<Vec<Registration>, Error> {
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    // SAFETY: the tests free nothing before their groups have gone.
    unsafe { Communicator::register_all(&mut ranks, tensors) }
}

fn deregister(group: &mut Group, registrations: &[Registration]) -> Result<(), Error> {
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    Communicator::deregister_all(&mut ranks, registrations)
}

/// One step of a sequence: an all-reduce of registered memory, or an ordinary one of the same bytes.
#[derive(Clone, Copy, Debug)]
struct Step {
    call: AllReduceRegistered,
    absent: u32,
    ordinary: Option<Algorithm>,
}

fn random_step(world: u32, dtype: DType, bytes: usize, rng: &mut Rng) -> Step {
    let wire = if rng.below(2) == 0 { Wire::Native } else { Wire::Bf16 };
    let wire = if dtype == DType::F32 { wire } else { Wire::Native };
    let op = ReduceOp::ALL[rng.below(4) as usize];
    let offset = 16 * rng.below(1 + (bytes / 16 / 2) as u64) as usize;
    let count = 1 + rng.below(((bytes - offset) / dtype.bytes()) as u64) as usize;
    let absent = if rng.below(3) == 0 { rng.below(1 << world) as u32 } else { 0 };
    // Not all: a maximum of nothing is any NaN.
    let absent = if absent == (1 << world) - 1 { 0 } else { absent };
    let ordinary = [None, None, Some(Algorithm::TwoShot), Some(Algorithm::OneShot(Format::Full))];
    let ordinary = ordinary[rng.below(4) as usize];
    let call = AllReduceRegistered { offset, op, wire, ..AllReduceRegistered::new(count, dtype) };
    Step { call, absent, ordinary }
}

impl Step {
    /// What it makes of the ranks' bytes.
    fn apply(&self, images: &mut [Vec<u8>]) {
        let AllReduceRegistered { offset, count, dtype, op, wire, .. } = self.call;
        let range = offset..offset + count * dtype.bytes();
        let input = |(rank, image): (usize, &'_ Vec<u8>)| {
            (self.absent >> rank & 1 == 0).then(|| image[range.clone()].to_vec())
        };
        let inputs: Vec<_> = images.iter().enumerate().map(input).collect();
        let inputs: Vec<_> = inputs.iter().map(Option::as_deref).collect();
        let order = Order::Ranks;
        let result = Reduction { inputs: &inputs, dtype, op, wire, order }.exact(count);
        images.iter_mut().for_each(|image| image[range.clone()].copy_from_slice(&result));
    }

    /// Queues it on one rank.
    fn issue(&self, rank: &mut Rank, registration: &Registration) -> Result<(), Error> {
        let contribution = self.absent >> rank.communicator.rank() & 1 == 0;
        let AllReduceRegistered { offset, count, dtype, op, wire, .. } = self.call;
        let src = registration.tensor().offset(offset);
        // SAFETY: the step lies in the registered tensor, which outlives the group.
        unsafe {
            if let Some(algorithm) = self.ordinary {
                let algorithm = Some(algorithm);
                let call =
                    AllReduce { src, dst: src, count, dtype, op, wire, contribution, algorithm };
                return rank.communicator.all_reduce(&call, rank.stream);
            }
            let call = AllReduceRegistered { contribution, ..self.call };
            rank.communicator.all_reduce_registered(registration, &call, rank.stream)
        }
    }
}

/// How a sequence runs.
#[derive(Clone, Copy)]
struct Scene {
    world: u32,
    seed: u64,
    broken: u32,
    most_bytes: usize,
    /// Whether the ordinary all-reduces are made too.
    mixed: bool,
}

impl Scene {
    fn new(world: u32, seed: u64) -> Scene {
        Scene { world, seed, broken: 0, most_bytes: 12_000, mixed: true }
    }

    /// Runs the sequence that the seed makes; what is wrong with its results.
    fn run(self) -> Result<(), String> {
        self.attempt().map_err(|error| error.to_string())?
    }

    fn attempt(self) -> Result<Result<(), String>, Error> {
        let Scene { world, seed, broken, most_bytes, mixed } = self;
        let mut rng = Rng::new(seed, "registered");
        let devices = if rng.below(3) > 0 { world } else { 1 + rng.below(world.into()) as u32 };
        let first_slot = if rng.below(4) == 0 { u32::MAX - rng.below(6) as u32 } else { 0 };
        let max_blocks = Some(1 + rng.below(2) as u32);
        let (deadline, transport) = (DEADLINE, Transport::P2p);
        let config = Config { first_slot, max_blocks, transport, broken, deadline, ..small(world) };
        let mut group = Group::connect(&Machine::sim(devices, seed), world, &config);
        // One type: the bits of another's numbers may be any NaN.
        let dtype = DType::ALL[rng.below(3) as usize];
        let bytes = 16 + rng.below(most_bytes as u64) as usize;
        let steps: Vec<_> = (0..2 + rng.below(6))
            .map(|_| random_step(world, dtype, bytes, &mut rng))
            .filter(|step| mixed || step.ordinary.is_none())
            .collect();
        let mut images: Vec<_> = (0..world)
            .map(|_| elements(dtype, bytes.div_ceil(dtype.bytes()), Values::Ordinary, &mut rng))
            .map(|image| image[..bytes].to_vec())
            .collect();
        let memory = |gpu: &GpuRef| Ok((gpu.alloc(bytes)?, bytes));
        let all = |group: &Group| -> Result<Vec<_>, Error> {
            group.ranks.iter().map(|rank| memory(&rank.gpu)).collect()
        };
        let (tensors, copies) = (all(&group)?, all(&group)?);
        let registrations = register(&mut group, &tensors)?;
        for ((rank, image), (tensor, _)) in group.ranks.iter().zip(&images).zip(&tensors) {
            // Queued, not waited for: peers must not read before it is there.
            // SAFETY: the tensor is as large.
            unsafe { rank.gpu.upload(*tensor, image, rank.stream)? };
        }
        for step in &steps {
            step.apply(&mut images);
            for (rank, registration) in group.ranks.iter_mut().zip(&registrations) {
                step.issue(rank, registration)?;
            }
        }
        for ((rank, (copy, _)), (tensor, _)) in group.ranks.iter().zip(&copies).zip(&tensors) {
            // What a rank finds as soon as its own kernel has ended.
            // SAFETY: both are as large.
            unsafe { rank.gpu.copy(*copy, *tensor, bytes, rank.stream)? };
        }
        let mut found = Vec::new();
        for (rank, (copy, _)) in group.ranks.iter().zip(&copies) {
            let mut image = vec![0; bytes];
            // SAFETY: the copy is as large.
            unsafe { rank.gpu.download(&mut image, *copy, rank.stream)? };
            rank.communicator.health()?;
            found.push(image);
        }
        deregister(&mut group, &registrations)?;
        Ok(compare(&images, &found).map_err(|reason| format!("{reason} after {steps:?}")))
    }
}

fn compare(expected: &[Vec<u8>], found: &[Vec<u8>]) -> Result<(), String> {
    for (rank, (expected, found)) in expected.iter().zip(found).enumerate() {
        if let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) {
            let (wanted, got) = (expected[at], found[at]);
            return Err(format!("rank {rank}, byte {at}: expected {wanted:#x}, got {got:#x}"));
        }
    }
    Ok(())
}

fn sweep(world: u32, share: u64) {
    let one = std::env::var("PEERLANE_SEED").is_ok();
    let seeds = number_from_environment("PEERLANE_SEEDS", 200).div_ceil(share);
    let first = number_from_environment("PEERLANE_SEED", 1);
    let failures: Vec<_> = (first..first + if one { 1 } else { seeds })
        .filter_map(|seed| Some(format!("seed {seed}: {}", Scene::new(world, seed).run().err()?)))
        .collect();
    assert!(failures.is_empty(), "{} of {seeds} seeds failed: {failures:#?}", failures.len());
}

#[test]
fn world_2_is_right_under_every_seed() {
    sweep(2, 1);
}

#[test]
fn world_3_is_right_under_every_seed() {
    sweep(3, 1);
}

#[test]
fn world_8_is_right_under_every_seed() {
    sweep(8, 4);
}

#[test]
fn every_world_is_right() {
    (1..=16).for_each(|world| sweep(world, 40));
}

/// Under which seeds a switch shows.
fn failures(broken: u32) -> Vec<String> {
    let scene = |seed| Scene { broken, mixed: false, ..Scene::new(3, seed) };
    (1..=12).filter_map(|seed| scene(seed).run().err()).collect()
}

#[test]
fn each_part_of_the_protocol_is_needed() {
    assert!(failures(0).is_empty(), "{:#?}", failures(0));
    for (switch, name) in [
        (flags::BREAK_READY, "the flags before"),
        (flags::BREAK_DONE, "the flags after"),
        (flags::BREAK_FENCE, "the fences"),
        (flags::BREAK_SYNC, "the block barriers"),
    ] {
        let broken = failures(switch);
        assert!(!broken.is_empty(), "12 seeds do not notice that {name} are missing");
        assert!(broken.iter().any(|reason| reason.contains("expected")), "{name}: {broken:#?}");
    }
}

/// A group of two ranks with a tensor of `bytes` bytes each.
fn pair(bytes: usize, config: &Config) -> (Group, Vec<(DevicePtr, usize)>) {
    let group = Group::connect(&Machine::sim(2, 1), 2, config);
    let tensors = group.ranks.iter().map(|rank| (rank.gpu.alloc(bytes).unwrap(), bytes)).collect();
    (group, tensors)
}

fn quick() -> Config {
    Config { deadline: DEADLINE, transport: Transport::P2p, ..small(2) }
}

#[test]
fn special_values_are_reduced_as_by_two_shot() {
    for (seed, values) in [(1, Values::Special), (2, Values::Free)] {
        for dtype in DType::ALL {
            let (count, mut rng) = (700, Rng::new(seed, "special"));
            let bytes = count * dtype.bytes();
            let (mut group, tensors) = pair(bytes, &quick());
            let registrations = register(&mut group, &tensors).unwrap();
            let images: Vec<_> = (0..2).map(|_| elements(dtype, count, values, &mut rng)).collect();
            let inputs: Vec<_> = images.iter().map(|image| Some(image.as_slice())).collect();
            let (op, wire, order) = (ReduceOp::Sum, Wire::Native, Order::Ranks);
            let expected = Reduction { inputs: &inputs, dtype, op, wire, order }.exact(count);
            let call = AllReduceRegistered::new(count, dtype);
            for ((rank, image), registration) in
                group.ranks.iter_mut().zip(&images).zip(&registrations)
            {
                // SAFETY: the tensor is as large and outlives the group.
                unsafe {
                    rank.gpu.upload(registration.tensor(), image, rank.stream).unwrap();
                    let stream = rank.stream;
                    rank.communicator.all_reduce_registered(registration, &call, stream).unwrap();
                }
            }
            let mut bits = Vec::new();
            for (rank, (tensor, _)) in group.ranks.iter().zip(&tensors) {
                let mut found = vec![0; bytes];
                // SAFETY: the tensor is as large.
                unsafe { rank.gpu.download(&mut found, *tensor, rank.stream).unwrap() };
                assert_eq!(first_difference(dtype, op, &expected, &found), None, "{dtype:?}");
                bits.push(found);
            }
            assert_eq!(bits[0], bits[1], "{dtype:?}");
        }
    }
}

#[test]
fn a_captured_call_replays() {
    let count = 1500;
    let (mut group, tensors) = pair(4 * count, &quick());
    let registrations = register(&mut group, &tensors).unwrap();
    let call = AllReduceRegistered::new(count, DType::F32);
    let ones: Vec<u8> = std::iter::repeat_n(1.0_f32.to_le_bytes(), count).flatten().collect();
    let mut graphs = Vec::new();
    for (rank, registration) in group.ranks.iter_mut().zip(&registrations) {
        // SAFETY: the tensor is as large and outlives the group.
        unsafe {
            rank.gpu.upload(registration.tensor(), &ones, rank.stream).unwrap();
            rank.gpu.stream_synchronize(rank.stream).unwrap();
            rank.gpu.capture_begin(rank.stream).unwrap();
            let stream = rank.stream;
            rank.communicator.all_reduce_registered(registration, &call, stream).unwrap();
        }
        graphs.push(rank.gpu.capture_end(rank.stream).unwrap());
    }
    for _ in 0..3 {
        for (rank, graph) in group.ranks.iter().zip(&graphs) {
            rank.gpu.graph_launch(*graph, rank.stream).unwrap();
        }
    }
    for (rank, (tensor, bytes)) in group.ranks.iter().zip(&tensors) {
        let mut found = vec![0; *bytes];
        // SAFETY: the tensor is as large.
        unsafe { rank.gpu.download(&mut found, *tensor, rank.stream).unwrap() };
        assert!(found.chunks(4).all(|element| element == 8.0_f32.to_le_bytes()));
    }
}

/// The argument that an error names, and its text.
fn argument<T>(outcome: Result<T, Error>) -> (&'static str, String) {
    match outcome {
        Err(error @ Error::InvalidArgument { argument, .. }) => (argument, error.to_string()),
        Err(other) => panic!("expected a bad argument, got {other}"),
        Ok(_) => panic!("expected a bad argument, got none"),
    }
}

#[test]
fn what_cannot_be_registered_is_named() {
    let (mut group, tensors) = pair(1024, &quick());
    let bad = |group: &mut Group, change: fn(&mut (DevicePtr, usize))| {
        let mut tensors = tensors.clone();
        change(&mut tensors[1]);
        argument(register(group, &tensors))
    };
    let (name, text) = bad(&mut group, |tensor| tensor.1 = 512);
    assert_eq!(name, "bytes");
    assert!(text.contains("1024") && text.contains("512 from rank 1"), "{text}");
    assert_eq!(bad(&mut group, |tensor| tensor.1 = 0).0, "bytes");
    assert_eq!(bad(&mut group, |tensor| tensor.1 = 2000).0, "bytes");
    assert_eq!(bad(&mut group, |tensor| tensor.0 = DevicePtr(0)).0, "tensor");
    assert_eq!(bad(&mut group, |tensor| tensor.0 = tensor.0.offset(8)).0, "tensor");
    assert_eq!(argument(register(&mut group, &[tensors[0], tensors[0]])).0, "tensor");
    assert_eq!(argument(register(&mut group, &tensors[..1])).0, "tensors");
    let mut one = [&mut group.ranks[1].communicator];
    // SAFETY: nothing is registered.
    let partial = unsafe { Communicator::register_all(&mut one, &tensors[1..]) };
    assert_eq!(argument(partial).0, "ranks");
    // Nothing of that has changed anything.
    let registrations = register(&mut group, &tensors).unwrap();
    assert_eq!(registrations[1].bytes(), 1024);
}

#[test]
fn what_a_registration_does_not_cover_is_named() {
    let (mut group, tensors) = pair(1024, &quick());
    let (mut others, theirs) = pair(1024, &quick());
    let registrations = register(&mut group, &tensors).unwrap();
    let foreign = register(&mut others, &theirs).unwrap();
    let rank = &mut group.ranks[0];
    let mut call = |registration: &Registration, offset, count| {
        let call = AllReduceRegistered { offset, ..AllReduceRegistered::new(count, DType::F16) };
        // SAFETY: the calls are refused.
        unsafe { rank.communicator.all_reduce_registered(registration, &call, rank.stream) }
    };
    assert_eq!(argument(call(&registrations[0], 8, 4)).0, "offset");
    assert_eq!(argument(call(&registrations[0], 1040, 0)).0, "offset");
    assert_eq!(argument(call(&registrations[0], 16, 505)).0, "count");
    assert_eq!(argument(call(&foreign[0], 0, 4)).0, "registration");
    assert_eq!(argument(call(&registrations[1], 0, 4)).0, "registration");
    assert_eq!(call(&registrations[0], 1024, 0), Ok(()));
    deregister(&mut group, &registrations).unwrap();
    let call = AllReduceRegistered::new(4, DType::F16);
    let rank = &mut group.ranks[0];
    // SAFETY: the call is refused.
    let late =
        unsafe { rank.communicator.all_reduce_registered(&registrations[0], &call, rank.stream) };
    let (name, text) = argument(late);
    assert!(name == "registration" && text.contains("deregistered"), "{text}");
    assert_eq!(argument(deregister(&mut group, &registrations)).0, "registration");
}

#[test]
fn calls_that_differ_are_refused() {
    let (mut group, tensors) = pair(4096, &quick());
    let registrations = register(&mut group, &tensors).unwrap();
    let (first, last) = group.ranks.split_at_mut(1);
    let call = AllReduceRegistered::new(64, DType::F32);
    let issue = |rank: &mut Rank, registration: &Registration, call: AllReduceRegistered| {
        // SAFETY: the tensor outlives the group.
        unsafe { rank.communicator.all_reduce_registered(registration, &call, rank.stream) }
    };
    issue(&mut first[0], &registrations[0], call).unwrap();
    let rank = &mut last[0];
    for other in [
        AllReduceRegistered { offset: 16, ..call },
        AllReduceRegistered { count: 32, ..call },
        AllReduceRegistered { op: ReduceOp::Max, ..call },
    ] {
        let outcome = issue(rank, &registrations[1], other);
        assert!(matches!(outcome, Err(Error::Mismatch { .. })), "{outcome:?}");
    }
    let ordinary = AllReduce::in_place(tensors[1].0, 64, DType::F32);
    // SAFETY: the call is refused.
    let outcome = unsafe { rank.communicator.all_reduce(&ordinary, rank.stream) };
    assert!(matches!(outcome, Err(Error::Mismatch { .. })), "{outcome:?}");
    issue(rank, &registrations[1], call).unwrap();
    group.ranks.iter().for_each(|rank| rank.finish().unwrap());
}

#[test]
fn ranks_that_meet_in_host_memory_register_nothing() {
    let machine = Machine::linked(2, 1, Links::None);
    let mut group = Group::connect(&machine, 2, &Config { transport: Transport::Auto, ..quick() });
    let tensors: Vec<_> =
        group.ranks.iter().map(|rank| (rank.gpu.alloc(64).unwrap(), 64)).collect();
    let outcome = register(&mut group, &tensors).map(drop);
    assert!(matches!(outcome, Err(Error::Unsupported { .. })), "{outcome:?}");
}

/// Runs each rank of a group of two in a thread of its own.
fn in_threads<T: Send>(
    deadline: Duration,
    rank: impl Fn(&mut Communicator, (DevicePtr, usize)) -> T + Sync,
) -> Vec<T> {
    let gpus = Machine::sim(2, 1).gpus(2);
    let meeting = Meeting::new(2, Duration::from_secs(20));
    let config = Config { deadline, ..quick() };
    std::thread::scope(|scope| {
        let start = |(number, gpu): (u32, &GpuRef)| {
            let (gpu, meeting, config, rank) = (gpu.clone(), &meeting, &config, &rank);
            scope.spawn(move || {
                let mut communicator = Communicator::join(meeting, number, &gpu, config).unwrap();
                let tensor = (gpu.alloc(4096).unwrap(), 4096);
                rank(&mut communicator, tensor)
            })
        };
        let threads: Vec<_> = (0..).zip(&gpus).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn threads_register_together() {
    let rounds = in_threads(Duration::from_secs(10), |rank, (tensor, bytes)| {
        let stream = rank.gpu().stream_create().unwrap();
        for round in 1..4 {
            // SAFETY: the tensor outlives the communicator.
            let registration = unsafe { rank.register(tensor, bytes).unwrap() };
            let call = AllReduceRegistered::new(bytes / 4, DType::F32);
            let ones: Vec<u8> = 1.0_f32.to_le_bytes().repeat(bytes / 4);
            let mut found = vec![0; bytes];
            // SAFETY: all are as large.
            unsafe {
                rank.gpu().upload(tensor, &ones, stream).unwrap();
                rank.all_reduce_registered(&registration, &call, stream).unwrap();
                rank.gpu().download(&mut found, tensor, stream).unwrap();
            }
            rank.health().unwrap();
            assert_eq!(found, 2.0_f32.to_le_bytes().repeat(bytes / 4), "round {round}");
            rank.deregister(&registration).unwrap();
        }
        rank.registration_statistics()
    });
    assert!(rounds.iter().all(|statistics| *statistics == Default::default()), "{rounds:?}");
}

#[test]
fn what_one_thread_gets_wrong_is_an_error_on_both() {
    let outcomes = in_threads(Duration::from_secs(10), |rank, (tensor, bytes)| {
        let bytes = bytes / (1 + rank.rank() as usize);
        // SAFETY: nothing is registered.
        let other_bytes = unsafe { rank.register(tensor, bytes).map(drop) };
        let tensor = if rank.rank() == 0 { tensor } else { tensor.offset(4) };
        // SAFETY: nothing is registered.
        let unaligned = unsafe { rank.register(tensor, 64).map(drop) };
        (other_bytes, unaligned)
    });
    for (other_bytes, _) in &outcomes {
        let (name, text) = argument(other_bytes.clone());
        assert_eq!(name, "bytes");
        assert!(text.contains("4096") && text.contains("2048 from rank 1"), "{text}");
    }
    assert_eq!(argument(outcomes[1].1.clone()).0, "tensor");
    let Err(Error::Unsupported { reason, .. }) = &outcomes[0].1 else {
        panic!("{:?}", outcomes[0].1)
    };
    assert!(reason.contains("rank 1") && reason.contains("multiple of 16"), "{reason}");
}

#[test]
fn a_thread_that_never_registers_is_named_and_the_next_attempt_is_whole() {
    let begin = Instant::now();
    let outcomes = in_threads(Duration::from_millis(300), |rank, (tensor, bytes)| {
        if rank.rank() == 1 {
            std::thread::sleep(Duration::from_millis(600));
        }
        // SAFETY: the tensor outlives the communicator.
        let (first, second) = unsafe {
            let first = rank.register(tensor, bytes).map(drop);
            if rank.rank() == 0 {
                std::thread::sleep(Duration::from_millis(300));
            }
            (first, rank.register(tensor, bytes).map(drop))
        };
        (first, second)
    });
    assert!(begin.elapsed() < Duration::from_secs(10));
    for (first, second) in outcomes {
        let Err(Error::Rendezvous { reason, .. }) = &first else { panic!("{first:?}") };
        assert!(reason.contains("in vain for rank 1"), "{reason}");
        assert_eq!(second, Ok(()));
    }
}
