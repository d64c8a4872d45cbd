//! Ranks that one thread drives: memory, calls, and waiting for what they leave behind.
//!
//! Invariant: nothing waits for a rank's stream before every rank's calls are queued, and memory is
//! allocated before any of them is: a driver's allocator may wait for kernels that wait for peers.

use crate::job::{Call, Job};
use crate::machine::Machine;
use crate::script::{Place, Script};
use peerlane::gpu::{DevicePtr, GpuRef, Graph, Stream};
use peerlane::{
    AllGather, AllReduce, Broadcast, Communicator, Config, Error, Gather, ReduceScatter, Transport,
    layout,
};
use peerlane_device::abi::CHECK_LANE_BYTES;

/// A range of a GPU's memory.
pub struct Memory {
    gpu: GpuRef,
    /// Its first byte.
    pub base: DevicePtr,
    bytes: usize,
}

impl Memory {
    /// Allocates memory for `image` and queues writing it.
    pub fn with_image(gpu: &GpuRef, stream: Stream, image: &[u8]) -> Result<Memory, Error> {
        let bytes = image.len().max(1);
        let memory = Memory { gpu: gpu.clone(), base: gpu.alloc(bytes)?, bytes };
        memory.write(image, stream)?;
        Ok(memory)
    }

    /// Queues overwriting the memory.
    pub fn write(&self, image: &[u8], stream: Stream) -> Result<(), Error> {
        assert!(image.len() <= self.bytes, "an image of another script");
        // SAFETY: the memory is at least that large.
        unsafe { self.gpu.upload(self.base, image, stream) }
    }

    /// Reads the first `bytes` bytes, once the caller has waited for all work on them.
    pub fn read(&self, bytes: usize) -> Result<Vec<u8>, Error> {
        assert!(bytes <= self.bytes, "an image of another script");
        let mut image = vec![0; bytes];
        // SAFETY: the memory is at least that large.
        unsafe { self.gpu.download(&mut image, self.base, Stream::default())? };
        Ok(image)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A simulated GPU that a test has made fail answers with its error: nothing runs on it.
        // SAFETY: nothing uses the memory any more, unless a test has failed; then a driver waits
        // for the kernels that do, and the simulator keeps the memory until they are over.
        let _ = unsafe { self.gpu.free(self.base) };
    }
}

/// One rank: its communicator and the stream that its calls are queued on.
pub struct Rank {
    /// Its end of the group.
    pub communicator: Communicator,
    /// Its GPU.
    pub gpu: GpuRef,
    /// Where its calls go.
    pub stream: Stream,
}

impl Rank {
    /// A rank with a stream of its own.
    pub fn new(communicator: Communicator) -> Result<Rank, Error> {
        let gpu = communicator.gpu().clone();
        let stream = gpu.stream_create()?;
        Ok(Rank { communicator, gpu, stream })
    }

    /// Queues a call on this rank, if it makes it.
    pub fn issue(&mut self, job: &Job, place: Place, base: DevicePtr) -> Result<(), Error> {
        if !place.calls {
            return Ok(());
        }
        let src = place.src.map_or(DevicePtr(0), |offset| base.offset(offset));
        let dst = base.offset(place.dst);
        let (rank, stream) = (self.communicator.rank(), self.stream);
        let communicator = &mut self.communicator;
        // SAFETY: the script sized the tensors for the call, `base` is its image in this rank's
        // memory, and that lives until the stream has passed the call.
        unsafe {
            match &job.call {
                &Call::AllReduce { count, dtype, wire, op, algorithm, absent, .. } => {
                    let contribution = absent >> rank & 1 == 0;
                    let call =
                        AllReduce { src, dst, count, dtype, op, wire, contribution, algorithm };
                    communicator.all_reduce(&call, stream)
                }
                &Call::ReduceScatter { count, dtype, wire, op, absent, .. } => {
                    let contribution = absent >> rank & 1 == 0;
                    let call = ReduceScatter { src, dst, count, dtype, op, wire, contribution };
                    communicator.reduce_scatter(&call, stream)
                }
                &Call::AllGather { bytes, .. } => {
                    communicator.all_gather(&AllGather { src, dst, bytes }, stream)
                }
                &Call::Broadcast { bytes, root, route } => {
                    communicator.broadcast(&Broadcast { data: dst, bytes, root, route }, stream)
                }
                Call::Gather { rows, widths, root, .. } => {
                    let call = Gather { src, dst, rows: *rows, widths, root: *root };
                    communicator.gather(&call, stream)
                }
                Call::Barrier => communicator.barrier(stream),
            }
        }
    }

    /// Queues every call of a script whose image is at `base`.
    pub fn issue_all(&mut self, script: &Script, base: DevicePtr) -> Result<(), Error> {
        let rank = self.communicator.rank() as usize;
        let mut calls = script.jobs.iter().zip(&script.places);
        calls.try_for_each(|(job, places)| self.issue(job, places[rank], base))
    }

    /// Waits for the rank's calls and asks how they went.
    pub fn finish(&self) -> Result<(), Error> {
        self.gpu.stream_synchronize(self.stream)?;
        self.communicator.health()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // A communicator needs its last stream until it is closed. What fails here has failed
        // before, where a test saw it.
        let _ = self.communicator.close();
        // SAFETY: the stream was made in `new` and is not used again.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}

/// All ranks of a communicator.
pub struct Group {
    /// The ranks, in order.
    pub ranks: Vec<Rank>,
}

/// `config` with mailboxes in which calls have the same slots if they are checked.
pub fn with_room_for_checks(config: Config, world: u32) -> Config {
    let lanes = layout::choose(world, config.mailbox_bytes).map_or(0, |layout| layout.lanes);
    let checks = if config.checked { lanes as usize * CHECK_LANE_BYTES } else { 0 };
    Config { mailbox_bytes: config.mailbox_bytes + checks, ..config }
}

impl Group {
    /// Connects `world` ranks on the machine's GPUs.
    ///
    /// # Panics
    /// If they cannot be connected.
    pub fn connect(machine: &Machine, world: u32, config: &Config) -> Group {
        Group::on(&machine.gpus(world), config)
    }

    /// Connects one rank per GPU given. Where the configuration leaves the transport open, the
    /// environment may choose it, so that the suite can be run over each; it may also ask for checked calls.
    ///
    /// # Panics
    /// If they cannot be connected.
    pub fn on(gpus: &[GpuRef], config: &Config) -> Group {
        let environment = Config::from_environment().expect("the environment makes sense");
        let transport = match config.transport {
            Transport::Auto => environment.transport,
            chosen => chosen,
        };
        let checked = config.checked || environment.checked;
        let config = Config { transport, checked, ..config.clone() };
        let config = &with_room_for_checks(config, gpus.len() as u32);
        let communicators = Communicator::connect(gpus, config).expect("the ranks connect");
        let ranks = communicators.into_iter().map(Rank::new).collect::<Result<_, _>>();
        Group { ranks: ranks.expect("the GPUs have streams") }
    }

    /// Gives every rank the memory that the script describes.
    pub fn load(&self, script: &Script) -> Result<Vec<Memory>, Error> {
        let pairs = self.ranks.iter().zip(&script.images);
        pairs.map(|(rank, i)| Memory::with_image(&rank.gpu, rank.stream, &i.before)).collect()
    }

    /// Queues all calls, call by call, each on all ranks that take part.
    pub fn issue(&mut self, script: &Script, memory: &[Memory]) -> Result<(), Error> {
        for (job, places) in script.jobs.iter().zip(&script.places) {
            for ((rank, place), memory) in self.ranks.iter_mut().zip(places).zip(memory) {
                rank.issue(job, *place, memory.base)?;
            }
        }
        Ok(())
    }

    /// Waits for all ranks, and reads what is in their memory.
    pub fn collect(&self, memory: &[Memory], script: &Script) -> Result<Vec<Vec<u8>>, Error> {
        for rank in &self.ranks {
            rank.gpu.stream_synchronize(rank.stream)?;
        }
        self.ranks.iter().try_for_each(|rank| rank.communicator.health())?;
        let pairs = memory.iter().zip(&script.images);
        pairs.map(|(memory, image)| memory.read(image.before.len())).collect()
    }

    /// Runs all calls without waiting in between, and compares every byte. Returns what the ranks
    /// hold, or what is wrong.
    pub fn run(&mut self, script: &Script) -> Result<Vec<Vec<u8>>, String> {
        let found = self.attempt(script).map_err(|error| error.to_string())?;
        script.verify(&found)?;
        Ok(found)
    }

    fn attempt(&mut self, script: &Script) -> Result<Vec<Vec<u8>>, Error> {
        let memory = self.load(script)?;
        self.issue(script, &memory)?;
        self.collect(&memory, script)
    }

    /// [`Group::run`] of `jobs`, which must go right.
    ///
    /// # Panics
    /// If anything is wrong.
    pub fn check(&mut self, jobs: &[Job], seed: u64) -> Vec<Vec<u8>> {
        let script = Script::new(self.ranks.len() as u32, jobs, seed);
        self.run(&script).unwrap_or_else(|reason| panic!("{} ranks: {reason}", self.ranks.len()))
    }

    /// Records all calls of a script, a graph for each rank.
    pub fn capture(&mut self, script: &Script, memory: &[Memory]) -> Result<Vec<Graph>, Error> {
        let record = |(rank, memory): (&mut Rank, &Memory)| {
            rank.gpu.capture_begin(rank.stream)?;
            rank.issue_all(script, memory.base)?;
            rank.gpu.capture_end(rank.stream)
        };
        self.ranks.iter_mut().zip(memory).map(record).collect()
    }
}
