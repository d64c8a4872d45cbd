//! The public face: one [`Communicator`] per rank, one method per collective.
//!
//! A call checks its arguments, compares itself with the other ranks' calls, plans, and queues one
//! kernel. After the first call it allocates nothing, locks nothing and enters no system call of
//! its own; it never waits. Calls of one communicator run in the order in which they were made.

use crate::algorithm::{Algorithm, Route};
use crate::choice::{Choice, Known, Tuning};
use crate::error::{self, Error, Result};
use crate::gpu::{Event, GpuRef, Stream};
use crate::group::{Aborter, Agreement, Card, Group};
use crate::join;
use crate::plan::Shape;
use crate::plan::roles::Places;
use crate::rendezvous::{Meeting, Processes, lost_rank};
use peerlane_device::abi::{Args, Kernel, Layout, MAX_RANKS, Operation, Status, flags, state};
use std::time::Duration;

/// What all ranks of a communicator agree on when they meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// A wait on the GPU that lasts longer than this ends with an error.
    pub deadline: Duration,
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
            mailbox_bytes: 32 << 20,
            max_blocks: None,
            algorithm: None,
            route: None,
            tuning: Tuning::Auto,
            fixed: false,
            exact: true,
            islands: None,
            hub: None,
            broken: 0,
            first_slot: 0,
        }
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
}

impl Communicator {
    /// Makes all ranks of a group at once, rank r on `gpus[r]`, for one thread to drive. Several
    /// ranks may share a GPU.
    pub fn connect(gpus: &[GpuRef], config: &Config) -> Result<Vec<Communicator>> {
        let cards: Vec<Card> =
            gpus.iter().map(|gpu| Card::prepare(gpu, config)).collect::<Result<_>>()?;
        let agreement = Agreement::of(&cards, config)?;
        let known = agreement.known(0, &cards, config)?;
        gpus.iter().try_for_each(|gpu| agreement.map_peers(gpu))?;
        let members: Vec<_> =
            gpus.iter().map(|gpu| agreement.member(gpu, config)).collect::<Result<_>>()?;
        let group = Group::new(agreement.shape, members);
        let ranks = gpus.iter().enumerate();
        ranks
            .map(|(rank, gpu)| Communicator::new(rank as u32, gpu, config, (group.clone(), &known)))
            .collect()
    }

    /// Joins a group as `rank` from a thread of its own; returns once all ranks have joined.
    pub fn join(
        meeting: &Meeting,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<Communicator> {
        meeting.enter(rank)?;
        let joined = Self::join_rounds(meeting, rank, gpu, config);
        if let Err(error) = &joined {
            meeting.give_up(rank, error);
        }
        joined
    }

    /// Joins a group as `rank` from a process of its own; returns once all ranks have joined and
    /// every pair of GPUs has passed a probe, or with an error on every rank.
    pub fn join_processes(
        meeting: &Processes,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<Communicator> {
        let (group, known) = join::join(meeting, rank, gpu, config)?;
        Communicator::new(rank, gpu, config, (group, &known))
    }

    fn join_rounds(
        meeting: &Meeting,
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
    ) -> Result<Communicator> {
        let cards = meeting.exchange(rank, 0, Card::prepare(gpu, config)?)?;
        let agreement = Agreement::of(&cards, config)?;
        let known = meeting.exchange(rank, 1, agreement.known(rank, &cards, config)?)?;
        agreement.map_peers(gpu)?;
        let members = meeting.exchange(rank, 2, agreement.member(gpu, config)?)?;
        // Rank 0's group is everybody's, so that all share one call log.
        let groups = meeting.exchange(rank, 3, Group::new(agreement.shape, members))?;
        Communicator::new(rank, gpu, config, (groups[0].clone(), &known[0]))
    }

    fn new(
        rank: u32,
        gpu: &GpuRef,
        config: &Config,
        (group, known): (Group, &Known),
    ) -> Result<Communicator> {
        let shape = group.shape;
        let Shape { world, layout, .. } = shape;
        let mut peers = [0; MAX_RANKS];
        for (peer, member) in peers.iter_mut().zip(group.members.iter()) {
            *peer = member.mailbox.0;
        }
        let template = Args {
            flags: config.broken,
            peers,
            status: group.members[rank as usize].status.device.0,
            deadline_ns: config.deadline.as_nanos().min(u64::MAX as u128) as u64,
            ..Args::new(rank, world, layout)
        };
        let order = gpu.event_create()?;
        Ok(Communicator {
            rank,
            gpu: gpu.clone(),
            config: config.clone(),
            group: Some(group),
            template,
            places: Places::of(&shape, rank),
            choice: Choice::settle(config, &shape, known)?,
            calls: [0; MAX_RANKS],
            last_stream: None,
            order,
        })
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

    /// What calls take that do not choose for themselves.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The ordinals of all ranks' GPUs, in rank order.
    pub fn ordinals(&self) -> Result<Vec<u32>> {
        let group = self.group("ordinals")?;
        Ok((0..self.world_size()).map(|rank| group.ordinal(rank)).collect())
    }

    /// The first error that a kernel of this communicator recorded. It stays: the ranks' counters
    /// no longer agree, so every later call returns it too.
    pub fn health(&self) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        let page = group.members[self.rank as usize].status.host.cast::<Status>();
        // SAFETY: the page is alive as long as the group. The device writes the state last, after
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
            let (rank, pid) = (self.rank, group.pid(peer).unwrap_or_default());
            let operation = match status.state {
                state::OK => "health",
                _ => error::operation_name(status.operation),
            };
            return Err(Error::PeerLost { operation, rank, peer, pid });
        }
        let operation = error::operation_name(status.operation);
        let phase = error::phase_name(status.phase);
        let (rank, peer, epoch) = (self.rank, status.peer, status.epoch);
        Err(match status.state {
            state::OK => Error::Stopped { rank },
            state::TIMED_OUT => {
                Error::Timeout { operation, rank, peer, epoch, phase, waited: self.config.deadline }
            }
            state::CORRUPT => Error::Corrupt { operation, rank, peer },
            _ => Error::Aborted { operation, rank, peer, epoch, phase },
        })
    }

    /// How long this rank's waits may last from its next call on. Ranks may differ.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.config.deadline = deadline;
        self.template.deadline_ns = deadline.as_nanos().min(u64::MAX as u128) as u64;
    }

    /// Waits until everything queued on `stream` is done, and says whether it went well.
    pub fn synchronize(&self, stream: Stream) -> Result<()> {
        self.gpu.stream_synchronize(stream)?;
        self.health()
    }

    /// Ends every wait of every rank of the group. Their calls return errors from then on.
    pub fn abort(&self) {
        if let Some(group) = &self.group {
            group.aborter().abort();
        }
    }

    /// What aborts this communicator's group from another thread, while this one is inside a call.
    pub fn aborter(&self) -> Aborter {
        self.group.as_ref().map(Group::aborter).unwrap_or_default()
    }

    /// Ends the communicator: waits for everything queued on this rank's GPU and lets go of the group,
    /// whose memory is freed when all ranks have. A second call does nothing.
    pub fn close(&mut self) -> Result<()> {
        if self.group.is_none() {
            return Ok(());
        }
        // The whole GPU rather than the last stream, which its owner may have destroyed by now.
        let drained = if self.last_stream.is_some() { self.gpu.synchronize() } else { Ok(()) };
        // Nothing of this rank was cut short by an abort that met no wait.
        let health = self.health().or_else(|error| match error {
            Error::Stopped { .. } => Ok(()),
            other => Err(other),
        });
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

    /// This rank's places in all trees.
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    /// A call's arguments before its own are filled in.
    pub(crate) fn args(&self, operation: Operation) -> Args {
        Args { operation: operation as u32, ..self.template }
    }

    /// Compares the call with those of the ranks in `peers`.
    pub(crate) fn announce(
        &mut self,
        peers: u32,
        signature: crate::call_log::Signature,
    ) -> Result<()> {
        let group = self.group.as_ref().ok_or(Error::Closed { op: "announce", rank: self.rank })?;
        group.log.enter(self.rank, peers, &mut self.calls, signature)
    }

    /// Makes `stream` the one that calls are queued on, after everything queued before.
    pub(crate) fn follow(&mut self, op: &'static str, stream: Stream) -> Result<()> {
        if self.last_stream == Some(stream) {
            return Ok(());
        }
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
        if let Some(last) = self.last_stream
            && !self.gpu.is_capturing(stream)?
            && !self.gpu.is_capturing(last)?
        {
            self.gpu.event_record(self.order, last)?;
            self.gpu.stream_wait(stream, self.order)?;
        }
        self.last_stream = Some(stream);
        Ok(())
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

/// The flag bits of a call.
pub(crate) fn call_flags(contribution: bool) -> u32 {
    if contribution { 0 } else { flags::NO_CONTRIBUTION }
}
