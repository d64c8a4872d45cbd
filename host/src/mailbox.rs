//! The memory of a rank's GPU that peers write to, mailbox and staging area: whose it is, how another
//! rank reaches it, when it goes. What lies in host memory is in `host_mailbox.rs`.
//!
//! Invariant: a mailbox belongs to Peerlane and lives until no rank can write to it any more. What
//! another process offers is mapped here, never owned.

use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Exported, GpuRef, HostMemory, MemoryHandle, Stream};
use crate::neighbours::{self, Note, Purpose};
use crate::plan::staging::{AREA_FLAG_BYTES, AREA_FLAGS, FLAG_BYTES, UP_BYTE};
use crate::rendezvous::{ABORTED, PAGE, Segment};
use peerlane_device::abi::{CONTROL_BYTES, FREE, Layout, Status, state};
use serde::{Deserialize, Serialize};
use std::hash::BuildHasher;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, OnceLock};

/// One rank's memory that others write to, and its status page.
pub(crate) struct Member {
    gpu: GpuRef,
    pub(crate) ordinal: u32,
    /// 0 for a rank that this process reaches through host memory.
    pub(crate) mailbox: DevicePtr,
    /// Its staging area for scheduled calls, behind the mailbox in the same memory.
    pub(crate) staging: DevicePtr,
    pub(crate) status: HostMemory,
    holds: Holds,
    /// That ranks of this process may use the mailbox where it is.
    _note: Option<Note>,
    /// Keeps the status page mapped, if it lies in memory that processes share.
    _segment: Option<Arc<Segment>>,
}

/// What a rank's streams tell its host about scheduled calls, in its status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Board {
    /// 1 while a call is under way.
    pub(crate) busy: u32,
    /// The number of the last call that is done, captured ones not counted.
    pub(crate) done: u32,
    /// What each stream waits for; 0 for nothing.
    pub(crate) notes: [u32; 32],
}

impl Board {
    /// Where it lies in a status page: behind what kernels use, before what processes use.
    pub(crate) const OFFSET: usize = 1024;

    /// The note that a stream waits for `peer` in `phase` of turn `turn`.
    pub(crate) const fn note(turn: u32, phase: u32, peer: u32) -> u32 {
        1 << 31 | (turn & 0x3f_ffff) << 8 | phase << 4 | peer
    }

    /// The phase and the peer of the wait that is first in the order of the steps, if any.
    pub(crate) fn waits(&self) -> Option<(u32, u32)> {
        let first = self.notes.iter().filter(|note| **note != 0).min()?;
        Some((first >> 4 & 0xf, first & 0xf))
    }
}

/// What a member gives back in the end.
enum Holds {
    /// Memory of this process alone.
    Private,
    /// As a process of several: other processes may map it, and share the status page.
    Shared,
    /// Another process's memory, mapped into this rank's GPU.
    Imported,
    /// Nothing: the memory of a rank of this process, which gives it back itself, or none.
    Nothing,
}

/// How large the memory of a rank is that others write to, and where its staging area begins.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    layout: Layout,
    mailbox_bytes: usize,
    staging_bytes: usize,
}

impl Extent {
    /// A mailbox for `world` ranks and `staging_bytes` bytes.
    pub(crate) fn new(layout: Layout, world: u32, staging_bytes: usize) -> Extent {
        // Staging areas begin aligned as allocations do.
        let mailbox_bytes = layout.mailbox_bytes(world).next_multiple_of(256);
        Extent { layout, mailbox_bytes, staging_bytes }
    }

    fn bytes(&self) -> usize {
        self.mailbox_bytes + self.staging_bytes
    }
}

impl Member {
    /// Allocates and clears the memory of a rank on `gpu`.
    pub(crate) fn new(gpu: &GpuRef, extent: Extent) -> Result<Member> {
        let mailbox = gpu.alloc(extent.bytes())?;
        let status = gpu.alloc_host(PAGE);
        Member::with(gpu, (mailbox, extent), status, None)?.cleared(extent)
    }

    /// As `new`, for `rank` of a group of processes; `exported` if others shall map the mailbox.
    pub(crate) fn shared(
        gpu: &GpuRef,
        extent: Extent,
        segment: &Arc<Segment>,
        (rank, exported): (u32, bool),
    ) -> Result<Member> {
        let bytes = extent.bytes();
        let mailbox = if exported { gpu.alloc_shared(bytes)? } else { gpu.alloc(bytes)? };
        // SAFETY: the page is whole, and the member keeps it mapped.
        let status = unsafe { gpu.register_host(segment.page(rank), PAGE) };
        let mut member = Member::with(gpu, (mailbox, extent), status, Some(segment.clone()))?;
        let owner = (segment.number(), rank, Purpose::Mailbox);
        member._note = exported.then(|| neighbours::note(owner, mailbox.0, bytes));
        member.cleared(extent)
    }

    /// Holds `mailbox` and `status`, or frees the first if there is no second.
    fn with(
        gpu: &GpuRef,
        (mailbox, extent): (DevicePtr, Extent),
        status: Result<HostMemory>,
        segment: Option<Arc<Segment>>,
    ) -> Result<Member> {
        match status {
            Ok(status) => Ok(Member {
                gpu: gpu.clone(),
                ordinal: gpu.properties().ordinal,
                mailbox,
                staging: mailbox.offset(extent.mailbox_bytes),
                status,
                holds: if segment.is_some() { Holds::Shared } else { Holds::Private },
                _note: None,
                _segment: segment,
            }),
            Err(error) => {
                // SAFETY: allocated by the caller and used by nobody yet.
                unsafe { gpu.free(mailbox)? };
                Err(error)
            }
        }
    }

    fn cleared(self, extent: Extent) -> Result<Member> {
        self.clear(extent)?;
        Ok(self)
    }

    /// Empties the mailbox and takes all flags down. Only while nobody uses this rank's own memory.
    pub(crate) fn clear(&self, extent: Extent) -> Result<()> {
        let words = extent.layout.first_slot as usize;
        let own = OwnStream::new(&self.gpu)?;
        // SAFETY: the ranges lie in the mailbox and in the staging area.
        unsafe {
            self.gpu.fill(self.mailbox, 0, words, own.stream)?;
            let slots = self.mailbox.offset(words);
            self.gpu.fill(slots, FREE as u8, extent.mailbox_bytes - words, own.stream)?;
            if extent.staging_bytes != 0 {
                let areas = self.staging.offset(AREA_FLAGS);
                self.gpu.fill(self.staging, 0, FLAG_BYTES, own.stream)?;
                self.gpu.fill(areas, UP_BYTE, AREA_FLAG_BYTES, own.stream)?;
            }
        }
        self.gpu.stream_synchronize(own.stream)
    }

    /// Whether no call of this rank has recorded that it was cut short.
    pub(crate) fn is_well(&self) -> bool {
        let page = self.status.host.cast::<Status>();
        // SAFETY: the page is alive as long as the member.
        unsafe { (&raw const (*page).state).read_volatile() == state::OK }
    }

    /// Makes the status page say that no call was ever made; the abort word stays. Only while no work of this rank
    /// runs.
    pub(crate) fn clear_status(&self) {
        let page = self.status.host;
        let from = std::mem::offset_of!(Status, state);
        // SAFETY: the page is alive as long as the member, and it ends behind both.
        unsafe {
            page.add(from).write_bytes(0, size_of::<Status>() - from);
            page.add(Board::OFFSET).write_bytes(0, size_of::<Board>());
        }
        fence(Ordering::SeqCst);
    }

    /// Takes the word back with which hosts have stopped this rank's waits, unless a rank is gone.
    pub(crate) fn clear_abort(&self) {
        let status = self.status.host.cast::<Status>();
        // SAFETY: the page is alive as long as the member, and hosts write this word as an atomic.
        let abort = unsafe { AtomicU32::from_ptr(&raw mut (*status).abort) };
        let _ = abort.compare_exchange(ABORTED, 0, Ordering::SeqCst, Ordering::Relaxed);
    }

    /// What a rank on `gpu` knows of `peer` on the GPU `ordinal`, whose mailbox there it does not
    /// reach.
    pub(crate) fn distant(gpu: &GpuRef, segment: &Arc<Segment>, peer: u32, ordinal: u32) -> Member {
        let status = HostMemory { host: segment.page(peer), device: DevicePtr(0), bytes: PAGE };
        let (mailbox, holds) = (DevicePtr(0), Holds::Nothing);
        let _segment = Some(segment.clone());
        let staging = DevicePtr(0);
        let (gpu, _note) = (gpu.clone(), None);
        Member { gpu, ordinal, mailbox, staging, status, holds, _note, _segment }
    }

    /// The memory of `peer` on the GPU `ordinal`, as a rank on `gpu` reaches it.
    pub(crate) fn remote(
        gpu: &GpuRef,
        segment: &Arc<Segment>,
        (peer, ordinal): (u32, u32),
        extent: Extent,
        (offer, file): (Offer, Option<OwnedFd>),
    ) -> Result<Member> {
        offer.check((segment.number(), peer), extent)?;
        let mut member = Member::distant(gpu, segment, peer, ordinal);
        // The driver opens no IPC handle in the process that made it.
        let (mailbox, holds) = if offer.is_neighbour() {
            if ordinal != gpu.properties().ordinal {
                gpu.enable_peer(ordinal)?;
            }
            (DevicePtr(offer.address), Holds::Nothing)
        } else {
            let exported = Exported { handle: offer.handle, file };
            let mapped = gpu.import(exported, offer.bytes, ordinal)?;
            (mapped, Holds::Imported)
        };
        (member.mailbox, member.holds) = (mailbox, holds);
        member.staging = mailbox.offset(extent.mailbox_bytes);
        Ok(member)
    }

    /// Offers the mailbox to the other processes.
    pub(crate) fn offer(&self, extent: Extent) -> Result<(Offer, Option<OwnedFd>)> {
        let Exported { handle, file } = self.gpu.export(self.mailbox)?;
        let (address, process) = (self.mailbox.0, this_process());
        Ok((Offer { handle, bytes: extent.bytes(), address, process }, file))
    }

    /// Lets all counters begin at `first` instead of 0.
    pub(crate) fn number_slots_from(&self, first: u32, layout: Layout) -> Result<()> {
        let words = (layout.words(layout.lanes) - layout.words(0)) as usize;
        let counters: Vec<u8> = first.to_le_bytes().iter().copied().cycle().take(words).collect();
        let own = OwnStream::new(&self.gpu)?;
        // SAFETY: the counters lie in the mailbox, and nobody uses it meanwhile.
        unsafe {
            self.gpu.upload(self.mailbox.offset(layout.words(0) as usize), &counters, own.stream)?
        };
        self.gpu.stream_synchronize(own.stream)
    }

    /// Takes back what a failed probe has left in the control block and in the status page. Only
    /// while no kernel runs.
    pub(crate) fn forget_failures(&self) -> Result<()> {
        let own = OwnStream::new(&self.gpu)?;
        // SAFETY: inside the mailbox.
        unsafe { self.gpu.fill(self.mailbox, 0, CONTROL_BYTES, own.stream)? };
        self.gpu.stream_synchronize(own.stream)?;
        let page = self.status.host.cast::<Status>();
        // SAFETY: the page is alive as long as the member; only this rank's kernels store this word.
        unsafe { (&raw mut (*page).state).write_volatile(state::OK) };
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Failing to free cannot be reported from here, and there is nothing else to do about it.
        // SAFETY: who drops a member has waited for this rank's kernels and, if the memory is its
        // own, for the other ranks to leave. The segment is dropped after this.
        unsafe {
            match &self.holds {
                Holds::Private => {
                    let _ = self.gpu.free(self.mailbox);
                    let _ = self.gpu.free_host(self.status);
                }
                Holds::Shared => {
                    let _ = self.gpu.free(self.mailbox);
                    let _ = self.gpu.unregister_host(self.status);
                }
                Holds::Imported => {
                    let _ = self.gpu.release(self.mailbox);
                }
                Holds::Nothing => {}
            }
        }
    }
}

/// What a rank offers the others: its mailbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    handle: MemoryHandle,
    bytes: usize,
    /// Where the ranks of the same process find it.
    address: u64,
    process: (u32, u64),
}

impl Offer {
    /// Whether it is used where it is: it comes from this process, so it says.
    fn is_neighbour(&self) -> bool {
        self.process == this_process() && self.handle != MemoryHandle::File
    }

    /// That it is the mailbox of rank `peer` of the group `number`: as large as this rank's own, and of this process
    /// only if it is known here.
    pub(crate) fn check(&self, (number, peer): (u64, u32), extent: Extent) -> Result<()> {
        let wrong = |expected: String, got: String| {
            let (op, argument) = ("join", "offer");
            let got = format!("{got} from rank {peer}");
            Err(Error::InvalidArgument { op, argument, expected, got })
        };
        if self.bytes != extent.bytes() {
            let expected = format!("a mailbox of {} bytes", extent.bytes());
            return wrong(expected, format!("{} bytes", self.bytes));
        }
        let owner = (number, peer, Purpose::Mailbox);
        if self.is_neighbour() && !neighbours::offers(owner, self.address, self.bytes) {
            let expected = "the mailbox of a rank of this process".into();
            return wrong(expected, format!("the address {:#x}", self.address));
        }
        Ok(())
    }
}

/// What no two living processes have in common, whatever their namespaces: a process's number and
/// where its memory begins to differ.
pub(crate) fn this_process() -> (u32, u64) {
    static MARK: OnceLock<u64> = OnceLock::new();
    let mark = MARK.get_or_init(|| std::hash::RandomState::new().hash_one(0));
    (std::process::id(), *mark)
}

/// A stream that a group's own work runs on, destroyed when it goes out of scope.
pub(crate) struct OwnStream {
    gpu: GpuRef,
    pub(crate) stream: Stream,
}

impl OwnStream {
    pub(crate) fn new(gpu: &GpuRef) -> Result<OwnStream> {
        Ok(OwnStream { gpu: gpu.clone(), stream: gpu.stream_create()? })
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made in `new` and not used again; queued work still completes.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}

#[cfg(test)]
mod tests {
    use super::{Extent, Offer, this_process};
    use crate::gpu::{GpuRef, MemoryHandle, sim};
    use crate::neighbours::{self, Purpose};
    use crate::{Algorithm, AllReduce, Communicator, Config, DType, Format};
    use peerlane_device::abi::{Layout, lane_words};

    #[test]
    fn an_offer_of_another_size_or_at_a_strange_address_is_refused() {
        let extent = Extent::new(Layout::new(2, 4, 16).unwrap(), 2, 4096);
        let group = u64::MAX - 21;
        let refused = |handle: MemoryHandle, bytes, address, process| {
            let offer = Offer { handle, bytes, address, process };
            offer.check((group, 1), extent).err().map(|error| error.to_string())
        };
        let ipc = || MemoryHandle::Ipc(vec![0; 64]);
        let (right, other) = (extent.bytes(), (1, 2));
        assert_eq!(refused(MemoryHandle::File, right, 0, this_process()), None);
        assert_eq!(refused(ipc(), right, 0x1000, other), None, "to be mapped, not used as it is");
        for bytes in [0, 1, right - 1, right + 1, usize::MAX] {
            let reason = refused(ipc(), bytes, 0x1000, other).unwrap();
            assert!(reason.contains(&format!("got {bytes} bytes from rank 1")), "{reason}");
        }
        let lie = refused(ipc(), right, 0x1000, this_process()).unwrap();
        assert!(lie.contains("the address 0x1000 from rank 1"), "{lie}");
        let _note = neighbours::note((group, 1, Purpose::Mailbox), 0x1000, right);
        assert_eq!(refused(ipc(), right, 0x1000, this_process()), None);
        assert!(refused(ipc(), right, 0x1100, this_process()).is_some());
    }

    #[test]
    fn a_seal_that_nobody_needs_is_renewed_before_it_looks_new() {
        let machine = sim::World::new(&sim::Config { devices: 2, ..Default::default() });
        let gpus: Vec<GpuRef> = machine.devices();
        let config = Config { first_slot: (1 << 29) - 2, ..Config::default() };
        let mut ranks = Communicator::connect(&gpus, &config).unwrap();
        let algorithm = Some(Algorithm::OneShot(Format::Full));
        let tensors: Vec<_> = gpus.iter().map(|gpu| gpu.alloc(64).unwrap()).collect();
        let streams: Vec<_> = gpus.iter().map(|gpu| gpu.stream_create().unwrap()).collect();
        for _ in 0..3 {
            for ((rank, tensor), stream) in ranks.iter_mut().zip(&tensors).zip(&streams) {
                let call = AllReduce { algorithm, ..AllReduce::in_place(*tensor, 4, DType::F32) };
                // SAFETY: the tensor has 64 bytes.
                unsafe { rank.all_reduce(&call, *stream).unwrap() };
            }
        }
        for ((gpu, stream), peer) in gpus.iter().zip(&streams).zip([1, 0]) {
            let group = ranks[1 - peer].group("test").unwrap();
            let at = group.shape.layout.words(0) as usize + lane_words::SEALED + 4 * peer;
            let word = group.mailboxes.members[1 - peer].mailbox.offset(at);
            let mut seal = [0; 4];
            // SAFETY: a word of the mailbox.
            unsafe { gpu.download(&mut seal, word, *stream).unwrap() };
            gpu.stream_synchronize(*stream).unwrap();
            let seal = u32::from_le_bytes(seal);
            assert_eq!(seal, 1 << 29);
        }
    }
}
