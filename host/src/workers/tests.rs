//! Workers on simulated GPUs: results, order, errors that end everybody's waits, and wake-ups.

use super::{List, Operation, Options, Worker, Workers};
use crate::gpu::{DevicePtr, GpuRef, HostMemory, sim};
use crate::request::{AllGather, AllReduce, Broadcast};
use crate::{Communicator, Config, DType, Error};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Elements of a tensor: odd, and more than a block takes at once.
const COUNT: usize = 5003;
const BYTES: usize = 4 * COUNT;

fn config() -> Config {
    Config { deadline: Duration::from_secs(60), ..Config::default() }
}

fn start(world: u32, options: Options) -> Workers {
    let gpus = sim::devices(&sim::Config { devices: world, ..Default::default() });
    let ranks = Communicator::connect(&gpus, &config()).unwrap();
    Workers::start(ranks, options).unwrap()
}

/// One rank's memory: a pinned input, a tensor, and a place for its result.
#[derive(Clone, Copy)]
struct Buffers {
    input: HostMemory,
    tensor: DevicePtr,
    result: DevicePtr,
}

impl Buffers {
    fn new(gpu: &GpuRef, rank: u32) -> Buffers {
        let input = gpu.alloc_host(BYTES).unwrap();
        // SAFETY: the memory is that large and nobody else's.
        let values = unsafe { std::slice::from_raw_parts_mut(input.host.cast::<f32>(), COUNT) };
        let value = |index| (rank + 1) as f32 * ((index % 7) as f32 - 3.0);
        (0..COUNT).zip(values).for_each(|(index, place)| *place = value(index));
        let (tensor, result) = (gpu.alloc(BYTES).unwrap(), gpu.alloc(BYTES).unwrap());
        Buffers { input, tensor, result }
    }

    fn of_all(workers: &Workers) -> Vec<Buffers> {
        let all = 0..workers.world_size();
        all.map(|rank| Buffers::new(workers.gpu(rank).unwrap(), rank)).collect()
    }
}

/// Uploads, sums and copies away.
fn sums(buffers: &[Buffers]) -> List {
    let mut list = List::new(buffers.len() as u32);
    list.on_all(|rank| {
        let Buffers { input: src, tensor: dst, .. } = buffers[rank as usize];
        Operation::Upload { dst, src, bytes: BYTES }
    });
    list.on_all(|rank| all_reduce(buffers[rank as usize].tensor));
    list.on_all(|rank| {
        let Buffers { tensor: src, result: dst, .. } = buffers[rank as usize];
        Operation::Copy { dst, src, bytes: BYTES }
    });
    list
}

fn all_reduce(tensor: DevicePtr) -> Operation {
    Operation::AllReduce(AllReduce::in_place(tensor, COUNT, DType::F32))
}

/// That every rank's result is the sum of all inputs, then spoils it.
fn verify(workers: &Workers, buffers: &[Buffers]) {
    let factor = (1..=buffers.len()).sum::<usize>() as f32;
    for (rank, of) in (0..).zip(buffers) {
        let (gpu, stream) = (workers.gpu(rank).unwrap(), workers.stream(rank).unwrap());
        let mut found = vec![0; BYTES];
        // SAFETY: both are that large.
        unsafe {
            gpu.download(&mut found, of.result, stream).unwrap();
            gpu.fill(of.result, 0xee, BYTES, stream).unwrap();
        }
        let found: &[f32] = bytemuck::cast_slice(&found);
        for (index, found) in found.iter().enumerate() {
            assert_eq!(*found, factor * ((index % 7) as f32 - 3.0), "rank {rank}, element {index}");
        }
    }
}

/// # Panics
/// If the run fails.
fn run(workers: &mut Workers, list: &super::Recorded) {
    // SAFETY: the lists of these tests name memory of these tests, which is not freed.
    unsafe { workers.run(list) }.unwrap();
    workers.synchronize().unwrap();
}

#[test]
fn lists_do_what_calls_do_as_often_as_they_are_run() {
    for (world, spin) in
        [(1, None), (2, Some(Duration::ZERO)), (5, None), (8, Some(Duration::ZERO))]
    {
        let mut workers = start(world, Options { spin, ..Options::default() });
        let buffers = Buffers::of_all(&workers);
        let list = sums(&buffers).finish();
        assert_eq!((list.world_size(), list.len(0), list.len(world)), (world, 3, 0));
        for _ in 0..3 {
            run(&mut workers, &list);
            verify(&workers, &buffers);
        }
    }
}

#[test]
fn every_collective_can_be_in_a_list() {
    const ROW: usize = 24;
    let mut workers = start(3, Options::default());
    let buffers = Buffers::of_all(&workers);
    let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let widths: Arc<[usize]> = [ROW, 0, 2 * ROW].into();
    let mut list = List::new(3);
    list.on_all(|rank| {
        let tensor = buffers[rank as usize].tensor;
        Operation::callback(move |worker| {
            let value = worker.rank.rank() as u8 + 1;
            // SAFETY: the tensor is that large.
            unsafe { worker.rank.gpu().fill(tensor, value, BYTES, worker.stream()) }
        })
    });
    list.on_all(|_| Operation::Barrier);
    list.on_all(|rank| {
        let Buffers { tensor: src, result: dst, .. } = buffers[rank as usize];
        Operation::AllGather(AllGather { src, dst, bytes: ROW })
    });
    list.on_all(|rank| Operation::Broadcast(Broadcast::new(buffers[rank as usize].tensor, ROW, 2)));
    list.on_all(|rank| {
        let (src, dst) = (buffers[rank as usize].tensor, buffers[0].result.offset(3 * ROW));
        Operation::Gather { src, dst, rows: 1, widths: widths.clone(), root: 0 }
    });
    let (log, result) = (seen.clone(), buffers[0].result);
    let read = Operation::callback(move |worker: &mut Worker| {
        let mut bytes = vec![0; 6 * ROW];
        // SAFETY: the result is larger.
        unsafe { worker.rank.gpu().download(&mut bytes, result, worker.stream())? };
        log.lock().unwrap().push(bytes);
        Ok(())
    });
    list.on(0, read).unwrap();
    run(&mut workers, &list.finish());
    let rows = |values: &[u8]| values.iter().flat_map(|value| [*value; ROW]).collect::<Vec<u8>>();
    // Gathered from all; then rank 2's row from rank 0, and rank 2's first two.
    let expected = rows(&[1, 2, 3, 3, 3, 3]);
    assert_eq!(*seen.lock().unwrap(), [expected]);
}

#[test]
fn callbacks_run_in_order_on_the_threads_of_their_ranks() {
    let mut workers = start(2, Options::default());
    let seen: Arc<Mutex<Vec<(String, u32)>>> = Arc::default();
    let mut list = List::new(2);
    for step in 0..3 {
        list.on_all(|_| {
            let seen = seen.clone();
            Operation::callback(move |_| {
                let name = thread::current().name().unwrap_or_default().to_owned();
                seen.lock().unwrap().push((name, step));
                Ok(())
            })
        });
    }
    run(&mut workers, &list.finish());
    for rank in 0..2 {
        let name = format!("peerlane rank {rank}");
        let steps: Vec<u32> =
            seen.lock().unwrap().iter().filter(|of| of.0 == name).map(|of| of.1).collect();
        assert_eq!(steps, [0, 1, 2], "{name}");
    }
    let ordinals: Vec<u32> = (0..2)
        .map(|index| workers.call(index, |worker| worker.rank.gpu().properties().ordinal).unwrap())
        .collect();
    assert_eq!(ordinals, [0, 1]);
}

#[test]
fn an_error_of_one_rank_ends_all_waits_and_is_the_one_that_is_reported() {
    let mut workers = start(3, Options::default());
    let buffers = Buffers::of_all(&workers);
    let mut wrong = List::new(3);
    wrong.on_all(|rank| {
        all_reduce(if rank == 1 { DevicePtr(0) } else { buffers[rank as usize].tensor })
    });
    let mut panics = List::new(3);
    panics.on(2, Operation::callback(|_| panic!("no {}", "tensor"))).unwrap();
    panics.on(0, all_reduce(buffers[0].tensor)).unwrap();
    panics.on(1, all_reduce(buffers[1].tensor)).unwrap();
    let good = sums(&buffers).finish();
    for (list, expected) in [
        (wrong.finish(), "dst: expected a device address"),
        (panics.finish(), "rank 2 panicked: no tensor"),
    ] {
        let begin = Instant::now();
        // SAFETY: as in `run`.
        let error = unsafe { workers.run(&list) }.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let waited = workers.synchronize().unwrap_err();
        assert!(matches!(waited, Error::Aborted { .. } | Error::Stopped { .. }), "{waited}");
        assert!(begin.elapsed() < config().deadline / 4, "{:?}", begin.elapsed());
        workers.on_each(|worker| worker.rank.recover().map(drop)).unwrap();
        run(&mut workers, &good);
        verify(&workers, &buffers);
    }
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_is_queued() {
    let mut workers = start(2, Options::default());
    let other = List::new(3).finish();
    assert!(other.is_empty());
    // SAFETY: nothing is named.
    let error = unsafe { workers.run(&other) }.unwrap_err().to_string();
    assert_eq!(error, "run: list: expected one of 2 ranks, got one of 3");
    let error = List::new(2).on(2, Operation::Barrier).unwrap_err().to_string();
    assert_eq!(error, "list: index: expected below 2, got 2");
    let error = workers.call(2, |_| ()).unwrap_err().to_string();
    assert_eq!(error, "call: index: expected below 2, got 2");
    assert!(workers.stream(2).is_err() && workers.gpu(2).is_err() && workers.is_near(2).is_err());
    let none = Workers::start(Vec::new(), Options::default()).err().unwrap().to_string();
    assert_eq!(none, "workers: ranks: expected at least one, got none");
    let gpus = sim::devices(&sim::Config { devices: 1, ..Default::default() });
    let two = [0, 1].map(|_| Communicator::connect(&gpus, &config()).unwrap().remove(0));
    let mixed = Workers::start(two.into(), Options::default()).err().unwrap().to_string();
    assert_eq!(mixed, "workers: ranks: expected ranks of one group, got another's at 1");
    run(&mut workers, &List::new(2).finish());
    let ranks = workers.finish().unwrap();
    assert_eq!(
        ranks.iter().map(|rank| (rank.rank(), rank.calls())).collect::<Vec<_>>(),
        [(0, 0), (1, 0)]
    );
}

#[test]
fn ranks_that_are_given_back_go_on_with_other_streams() {
    let mut workers = start(2, Options::default());
    let buffers = Buffers::of_all(&workers);
    run(&mut workers, &sums(&buffers).finish());
    verify(&workers, &buffers);
    let mut ranks = workers.finish().unwrap();
    for (rank, of) in ranks.iter_mut().zip(&buffers) {
        let stream = rank.gpu().stream_create().unwrap();
        let call = AllReduce::in_place(of.tensor, COUNT, DType::F32);
        // SAFETY: the tensor is that large, and is not freed.
        unsafe { rank.all_reduce(&call, stream) }.unwrap();
    }
    ranks.iter_mut().for_each(|rank| rank.close().unwrap());
}

#[test]
fn uploads_of_more_than_there_is_are_refused() {
    let mut workers = start(1, Options::default());
    let of = Buffers::of_all(&workers)[0];
    let mut list = List::new(1);
    list.on_all(|_| Operation::Upload { dst: of.tensor, src: of.input, bytes: BYTES + 1 });
    // SAFETY: refused before anything is read.
    let error = unsafe { workers.run(&list.finish()) }.unwrap_err().to_string();
    assert_eq!(
        error,
        format!("upload: bytes: expected at most {BYTES}, which src has, got {}", BYTES + 1)
    );
}

#[test]
fn an_abort_from_another_thread_ends_a_run_that_waits() {
    let mut workers = start(2, Options::default());
    let buffers = Buffers::of_all(&workers);
    let aborter = workers.aborter();
    let mut list = List::new(2);
    // Rank 1 does not come.
    list.on(0, all_reduce(buffers[0].tensor)).unwrap();
    let list = list.finish();
    let aborting = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        aborter.abort();
    });
    // SAFETY: as in `run`.
    let outcome = unsafe { workers.run(&list) }.and_then(|()| workers.synchronize());
    assert!(matches!(outcome, Err(Error::Aborted { .. } | Error::Stopped { .. })), "{outcome:?}");
    aborting.join().unwrap();
}

#[test]
fn no_wake_up_is_lost_and_groups_do_not_mind_each_other() {
    let (ended, wait) = mpsc::channel();
    let spins = [Some(Duration::ZERO), Some(Duration::from_micros(5)), None];
    for spin in spins {
        let ended = ended.clone();
        thread::spawn(move || {
            let empty = List::new(3).finish();
            let mut workers = start(3, Options { spin, near: false });
            for _ in 0..2000 {
                // SAFETY: nothing is named.
                unsafe { workers.run(&empty) }.unwrap();
            }
            ended.send(()).unwrap();
        });
    }
    // A lost one is waited for without end.
    for _ in spins {
        wait.recv_timeout(Duration::from_secs(60)).expect("a wake-up was lost");
    }
}

#[test]
fn a_group_that_is_dropped_has_finished_what_it_queued() {
    let mut workers = start(2, Options::default());
    let buffers = Buffers::of_all(&workers);
    let gpu = workers.gpu(0).unwrap().clone();
    // SAFETY: as in `run`.
    unsafe { workers.run(&sums(&buffers).finish()) }.unwrap();
    drop(workers);
    let stream = gpu.stream_create().unwrap();
    let mut first = [0; 4];
    // SAFETY: the result is larger.
    unsafe { gpu.download(&mut first, buffers[0].result, stream) }.unwrap();
    assert_eq!(f32::from_le_bytes(first), -9.0);
}
