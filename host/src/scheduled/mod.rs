//! Runs the steps of a scheduled call: copies, local reductions and flags on a rank's own streams.
//!
//! Invariant: a rank queues its steps in the order that all ranks share (`plan/steps.rs`), on whatever
//! stream each belongs to, and no operation is held back beyond its half of a turn. So a call comes to
//! its end even if the driver puts several streams of one rank into one hardware queue. The streams of
//! two ranks must not share one: who queues both their calls does so one after the other.
//!
//! Ranks are ordered by flags in staging areas only; events order the streams of one rank. An event can be
//! waited for only once it has been recorded, and when a peer does that is the peer's affair.

mod lane;
mod moves;

use crate::algorithm::{Pattern, Spread};
use crate::call_log::Signature;
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{Backend, DevicePtr, Event, GpuRef, MemoryOp, Stream};
use crate::group::Group;
use crate::mailbox::Board;
use crate::monitor::Monitor;
use crate::plan::staging::{self, Cut, UP};
use crate::plan::steps::{self, Steps};
use crate::plan::{Shape, roles};
use lane::Lane;
use peerlane_device::abi::{Args, DType, MAX_RANKS, Operation, flags, phase};
use std::mem::offset_of;

/// The stream of the reductions. Every call begins and ends on it.
const REDUCE: usize = 0;
/// The stream that keeps results.
const TAKE: usize = 1;
/// The stream of the sends to the next rank; those to the one after it have the next stream, and so on. What
/// goes to one peer goes one after the other: side by side, a result slows down the chunk that the next
/// result is made of (two H200s, 64 MiB: 250 us with two streams to a peer, 236 with one).
const SEND: usize = 2;

/// What a rank needs for scheduled calls.
pub(crate) struct Scheduled {
    gpu: GpuRef,
    rank: u32,
    shape: Shape,
    staging_bytes: usize,
    chunk_bytes: Option<usize>,
    /// Skips the waits for room. Test only.
    breaks_credit: bool,
    /// Every rank's staging area, as this rank reaches it.
    staging: [DevicePtr; MAX_RANKS],
    /// This rank's board, as its GPU reaches it.
    board: DevicePtr,
    lanes: Vec<Lane>,
    fork: Event,
    /// By scheme; made when first used.
    steps: Vec<Option<Box<Steps>>>,
    /// Calls so far.
    calls: u32,
    monitor: Monitor,
}

/// Which steps a call takes.
#[derive(Clone, Copy)]
pub(crate) enum Scheme {
    AllReduce(Pattern),
    /// From this root.
    Broadcast(Spread, u32),
}

impl Scheme {
    const COUNT: usize = Pattern::ALL.len() + Spread::ALL.len() * MAX_RANKS;

    fn index(self) -> usize {
        match self {
            Scheme::AllReduce(pattern) => pattern as usize,
            Scheme::Broadcast(spread, root) => {
                Pattern::ALL.len() + spread as usize * MAX_RANKS + root as usize
            }
        }
    }

    fn steps(self, shape: &Shape, rank: u32) -> Steps {
        let world = shape.world;
        match self {
            Scheme::AllReduce(pattern) => match roles::forest(shape.by_island(), pattern) {
                Some(forest) => Steps::of(&forest, world, rank, pattern == Pattern::Ring),
                None => Steps::one_shot(world, rank),
            },
            Scheme::Broadcast(spread, root) => {
                Steps::broadcast(&roles::spread(shape, spread, root), world, rank)
            }
        }
    }
}

/// What one call is about.
pub(crate) struct Job {
    /// What this rank brings, if `contribution`.
    pub(crate) src: DevicePtr,
    pub(crate) dst: DevicePtr,
    pub(crate) dtype: DType,
    pub(crate) contribution: bool,
    pub(crate) cut: Cut,
    /// The arguments of its kernels before their own are filled in.
    pub(crate) args: Args,
    pub(crate) signature: Signature,
}

impl Job {
    /// Whether what is sent lies where the result will.
    fn is_in_place(&self) -> bool {
        let (bytes, src, dst) = (self.signature.bytes as u64, self.src.0, self.dst.0);
        !self.contribution || src < dst + bytes && dst < src + bytes
    }
}

impl Scheduled {
    /// Makes the streams and the monitor of `rank`.
    pub(crate) fn new(
        gpu: &GpuRef,
        rank: u32,
        group: &Group,
        config: &Config,
    ) -> Result<Scheduled> {
        let shape = group.shape;
        let mut staging = [DevicePtr(0); MAX_RANKS];
        for (address, member) in staging.iter_mut().zip(group.mailboxes.members.iter()) {
            *address = member.staging;
        }
        let lanes = streams(gpu, rank, group)?.min(SEND + shape.world as usize - 1);
        let own = &group.mailboxes.members[rank as usize];
        Ok(Scheduled {
            gpu: gpu.clone(),
            rank,
            shape,
            staging_bytes: config.staging(),
            chunk_bytes: config.chunk_bytes,
            breaks_credit: config.broken & flags::BREAK_CREDIT != 0
                && gpu.backend() == Backend::Sim,
            staging,
            board: own.status.device.offset(Board::OFFSET),
            lanes: (0..lanes).map(|_| Lane::new(gpu)).collect::<Result<_>>()?,
            fork: gpu.event_create()?,
            steps: vec![None; Scheme::COUNT],
            calls: 0,
            monitor: Monitor::new(gpu, rank, group, config)?,
        })
    }

    /// The operation of the calls that were captured, if any were.
    pub(crate) fn captured(&self) -> Option<Operation> {
        self.monitor.captured()
    }

    /// Gives calls that were captured before, with other streams and events, their deadline.
    pub(crate) fn watch_graphs(&mut self, operation: Operation) -> Result<()> {
        self.monitor.watch_graphs(operation)
    }

    /// See [`Communicator::set_deadline`](crate::Communicator::set_deadline).
    pub(crate) fn set_deadline(&self, config: &Config) {
        self.monitor.set_deadline(config);
    }

    /// Ends the monitor, now that all calls are done. There are no others.
    pub(crate) fn stop_watching(&mut self) {
        self.monitor.stop();
    }

    /// How a tensor of `units` units, the last of `tail` bytes, is cut.
    pub(crate) fn cut(
        &mut self,
        op: &'static str,
        scheme: Scheme,
        units: (usize, u32),
    ) -> Result<Cut> {
        let (staging_bytes, chunk_bytes) = (self.staging_bytes, self.chunk_bytes);
        Cut::new(op, self.steps(scheme), units, staging_bytes, chunk_bytes)
    }

    /// Bytes of the staging area that a tensor of `units` units would have a use for.
    pub(crate) fn staging_bytes(&mut self, scheme: Scheme, units: usize) -> usize {
        let chunk_bytes = self.chunk_bytes;
        staging::staging_bytes(self.steps(scheme), units, chunk_bytes)
    }

    fn steps(&mut self, scheme: Scheme) -> &Steps {
        let (shape, rank) = (&self.shape, self.rank);
        self.steps[scheme.index()].get_or_insert_with(|| Box::new(scheme.steps(shape, rank)))
    }

    /// Queues a call behind everything on `stream`, and what comes on `stream` behind the call.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`](crate::Communicator::all_reduce).
    ///
    /// # Errors
    /// An error before `begun` is set has queued nothing that a peer could notice.
    pub(crate) unsafe fn run(
        &mut self,
        scheme: Scheme,
        job: &Job,
        stream: Stream,
        begun: &mut bool,
    ) -> Result<()> {
        self.steps(scheme);
        let Some(steps) = self.steps[scheme.index()].take() else { return Ok(()) };
        // SAFETY: passed on to the caller.
        let outcome = unsafe { self.queue(job, &steps, stream, begun) };
        self.steps[scheme.index()] = Some(steps);
        outcome
    }

    unsafe fn queue(
        &mut self,
        job: &Job,
        steps: &Steps,
        stream: Stream,
        begun: &mut bool,
    ) -> Result<()> {
        let captured = self.gpu.is_capturing(stream)?;
        let operation = job.signature.operation;
        if !captured && self.gpu.is_capturing(self.lanes[REDUCE].stream)? {
            return Err(Error::Unsupported {
                op: operation.name(),
                reason: "an earlier scheduled call of this communicator is being captured, and the capture has not ended".into(),
            });
        }
        self.calls = self.calls.wrapping_add(1);
        self.monitor.began(self.calls, captured, operation)?;
        self.fork(steps, stream)?;
        // SAFETY: flags and board are the group's; the caller vouches for the tensors.
        unsafe {
            self.open()?;
            *begun = true;
            let chunks = (0..steps.parts).map(|part| job.cut.chunks(part)).max().unwrap_or(0);
            for turn in 0..chunks + steps.longest_delay {
                for step in &steps.work {
                    self.step(job, steps, step, turn)?;
                }
                self.publish(steps)?;
                self.flush()?;
                for step in &steps.sends {
                    self.step(job, steps, step, turn)?;
                }
                if turn == 0 {
                    self.await_peers();
                }
                self.flush()?;
            }
            self.join(captured, stream)
        }
    }

    /// Lets every stream of the call wait for the caller's.
    fn fork(&mut self, steps: &Steps, stream: Stream) -> Result<()> {
        self.lanes.iter_mut().for_each(Lane::reset);
        self.lanes[REDUCE].used = true;
        for step in &steps.work {
            let lane = self.lane_of(&step.task);
            self.lanes[lane].used = true;
        }
        for peer in self.peers() {
            let lane = self.send_lane(peer);
            self.lanes[lane].used = true;
        }
        self.gpu.event_record(self.fork, stream)?;
        let used = self.lanes.iter().filter(|lane| lane.used);
        used.map(|lane| lane.stream).try_for_each(|own| self.gpu.stream_wait(own, self.fork))
    }

    /// All ranks but this one.
    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let (rank, world) = (self.rank, self.shape.world);
        (0..world).filter(move |peer| *peer != rank)
    }

    /// Says that the call has begun, and holds what is sent to each peer until its whole staging area is free:
    /// the first chunks need no other room. Every flag of an area goes down and up once in each
    /// call, whoever sends to whom in it, so that calls can follow each other in any order.
    ///
    /// No note says that a stream waits here but where it is that of the reductions: whoever has not ended its
    /// last call has not begun this one, for which [`Scheduled::await_peers`] waits there, with a note.
    unsafe fn open(&mut self) -> Result<()> {
        let busy = self.board.offset(offset_of!(Board, busy));
        self.lanes[REDUCE].pending.push(MemoryOp::Write(busy, 1));
        if !self.breaks_credit {
            for peer in self.peers() {
                let area = self.staging[self.rank as usize].offset(staging::area_flag(peer));
                let begun = self.staging[peer as usize].offset(staging::begun_flag(self.rank));
                let lane = self.send_lane(peer);
                if lane == REDUCE {
                    self.await_flag(lane, area, Board::note(0, phase::CREDIT, peer));
                } else {
                    let taken = [MemoryOp::Wait(area, UP), MemoryOp::Write(area, 0)];
                    self.lanes[lane].pending.extend(taken);
                }
                self.lanes[lane].pending.push(MemoryOp::Write(begun, UP));
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { self.lanes[REDUCE].queue(&self.gpu) }
    }

    /// Waits until every peer has begun the call, and so has taken down the flag of this rank's area: it must
    /// not go up before.
    fn await_peers(&mut self) {
        if self.breaks_credit {
            return;
        }
        for peer in self.peers() {
            let begun = self.staging[self.rank as usize].offset(staging::begun_flag(peer));
            self.await_flag(REDUCE, begun, Board::note(0, phase::CREDIT, peer));
        }
        self.lanes[REDUCE].clear_note();
    }

    /// Queues what is pending on every stream.
    unsafe fn flush(&mut self) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.lanes.iter_mut().try_for_each(|lane| unsafe { lane.queue(&self.gpu) })
    }

    /// Lets the caller's stream wait for every stream of the call, and tells every peer that this rank's staging
    /// area is free.
    unsafe fn join(&mut self, captured: bool, stream: Stream) -> Result<()> {
        let reduce = self.lanes[REDUCE].stream;
        for lane in self.lanes.iter().skip(1).filter(|lane| lane.used) {
            self.gpu.event_record(lane.event, lane.stream)?;
            self.gpu.stream_wait(reduce, lane.event)?;
        }
        // The caller need not wait for what is said to others, but a capture ends only when all is joined.
        if !captured {
            self.gpu.event_record(self.fork, reduce)?;
        }
        for peer in self.peers().filter(|_| !self.breaks_credit) {
            let area = self.staging[peer as usize].offset(staging::area_flag(self.rank));
            self.lanes[REDUCE].pending.push(MemoryOp::Write(area, UP));
        }
        let lane = &mut self.lanes[REDUCE];
        lane.pending.push(MemoryOp::Write(self.board.offset(offset_of!(Board, busy)), 0));
        // A graph that runs again says nothing about what has been called since.
        if !captured {
            let done = self.board.offset(offset_of!(Board, done));
            lane.pending.push(MemoryOp::Write(done, self.calls));
        }
        // SAFETY: the board is the group's.
        unsafe { lane.queue(&self.gpu)? };
        if captured {
            self.gpu.event_record(self.fork, reduce)?;
        }
        self.gpu.stream_wait(stream, self.fork)
    }

    /// Holds a stream until a flag is up, and takes it down.
    fn await_flag(&mut self, lane: usize, flag: DevicePtr, note: u32) {
        let at = self.note_of(lane);
        self.lanes[lane].await_flag(flag, at, note);
    }

    /// The word of the board that says what a stream waits for.
    fn note_of(&self, lane: usize) -> DevicePtr {
        self.board.offset(offset_of!(Board, notes) + 4 * lane)
    }
}

/// How many streams `rank` may have for its steps. Ranks on one GPU divide its hardware queues: where the
/// streams were as many as all queues, monitors' not counted, 8 ranks on two H200s stood still, and no deadline
/// ended it.
fn streams(gpu: &GpuRef, rank: u32, group: &Group) -> Result<usize> {
    let members = &group.mailboxes.members;
    let ordinal = members[rank as usize].ordinal;
    let sharers = members.iter().filter(|member| member.ordinal == ordinal).count();
    let (all, least) = (gpu.hardware_queues(), steps::LEAST_QUEUES);
    if all / sharers < least {
        return Err(Error::Unsupported {
            op: "scheduled steps",
            reason: format!(
                "they need {least} hardware queues for each of the {sharers} ranks on GPU {ordinal}, which has {all}; CUDA_DEVICE_MAX_CONNECTIONS=32 gives it more"
            ),
        });
    }
    Ok(all / sharers - least + 1)
}

impl Drop for Scheduled {
    fn drop(&mut self) {
        // What fails here has failed before, where a call said so. What is still said to peers must be said
        // before their memory goes; the monitor lets this wait no longer than the deadline.
        let _ = self.lanes.first().map(|lane| self.gpu.stream_synchronize(lane.stream));
        self.monitor.stop();
        // SAFETY: made in `new` and not used again; queued work still completes.
        unsafe {
            let _ = self.gpu.event_destroy(self.fork);
            self.lanes.iter().for_each(|lane| lane.destroy(&self.gpu));
        }
    }
}
