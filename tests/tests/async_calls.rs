//! Calls beside the caller's stream: order, results, waiting, and what a capture makes of them.

use peerlane::cases::{Rng, Values, elements};
use peerlane::gpu::{DevicePtr, Event, GpuRef, Stream};
use peerlane::reference::{Order, Reduction};
use peerlane::{
    Algorithm, AllGather, AllReduce, Broadcast, Chunk, Communicator, Config, DType, Error, Gather,
    Pattern, ReduceOp, ReduceScatter, Wire, Work,
};
use peerlane_tests::{Machine, Memory, small};
use std::time::Duration;

const WORLD: u32 = 3;

/// One rank, its caller's stream and a tensor of `count` numbers.
struct Rank {
    communicator: Communicator,
    gpu: GpuRef,
    stream: Stream,
    memory: Memory,
}

struct Scene {
    ranks: Vec<Rank>,
    inputs: Vec<Vec<u8>>,
    sum: Vec<u8>,
}

fn scene(count: usize, seed: u64, config: Config) -> Scene {
    let mut rng = Rng::new(seed, "async");
    let mut input = || elements(DType::F32, count, Values::Ordinary, &mut rng);
    let inputs: Vec<Vec<u8>> = (0..WORLD).map(|_| input()).collect();
    let all: Vec<Option<&[u8]>> = inputs.iter().map(|input| Some(input.as_slice())).collect();
    let (dtype, op, wire) = (DType::F32, ReduceOp::Sum, Wire::Native);
    let sum = Reduction { inputs: &all, dtype, op, wire, order: Order::Ranks }.exact(count);
    let gpus = Machine::sim(WORLD, seed).gpus(WORLD);
    let ranks = Communicator::connect(&gpus, &config).unwrap().into_iter().zip(&inputs);
    let ranks = ranks.map(|(communicator, input)| {
        let gpu = communicator.gpu().clone();
        let stream = gpu.stream_create().unwrap();
        let memory = Memory::with_image(&gpu, stream, input).unwrap();
        Rank { communicator, gpu, stream, memory }
    });
    Scene { ranks: ranks.collect(), inputs, sum }
}

fn fast() -> Config {
    Config { staging_bytes: Some(96 << 10), chunk_bytes: Some(512), ..small(WORLD) }
}

fn event(gpu: &GpuRef, stream: Stream) -> Event {
    let event = gpu.event_create().unwrap();
    gpu.event_record(event, stream).unwrap();
    event
}

impl Rank {
    fn call(&self, count: usize, algorithm: Algorithm) -> AllReduce {
        let call = AllReduce::in_place(self.memory.base, count, DType::F32);
        AllReduce { algorithm: Some(algorithm), ..call }
    }

    fn begin(&mut self, count: usize, algorithm: Algorithm) -> Work {
        let call = self.call(count, algorithm);
        // SAFETY: the tensor has that many elements and lives until the scene ends.
        unsafe { self.communicator.all_reduce_async(&call, self.stream).unwrap() }
    }
}

#[test]
fn works_are_done_when_they_say_so() {
    for algorithm in [Algorithm::TwoShot, Algorithm::Scheduled(Pattern::TwoShot)] {
        for seed in 1..=5 {
            let mut scene = scene(2000, seed, fast());
            let works: Vec<Work> =
                scene.ranks.iter_mut().map(|rank| rank.begin(2000, algorithm)).collect();
            for (rank, work) in scene.ranks.iter().zip(&works) {
                work.wait().unwrap();
                assert!(work.query().unwrap());
                // Again, and the same.
                assert_eq!(work.wait(), Ok(()));
                assert!(rank.memory.read(8000).unwrap() == scene.sum, "seed {seed}");
            }
        }
    }
}

#[test]
fn the_callers_stream_goes_on_while_a_call_waits_for_a_peer() {
    let mut scene = scene(500, 1, fast());
    let first = scene.ranks[0].begin(500, Algorithm::TwoShot);
    let rank = &scene.ranks[0];
    let mark = event(&rank.gpu, rank.stream);
    rank.gpu.stream_synchronize(rank.stream).unwrap();
    assert!(rank.gpu.event_query(mark).unwrap());
    assert!(!first.query().unwrap(), "ranks 1 and 2 have not called");
    let rest: Vec<Work> =
        scene.ranks[1..].iter_mut().map(|rank| rank.begin(500, Algorithm::TwoShot)).collect();
    rest.iter().for_each(|work| work.wait().unwrap());
    first.wait().unwrap();
}

#[test]
fn calls_beside_and_on_streams_keep_their_order() {
    for seed in 1..=8 {
        let count = 300;
        let mut scene = scene(count, seed, fast());
        // Sums of sums: each call needs the one before.
        let mut works = Vec::new();
        for turn in 0..6u64 {
            let algorithm = match (turn + seed) % 3 {
                0 => Algorithm::TwoShot,
                1 => Algorithm::Scheduled(Pattern::TwoShot),
                _ => Algorithm::Staged,
            };
            for rank in &mut scene.ranks {
                if turn % 2 == 0 {
                    works.push(rank.begin(count, algorithm));
                } else {
                    let call = rank.call(count, algorithm);
                    let stream = rank.gpu.stream_create().unwrap();
                    // SAFETY: as for `begin`.
                    unsafe { rank.communicator.all_reduce(&call, stream).unwrap() };
                }
            }
            if turn % 4 == 0 {
                // Dropped before they are done.
                works.clear();
            }
        }
        for rank in &mut scene.ranks {
            rank.communicator.barrier(rank.stream).unwrap();
        }
        let mut expected = scene.inputs.clone();
        for _ in 0..6 {
            let all: Vec<Option<&[u8]>> = expected.iter().map(|i| Some(i.as_slice())).collect();
            let (dtype, op, wire) = (DType::F32, ReduceOp::Sum, Wire::Native);
            let sum = Reduction { inputs: &all, dtype, op, wire, order: Order::Ranks };
            expected = vec![sum.exact(count); WORLD as usize];
        }
        for rank in &scene.ranks {
            rank.communicator.synchronize(rank.stream).unwrap();
            assert!(rank.memory.read(4 * count).unwrap() == expected[0], "seed {seed}");
        }
    }
}

#[test]
fn every_collective_runs_beside() {
    let mut scene = scene(96, 2, fast());
    let mut works = Vec::new();
    let out: Vec<Memory> = (scene.ranks.iter())
        .map(|rank| Memory::with_image(&rank.gpu, rank.stream, &[0; 4 * 96 * 3]).unwrap())
        .collect();
    for (rank, out) in scene.ranks.iter_mut().zip(&out) {
        let (src, stream, at) =
            (rank.memory.base, rank.stream, |n: usize| out.base.offset(384 * n));
        let (dtype, op, wire) = (DType::F32, ReduceOp::Sum, Wire::Native);
        let scatter =
            ReduceScatter { src, dst: at(1), count: 32, dtype, op, wire, contribution: true };
        let widths = [64; WORLD as usize];
        let gather = Gather { src, dst: at(2), rows: 2, widths: &widths, root: 1 };
        let own = &mut rank.communicator;
        // SAFETY: the tensors are as large as the calls say and live until the scene ends.
        works.push(unsafe {
            [
                own.all_gather_async(&AllGather { src, dst: at(0), bytes: 100 }, stream).unwrap(),
                own.reduce_scatter_async(&scatter, stream).unwrap(),
                own.gather_async(&gather, stream).unwrap(),
                own.broadcast_async(&Broadcast::new(src, 384, 2), stream).unwrap(),
            ]
        });
    }
    works.iter().flatten().for_each(|work| work.wait().unwrap());
    for (number, (rank, out)) in scene.ranks.iter().zip(&out).enumerate() {
        let found = out.read(4 * 96 * 3).unwrap();
        let joined: Vec<u8> =
            scene.inputs.iter().flat_map(|input| &input[..100]).copied().collect();
        assert!(found[..300] == joined);
        assert!(found[384..][..128] == scene.sum[128 * number..][..128]);
        assert!(rank.memory.read(384).unwrap() == scene.inputs[2]);
    }
}

#[test]
fn a_peer_that_does_not_come_is_an_error_of_the_work() {
    for algorithm in [Algorithm::TwoShot, Algorithm::Scheduled(Pattern::Ring)] {
        let config = Config { deadline: Duration::from_millis(100), ..fast() };
        let mut scene = scene(500, 1, config);
        let work = scene.ranks[0].begin(500, algorithm);
        let error = work.wait().unwrap_err();
        assert!(matches!(error, Error::Timeout { rank: 0, .. }), "{error:?}");
        assert_eq!(work.wait(), Err(error.clone()));
        assert!(work.query().unwrap());
        assert_eq!(scene.ranks[0].communicator.close(), Err(error.clone()));
        assert_eq!(work.wait(), Err(error));
    }
}

#[test]
fn works_can_be_captured_and_replayed() {
    for algorithm in [Algorithm::TwoShot, Algorithm::Scheduled(Pattern::TwoShot)] {
        let mut scene = scene(800, 3, fast());
        let mut graphs = Vec::new();
        for rank in &mut scene.ranks {
            rank.gpu.stream_synchronize(rank.stream).unwrap();
            rank.gpu.capture_begin(rank.stream).unwrap();
            let work = rank.begin(800, algorithm);
            let refused = work.wait().unwrap_err().to_string();
            assert!(refused.contains("part of a graph"), "{refused}");
            assert!(work.query().is_err());
            work.wait_on(rank.stream).unwrap();
            graphs.push(rank.gpu.capture_end(rank.stream).unwrap());
        }
        for _ in 0..3 {
            for ((rank, graph), input) in scene.ranks.iter().zip(&graphs).zip(&scene.inputs) {
                rank.memory.write(input, rank.stream).unwrap();
                rank.gpu.graph_launch(*graph, rank.stream).unwrap();
            }
            for rank in &scene.ranks {
                rank.communicator.synchronize(rank.stream).unwrap();
                assert!(rank.memory.read(3200).unwrap() == scene.sum);
            }
        }
        // And calls outside go on.
        let works: Vec<Work> =
            scene.ranks.iter_mut().map(|rank| rank.begin(800, algorithm)).collect();
        works.iter().for_each(|work| work.wait().unwrap());
    }
}

#[test]
fn a_capture_with_work_in_flight_is_refused_until_somebody_waits() {
    let mut scene = scene(100, 4, fast());
    let works: Vec<Work> =
        scene.ranks.iter_mut().map(|rank| rank.begin(100, Algorithm::TwoShot)).collect();
    let rank = &mut scene.ranks[0];
    let call = rank.call(100, Algorithm::TwoShot);
    rank.gpu.capture_begin(rank.stream).unwrap();
    // SAFETY: as for `begin`.
    let refused = unsafe {
        [
            rank.communicator.all_reduce_async(&call, rank.stream).map(drop).unwrap_err(),
            rank.communicator.all_reduce(&call, rank.stream).unwrap_err(),
        ]
    };
    for error in refused {
        assert!(error.to_string().contains("wait for its work"), "{error}");
    }
    rank.gpu.capture_end(rank.stream).unwrap();
    works.iter().for_each(|work| work.wait().unwrap());
    let rank = &mut scene.ranks[0];
    rank.gpu.capture_begin(rank.stream).unwrap();
    let work = rank.begin(100, Algorithm::TwoShot);
    // A call outside the capture, on the communicator's stream that is inside.
    let other = rank.gpu.stream_create().unwrap();
    // SAFETY: as for `begin`.
    let error = unsafe { rank.communicator.all_reduce_async(&call, other).map(drop).unwrap_err() };
    assert!(error.to_string().contains("is being captured"), "{error}");
    work.wait_on(rank.stream).unwrap();
    rank.gpu.capture_end(rank.stream).unwrap();
}

#[test]
fn chunks_are_reduced_as_they_become_ready() {
    for algorithm in [Algorithm::TwoShot, Algorithm::Scheduled(Pattern::TwoShot)] {
        let (rows, width) = (5, 210);
        let mut scene = scene(rows * width, 6, fast());
        let mut all = Vec::new();
        for (rank, input) in scene.ranks.iter_mut().zip(&scene.inputs) {
            let producer = rank.gpu.stream_create().unwrap();
            // The producer overwrites what was there row by row.
            rank.gpu.stream_synchronize(rank.stream).unwrap();
            rank.memory.write(&vec![0; input.len()], producer).unwrap();
            let mut chunks = Vec::new();
            for row in 0..rows {
                let bytes = 4 * width * row..4 * width * (row + 1);
                let to = rank.memory.base.offset(bytes.start);
                // SAFETY: the row lies in the tensor.
                unsafe { rank.gpu.upload(to, &input[bytes], producer).unwrap() };
                let ready = event(&rank.gpu, producer);
                chunks.push(Chunk { first: row * width, count: width, ready });
            }
            let call = rank.call(rows * width, algorithm);
            // SAFETY: as for `begin`.
            all.push(unsafe { rank.communicator.all_reduce_chunks(&call, &chunks).unwrap() });
        }
        for (rank, works) in scene.ranks.iter().zip(&all) {
            assert_eq!(works.len(), rows);
            works[rows - 1].wait_on(rank.stream).unwrap();
            rank.communicator.synchronize(rank.stream).unwrap();
            assert!(works.iter().all(|work| work.query().unwrap()));
            assert!(rank.memory.read(4 * rows * width).unwrap() == scene.sum);
        }
    }
}

#[test]
fn what_no_chunk_names_stays_as_it_is() {
    let mut scene = scene(200, 7, fast());
    let mut works = Vec::new();
    let call = scene.ranks[0].call(200, Algorithm::TwoShot);
    for rank in &mut scene.ranks {
        let ready = event(&rank.gpu, rank.stream);
        let half = Chunk { first: 0, count: 100, ready };
        let call = AllReduce { src: rank.memory.base, dst: rank.memory.base, ..call };
        // SAFETY: as for `begin`.
        works.push(unsafe { rank.communicator.all_reduce_chunks(&call, &[half]).unwrap() });
    }
    works.iter().flatten().for_each(|work| work.wait().unwrap());
    let beyond =
        Chunk { first: 150, count: 51, ready: event(&scene.ranks[0].gpu, scene.ranks[0].stream) };
    // SAFETY: it is refused.
    let error = unsafe { scene.ranks[0].communicator.all_reduce_chunks(&call, &[beyond]) };
    let error = error.map(drop).unwrap_err().to_string();
    assert!(error.contains("got chunk 0 of 51 elements from 150 on"), "{error}");
    for rank in &scene.ranks {
        let found = rank.memory.read(800).unwrap();
        assert!(found[..400] == scene.sum[..400]);
        assert_ne!(found[400..], scene.sum[400..], "no chunk named the second half");
    }
}

#[test]
fn chunks_captured_with_work_in_flight_are_refused_until_somebody_waits() {
    let mut scene = scene(100, 4, fast());
    let works: Vec<Work> =
        scene.ranks.iter_mut().map(|rank| rank.begin(100, Algorithm::TwoShot)).collect();
    let captured = |rank: &mut Rank| {
        let call = rank.call(100, Algorithm::TwoShot);
        rank.gpu.capture_begin(rank.stream).unwrap();
        let ready = event(&rank.gpu, rank.stream);
        let whole = [Chunk { first: 0, count: 100, ready }];
        // SAFETY: as for `begin`.
        unsafe { rank.communicator.all_reduce_chunks(&call, &whole) }
    };
    let error = captured(&mut scene.ranks[0]).map(drop).unwrap_err().to_string();
    assert!(error.contains("wait for its work"), "{error}");
    // Nothing was queued in it.
    let rank = &scene.ranks[0];
    rank.gpu.capture_end(rank.stream).unwrap();
    works.iter().for_each(|work| work.wait().unwrap());
    for rank in &mut scene.ranks {
        let works = captured(rank).unwrap();
        works[0].wait_on(rank.stream).unwrap();
        let graph = rank.gpu.capture_end(rank.stream).unwrap();
        rank.gpu.graph_launch(graph, rank.stream).unwrap();
    }
    for rank in &scene.ranks {
        rank.communicator.synchronize(rank.stream).unwrap();
    }
}

#[test]
fn chunks_of_a_tensor_that_is_nowhere_are_refused() {
    let mut scene = scene(100, 9, fast());
    let rank = &mut scene.ranks[0];
    let ready = event(&rank.gpu, rank.stream);
    let call = rank.call(100, Algorithm::TwoShot);
    let part = [Chunk { first: 8, count: 8, ready }];
    let null = DevicePtr(0);
    let odd = call.dst.offset(2);
    let wrong = [
        (AllReduce { dst: null, ..call }, "dst: expected a device address, got null"),
        (AllReduce { src: null, ..call }, "src: expected a device address, got null"),
        (AllReduce { dst: odd, ..call }, "dst: expected an address aligned to 4 bytes"),
        (AllReduce { count: usize::MAX, ..call }, "count: expected at most 2^34 bytes"),
    ];
    for (call, says) in wrong {
        // SAFETY: it is refused.
        let refused = unsafe { rank.communicator.all_reduce_chunks(&call, &part) };
        let error = refused.map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("all_reduce_chunks: {says}")), "{error}");
    }
}

#[test]
fn bad_streams_and_closed_communicators_are_named() {
    let mut scene = scene(10, 8, fast());
    let foreign = scene.ranks[1].stream;
    let call = scene.ranks[0].call(10, Algorithm::TwoShot);
    let own = &mut scene.ranks[0].communicator;
    // SAFETY: both are refused.
    let errors = unsafe {
        let foreign = own.all_reduce_async(&call, foreign).map(drop).unwrap_err();
        own.close().unwrap();
        [foreign, own.all_reduce_async(&call, Stream::default()).map(drop).unwrap_err()]
    };
    assert!(errors[0].to_string().contains("a stream of GPU 0"), "{}", errors[0]);
    assert!(matches!(errors[1], Error::Closed { .. }));
}
