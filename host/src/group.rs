//! What the ranks of a group build together before the first call: mailboxes, mappings, one layout.
//!
//! Invariant: what cards decide is the same on every rank. Nothing here is on the path of a call.

use crate::call_log::CallLog;
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef, cuda};
use crate::layout;
use crate::mailbox::{Extent, Member, Offer};
use crate::plan::steps::LEAST_STAGING_BYTES;
use crate::plan::{self, Shape};
use crate::rendezvous::{ABORTED, Membership, Segment};
use peerlane_device::abi::{ABI_VERSION, Kernel, MAX_RANKS, MAX_THREADS, Status, UNIT};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

/// What a rank shows the others first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Card {
    ordinal: u32,
    uuid: String,
    backend: Backend,
    /// Blocks of any kernel that its GPU holds at once.
    resident_blocks: u32,
    /// The configuration, as text: it is only compared.
    config: String,
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
        Ok(Card {
            ordinal: gpu.properties().ordinal,
            uuid: gpu.properties().uuid.clone(),
            backend: gpu.backend(),
            resident_blocks,
            config: format!("{config:?}"),
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
                self.uuid
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
                    first.config, card.config
                ));
            }
        }
        let Some(layout) = layout::choose(world, config.mailbox_bytes) else {
            return Err(Error::InvalidArgument {
                op: "connect",
                argument: "mailbox_bytes",
                expected: format!("at least a few hundred KiB for {world} ranks"),
                got: config.mailbox_bytes.to_string(),
            });
        };
        check_staging(config)?;
        let max_blocks = max_blocks(cards, config);
        let (islands, hub) = (islands(world, config)?, hub(world, config)?);
        Ok(Agreement {
            shape: Shape { world, layout, max_blocks, islands, hub },
            extent: Extent::new(layout, world, config.staging()),
            ordinals: cards.iter().map(|card| card.ordinal).collect(),
        })
    }

    /// Allocates the memory of a rank on `gpu`.
    pub(crate) fn member(&self, gpu: &GpuRef, config: &Config) -> Result<Arc<Member>> {
        let member = Member::new(gpu, self.extent)?;
        if config.first_slot != 0 {
            member.number_slots_from(config.first_slot, self.shape.layout)?;
        }
        Ok(Arc::new(member))
    }

    /// Allocates the memory of `rank`, which is a process of its own, and offers it to the others.
    pub(crate) fn offer(
        &self,
        gpu: &GpuRef,
        config: &Config,
        segment: &Arc<Segment>,
        rank: u32,
    ) -> Result<(Arc<Member>, Offer, Option<OwnedFd>)> {
        let member = Member::shared(gpu, self.extent, segment, rank)?;
        if config.first_slot != 0 {
            member.number_slots_from(config.first_slot, self.shape.layout)?;
        }
        let (offer, file) = member.offer(self.extent)?;
        Ok((Arc::new(member), offer, file))
    }

    /// Maps what the other ranks offer, in rank order, into the GPU of `rank`, whose own memory is
    /// `own`.
    pub(crate) fn accept(
        &self,
        gpu: &GpuRef,
        segment: &Arc<Segment>,
        (rank, own): (u32, &Arc<Member>),
        cards: &[Card],
        offers: Vec<(Offer, Option<OwnedFd>)>,
    ) -> Result<Vec<Arc<Member>>> {
        let peers = (0..).zip(cards).zip(offers);
        let members = peers.map(|((peer, card), (offer, file))| {
            if peer == rank {
                return Ok(own.clone());
            }
            let ordinal = card.ordinal_here()?;
            let at = (peer, ordinal);
            Member::remote(gpu, segment, at, self.extent, (offer, file)).map(Arc::new)
        });
        members.collect()
    }

    /// Maps every other rank's GPU into `gpu`, or says which one it cannot reach.
    pub(crate) fn map_peers(&self, gpu: &GpuRef) -> Result<()> {
        let from = gpu.properties().ordinal;
        for &to in &self.ordinals {
            if to == from {
                continue;
            }
            if !gpu.peer_access(to)?.access {
                let reason = "the driver offers no peer access between them".into();
                return Err(Error::Unreachable { from, to, reason });
            }
            gpu.enable_peer(to)?;
        }
        Ok(())
    }
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

/// What every communicator of a group holds. Dropped in this order.
#[derive(Clone)]
pub(crate) struct Group {
    pub(crate) shape: Shape,
    pub(crate) members: Arc<[Arc<Member>]>,
    pub(crate) log: Arc<CallLog>,
    /// If the ranks are processes: this one's belonging to the group. After the members, since it
    /// tells the others that this process writes to them no more.
    membership: Option<Arc<Membership>>,
}

impl Group {
    /// A group of ranks of this process.
    pub(crate) fn new(shape: Shape, members: Vec<Arc<Member>>) -> Group {
        let log = Arc::new(CallLog::new(shape.world));
        Group { shape, members: members.into(), log, membership: None }
    }

    /// One process's view of a group of processes.
    pub(crate) fn of_processes(
        shape: Shape,
        members: Vec<Arc<Member>>,
        membership: Membership,
    ) -> Group {
        let log = Arc::new(CallLog::shared(shape.world, membership.segment.clone()));
        Group { shape, members: members.into(), log, membership: Some(Arc::new(membership)) }
    }

    /// What the ranks share if they are processes.
    pub(crate) fn segment(&self) -> Option<&Arc<Segment>> {
        self.membership.as_ref().map(|membership| &membership.segment)
    }

    /// What can stop every rank's waits for as long as the group lasts.
    pub(crate) fn aborter(&self) -> Aborter {
        Aborter { members: Arc::downgrade(&self.members) }
    }

    /// The ordinal of the GPU that holds `rank`.
    pub(crate) fn ordinal(&self, rank: u32) -> u32 {
        self.members[rank as usize].ordinal
    }
}

/// Stops a group's waits, from any thread and while its communicators are in use or being closed.
/// It does not keep the group alive.
#[derive(Clone)]
pub struct Aborter {
    members: Weak<[Arc<Member>]>,
}

impl Default for Aborter {
    /// One that stops nothing.
    fn default() -> Aborter {
        Aborter { members: Weak::<[Arc<Member>; 0]>::new() }
    }
}

impl Aborter {
    /// Ends every wait of every rank; their calls return errors from then on. Does nothing once
    /// the communicator is closed.
    pub fn abort(&self) {
        for member in self.members.upgrade().iter().flat_map(|members| members.iter()) {
            let status = member.status.host.cast::<Status>();
            // SAFETY: the page is alive as long as the member, and hosts write this word as an
            // atomic; kernels only read it.
            let abort = unsafe { AtomicU32::from_ptr(&raw mut (*status).abort) };
            // A rank that was lost before is the reason to report.
            let _ = abort.compare_exchange(0, ABORTED, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}
