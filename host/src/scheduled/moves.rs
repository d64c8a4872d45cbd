//! The steps of a scheduled call, one by one: which flags each waits for, what it moves, whom it tells.
//!
//! Invariant: a chunk's slot is written only while its `full` flag is down and its room has been granted, and
//! read only between the wait for that flag and what gives the room back.

use super::{Job, REDUCE, SEND, Scheduled, TAKE};
use crate::error::Result;
use crate::gpu::{DevicePtr, MemoryOp};
use crate::mailbox::Board;
use crate::plan;
use crate::plan::staging::{self, SLOTS, Span, UP};
use crate::plan::steps::{Edge, Source, Step, Steps, Task};
use peerlane_device::abi::{Args, Kernel, MAX_RANKS, phase};

/// Where and when a step is carried out.
#[derive(Clone, Copy)]
struct At {
    lane: usize,
    part: u32,
    chunk: u32,
    turn: u32,
}

impl Scheduled {
    /// The stream of a task.
    pub(super) fn lane_of(&self, task: &Task) -> usize {
        match task {
            Task::Neutral | Task::Reduce { .. } => REDUCE,
            Task::Take(_) => self.lane(TAKE),
            Task::SendOwn(edge) | Task::SendSum(edge) | Task::Pass(edge) => {
                self.send_lane(edge.peer)
            }
        }
    }

    /// The stream of what is sent to `peer`.
    pub(super) fn send_lane(&self, peer: u32) -> usize {
        let distance = (peer + self.shape.world - self.rank - 1) % self.shape.world;
        self.lane(SEND + distance as usize)
    }

    /// The stream that stands for stream number `wanted`: fewer there may be.
    fn lane(&self, wanted: usize) -> usize {
        match self.lanes.len() {
            count if wanted < count => wanted,
            count @ 0..=SEND => wanted % count.max(1),
            count => SEND + (wanted - SEND) % (count - SEND),
        }
    }

    /// Queues a step on the chunk that is due in `turn`, if there is one.
    pub(super) unsafe fn step(
        &mut self,
        job: &Job,
        steps: &Steps,
        step: &Step,
        turn: u32,
    ) -> Result<()> {
        let Some(chunk) = turn.checked_sub(step.delay) else { return Ok(()) };
        let Some(span) = job.cut.chunk(step.part, chunk) else { return Ok(()) };
        let at = At { lane: self.lane_of(&step.task), part: step.part, chunk, turn };
        // SAFETY: passed on to the caller.
        unsafe {
            match &step.task {
                Task::Neutral if job.contribution => Ok(()),
                Task::Neutral => self.reduce(job, at, span, &[], (false, false)),
                Task::Reduce { sources, complete } => {
                    if steps.overwrites && job.is_in_place() {
                        self.follow_sends()?;
                    }
                    let shared = steps.overwrites;
                    self.reduce(job, at, span, sources, (*complete, shared))
                }
                Task::Take(edge) => self.take(job, at, span, edge),
                Task::SendOwn(edge) if job.contribution => {
                    self.send(job, at, edge, job.src.offset(span.offset), span)
                }
                Task::SendOwn(edge) | Task::SendSum(edge) | Task::Pass(edge) => {
                    let is_result = matches!(step.task, Task::Pass(_));
                    self.follow_work(at.lane, if is_result { self.lane(TAKE) } else { REDUCE })?;
                    self.send(job, at, edge, job.dst.offset(span.offset), span)
                }
            }
        }
    }

    /// Adds up `sources` into this rank's result. The sum of an inner rank lies there too until the
    /// result comes, which it does only after the sum has been sent. The sum is `complete` if it is everybody's;
    /// it is `shared` if others make the same.
    unsafe fn reduce(
        &mut self,
        job: &Job,
        at: At,
        span: Span,
        sources: &[Source],
        (complete, shared): (bool, bool),
    ) -> Result<()> {
        let mut args = Args { peers: [0; MAX_RANKS], ..job.args };
        args.world = 0;
        for source in sources {
            let address = match source {
                Source::Own if job.contribution => job.src.offset(span.offset),
                // Neutral elements: others count them too, and a NaN that meets one may vanish.
                Source::Own if shared => job.dst.offset(span.offset),
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
        args.dst = job.dst.offset(span.offset).0;
        (args.units, args.tail) = (span.units as u32, span.tail);
        (args.block_units, args.chunk_units) = (grid.block_units, grid.chunk_units);
        if !complete {
            args.scale = 1.0;
        }
        let kernel = Kernel::local_reduce(job.dtype);
        let lane = &mut self.lanes[at.lane];
        // SAFETY: the caller vouches for the tensors; slots lie in the staging area.
        unsafe {
            lane.queue(&self.gpu)?;
            self.gpu.launch(kernel, grid.blocks, grid.threads, &args, lane.stream)?;
        }
        lane.fresh = true;
        for source in sources {
            if let Source::Slot(edge) = source {
                self.give_back(job, at, edge);
            }
        }
        self.lanes[at.lane].clear_note();
        Ok(())
    }

    /// Keeps a result that has come.
    unsafe fn take(&mut self, job: &Job, at: At, span: Span, edge: &Edge) -> Result<()> {
        self.await_data(at, edge);
        let slot = self.staging[self.rank as usize].offset(job.cut.slot(edge.region, at.chunk));
        let lane = &mut self.lanes[at.lane];
        // SAFETY: as for `reduce`.
        unsafe {
            lane.queue(&self.gpu)?;
            self.gpu.copy(job.dst.offset(span.offset), slot, span.bytes(), lane.stream)?;
        }
        lane.fresh = true;
        self.give_back(job, at, edge);
        self.lanes[at.lane].clear_note();
        Ok(())
    }

    /// Copies a chunk to a peer and says that it is there.
    unsafe fn send(
        &mut self,
        job: &Job,
        at: At,
        edge: &Edge,
        src: DevicePtr,
        span: Span,
    ) -> Result<()> {
        let (peer, own) = (edge.peer as usize, self.staging[self.rank as usize]);
        if at.chunk >= SLOTS && !self.breaks_credit {
            let free = own.offset(staging::free_flag(edge.peer, edge.pair, at.chunk));
            self.await_flag(at.lane, free, Board::note(at.turn, phase::CREDIT, edge.peer));
        }
        let slot = self.staging[peer].offset(job.cut.slot(edge.region, at.chunk));
        let full = self.staging[peer].offset(staging::full_flag(self.rank, edge.pair, at.chunk));
        let lane = &mut self.lanes[at.lane];
        // SAFETY: as for `reduce`; the slot lies in the peer's staging area and is free.
        unsafe {
            lane.queue(&self.gpu)?;
            self.gpu.copy(slot, src, span.bytes(), lane.stream)?;
        }
        lane.fresh = true;
        lane.pending.push(MemoryOp::Write(full, UP));
        lane.clear_note();
        Ok(())
    }

    fn await_data(&mut self, at: At, edge: &Edge) {
        let own = self.staging[self.rank as usize];
        let full = own.offset(staging::full_flag(edge.peer, edge.pair, at.chunk));
        let phase = if edge.results { phase::RESULT } else { phase::DATA };
        self.await_flag(at.lane, full, Board::note(at.turn, phase, edge.peer));
    }

    /// Tells the sender along `edge` that the slot is free again, if it has a use for it.
    fn give_back(&mut self, job: &Job, at: At, edge: &Edge) {
        if at.chunk + SLOTS < job.cut.chunks(at.part) {
            let flag = staging::free_flag(self.rank, edge.pair, at.chunk);
            let flag = self.staging[edge.peer as usize].offset(flag);
            self.lanes[at.lane].pending.push(MemoryOp::Write(flag, UP));
        }
    }

    /// Records what this half of a turn has made, where a send may follow. What is pending tells others
    /// and need not be waited for.
    pub(super) fn publish(&mut self, steps: &Steps) -> Result<()> {
        let take = if steps.passes { self.lane(TAKE) } else { REDUCE };
        for lane in [REDUCE, take] {
            self.record(lane)?;
        }
        Ok(())
    }

    /// Records the work on a stream, if there is new work.
    fn record(&mut self, lane: usize) -> Result<()> {
        let lane = &mut self.lanes[lane];
        if !std::mem::take(&mut lane.fresh) {
            return Ok(());
        }
        self.gpu.event_record(lane.event, lane.stream)
    }

    /// Lets a stream wait for what this rank has done so far on the stream `work`. Something has been:
    /// what is sent from there was made in this turn or before.
    fn follow_work(&self, lane: usize, work: usize) -> Result<()> {
        if work == lane {
            return Ok(());
        }
        self.gpu.stream_wait(self.lanes[lane].stream, self.lanes[work].event)
    }

    /// Lets the reductions wait for all that has been sent, where they write over it.
    fn follow_sends(&mut self) -> Result<()> {
        for lane in 1..self.lanes.len() {
            if self.lanes[lane].fresh {
                self.record(lane)?;
                self.follow_work(REDUCE, lane)?;
            }
        }
        Ok(())
    }
}
