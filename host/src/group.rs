//! What the ranks of a group build together before the first call: mailboxes, mappings, one layout.
//!
//! Invariant: mailboxes belong to Peerlane and live until the last communicator of the group lets
//! go, since peers write into them. Nothing here is on the path of a call.

use crate::call_log::CallLog;
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{Backend, DevicePtr, GpuRef, HostMemory, Stream};
use crate::layout;
use crate::plan::Shape;
use peerlane_device::abi::{ABI_VERSION, FREE, Kernel, Layout, MAX_RANKS, MAX_THREADS, Status};
use std::sync::Arc;

/// What a rank shows the others first.
#[derive(Clone, Debug)]
pub(crate) struct Card {
    ordinal: u32,
    backend: Backend,
    /// Blocks of any kernel that its GPU holds at once.
    resident_blocks: u32,
    config: Config,
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
            backend: gpu.backend(),
            resident_blocks,
            config: config.clone(),
            version: ABI_VERSION,
        })
    }
}

/// One rank's memory that others write to, and its status page.
pub(crate) struct Member {
    gpu: GpuRef,
    ordinal: u32,
    pub(crate) mailbox: DevicePtr,
    pub(crate) status: HostMemory,
}

impl Member {
    /// Allocates and clears the memory of a rank on `gpu`.
    fn new(gpu: &GpuRef, layout: Layout, world: u32) -> Result<Member> {
        let bytes = layout.mailbox_bytes(world);
        let mailbox = gpu.alloc(bytes)?;
        let status = match gpu.alloc_host(size_of::<Status>()) {
            Ok(status) => status,
            Err(error) => {
                // SAFETY: allocated above and used by nobody yet.
                unsafe { gpu.free(mailbox)? };
                return Err(error);
            }
        };
        let member =
            Member { gpu: gpu.clone(), ordinal: gpu.properties().ordinal, mailbox, status };
        let words = layout.first_slot as usize;
        let own = OwnStream::new(gpu)?;
        // SAFETY: both ranges lie in the mailbox.
        unsafe {
            gpu.fill(mailbox, 0, words, own.stream)?;
            gpu.fill(mailbox.offset(words), FREE as u8, bytes - words, own.stream)?;
        }
        gpu.stream_synchronize(own.stream)?;
        Ok(member)
    }
}

impl Member {
    /// Lets all counters begin at `first` instead of 0.
    fn number_slots_from(&self, first: u32, layout: Layout) -> Result<()> {
        let words = (layout.words(layout.lanes) - layout.words(0)) as usize;
        let counters: Vec<u8> = first.to_le_bytes().iter().copied().cycle().take(words).collect();
        let own = OwnStream::new(&self.gpu)?;
        // SAFETY: the counters lie in the mailbox, and nobody uses it yet.
        unsafe {
            self.gpu.upload(self.mailbox.offset(layout.words(0) as usize), &counters, own.stream)?
        };
        self.gpu.stream_synchronize(own.stream)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Failing to free cannot be reported from here, and there is nothing else to do about it.
        // SAFETY: the last communicator of the group is gone, so no kernel uses the memory.
        let _ = unsafe { self.gpu.free(self.mailbox) };
        // SAFETY: as above.
        let _ = unsafe { self.gpu.free_host(self.status) };
    }
}

/// What all ranks' cards add up to.
pub(crate) struct Agreement {
    pub(crate) shape: Shape,
    ordinals: Vec<u32>,
}

impl Agreement {
    /// Compares the cards, in rank order, and derives what they decide. The same on every rank.
    pub(crate) fn of(cards: &[Card]) -> Result<Agreement> {
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
                    "rank 0 and rank {rank} bring different configurations: {:?} and {:?}",
                    first.config, card.config
                ));
            }
        }
        let config = &cards[0].config;
        let Some(layout) = layout::choose(world, config.mailbox_bytes) else {
            return Err(Error::InvalidArgument {
                op: "connect",
                argument: "mailbox_bytes",
                expected: format!("at least a few hundred KiB for {world} ranks"),
                got: config.mailbox_bytes.to_string(),
            });
        };
        Ok(Agreement {
            shape: Shape { world, layout, max_blocks: max_blocks(cards, config) },
            ordinals: cards.iter().map(|card| card.ordinal).collect(),
        })
    }

    /// Allocates the memory of a rank on `gpu`.
    pub(crate) fn member(&self, gpu: &GpuRef, config: &Config) -> Result<Arc<Member>> {
        let member = Member::new(gpu, self.shape.layout, self.shape.world)?;
        if config.first_slot != 0 {
            member.number_slots_from(config.first_slot, self.shape.layout)?;
        }
        Ok(Arc::new(member))
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

/// Most blocks in a call: ranks that share a GPU wait for each other's blocks, so all must fit.
fn max_blocks(cards: &[Card], config: &Config) -> u32 {
    let shared =
        |card: &Card| cards.iter().filter(|other| other.ordinal == card.ordinal).count() as u32;
    let fitting = cards.iter().map(|card| card.resident_blocks / shared(card)).min().unwrap_or(1);
    config.max_blocks.unwrap_or(u32::MAX).min(fitting).max(1)
}

/// What every communicator of a group holds.
#[derive(Clone)]
pub(crate) struct Group {
    pub(crate) shape: Shape,
    pub(crate) members: Arc<[Arc<Member>]>,
    pub(crate) log: Arc<CallLog>,
}

impl Group {
    pub(crate) fn new(shape: Shape, members: Vec<Arc<Member>>) -> Group {
        Group { shape, members: members.into(), log: Arc::new(CallLog::new(shape.world)) }
    }

    /// Stops every rank's waits.
    pub(crate) fn abort(&self) {
        for member in self.members.iter() {
            let status = member.status.host.cast::<Status>();
            // SAFETY: the page is alive as long as the member; only hosts write this word, all
            // of them the same value, and kernels only read it.
            unsafe { (&raw mut (*status).abort).write_volatile(1) };
        }
    }

    /// The ordinal of the GPU that holds `rank`.
    pub(crate) fn ordinal(&self, rank: u32) -> u32 {
        self.members[rank as usize].ordinal
    }
}

/// A stream that a group's own work runs on, destroyed when it goes out of scope.
pub(crate) struct OwnStream<'a> {
    gpu: &'a GpuRef,
    pub(crate) stream: Stream,
}

impl<'a> OwnStream<'a> {
    pub(crate) fn new(gpu: &'a GpuRef) -> Result<OwnStream<'a>> {
        Ok(OwnStream { gpu, stream: gpu.stream_create()? })
    }
}

impl Drop for OwnStream<'_> {
    fn drop(&mut self) {
        // SAFETY: made in `new` and not used again; queued work still completes.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}
