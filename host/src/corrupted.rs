//! Tests: mailboxes of which anybody may have written anything, at any time, under the kernels that ship.
//!
//! Invariant: whatever counters, credits, seals, flags and slots hold, a rank writes into mailboxes and into its own
//! results only, and every call ends. The simulator reports what lies outside of all memory; fences around every tensor show
//! what lies outside of a result.

use crate::gpu::{DevicePtr, GpuRef, Stream, sim};
use crate::request::{AllGather, AllReduce, Broadcast, Gather, ReduceScatter};
use crate::{Algorithm, Communicator, Config, DType, Error, Result, Route, Transport};
use peerlane_device::abi::FREE;
use std::time::Duration;

/// Bytes of a tensor.
const BYTES: usize = 24 << 10;
/// Bytes before and behind each, which no call may touch.
const FENCE: usize = 4096;
const FENCED: u8 = 0xa7;

/// What the worlds and the garbage of a seed follow from.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }
}

/// One rank, what it works on, and where garbage comes from.
struct Rank {
    gpu: GpuRef,
    communicator: Communicator,
    stream: Stream,
    beside: Stream,
    /// What it reads, and what it writes, each between fences.
    tensors: [DevicePtr; 2],
}

impl Rank {
    fn new(gpu: &GpuRef, communicator: Communicator) -> Rank {
        let stream = gpu.stream_create().unwrap();
        let tensors = [(); 2].map(|()| gpu.alloc(BYTES + 2 * FENCE).unwrap());
        for tensor in tensors {
            // SAFETY: as large as it was allocated.
            unsafe { gpu.fill(tensor, FENCED, BYTES + 2 * FENCE, stream).unwrap() };
        }
        gpu.stream_synchronize(stream).unwrap();
        let beside = gpu.stream_create().unwrap();
        Rank { gpu: gpu.clone(), communicator, stream, beside, tensors }
    }

    /// Queues one of the calls there are.
    fn call(&mut self, world: u32, kind: usize, size: usize) -> Result<()> {
        let [src, dst] = self.tensors.map(|tensor| tensor.offset(FENCE));
        let stream = self.stream;
        let fused: Vec<_> = Algorithm::ALL.into_iter().filter(|a| !a.is_scheduled()).collect();
        let routes: Vec<_> = Route::ALL.into_iter().filter(|r| !r.is_scheduled()).collect();
        let whole = AllReduce { src, ..AllReduce::in_place(dst, size / 2, DType::Bf16) };
        // SAFETY: no call moves more than `BYTES` bytes.
        unsafe {
            match kind % (fused.len() + routes.len() + 3) {
                0 => {
                    let AllReduce { dtype, op, wire, contribution, .. } = whole;
                    let count = size / 2 / world as usize;
                    let call = ReduceScatter { src, dst, count, dtype, op, wire, contribution };
                    self.communicator.reduce_scatter(&call, stream)
                }
                1 => {
                    let call = AllGather { src, dst, bytes: size / world as usize };
                    self.communicator.all_gather(&call, stream)
                }
                2 => {
                    let widths = vec![size / world as usize / 3; world as usize];
                    let call = Gather { src, dst, rows: 3, widths: &widths, root: world - 1 };
                    self.communicator.gather(&call, stream)
                }
                other if other - 3 < routes.len() => {
                    let route = Some(routes[other - 3]);
                    let call = Broadcast { route, ..Broadcast::new(dst, size, 0) };
                    self.communicator.broadcast(&call, stream)
                }
                other => {
                    let algorithm = Some(fused[other - 3 - routes.len()]);
                    self.communicator.all_reduce(&AllReduce { algorithm, ..whole }, stream)
                }
            }
        }
    }

    /// Writes garbage somewhere into its mailboxes, beside whatever runs.
    fn corrupt(&self, random: &mut Random) {
        let group = self.communicator.group("test").unwrap();
        let (shape, rank) = (group.shape, self.communicator.rank() as usize);
        let bytes = shape.layout.mailbox_bytes(shape.world);
        let words = shape.layout.first_slot as usize;
        // Half of it hits the control block and the counters.
        let limit = if random.below(2) == 0 { words } else { bytes };
        let at = random.below(limit / 4) * 4;
        let count = (1 + random.below(64)).min((bytes - at) / 4);
        let word = |random: &mut Random| match random.below(5) {
            0 => 0,
            1 => FREE,
            2 => random.next() % 8,
            3 => FREE - random.next() % 8,
            _ => random.next() ^ random.next() << 1,
        };
        let garbage: Vec<u8> = (0..count).flat_map(|_| word(random).to_ne_bytes()).collect();
        let own = group.mailboxes.members[rank].mailbox.offset(at);
        // SAFETY: inside the mailbox.
        unsafe { self.gpu.upload(own, &garbage, self.beside).unwrap() };
        if let Some(host) = &group.mailboxes.hosts[rank] {
            // SAFETY: inside the mailbox; no kernel runs while this thread does not wait.
            unsafe {
                let place = host.memory.host.add(at);
                place.copy_from_nonoverlapping(garbage.as_ptr(), garbage.len());
            }
        }
    }

    /// That nothing was written around the tensors, nor into the one that is only read.
    fn assert_fences(&self, what: &str) {
        for (index, tensor) in self.tensors.into_iter().enumerate() {
            let mut bytes = vec![0; BYTES + 2 * FENCE];
            // SAFETY: as large as it was allocated.
            unsafe { self.gpu.download(&mut bytes, tensor, self.stream).unwrap() };
            let behind = FENCE + BYTES;
            let mut untouched = bytes[..FENCE].iter().chain(&bytes[behind..]);
            assert!(untouched.all(|byte| *byte == FENCED), "{what}: fence of tensor {index}");
            let is_read = index == 0;
            assert!(
                !is_read || bytes.iter().all(|b| *b == FENCED),
                "{what}: a tensor that is read"
            );
        }
    }
}

/// Runs a seed; says how many of its calls ended in an error.
fn run(seed: u64) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let world = [2, 3, 5][random.below(3)];
    let transport = [Transport::P2p, Transport::Host][random.below(2)];
    let machine = sim::World::new(&sim::Config { devices: world, seed, ..Default::default() });
    let gpus: Vec<GpuRef> = machine.devices();
    let config = Config {
        deadline: Duration::from_millis(20),
        mailbox_bytes: 1 << 20,
        max_blocks: Some(2),
        transport,
        ..Config::default()
    };
    let group = Communicator::connect(&gpus, &config).unwrap();
    let mut ranks: Vec<Rank> =
        gpus.iter().zip(group).map(|(gpu, communicator)| Rank::new(gpu, communicator)).collect();
    let mut failed = 0;
    for _ in 0..3 {
        let (kind, size) = (random.below(1000), 96 * (1 + random.below(BYTES / 96)));
        let what = format!("seed {seed}, call {kind} of {size} bytes, {world} ranks, {transport}");
        for rank in &mut ranks {
            if random.below(2) == 0 {
                rank.corrupt(&mut random);
            }
            let called = rank.call(world, kind, size);
            failed += usize::from(typed(&what, called));
            rank.corrupt(&mut random);
        }
        for rank in &ranks {
            typed(&what, rank.gpu.stream_synchronize(rank.beside));
            typed(&what, rank.gpu.stream_synchronize(rank.stream));
            failed += usize::from(typed(&what, rank.communicator.health()));
        }
        ranks.iter().for_each(|rank| rank.assert_fences(&what));
    }
    failed
}

/// Whether it is an error, which must be one of those that a wait ends with.
fn typed(what: &str, result: Result<()>) -> bool {
    match result {
        Ok(()) => false,
        Err(Error::Timeout { .. } | Error::Aborted { .. } | Error::Stopped { .. }) => true,
        Err(other) => panic!("{what}: {other}"),
    }
}

/// How many seeds: `PEERLANE_SEEDS`, or a few.
fn seeds() -> u64 {
    std::env::var("PEERLANE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn garbage_in_mailboxes_makes_nobody_write_elsewhere() {
    let failed: usize = (1..=seeds()).map(run).sum();
    assert!(failed > 0, "the garbage never mattered");
}

/// The negative control: an address that a kernel took from garbage would be seen.
#[test]
fn a_write_outside_of_all_memory_is_reported() {
    let machine = sim::World::new(&sim::Config { devices: 2, ..Default::default() });
    let gpus: Vec<GpuRef> = machine.devices();
    let config = Config { mailbox_bytes: 1 << 20, ..Config::default() };
    let group = Communicator::connect(&gpus, &config).unwrap();
    let rank = &group[0];
    let shape = rank.group("test").unwrap().shape;
    let mut layout = shape.layout;
    // As if the number of a slot were not cut off at the number of slots.
    layout.slots = 1 << 20;
    let mut args = peerlane_device::abi::Args::new(0, 2, layout);
    rank.group("test").unwrap().mailboxes.address(&mut args);
    let member = rank.group("test").unwrap().member(0);
    member.number_slots_from(700_000, shape.layout).unwrap();
    let stream = gpus[0].stream_create().unwrap();
    let kernel = peerlane_device::abi::Kernel::Barrier;
    // SAFETY: it is not sound, which the simulator must say.
    unsafe { gpus[0].launch(kernel, 1, 32, &args, stream).unwrap() };
    let found = gpus[0].stream_synchronize(stream);
    assert!(matches!(found, Err(Error::Simulated { .. })), "{found:?}");
}
