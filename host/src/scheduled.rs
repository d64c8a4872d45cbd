//! Runs the steps of a scheduled all-reduce: copies, local reductions and flags on a rank's own streams.
//!
//! Invariant: a rank queues its steps in the order that all ranks share (`plan/steps.rs`), on whatever
//! stream each belongs to, and no operation is held back beyond its half of a turn. So the call comes to
//! its end even if the driver puts several of the streams into one hardware queue.
//!
//! Ranks are ordered by flags in staging areas only; events order the streams of one rank. An event can be
//! waited for only once it has been recorded, and when a peer does that is the peer's affair.

use crate::algorithm::Pattern;
use crate::call_log::Signature;
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{Backend, DevicePtr, Event, GpuRef, MemoryOp, Stream};
use crate::group::Group;
use crate::mailbox::Board;
use crate::monitor::Monitor;
use crate::plan::roles;
use crate::plan::steps::{self, Cut, Edge, Source, Span, Step, Steps, Task};
use crate::plan::{self, Shape};
use crate::request::AllReduce;
use peerlane_device::abi::{Args, Kernel, MAX_RANKS, flags, phase};
use std::mem::offset_of;

/// The stream of the reductions. Every call begins and ends on it.
const REDUCE: usize = 0;
/// The stream that keeps results.
const TAKE: usize = 1;

/// What a rank needs for scheduled calls.
pub(crate) struct Scheduled {
    gpu: GpuRef,
    rank: u32,
    shape: Shape,
    staging_bytes: usize,
    chunk_bytes: Option<usize>,
    /// Skips the waits for free slots. Test only.
    breaks_credit: bool,
    /// Every rank's staging area, as this rank reaches it.
    staging: [DevicePtr; MAX_RANKS],
    /// This rank's board, as its GPU reaches it.
    board: DevicePtr,
    streams: Vec<Lane>,
    fork: Event,
    /// By pattern; made when first used.
    steps: [Option<Box<Steps>>; Pattern::ALL.len()],
    /// Calls so far.
    calls: u32,
    monitor: Monitor,
}

/// A stream and what has been put on it.
struct Lane {
    stream: Stream,
    event: Event,
    /// Operations not queued yet; never for longer than half a turn.
    pending: Vec<MemoryOp>,
    /// Used by this call.
    used: bool,
    /// It has work that nobody has an event for.
    fresh: bool,
}

/// What one call is about.
struct Job<'a> {
    call: &'a AllReduce,
    cut: Cut,
    /// The arguments of its kernels before their own are filled in.
    args: Args,
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
        let own = &group.mailboxes.members[rank as usize];
        let sharers =
            group.mailboxes.members.iter().filter(|member| member.ordinal == own.ordinal).count();
        // Ranks on one GPU divide its queues. Where the streams were as many as all queues, monitors' not
        // counted, 8 ranks on two H200s stood still and no deadline ended it.
        let queues = gpu.hardware_queues() / sharers;
        if queues < steps::LEAST_QUEUES {
            return Err(Error::Unsupported {
                op: "all_reduce",
                reason: format!(
                    "scheduled steps need {} hardware queues for each of the {sharers} ranks on GPU {}, which has {}; CUDA_DEVICE_MAX_CONNECTIONS=32 gives it more",
                    steps::LEAST_QUEUES,
                    own.ordinal,
                    gpu.hardware_queues()
                ),
            });
        }
        let mut scheduled = Scheduled {
            gpu: gpu.clone(),
            rank,
            shape,
            staging_bytes: config.staging(),
            chunk_bytes: config.chunk_bytes,
            breaks_credit: config.broken & flags::BREAK_CREDIT != 0
                && gpu.backend() == Backend::Sim,
            staging,
            board: own.status.device.offset(Board::OFFSET),
            streams: Vec::new(),
            fork: gpu.event_create()?,
            steps: Default::default(),
            calls: 0,
            monitor: Monitor::new(gpu, rank, group, config.deadline),
        };
        let wanted = 2 + 2 * (shape.world as usize - 1);
        for _ in 0..wanted.min(queues - steps::LEAST_QUEUES + 1) {
            let stream = gpu.stream_create_urgent()?;
            let lane = Lane {
                stream,
                event: gpu.event_create()?,
                pending: Vec::with_capacity(16),
                used: false,
                fresh: false,
            };
            scheduled.streams.push(lane);
        }
        Ok(scheduled)
    }

    /// See [`Communicator::set_deadline`](crate::Communicator::set_deadline).
    pub(crate) fn set_deadline(&self, deadline: std::time::Duration) {
        self.monitor.set_deadline(deadline);
    }

    /// How a tensor of `units` units is cut, the last of `tail` bytes.
    pub(crate) fn cut(&mut self, pattern: Pattern, units: (usize, u32)) -> Result<Cut> {
        let (staging_bytes, chunk_bytes) = (self.staging_bytes, self.chunk_bytes);
        self.steps(pattern).cut(units, staging_bytes, chunk_bytes)
    }

    /// Bytes of the staging area that a tensor of `units` units would have a use for.
    pub(crate) fn staging_bytes(&mut self, pattern: Pattern, units: usize) -> usize {
        let chunk_bytes = self.chunk_bytes;
        self.steps(pattern).staging_bytes(units, chunk_bytes)
    }

    fn steps(&mut self, pattern: Pattern) -> &Steps {
        let (shape, rank) = (&self.shape, self.rank);
        self.steps[pattern as usize].get_or_insert_with(|| {
            let forest = roles::forest(shape.by_island(), pattern);
            Box::new(Steps::of(&forest, shape.world, rank, pattern == Pattern::Ring))
        })
    }

    /// Queues a call behind everything on `stream`, and what comes on `stream` behind the call.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`](crate::Communicator::all_reduce).
    ///
    /// # Errors
    /// An error before `begun` is set has queued nothing that a peer could notice.
    pub(crate) unsafe fn all_reduce(
        &mut self,
        (call, pattern, cut): (&AllReduce, Pattern, Cut),
        args: Args,
        signature: Signature,
        stream: Stream,
        begun: &mut bool,
    ) -> Result<()> {
        self.steps(pattern);
        let Some(steps) = self.steps[pattern as usize].take() else { return Ok(()) };
        let job = Job { call, cut, args };
        // SAFETY: passed on to the caller.
        let outcome = unsafe { self.run(&job, &steps, signature, stream, begun) };
        self.steps[pattern as usize] = Some(steps);
        outcome
    }

    unsafe fn run(
        &mut self,
        job: &Job<'_>,
        steps: &Steps,
        signature: Signature,
        stream: Stream,
        begun: &mut bool,
    ) -> Result<()> {
        let captured = self.gpu.is_capturing(stream)?;
        if !captured && self.gpu.is_capturing(self.streams[REDUCE].stream)? {
            return Err(Error::Unsupported {
                op: signature.operation.name(),
                reason: "an earlier scheduled call of this communicator is being captured, and the capture has not ended".into(),
            });
        }
        self.calls = self.calls.wrapping_add(1);
        self.monitor.began(self.calls, captured, signature.operation)?;
        self.fork(steps, stream)?;
        // SAFETY: flags and board are the group's; the caller vouches for the tensors.
        unsafe {
            self.open(job, steps)?;
            *begun = true;
            let chunks = (0..steps.parts).map(|part| job.cut.chunks(part)).max().unwrap_or(0);
            for turn in 0..chunks + steps.longest_delay {
                for step in &steps.work {
                    self.step(job, step, turn)?;
                }
                self.flush()?;
                self.publish(steps)?;
                for step in &steps.sends {
                    self.step(job, step, turn)?;
                }
                self.flush()?;
            }
            self.join(captured, stream)
        }
    }

    /// The stream that carries the sends along `edge`.
    fn send_lane(&self, edge: &Edge) -> usize {
        let distance = (edge.peer + self.shape.world - self.rank - 1) % self.shape.world;
        self.lane(2 + 2 * distance as usize + edge.results as usize)
    }

    /// The stream that stands for stream number `wanted`: fewer there may be.
    fn lane(&self, wanted: usize) -> usize {
        match self.streams.len() {
            count if wanted < count => wanted,
            count @ 0..=2 => wanted % count.max(1),
            count => 2 + (wanted - 2) % (count - 2),
        }
    }

    /// Lets every stream of the call wait for the caller's.
    fn fork(&mut self, steps: &Steps, stream: Stream) -> Result<()> {
        for lane in &mut self.streams {
            (lane.used, lane.fresh) = (false, false);
            lane.pending.clear();
        }
        for step in steps.work.iter().chain(&steps.sends) {
            let lane = self.lane_of(step);
            self.streams[lane].used = true;
        }
        self.streams[REDUCE].used = true;
        self.gpu.event_record(self.fork, stream)?;
        let used = self.streams.iter().filter(|lane| lane.used);
        used.map(|lane| lane.stream).try_for_each(|own| self.gpu.stream_wait(own, self.fork))
    }

    fn lane_of(&self, step: &Step) -> usize {
        match &step.task {
            Task::Neutral | Task::Reduce { .. } => REDUCE,
            Task::Take(_) => self.lane(TAKE),
            Task::SendOwn(edge) | Task::SendSum(edge) | Task::Pass(edge) => self.send_lane(edge),
        }
    }

    /// Says that the call has begun and tells every sender that the slots are free.
    unsafe fn open(&mut self, job: &Job<'_>, steps: &Steps) -> Result<()> {
        let busy = self.board_word(offset_of!(Board, busy));
        self.streams[REDUCE].pending.push(MemoryOp::Note(busy, 1));
        for (part, edge) in &steps.incoming {
            for chunk in 0..job.cut.chunks(*part).min(steps::SLOTS) {
                let flag = self.free_flag_of(edge, chunk);
                self.streams[REDUCE].pending.push(MemoryOp::Write(flag, 1));
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { self.queue_pending(REDUCE) }
    }

    unsafe fn step(&mut self, job: &Job<'_>, step: &Step, turn: u32) -> Result<()> {
        let Some(chunk) = turn.checked_sub(step.delay) else { return Ok(()) };
        let Some(span) = job.cut.chunk(step.part, chunk) else { return Ok(()) };
        let lane = self.lane_of(step);
        let at = At { lane, part: step.part, chunk, turn };
        // SAFETY: passed on to the caller.
        unsafe {
            match &step.task {
                Task::Neutral if job.call.contribution => Ok(()),
                Task::Neutral => self.reduce(job, at, span, &[], false),
                Task::Reduce { sources, complete } => {
                    self.reduce(job, at, span, sources, *complete)
                }
                Task::Take(edge) => self.take(job, at, span, edge),
                Task::SendOwn(edge) if job.call.contribution => {
                    self.send(job, at, edge, job.call.src.offset(span.offset), span)
                }
                Task::SendOwn(edge) | Task::SendSum(edge) | Task::Pass(edge) => {
                    let is_result = matches!(step.task, Task::Pass(_));
                    self.follow_work(lane, if is_result { self.lane(TAKE) } else { REDUCE })?;
                    self.send(job, at, edge, job.call.dst.offset(span.offset), span)
                }
            }
        }
    }

    /// Adds up `sources` into this rank's result. The sum of an inner rank lies there too until the
    /// result comes, which it does only after the sum has been sent.
    unsafe fn reduce(
        &mut self,
        job: &Job<'_>,
        at: At,
        span: Span,
        sources: &[Source],
        complete: bool,
    ) -> Result<()> {
        let mut args = Args { peers: [0; MAX_RANKS], ..job.args };
        args.world = 0;
        for source in sources {
            let address = match source {
                Source::Own if job.call.contribution => job.call.src.offset(span.offset),
                Source::Own => continue,
                Source::Slot(edge) => {
                    self.await_data(at, edge);
                    self.staging[self.rank as usize].offset(job.cut.slot(edge.region, at.chunk))
                }
            };
            args.peers[args.world as usize] = address.0;
            args.world += 1;
        }
        let grid = plan::grid(&self.shape, span.units);
        args.dst = job.call.dst.offset(span.offset).0;
        (args.units, args.tail) = (span.units as u32, span.tail);
        (args.block_units, args.chunk_units) = (grid.block_units, grid.chunk_units);
        if !complete {
            args.scale = 1.0;
        }
        let kernel = Kernel::local_reduce(job.call.dtype);
        let stream = self.streams[at.lane].stream;
        // SAFETY: the caller vouches for the tensors; slots lie in the staging area.
        unsafe {
            self.queue_pending(at.lane)?;
            self.gpu.launch(kernel, grid.blocks, grid.threads, &args, stream)?;
        }
        self.streams[at.lane].fresh = true;
        for source in sources {
            if let Source::Slot(edge) = source {
                self.give_back(job, at, edge);
            }
        }
        Ok(())
    }

    /// Keeps a result that has come.
    unsafe fn take(&mut self, job: &Job<'_>, at: At, span: Span, edge: &Edge) -> Result<()> {
        self.await_data(at, edge);
        let slot = self.staging[self.rank as usize].offset(job.cut.slot(edge.region, at.chunk));
        let dst = job.call.dst.offset(span.offset);
        // SAFETY: as for `reduce`.
        unsafe {
            self.queue_pending(at.lane)?;
            self.gpu.copy(dst, slot, span.bytes(), self.streams[at.lane].stream)?;
        }
        self.streams[at.lane].fresh = true;
        self.give_back(job, at, edge);
        Ok(())
    }

    /// Copies a chunk to a peer and says that it is there.
    unsafe fn send(
        &mut self,
        job: &Job<'_>,
        at: At,
        edge: &Edge,
        src: DevicePtr,
        span: Span,
    ) -> Result<()> {
        let (peer, own) = (edge.peer as usize, self.staging[self.rank as usize]);
        let free = own.offset(steps::free_flag(edge.peer, edge.pair, at.chunk));
        if !self.breaks_credit {
            self.await_flag(at, free, edge.peer, phase::CREDIT);
        }
        let slot = self.staging[peer].offset(job.cut.slot(edge.region, at.chunk));
        // SAFETY: as for `reduce`; the slot lies in the peer's staging area and is free.
        unsafe {
            self.queue_pending(at.lane)?;
            self.gpu.copy(slot, src, span.bytes(), self.streams[at.lane].stream)?;
        }
        let full = self.staging[peer].offset(steps::full_flag(self.rank, edge.pair, at.chunk));
        self.streams[at.lane].pending.push(MemoryOp::Write(full, 1));
        Ok(())
    }

    fn await_data(&mut self, at: At, edge: &Edge) {
        let own = self.staging[self.rank as usize];
        let full = own.offset(steps::full_flag(edge.peer, edge.pair, at.chunk));
        let phase = if edge.results { phase::RESULT } else { phase::DATA };
        self.await_flag(at, full, edge.peer, phase);
    }

    /// Waits for a flag and takes it down, and lets the board say so meanwhile.
    fn await_flag(&mut self, at: At, flag: DevicePtr, peer: u32, phase: u32) {
        let note = self.board_word(offset_of!(Board, notes) + 4 * at.lane);
        self.streams[at.lane].pending.extend([
            MemoryOp::Note(note, Board::note(at.turn, phase, peer)),
            MemoryOp::Wait(flag, 1),
            MemoryOp::Note(flag, 0),
            MemoryOp::Note(note, 0),
        ]);
    }

    /// Tells the sender along `edge` that the slot is free again, if it has a use for it.
    fn give_back(&mut self, job: &Job<'_>, at: At, edge: &Edge) {
        if at.chunk + steps::SLOTS < job.cut.chunks(at.part) {
            let flag = self.free_flag_of(edge, at.chunk);
            self.streams[at.lane].pending.push(MemoryOp::Write(flag, 1));
        }
    }

    fn free_flag_of(&self, edge: &Edge, chunk: u32) -> DevicePtr {
        self.staging[edge.peer as usize].offset(steps::free_flag(self.rank, edge.pair, chunk))
    }

    fn board_word(&self, offset: usize) -> DevicePtr {
        self.board.offset(offset)
    }

    unsafe fn queue_pending(&mut self, lane: usize) -> Result<()> {
        let Lane { stream, pending, .. } = &mut self.streams[lane];
        if pending.is_empty() {
            return Ok(());
        }
        // SAFETY: flags and board are aligned words of the group's.
        let queued = unsafe { self.gpu.stream_memory(*stream, pending) };
        pending.clear();
        queued
    }

    /// Queues what is pending on every stream.
    unsafe fn flush(&mut self) -> Result<()> {
        // SAFETY: passed on to the caller.
        (0..self.streams.len()).try_for_each(|lane| unsafe { self.queue_pending(lane) })
    }

    /// Records what this half of a turn has made, where a send may follow.
    fn publish(&mut self, steps: &Steps) -> Result<()> {
        let take = if steps.passes { self.lane(TAKE) } else { REDUCE };
        for lane in [REDUCE, take] {
            if std::mem::take(&mut self.streams[lane].fresh) {
                let Lane { event, stream, .. } = self.streams[lane];
                self.gpu.event_record(event, stream)?;
            }
        }
        Ok(())
    }

    /// Lets a stream wait for what this rank has done so far on the stream `work`. Something has been:
    /// what is sent from there was made in this turn or before.
    fn follow_work(&self, lane: usize, work: usize) -> Result<()> {
        if work == lane {
            return Ok(());
        }
        self.gpu.stream_wait(self.streams[lane].stream, self.streams[work].event)
    }

    /// Lets the caller's stream wait for every stream of the call.
    unsafe fn join(&mut self, captured: bool, stream: Stream) -> Result<()> {
        let reduce = self.streams[REDUCE].stream;
        for lane in self.streams.iter().skip(1).filter(|lane| lane.used) {
            self.gpu.event_record(lane.event, lane.stream)?;
            self.gpu.stream_wait(reduce, lane.event)?;
        }
        let busy = self.board_word(offset_of!(Board, busy));
        let done = self.board_word(offset_of!(Board, done));
        let pending = &mut self.streams[REDUCE].pending;
        pending.push(MemoryOp::Write(busy, 0));
        // A graph that runs again says nothing about what has been called since.
        if !captured {
            pending.push(MemoryOp::Note(done, self.calls));
        }
        // SAFETY: the board is the group's.
        unsafe { self.queue_pending(REDUCE)? };
        self.gpu.event_record(self.fork, reduce)?;
        self.gpu.stream_wait(stream, self.fork)
    }
}

/// Where a step is carried out.
#[derive(Clone, Copy)]
struct At {
    lane: usize,
    part: u32,
    chunk: u32,
    turn: u32,
}

impl Drop for Scheduled {
    fn drop(&mut self) {
        self.monitor.stop();
        // What fails here has failed before, where a call said so.
        // SAFETY: made in `new` and not used again; queued work still completes.
        unsafe {
            let _ = self.gpu.event_destroy(self.fork);
            for lane in &self.streams {
                let _ = self.gpu.event_destroy(lane.event);
                let _ = self.gpu.stream_destroy(lane.stream);
            }
        }
    }
}
