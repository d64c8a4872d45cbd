//! The public face: one [`Communicator`] per rank, one method per collective.
//!
//! A call checks its arguments, compares itself with the other ranks' calls, plans, and queues one
//! kernel (a scheduled all-reduce: its steps). After the first call it allocates nothing, locks nothing and enters no system call of
//! its own; it never waits. An asynchronous call allocates once there are more works than ever before, and takes a
//! lock, as its work's end does: that of the pool of events, which is held for a push or a pop.
//! Calls of one communicator run in the order in which they were made.

use crate::algorithm::{Algorithm, Route};
use crate::call_log::Signature;
use crate::choice::{Choice, Known, Tuning};
use crate::collectives::invalid;
use crate::error::{self, Error, Result};
use crate::gpu::{Event, GpuRef, Stream};
use crate::group::{Aborter, Agreement, Card, Group, Mailboxes};
use crate::join;
use crate::mailbox::Member;
use crate::plan::Shape;
use crate::plan::roles::Places;
use crate::plan::staging::FLAG_BYTES;
use crate::registration::Registrations;
use crate::regroup::Outcome;
use crate::rendezvous::{Meeting, Processes, Segment, lost_rank};
use crate::scheduled::Scheduled;
use crate::selftest::SelfTest;
use crate::sizing::{Sizes, Sizing, State};
use crate::trace;
use crate::traced::Timing;
use crate::transport::{Pairs, Transport};
use crate::usage::{Tally, Usage};
use crate::work::Side;
use peerlane_device::abi::{
    Args, Kernel, Layout, MAX_RANKS, Operation, Status, TICK_SHIFT, flags, state, ticks,
};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Bytes of a staging area where one is wanted and its size is not said: two ranks have room for 64 MiB in two
/// chunks a part.
pub const STAGING_BYTES: usize = FLAG_BYTES + (64 << 20);

/// What all ranks of a communicator agree on when they meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// A wait on the GPU that lasts longer than this ends with an error. 19 hours are as good as no limit.
    pub deadline: Duration,
    /// The same in a rank's first call, in which others may still be compiling or loading, if that is
    /// longer. `None`: six times the deadline.
    pub first_deadline: Option<Duration>,
    /// Whether the ranks compare on the GPU what they call, and checksums of all that travels ([`docs/reliability.md`]).
    /// Every call is then carried out by kernels.
    ///
    /// [`docs/reliability.md`]: https://github.com/peerlane/peerlane/blob/main/docs/reliability.md
    pub checked: bool,
    /// Most bytes of device memory for one rank's mailbox.
    pub mailbox_bytes: usize,
    /// Most blocks that one call may use. `None`: as many as the smallest GPU holds at once,
    /// divided by the ranks that share it.
    pub max_blocks: Option<u32>,
    /// How every all-reduce is carried out that does not choose for itself. `None`: by size.
    pub algorithm: Option<Algorithm>,
    /// How every broadcast is carried out that does not choose for itself. `None`: by size.
    pub route: Option<Route>,
    /// Where the table of measured choices comes from.
    pub tuning: Tuning,
    /// One algorithm and one route for all sizes, for results that do not depend on how many rows a tensor has:
    /// `algorithm` and `route` if given, else full-width one-shot for two ranks, two-shot for more, and direct.
    pub fixed: bool,
    /// Only algorithms that add in rank order and round once are chosen by size. An algorithm that
    /// is asked for by name is used in any case.
    pub exact: bool,
    /// Which island each rank belongs to, by rank: ranks with the same number are near each other.
    /// `None`: two halves.
    pub islands: Option<Vec<u8>>,
    /// The rank that passes broadcasts on by [`Route::Hub`]. `None`: rank 0.
    pub hub: Option<u32>,
    /// What carries data from rank to rank.
    pub transport: Transport,
    /// Whether the ranks want a self-test of their GPUs first.
    pub self_test: SelfTest,
    /// Bytes of device memory for one rank's staging area, which scheduled calls copy through. `None`: some
    /// 64 MiB if `algorithm` or `route` is a scheduled one, none otherwise.
    pub staging_bytes: Option<usize>,
    /// Bytes that a scheduled call copies at once, a multiple of 16. `None`: half of a part of the tensor,
    /// but at least 4 MiB and at most what the staging area has room for.
    pub chunk_bytes: Option<usize>,
    /// Between which limits [`Communicator::adapt`] may change `mailbox_bytes` and `staging_bytes`, which
    /// are then what the ranks begin with. `None`: they stay as they are.
    pub sizing: Option<Sizing>,
    /// Test only: `abi::flags::BREAK_*` bits that break the protocol on purpose. Real GPUs ignore
    /// them.
    #[doc(hidden)]
    pub broken: u32,
    /// Test only: where the pipes' counters begin, to see them wrap.
    #[doc(hidden)]
    pub first_slot: u32,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            deadline: Duration::from_secs(10),
            first_deadline: None,
            checked: false,
            mailbox_bytes: 32 << 20,
            max_blocks: None,
            algorithm: None,
            route: None,
            tuning: Tuning::Auto,
            fixed: false,
            exact: true,
            islands: None,
            hub: None,
            transport: Transport::Auto,
            self_test: SelfTest::Auto,
            staging_bytes: None,
            chunk_bytes: None,
            sizing: None,
            broken: 0,
            first_slot: 0,
        }
    }
}

impl Config {
    /// How long a wait in a rank's first call may last.
    pub(crate) fn first_deadline(&self) -> Duration {
        let first = self.first_deadline.unwrap_or(self.deadline.saturating_mul(6));
        first.max(self.deadline)
    }

    /// Bytes of a staging area.
    pub(crate) fn staging(&self) -> usize {
        let scheduled = self.algorithm.is_some_and(Algorithm::is_scheduled)
            || self.route.is_some_and(Route::is_scheduled);
        self.staging_bytes.unwrap_or(if scheduled { STAGING_BYTES } else { 0 })
    }
}

/// One rank's end of a group of GPUs.
///
/// Calls may use any stream of the rank's GPU. A change of stream is ordered by an event, so the
/// stream of the previous call must still exist; inside a CUDA graph capture the caller orders the
/// streams.
pub struct Communicator {
    rank: u32,
    gpu: GpuRef,
    config: Config,
    /// Empty once closed.
    group: Option<Group>,
    /// What no call changes.
    template: Args,
    /// This rank's places in all trees.
    places: Places,
    /// What calls take that do not choose for themselves.
    choice: Choice,
    /// Calls made together with each rank, for the call log.
    calls: [u64; MAX_RANKS],
    last_stream: Option<Stream>,
    order: Event,
    /// Tensors that all ranks reach.
    registrations: Registrations,
    /// Made by the first scheduled call.
    scheduled: Option<Box<Scheduled>>,
    /// Made by the first asynchronous call.
    pub(crate) side: Option<Side>,
    /// What all clones of this rank's aborter stop.
    pub(crate) aborter: Aborter,
    /// What the calls have brought.
    pub(crate) tally: Tally,
    /// The sizes, and how long they have been too large.
    pub(crate) state: State,
    /// How often the ranks have met about sizes since the group was made.
    pub(crate) meetings: u64,
    /// How often the ranks have recovered or shrunk, and what becomes of this generation's calls.
    pub(crate) generation: u64,
    pub(crate) outcome: Outcome,
    /// Times the calls on the GPU while they are traced.
    pub(crate) timing: Timing,
}

impl Communicator {
    /// Makes all ranks of a group at once, rank r on `gpus[r]`, for one thread to drive. Several
    /// ranks may share a GPU.
    pub fn connect(gpus: &[GpuRef], config: &Config) -> Result<Vec<Communicator>> {
        let (group, known) = Communicator::assemble(gpus, config)?;
        (0..)
            .zip(gpus)
            .map(|(rank, gpu)| Communicator::new(rank, gpu, config, (group.clone(), &known)))
            .collect()
    }

    /// All of a group's memory, rank r's on `gpus[r]`.
    pub(crate) fn assemble(gpus: &[GpuRef], config: &Config) -> Result<(Group, Known)> {
        let cards: Vec<Card> =
            gpus.iter().map(|gpu| Card::prepare(gpu, config)).collect::<Result<_>>()?;
        let agreement = Agreement::of(&cards, config)?;
        let known = agreement.known(&gpus[0], (0, None), &cards, config)?;
        agreement.accept_verdicts(&known, config)?;
        let ranks = || (0..).zip(gpus);
        let unreached = ranks().map(|(rank, gpu)| agreement.map_peers(gpu, rank, config.transport));
        let pairs = known.verdicts.demote(Pairs::of(&unreached.collect::<Result<Vec<_>>>()?));
        let members =
            gpus.iter().map(|gpu| agreement.member(gpu, config)).collect::<Result<_>>()?;
        let mut mailboxes = Mailboxes::new(members, pairs);
        let hosts = ranks().map(|(rank, gpu)| agreement.host_mailbox(gpu, config, (rank, pairs)));
        mailboxes.hosts = hosts.collect::<Result<_>>()?;
        Ok((Group::new(agreement.shape, mailboxes), known))
    }

    /// Joins a group as `rank` from a thread of its own; returns once all ranks have joined.
    pub fn join(
        meeting: &Meeting,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<Communicator> {
        meeting.enter(rank)?;
        let joined = Self::meet(meeting, rank, gpu, config)
            .and_then(|(group, known)| Communicator::new(rank, gpu, config, (group, &known)));
        joined.inspect_err(|error| meeting.give_up(rank, error))
    }

    /// Joins a group as `rank` from a process of its own; returns once all ranks have joined and
    /// every pair of GPUs has passed a probe, or with an error on every rank.
    pub fn join_processes(
        meeting: &Processes,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<Communicator> {
        let (group, known) = join::join(meeting.enter(rank)?, rank, Ok(()), gpu, config)?;
        Communicator::new(rank, gpu, config, (group, &known))
    }

    /// Builds a group with the others, in a meeting that `rank` has entered.
    pub(crate) fn meet(
        meeting: &Meeting,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<(Group, Known)> {
        let cards = meeting.exchange(rank, 0, Card::prepare(gpu, config)?)?;
        let agreement = Agreement::of(&cards, config)?;
        let patience = Some(meeting.patience());
        let known = agreement.known(gpu, (rank, patience), &cards, config)?;
        let known = meeting.exchange(rank, 1, known)?.swap_remove(0);
        agreement.accept_verdicts(&known, config)?;
        let unreached = agreement.map_peers(gpu, rank, config.transport)?;
        let own = (agreement.member(gpu, config)?, unreached);
        let (members, unreached): (Vec<_>, Vec<_>) =
            meeting.exchange(rank, 2, own)?.into_iter().unzip();
        let pairs = known.verdicts.demote(Pairs::of(&unreached));
        let mut mailboxes = Mailboxes::new(members, pairs);
        let host = agreement.host_mailbox(gpu, config, (rank, pairs))?;
        mailboxes.hosts = meeting.exchange(rank, 3, host)?;
        // Rank 0's group is everybody's, so that all share one call log.
        let group = Group::new(agreement.shape, mailboxes);
        Ok((meeting.exchange(rank, 4, group)?.swap_remove(0), known))
    }

    fn new(
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
        (group, known): (Group, &Known),
    ) -> Result<Communicator> {
        trace::start_from_environment();
        let choice = Choice::settle(config, &group.shape, known)?;
        let order = gpu.event_create()?;
        Ok(Communicator {
            rank,
            gpu: gpu.clone(),
            config: config.clone(),
            template: template(rank, config, &group),
            places: Places::of(&group.shape, rank),
            aborter: group.aborter(),
            group: Some(group),
            choice,
            calls: [0; MAX_RANKS],
            last_stream: None,
            order,
            registrations: Registrations::default(),
            scheduled: None,
            side: None,
            tally: Tally::default(),
            state: State::new(Sizes::of(config)),
            meetings: 0,
            generation: 0,
            outcome: Outcome::default(),
            timing: Timing::default(),
        })
    }

    /// Takes another group's place in all calls from now on. Says whether the one until now was aborted;
    /// an abort that comes later finds the new one.
    pub(crate) fn replace_group(&mut self, config: Config, group: Group, choice: Choice) -> bool {
        self.template = template(self.rank, &config, &group);
        self.places = Places::of(&group.shape, self.rank);
        (self.config, self.choice) = (config, choice);
        self.calls = [0; MAX_RANKS];
        self.meetings = 0;
        // It knows the addresses of the memory that goes.
        self.scheduled = None;
        self.aborter.follow(&group);
        // What is not said by now is that all went well.
        std::mem::take(&mut self.outcome).settle(Ok(()));
        let aborted = self.health().is_err();
        self.group = Some(group);
        aborted
    }

    /// This rank's number.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        self.template.world
    }

    /// This rank's GPU.
    pub fn gpu(&self) -> &GpuRef {
        &self.gpu
    }

    /// What the ranks agreed on.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How a mailbox is divided.
    pub fn layout(&self) -> Layout {
        self.template.layout
    }

    /// Bytes of device memory that this rank's mailbox takes.
    pub fn mailbox_bytes(&self) -> usize {
        self.layout().mailbox_bytes(self.world_size())
    }

    /// What this rank's calls have brought, and the sizes in force.
    pub fn usage(&self) -> Usage {
        self.tally.report(self.state.sizes)
    }

    /// How many calls of this rank have been queued, captured ones included.
    pub fn calls(&self) -> u64 {
        self.tally.calls()
    }

    /// What calls take that do not choose for themselves.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The ordinals of all ranks' GPUs, in rank order.
    pub fn ordinals(&self) -> Result<Vec<u32>> {
        let group = self.group("ordinals")?;
        Ok((0..self.world_size()).map(|rank| group.ordinal(rank)).collect())
    }

    /// What carries data from one rank to another: [`Transport::P2p`] or [`Transport::Host`].
    pub fn transport(&self, from: u32, to: u32) -> Result<Transport> {
        const OP: &str = "transport";
        let group = self.group(OP)?;
        let expected = || format!("a rank from 0 to {}", self.world_size() - 1);
        match (from.max(to) < self.world_size(), from == to) {
            (false, _) => Err(invalid(OP, "from and to", expected(), format!("{from} and {to}"))),
            (true, true) => Err(invalid(OP, "from and to", "two ranks".into(), from)),
            (true, false) => Ok(group.transport(from, to)),
        }
    }

    /// The first error that a kernel of this communicator recorded. It stays, and every later call returns it too,
    /// until the ranks [recover](Communicator::recover): their counters no longer agree.
    pub fn health(&self) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        health_of(&group.mailboxes.members, group.segment(), self.rank)
    }

    /// What tells this rank's health without the communicator.
    pub(crate) fn health_handle(&self) -> Health {
        let group = self.group.as_ref();
        Health {
            members: group.map_or_else(
                || Weak::<[Arc<Member>; 0]>::new() as Weak<[Arc<Member>]>,
                |group| Arc::downgrade(&group.mailboxes.members),
            ),
            segment: group.and_then(Group::segment).map(Arc::downgrade),
            rank: self.rank,
            outcome: self.outcome.clone(),
        }
    }

    /// The error of a call after `close`.
    pub(crate) fn closed(&self, operation: Operation) -> Error {
        Error::Closed { op: operation.name(), rank: self.rank }
    }

    /// How long this rank's waits may last from its next call on. Ranks may differ.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.config.deadline = deadline;
        self.template.deadline = ticks(deadline);
        self.template.first_deadline = ticks(self.config.first_deadline());
        if let Some(scheduled) = &self.scheduled {
            scheduled.set_deadline(&self.config);
        }
    }

    /// Waits until everything queued on `stream` is done, and says whether it went well.
    pub fn synchronize(&self, stream: Stream) -> Result<()> {
        let _span = trace::span!("synchronize", rank = self.rank);
        self.gpu.stream_synchronize(stream)?;
        self.health()
    }

    /// Ends every wait of every rank of the group. Their calls return errors from then on, until they
    /// [recover](Communicator::recover).
    pub fn abort(&self) {
        self.aborter().abort();
    }

    /// What aborts this communicator's group from another thread, while this one is inside a call.
    pub fn aborter(&self) -> Aborter {
        self.group.as_ref().map(|_| self.aborter.clone()).unwrap_or_default()
    }

    /// Ends the communicator: waits for everything queued on this rank's GPU and lets go of the group,
    /// whose memory is freed when all ranks have. A second call does nothing.
    pub fn close(&mut self) -> Result<()> {
        if self.group.is_none() {
            return Ok(());
        }
        // The whole GPU rather than the last stream, which its owner may have destroyed by now.
        // After recovering there may be graphs that were launched on any.
        let used = self.last_stream.is_some() || self.generation != 0;
        let drained = if used { self.gpu.synchronize() } else { Ok(()) };
        // Nothing of this rank was cut short by an abort that met no wait.
        let health = self.health().or_else(|error| match error {
            Error::Stopped { .. } => Ok(()),
            other => Err(other),
        });
        self.timing = Timing::default();
        // Its monitor has ended the waits of its streams if nobody else would.
        self.scheduled = None;
        self.side = None;
        self.registrations.clear();
        self.group = None;
        drained.and(health)
    }

    /// The group, unless the communicator is closed.
    pub(crate) fn group(&self, op: &'static str) -> Result<&Group> {
        self.group.as_ref().ok_or(Error::Closed { op, rank: self.rank })
    }

    /// What every call checks first.
    pub(crate) fn ready(&self, operation: Operation) -> Result<Shape> {
        let shape = self.group(operation.name())?.shape;
        self.health()?;
        Ok(shape)
    }

    /// The first of `ranks`, if they are all ranks of one group of this process, in order.
    pub(crate) fn whole_group<'a>(
        op: &'static str,
        ranks: &'a [&mut Communicator],
    ) -> Result<&'a Communicator> {
        let wrong = |got: String| {
            let expected = "all ranks of one group of this process, in order".to_owned();
            invalid(op, "ranks", expected, got)
        };
        let first = ranks.first().ok_or_else(|| wrong("none".into()))?;
        let log = &first.group(op)?.log;
        if ranks.len() != first.world_size() as usize {
            return Err(wrong(format!("{} of {} ranks", ranks.len(), first.world_size())));
        }
        for (index, rank) in ranks.iter().enumerate() {
            if !Arc::ptr_eq(&rank.group(op)?.log, log) || rank.rank() as usize != index {
                return Err(wrong(format!("rank {} of some group at {index}", rank.rank())));
            }
        }
        Ok(first)
    }

    /// This rank's registrations.
    pub(crate) fn registrations(&mut self) -> &mut Registrations {
        &mut self.registrations
    }

    /// This rank's registrations, to look at.
    pub(crate) fn registrations_ref(&self) -> &Registrations {
        &self.registrations
    }

    /// This rank's places in all trees.
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    /// A call's arguments before its own are filled in.
    pub(crate) fn args(&self, operation: Operation) -> Args {
        Args { operation: operation as u32, ..self.template }
    }

    /// Compares the call with those of the ranks in `peers`.
    pub(crate) fn announce(&mut self, peers: u32, signature: Signature) -> Result<()> {
        let group = self.group.as_ref().ok_or(Error::Closed { op: "announce", rank: self.rank })?;
        group.log.enter(self.rank, peers, &mut self.calls, signature)
    }

    /// That `stream` is one of this rank's GPU.
    pub(crate) fn owns_stream(&self, op: &'static str, stream: Stream) -> Result<()> {
        let own = self.gpu.properties().ordinal;
        let owner = self.gpu.owner_of_stream(stream);
        if owner != Some(own) {
            return Err(Error::InvalidArgument {
                op,
                argument: "stream",
                expected: format!("a stream of GPU {own}, where rank {} is", self.rank),
                got: owner.map_or("no stream".into(), |gpu| format!("a stream of GPU {gpu}")),
            });
        }
        Ok(())
    }

    /// Whether a call on `stream` becomes part of a graph, where that matters: asking takes time.
    pub(crate) fn is_captured(&self, stream: Stream) -> Result<bool> {
        Ok(self.config.sizing.is_some() && self.gpu.is_capturing(stream)?)
    }

    /// Whether everything is done that this rank has queued until now. All calls are behind each other, so
    /// the end of the last is the end of all.
    pub(crate) fn is_drained(&self) -> Result<bool> {
        let Some(last) = self.last_stream else { return Ok(true) };
        self.gpu.stream_query(last)
    }

    /// Makes `stream` the one that calls are queued on, after everything queued before.
    pub(crate) fn follow(&mut self, op: &'static str, stream: Stream) -> Result<()> {
        if self.last_stream == Some(stream) {
            return Ok(());
        }
        self.owns_stream(op, stream)?;
        if let Some(last) = self.last_stream {
            if self.gpu.is_capturing(stream)? {
                self.refuse_in_flight(op)?;
            } else if !self.gpu.is_capturing(last)? {
                self.gpu.event_record(self.order, last)?;
                self.gpu.stream_wait(stream, self.order)?;
                if let Some(side) = &self.side {
                    side.settle(last);
                }
            }
        }
        self.last_stream = Some(stream);
        Ok(())
    }

    /// Waits for a stream of its own accord and has nothing to do with it any more: it may go.
    pub(crate) fn leave_stream(&mut self, stream: Stream) -> Result<()> {
        if self.last_stream == Some(stream) {
            self.gpu.stream_synchronize(stream)?;
            if let Some(side) = &self.side {
                side.settle(stream);
            }
            self.last_stream = None;
        }
        Ok(())
    }

    /// Whether this rank has made scheduled calls.
    pub(crate) fn has_scheduled(&self) -> bool {
        self.scheduled.is_some()
    }

    /// Stops the thread that aborts if a scheduled call takes too long, once all are done.
    pub(crate) fn stop_watching(&mut self) {
        if let Some(scheduled) = &mut self.scheduled {
            scheduled.stop_watching();
        }
    }

    /// Forgets what scheduled calls need, once all are done. Returns what was captured, if anything was.
    pub(crate) fn stop_scheduled(&mut self) -> Option<Operation> {
        self.scheduled.take().and_then(|scheduled| scheduled.captured())
    }

    /// Makes the next call the first, now that all are done; `captured` is what a graph may still run.
    pub(crate) fn forget_calls(&mut self, captured: Option<Operation>) -> Result<()> {
        self.calls = [0; MAX_RANKS];
        self.tally.begin_anew();
        self.last_stream = None;
        if let Some(side) = &self.side {
            side.settle_all();
        }
        if let Some(operation) = captured {
            self.scheduled(operation.name())?.watch_graphs(operation)?;
        }
        Ok(())
    }

    /// Goes on as `rank` of another group, without registrations and streams of the last one.
    pub(crate) fn renumber(&mut self, rank: u32, config: Config, group: Group, choice: Choice) {
        self.registrations.clear();
        self.rank = rank;
        self.state = State::new(Sizes::of(&config));
        self.replace_group(config, group, choice);
    }

    /// What scheduled calls need.
    pub(crate) fn scheduled(&mut self, op: &'static str) -> Result<&mut Scheduled> {
        if self.scheduled.is_none() {
            let made = Scheduled::new(&self.gpu, self.rank, self.group(op)?, &self.config)?;
            self.scheduled = Some(Box::new(made));
        }
        self.scheduled.as_deref_mut().ok_or(Error::Closed { op, rank: self.rank })
    }

    /// Queues a kernel on the stream given to [`Communicator::follow`].
    ///
    /// # Safety
    /// The tensors in `args` are what `kernel` expects, alive until the stream has passed the call.
    pub(crate) unsafe fn queue(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        let stream = self.last_stream.unwrap_or_default();
        // SAFETY: mailboxes and status are the group's; the caller vouches for the tensors.
        unsafe { self.gpu.launch(kernel, blocks, threads, args, stream) }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Peers may still be served by kernels that this rank has queued; waiting for those here is
        // what keeps the mailboxes alive for them. The deadline bounds it.
        let _ = self.close();
        // SAFETY: made in `new` and not used again.
        let _ = unsafe { self.gpu.event_destroy(self.order) };
    }
}

/// What no call of `rank` changes as long as it belongs to `group`.
fn template(rank: u32, config: &Config, group: &Group) -> Args {
    let Shape { world, layout, .. } = group.shape;
    let mut template = Args {
        flags: config.broken | if config.checked { flags::CHECKED } else { 0 },
        deadline: ticks(config.deadline),
        first_deadline: ticks(config.first_deadline()),
        ..Args::new(rank, world, layout)
    };
    group.mailboxes.address(&mut template);
    template
}

/// The flag bits of a call.
pub(crate) fn call_flags(contribution: bool) -> u32 {
    if contribution { 0 } else { flags::NO_CONTRIBUTION }
}

/// A rank's health, as long as its group lasts. It does not keep the group alive.
pub(crate) struct Health {
    members: Weak<[Arc<Member>]>,
    segment: Option<Weak<Segment>>,
    rank: u32,
    outcome: Outcome,
}

impl Health {
    /// As [`Communicator::health`] was in the generation in which this was made; well, once the group is gone.
    pub(crate) fn check(&self) -> Result<()> {
        let segment = self.segment.as_ref().and_then(Weak::upgrade);
        let now = self
            .members
            .upgrade()
            .map_or(Ok(()), |members| health_of(&members, segment.as_ref(), self.rank));
        // The outcome is said before the page is cleared: who finds the page clear finds the outcome.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        self.outcome.said().unwrap_or(now)
    }
}

/// What the status page of `rank` says.
fn health_of(members: &[Arc<Member>], segment: Option<&Arc<Segment>>, rank: u32) -> Result<()> {
    let page = members[rank as usize].status.host.cast::<Status>();
    // SAFETY: the page is alive as long as the member. The device writes the state last, after
    // a system-wide fence, so the rest is valid once it is not OK. Hosts write the abort word.
    let (status, abort) = unsafe {
        let abort = (&raw const (*page).abort).read_volatile();
        if (&raw const (*page).state).read_volatile() == state::OK && abort == 0 {
            return Ok(());
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        (page.read_volatile(), abort)
    };
    let lost = lost_rank(abort);
    if let Some(peer) = lost {
        let pid = segment.map_or(0, |segment| segment.pid(peer));
        let operation = match status.state {
            state::OK => "health",
            _ => error::operation_name(status.operation),
        };
        return Err(Error::PeerLost { operation, rank, peer, pid });
    }
    let operation = error::operation_name(status.operation);
    let phase = error::phase_name(status.phase);
    let (peer, epoch) = (status.peer, status.epoch);
    Err(match status.state {
        state::OK => Error::Stopped { rank },
        state::TIMED_OUT => {
            // Whole milliseconds: a tick says no more.
            let waited =
                Duration::from_millis((u64::from(status.waited) << TICK_SHIFT) / 1_000_000);
            Error::Timeout { operation, rank, peer, epoch, phase, waited }
        }
        state::CORRUPT => Error::Corrupt { operation, rank, peer },
        state::MISMATCH => {
            let [mine, theirs] = status.signatures.map(Signature::describe);
            Error::Mismatch { op: operation, rank, peer, call: epoch.into(), mine, theirs }
        }
        _ => Error::Aborted { operation, rank, peer, epoch, phase },
    })
}
