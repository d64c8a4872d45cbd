//! What the ranks of a group build together before the first call: mailboxes, mappings, one layout.
//!
//! Invariant: what cards decide is the same on every rank. Nothing here is on the path of a call.

use crate::call_log::CallLog;
use crate::choice::{Known, LinkClass, Shown, Tuning};
use crate::communicator::Config;
use crate::error::{Error, Result, clipped};
use crate::gpu::{Backend, GpuRef, cuda};
use crate::host_mailbox::HostMailbox;
use crate::layout;
use crate::mailbox::{Extent, Member, Offer};
use crate::plan::staging::LEAST_STAGING_BYTES;
use crate::plan::{self, Shape};
use crate::rendezvous::{ABORTED, Assembly, LOST, Membership, Segment};
use crate::selftest::{Consult, Identity, Symptom, explained};
use crate::sizing;
use crate::transport::{Pairs, Transport};
use peerlane_device::abi::{ABI_VERSION, Args, Kernel, MAX_RANKS, MAX_THREADS, Status, UNIT};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// What a rank shows the others first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Card {
    ordinal: u32,
    uuid: String,
    pci_bus_id: String,
    /// The generation of PCIe that GPUs of its age have.
    pcie: u8,
    /// The GPUs whose memory it can use, and whether over NVLink. None are named if it is simulated.
    peers: Vec<(String, bool)>,
    backend: Backend,
    /// Blocks of any kernel that its GPU holds at once.
    resident_blocks: u32,
    /// The configuration, as text: it is only compared.
    config: String,
    /// The file of measured choices that it was told to use.
    tuning: Option<Shown>,
    version: u32,
}

impl Card {
    /// Makes `gpu` ready to launch and describes it.
    pub(crate) fn prepare(gpu: &GpuRef, config: &Config) -> Result<Card> {
        gpu.load_kernels()?;
        let mut resident_blocks = u32::MAX;
        for kernel in Kernel::ALL {
            resident_blocks = resident_blocks.min(gpu.resident_blocks(*kernel, MAX_THREADS)?);
        }
        if config.checked {
            resident_blocks = resident_blocks.min(gpu.load_checked_kernels(MAX_THREADS)?);
        }
        Ok(Card {
            ordinal: gpu.properties().ordinal,
            uuid: gpu.properties().uuid.clone(),
            pci_bus_id: gpu.properties().pci_bus_id.clone(),
            pcie: pcie_generation(gpu.properties().compute_capability),
            peers: peers(gpu)?,
            backend: gpu.backend(),
            resident_blocks,
            config: comparable(config),
            tuning: Shown::of(config)?,
            version: ABI_VERSION,
        })
    }

    /// The ordinal in this process of the GPU that it describes.
    fn ordinal_here(&self) -> Result<u32> {
        if self.backend == Backend::Sim {
            return Ok(self.ordinal);
        }
        let here = cuda::devices()?;
        let found = here.iter().find(|gpu| gpu.properties().uuid == self.uuid);
        found.map(|gpu| gpu.properties().ordinal).ok_or_else(|| Error::Unsupported {
            op: "join",
            reason: format!(
                "GPU {} of another rank is hidden from this process; CUDA_VISIBLE_DEVICES must show every rank all GPUs of the group",
                clipped(&self.uuid)
            ),
        })
    }
}

/// What all ranks' cards add up to.
pub(crate) struct Agreement {
    pub(crate) shape: Shape,
    extent: Extent,
    ordinals: Vec<u32>,
}

impl Agreement {
    /// Compares the cards, in rank order, and derives what they decide. The same on every rank.
    pub(crate) fn of(cards: &[Card], config: &Config) -> Result<Agreement> {
        let world = cards.len() as u32;
        let fail = |reason: String| Err(Error::Rendezvous { world, reason });
        if cards.is_empty() || cards.len() > MAX_RANKS {
            return fail(format!("expected 1 to {MAX_RANKS} ranks, got {world}"));
        }
        for (rank, card) in cards.iter().enumerate() {
            let first = &cards[0];
            if card.version != first.version || card.backend != first.backend {
                return fail(format!(
                    "rank 0 is {:?} with version {}, rank {rank} is {:?} with version {}",
                    first.backend, first.version, card.backend, card.version
                ));
            }
            if card.config != first.config {
                return fail(format!(
                    "rank 0 and rank {rank} bring different configurations: {} and {}",
                    clipped(&first.config),
                    clipped(&card.config)
                ));
            }
        }
        if let Some(reason) = different_tables(cards) {
            return fail(reason);
        }
        let choose = if config.checked { layout::choose_checked } else { layout::choose };
        let Some(layout) = choose(world, config.mailbox_bytes) else {
            return Err(Error::InvalidArgument {
                op: "connect",
                argument: "mailbox_bytes",
                expected: format!("at least a few hundred KiB for {world} ranks"),
                got: config.mailbox_bytes.to_string(),
            });
        };
        check_staging(config)?;
        sizing::check(config, world)?;
        let max_blocks = max_blocks(cards, config);
        let (islands, hub) = (islands(world, config)?, hub(world, config)?);
        Ok(Agreement {
            shape: Shape {
                islands,
                hub,
                class: link_class(cards),
                ..Shape::new(world, layout, max_blocks)
            },
            extent: Extent::new(layout, world, config.staging()),
            ordinals: cards.iter().map(|card| card.ordinal).collect(),
        })
    }

    /// What rank 0, on `gpu`, finds out for all; nothing on other ranks. `patience` is the others'.
    pub(crate) fn known(
        &self,
        gpu: &GpuRef,
        (rank, patience): (u32, Option<Duration>),
        cards: &[Card],
        config: &Config,
    ) -> Result<Known> {
        if rank != 0 {
            return Ok(Known::default());
        }
        let identity = |card: &Card| (card.uuid.clone(), card.pci_bus_id.clone());
        let gpus: Vec<_> = cards.iter().map(identity).collect();
        let simulated = cards[0].backend == Backend::Sim;
        let class = (simulated, self.shape.class);
        let known = Known::find(config, cards[0].tuning.as_ref(), &gpus, class)?;
        let identity =
            |card: &Card| Identity { pci_bus_id: card.pci_bus_id.clone(), uuid: card.uuid.clone() };
        let gpus = cards.iter().map(identity).collect();
        Ok(Known { verdicts: Consult { config, gpu, gpus, patience }.ask(), ..known })
    }

    /// That no pair of GPUs has failed its self-test which must not use host memory. The same on every rank.
    pub(crate) fn accept_verdicts(&self, known: &Known, config: &Config) -> Result<()> {
        known.verdicts.accept(config.transport, &self.ordinals)
    }

    /// Allocates the memory of a rank on `gpu`.
    pub(crate) fn member(&self, gpu: &GpuRef, config: &Config) -> Result<Arc<Member>> {
        self.numbered(Member::new(gpu, self.extent)?, config)
    }

    /// Lets the counters of a new member begin where the configuration says.
    fn numbered(&self, member: Member, config: &Config) -> Result<Arc<Member>> {
        if config.first_slot != 0 {
            member.number_slots_from(config.first_slot, self.shape.layout)?;
        }
        Ok(Arc::new(member))
    }

    /// Allocates the memory of `rank`, which is a process of its own, and offers it to the others,
    /// unless they are to use host memory.
    pub(crate) fn offer(
        &self,
        gpu: &GpuRef,
        config: &Config,
        segment: &Arc<Segment>,
        rank: u32,
    ) -> Result<(Arc<Member>, Option<Offer>, Option<OwnedFd>)> {
        let make = |exported| -> Result<_> {
            self.numbered(Member::shared(gpu, self.extent, segment, (rank, exported))?, config)
        };
        let export = || {
            let member = make(true)?;
            let (offer, file) = member.offer(self.extent)?;
            Ok((member, Some(offer), file))
        };
        match config.transport {
            Transport::P2p => export(),
            Transport::Host => Ok((make(false)?, None, None)),
            // Memory that cannot be exported is no reason not to work.
            Transport::Auto => export().or_else(|_: Error| Ok((make(false)?, None, None))),
        }
    }

    /// Maps what the other ranks offer, in rank order, into the GPU of `rank`, whose own memory is
    /// `own`. Says with a bit each which ranks it does not reach so.
    pub(crate) fn accept(
        &self,
        gpu: &GpuRef,
        segment: &Arc<Segment>,
        (rank, own): (u32, &Arc<Member>),
        cards: &[Card],
        offers: Vec<(Option<Offer>, Option<OwnedFd>)>,
        transport: Transport,
    ) -> Result<(Vec<Arc<Member>>, u16)> {
        let mut unreached = 0;
        let peers = (0..).zip(cards).zip(offers);
        let members = peers.map(|((peer, card), (offer, file))| {
            if peer == rank {
                return Ok(own.clone());
            }
            let remote = |offer| {
                let at = (peer, card.ordinal_here()?);
                Member::remote(gpu, segment, at, self.extent, (offer, file))
            };
            let member = match (offer.map(remote), transport) {
                (Some(Ok(member)), _) => member,
                (Some(Err(error)), Transport::P2p) => {
                    return Err(explained(error, gpu.backend(), Symptom::NoAccess));
                }
                (Some(Err(error @ Error::InvalidArgument { .. })), _) => return Err(error),
                (Some(Err(_)) | None, _) => {
                    unreached |= 1 << peer;
                    Member::distant(gpu, segment, peer, card.ordinal)
                }
            };
            Ok(Arc::new(member))
        });
        let members = members.collect::<Result<_>>()?;
        Ok((members, unreached))
    }

    /// Maps the other ranks' GPUs into `gpu`, that of `rank`. Says with a bit each which ranks it
    /// does not reach so.
    pub(crate) fn map_peers(&self, gpu: &GpuRef, rank: u32, transport: Transport) -> Result<u16> {
        let from = gpu.properties().ordinal;
        let mut unreached = 0;
        for (peer, &to) in (0..).zip(&self.ordinals).filter(|(peer, _)| *peer != rank) {
            let mapped = match transport {
                Transport::Host => {
                    unreached |= 1 << peer;
                    continue;
                }
                Transport::Auto | Transport::P2p if to == from => Ok(()),
                Transport::Auto | Transport::P2p => map_peer(gpu, to),
            };
            match (mapped, transport) {
                (Err(Error::Unreachable { .. }), Transport::Auto) => unreached |= 1 << peer,
                (Err(error), _) => return Err(explained(error, gpu.backend(), Symptom::NoAccess)),
                (Ok(()), _) => {}
            }
        }
        Ok(unreached)
    }

    /// The host mailbox of `rank` on `gpu`, if a rank of this process needs it.
    pub(crate) fn host_mailbox(
        &self,
        gpu: &GpuRef,
        config: &Config,
        (rank, pairs): (u32, Pairs),
    ) -> Result<Option<Arc<HostMailbox>>> {
        let Shape { world, layout, .. } = self.shape;
        let needed = pairs.senders(rank) != 0;
        let made = needed.then(|| HostMailbox::new(gpu, layout, world, config.first_slot));
        Ok(made.transpose()?.map(Arc::new))
    }
}

fn map_peer(gpu: &GpuRef, to: u32) -> Result<()> {
    if gpu.peer_access(to)?.access {
        return gpu.enable_peer(to);
    }
    let reason = "the driver offers no peer access between them".into();
    Err(Error::Unreachable { from: gpu.properties().ordinal, to, reason })
}

/// That a staging area can be cut into slots, and chunks can be what was asked.
fn check_staging(config: &Config) -> Result<()> {
    let invalid = |argument, expected: String, got: usize| {
        Err(Error::InvalidArgument { op: "connect", argument, expected, got: got.to_string() })
    };
    let staging = config.staging();
    if staging != 0 && staging < LEAST_STAGING_BYTES {
        return invalid("staging_bytes", format!("0 or at least {LEAST_STAGING_BYTES}"), staging);
    }
    match config.chunk_bytes {
        Some(bytes) if bytes == 0 || !bytes.is_multiple_of(UNIT) => {
            invalid("chunk_bytes", format!("a multiple of {UNIT} above 0"), bytes)
        }
        _ => Ok(()),
    }
}

/// The configuration as text. Files are compared by what they hold, not by their names.
fn comparable(config: &Config) -> String {
    let mut config = config.clone();
    if let Tuning::File(path) = &mut config.tuning {
        path.clear();
    }
    format!("{config:?}")
}

/// What two ranks were told that differs, if their files differ.
fn different_tables(cards: &[Card]) -> Option<String> {
    let first = cards[0].tuning.as_ref()?;
    let others = (1..).zip(&cards[1..]);
    let mut others = others.filter_map(|(rank, card)| Some((rank, card.tuning.as_ref()?)));
    let (rank, other) = others.find(|(_, other)| other.hash != first.hash)?;
    Some(format!(
        "rank 0 and rank {rank} bring different configurations: tuning tables {} ({}) and {} ({})",
        clipped(&first.file),
        clipped(&first.hash),
        clipped(&other.file),
        clipped(&other.hash)
    ))
}

/// The GPUs whose memory `gpu` can use, and whether over NVLink: atomics work over NVLink only.
fn peers(gpu: &GpuRef) -> Result<Vec<(String, bool)>> {
    if gpu.backend() == Backend::Sim {
        return Ok(Vec::new());
    }
    let own = gpu.properties().ordinal;
    let mut peers = Vec::new();
    for other in cuda::devices()?.iter().map(|other| other.properties()) {
        if other.ordinal == own {
            continue;
        }
        let link = gpu.peer_access(other.ordinal)?;
        if link.access {
            peers.push((other.uuid.clone(), link.native_atomics));
        }
    }
    Ok(peers)
}

/// The generation of PCIe that GPUs of a compute capability have.
fn pcie_generation(compute_capability: (u32, u32)) -> u8 {
    match compute_capability {
        (..=7, _) => 3,
        (8, _) => 4,
        _ => 5,
    }
}

/// The kind of the slowest link between two ranks. Simulated GPUs stand for ones with NVLink.
fn link_class(cards: &[Card]) -> LinkClass {
    let mut class = LinkClass::NvLink;
    let oldest = cards.iter().map(|card| card.pcie).min().unwrap_or_default();
    for from in cards.iter().filter(|card| card.backend != Backend::Sim) {
        for to in cards.iter().filter(|to| to.uuid != from.uuid) {
            match from.peers.iter().find(|(uuid, _)| *uuid == to.uuid) {
                None => return LinkClass::Host,
                Some((_, false)) => class = LinkClass::Pcie(oldest),
                Some((_, true)) => {}
            }
        }
    }
    class
}

/// Most blocks in a call: ranks that share a GPU wait for each other's blocks, so all must fit.
fn max_blocks(cards: &[Card], config: &Config) -> u32 {
    let shared = |card: &Card| cards.iter().filter(|other| other.uuid == card.uuid).count() as u32;
    let fitting = cards.iter().map(|card| card.resident_blocks / shared(card)).min().unwrap_or(1);
    config.max_blocks.unwrap_or(u32::MAX).min(fitting).max(1)
}

/// Which island each rank belongs to.
fn islands(world: u32, config: &Config) -> Result<[u8; MAX_RANKS]> {
    match &config.islands {
        None => Ok(plan::halves(world)),
        Some(given) if given.len() == world as usize => {
            let mut islands = [0; MAX_RANKS];
            islands[..given.len()].copy_from_slice(given);
            Ok(islands)
        }
        Some(given) => Err(Error::InvalidArgument {
            op: "connect",
            argument: "islands",
            expected: format!("{world} numbers, one a rank"),
            got: given.len().to_string(),
        }),
    }
}

/// The rank that passes broadcasts on.
fn hub(world: u32, config: &Config) -> Result<u32> {
    match config.hub {
        None => Ok(0),
        Some(hub) if hub < world => Ok(hub),
        Some(hub) => Err(Error::InvalidArgument {
            op: "connect",
            argument: "hub",
            expected: format!("a rank from 0 to {}", world - 1),
            got: hub.to_string(),
        }),
    }
}

/// All mailboxes of a group, as one process has them.
#[derive(Clone)]
pub(crate) struct Mailboxes {
    pub(crate) members: Arc<[Arc<Member>]>,
    /// Those in host memory, by rank, as far as a rank of this process uses them.
    pub(crate) hosts: Vec<Option<Arc<HostMailbox>>>,
    pub(crate) pairs: Pairs,
}

impl Mailboxes {
    /// No mailbox in host memory yet.
    pub(crate) fn new(members: Vec<Arc<Member>>, pairs: Pairs) -> Mailboxes {
        let hosts = members.iter().map(|_| None).collect();
        Mailboxes { members: members.into(), hosts, pairs }
    }

    /// Fills in where `args.rank` writes to and what it reads.
    pub(crate) fn address(&self, args: &mut Args) {
        let rank = args.rank;
        let host = |rank: usize| self.hosts[rank].as_ref().map_or(0, |host| host.memory.device.0);
        for (peer, member) in self.members.iter().enumerate() {
            let by_host = self.pairs.by_host(rank, peer as u32);
            args.peers[peer] = if by_host { host(peer) } else { member.mailbox.0 };
        }
        args.host_senders = self.pairs.senders(rank);
        args.host_mailbox = host(rank as usize);
        args.status = self.members[rank as usize].status.device.0;
    }
}

/// What every communicator of a group holds. Dropped in this order.
#[derive(Clone)]
pub(crate) struct Group {
    pub(crate) shape: Shape,
    pub(crate) mailboxes: Mailboxes,
    pub(crate) log: Arc<CallLog>,
    /// Where the ranks meet again.
    pub(crate) assembly: Assembly,
    /// If the ranks are processes: this one's belonging to the group. After the mailboxes, since it
    /// tells the others that this process writes to them no more.
    membership: Option<Arc<Membership>>,
}

impl Group {
    /// A group of ranks of this process.
    pub(crate) fn new(shape: Shape, mailboxes: Mailboxes) -> Group {
        let log = Arc::new(CallLog::new(shape.world));
        let assembly = Assembly::of_threads(shape.world);
        let shape = shape_with(shape, &mailboxes);
        Group { shape, mailboxes, log, assembly, membership: None }
    }

    /// One process's view of a group of processes.
    pub(crate) fn of_processes(
        shape: Shape,
        mailboxes: Mailboxes,
        membership: Membership,
    ) -> Group {
        let log = Arc::new(CallLog::shared(shape.world, membership.segment.clone()));
        let assembly = Assembly::Processes(membership.segment.clone());
        let membership = Some(Arc::new(membership));
        let shape = shape_with(shape, &mailboxes);
        Group { shape, mailboxes, log, assembly, membership }
    }

    /// What carries data from one rank to another.
    pub(crate) fn transport(&self, from: u32, to: u32) -> Transport {
        if self.mailboxes.pairs.by_host(from, to) { Transport::Host } else { Transport::P2p }
    }

    /// What `rank` knows of itself.
    pub(crate) fn member(&self, rank: u32) -> &Member {
        &self.mailboxes.members[rank as usize]
    }

    /// A number that it shares with the other ranks' views of it, and with no other group.
    pub(crate) fn number(&self) -> u64 {
        self.log.number()
    }

    /// What the ranks share if they are processes.
    pub(crate) fn segment(&self) -> Option<&Arc<Segment>> {
        self.membership.as_ref().map(|membership| &membership.segment)
    }

    /// That all ranks let go of the group now: letting go waits, for at most `patience`, until this rank's
    /// memory is freed.
    pub(crate) fn leave_together(&self, patience: Duration) {
        if let Some(membership) = &self.membership {
            membership.leave_together(patience);
        }
    }

    /// What can stop every rank's waits for as long as the group lasts.
    pub(crate) fn aborter(&self) -> Aborter {
        Aborter { members: Arc::new(Mutex::new(Arc::downgrade(&self.mailboxes.members))) }
    }

    /// The ordinal of the GPU that holds `rank`.
    pub(crate) fn ordinal(&self, rank: u32) -> u32 {
        self.member(rank).ordinal
    }
}

/// The shape, now that it is known what carries the data.
fn shape_with(shape: Shape, mailboxes: &Mailboxes) -> Shape {
    let host = mailboxes.pairs.any();
    Shape { host, class: if host { LinkClass::Host } else { shape.class }, ..shape }
}

/// Stops a group's waits, from any thread and while its communicators are in use or being closed.
/// It does not keep the group alive. Clones share what they stop: the group that the communicator has
/// now, which [`Communicator::adapt`](crate::Communicator::adapt) and
/// [`Communicator::shrink`](crate::Communicator::shrink) may replace.
#[derive(Clone)]
pub struct Aborter {
    members: Arc<Mutex<Weak<[Arc<Member>]>>>,
}

impl Default for Aborter {
    /// One that stops nothing.
    fn default() -> Aborter {
        Aborter { members: Arc::new(Mutex::new(Weak::<[Arc<Member>; 0]>::new())) }
    }
}

impl Aborter {
    /// Ends every wait of every rank; their calls return errors from then on, until the ranks recover. Does
    /// nothing once the communicator is closed.
    pub fn abort(&self) {
        self.store(ABORTED);
    }

    /// Test only: ends the waits as the end of the process of `lost` does.
    #[doc(hidden)]
    pub fn lose(&self, lost: u32) {
        self.store(LOST + lost);
    }

    /// Stores why the waits end, for every rank that has no reason yet.
    fn store(&self, reason: u32) {
        // Held until all words are stored: who lets the clones follow another group looks at them after that.
        let members = self.lock();
        for member in members.upgrade().iter().flat_map(|members| members.iter()) {
            let status = member.status.host.cast::<Status>();
            // SAFETY: the page is alive as long as the member, and hosts write this word as an
            // atomic; kernels only read it.
            let abort = unsafe { AtomicU32::from_ptr(&raw mut (*status).abort) };
            // A rank that was lost before is the reason to report.
            let _ = abort.compare_exchange(0, reason, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Waits until whoever is aborting through a clone has stored all words.
    pub(crate) fn settle(&self) {
        drop(self.lock());
    }

    /// From now on stops the waits of `group`, for all clones.
    pub(crate) fn follow(&self, group: &Group) {
        *self.lock() = Arc::downgrade(&group.mailboxes.members);
    }

    fn lock(&self) -> MutexGuard<'_, Weak<[Arc<Member>]>> {
        // Every change is one assignment.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
