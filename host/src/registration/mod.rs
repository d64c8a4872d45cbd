//! Tensors that all ranks of a group reach, so that calls on them need no mailbox (docs/registration.md).
//!
//! Invariant: what a rank gets wrong it brings to the round, so all ranks return, and all return an error if one
//! does. Kernels touch only tensors whose registration is in use on this rank; a mapping goes once
//! this rank's GPU is done with everything queued.

mod cache;
mod cards;

use crate::collectives::invalid;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Exported, GpuRef, MemoryHandle};
use crate::mailbox::this_process;
use crate::neighbours::{self, Owner, Purpose};
use crate::rendezvous::{Table, Topic};
pub use cache::RegistrationStatistics;
pub(crate) use cache::Registrations;
use cache::{Key, Mapping};
#[cfg(any(fuzzing, test))]
pub(crate) use cards::check_cards;
use cards::{Card, Cards, Offer, Task, agree, reason, settled};
use peerlane_device::abi::{MAX_RANKS, UNIT};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// A tensor of each rank that all ranks reach.
///
/// It is in use until [`Communicator::deregister`] or the communicator's end. Dropping it tells nobody: the
/// tensors stay mapped, and must stay alive, until then.
#[derive(Clone)]
pub struct Registration {
    entry: Arc<Entry>,
}

/// What a registration is on one rank.
pub(crate) struct Entry {
    /// The communicator, among all of this process.
    owner: u64,
    /// The assembly that made it: the same on all ranks.
    number: u64,
    bytes: usize,
    own: DevicePtr,
    /// Every rank's tensor, as this rank reaches it.
    addresses: [u64; MAX_RANKS],
    /// What keeps them there; `None` once it is not in use.
    mappings: Mutex<Option<Vec<Arc<Mapping>>>>,
}

impl Entry {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<Arc<Mapping>>>> {
        self.mappings.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Registration {
    /// This rank's tensor.
    pub fn tensor(&self) -> DevicePtr {
        self.entry.own
    }

    /// Bytes of each rank's tensor.
    pub fn bytes(&self) -> usize {
        self.entry.bytes
    }

    /// Its number, the same on all ranks.
    pub(crate) fn number(&self) -> u64 {
        self.entry.number
    }

    /// Where this rank reaches the bytes from `offset` on of every rank's tensor.
    pub(crate) fn table(&self, world: u32, offset: usize) -> [u64; MAX_RANKS] {
        let mut table = self.entry.addresses;
        table[..world as usize].iter_mut().for_each(|address| *address += offset as u64);
        table
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Entry { number, bytes, own, .. } = &*self.entry;
        write!(f, "Registration {number} of {bytes} bytes at {:#x}", own.0)
    }
}

impl Communicator {
    /// Lets every rank reach `bytes` bytes at `tensor` of every other: the same size on every rank, at a multiple of
    /// 16. Collective: every rank calls it from a thread or a process of its own and waits for the others, but no
    /// longer than the deadline. All ranks succeed, or none does.
    ///
    /// # Safety
    /// The memory stays allocated until all ranks have deregistered it or closed their communicators, and as
    /// long as a graph exists in which a call on it was captured.
    pub unsafe fn register(&mut self, tensor: DevicePtr, bytes: usize) -> Result<Registration> {
        const OP: &str = "register";
        self.registers(OP)?;
        // What ails one rank ails all, so nobody is left waiting.
        self.health()?;
        let (number, mut table) = self.sit(OP)?;
        let among_processes = matches!(table, Table::Processes { .. });
        let (outcome, file) = match self.offer(tensor, bytes, among_processes) {
            Ok((offer, file)) => (Ok(offer), file),
            Err(error) => (Err(error), None),
        };
        // Until all have mapped it.
        let owner = self.owner_of_tensor(number, self.rank())?;
        let _note = owner.map(|owner| neighbours::note(owner, tensor.0, bytes));
        let card = Card::new(self.rank(), Task::Register(bytes), outcome.clone().map(Some));
        let cards = table.exchange(card, file)?;
        // This rank's own mistake in its own words.
        outcome?;
        agree(OP, &cards)?;
        let mapped = self.map(number, (tensor, bytes), cards);
        let verdict = mapped.as_ref().map(drop).map_err(|error| reason(self.rank(), error));
        let verdicts = table.exchange(verdict, None);
        let all = verdicts.and_then(|all| settled(OP, all.into_iter().map(|(verdict, _)| verdict)));
        match (mapped, all) {
            (Ok(registration), Ok(())) => Ok(registration),
            (Ok(registration), Err(error)) => {
                self.let_go(&registration);
                Err(error)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Ends the use of a registration, after everything queued on this rank's GPU. Collective, as
    /// [`Communicator::register`] is. Once it has returned no rank maps the memory any more, and it may be freed.
    pub fn deregister(&mut self, registration: &Registration) -> Result<()> {
        const OP: &str = "deregister";
        self.group(OP)?;
        self.uses(OP, registration)?;
        let (_, mut table) = self.sit(OP)?;
        let drained = self.gpu().synchronize();
        let task = Task::Deregister(registration.number());
        let card = Card::new(self.rank(), task, drained.map(|()| None));
        let cards = table.exchange(card, None)?;
        agree(OP, &cards)?;
        self.let_go(registration);
        table.exchange((), None).map(drop)
    }

    /// [`Communicator::register`] for one thread that drives all ranks of a group, in rank order: each rank's
    /// tensor and its bytes.
    ///
    /// # Safety
    /// As for [`Communicator::register`].
    pub unsafe fn register_all(
        ranks: &mut [&mut Communicator],
        tensors: &[(DevicePtr, usize)],
    ) -> Result<Vec<Registration>> {
        const OP: &str = "register_all";
        one_each(OP, ranks, tensors.len())?;
        ranks.iter().try_for_each(|rank| rank.registers(OP).and_then(|()| rank.health()))?;
        let mut cards: Cards = Vec::new();
        for (rank, (tensor, bytes)) in ranks.iter().zip(tensors) {
            let (offer, file) = rank.offer(*tensor, *bytes, false)?;
            let task = Task::Register(*bytes);
            cards.push((Card { task, outcome: Ok(Some(offer)) }, file));
        }
        agree(OP, &cards)?;
        let number = next_number(ranks);
        let cards: Vec<Card> = cards.into_iter().map(|(card, _)| card).collect();
        let pairs = ranks.iter_mut().zip(tensors);
        let all = pairs.map(|(rank, tensor)| {
            rank.map(number, *tensor, cards.iter().map(|card| (card.clone(), None)).collect())
        });
        all.collect()
    }

    /// [`Communicator::deregister`] for one thread that drives all ranks of a group, in rank order.
    pub fn deregister_all(
        ranks: &mut [&mut Communicator],
        registrations: &[Registration],
    ) -> Result<()> {
        const OP: &str = "deregister_all";
        one_each(OP, ranks, registrations.len())?;
        let pairs = || ranks.iter().zip(registrations);
        pairs().try_for_each(|(rank, registration)| rank.uses(OP, registration))?;
        let tasks = registrations.iter().map(|one| Task::Deregister(one.number()));
        agree(OP, &tasks.map(|task| (Card { task, outcome: Ok(None) }, None)).collect())?;
        // Any rank's kernels may touch any rank's tensor.
        ranks.iter().try_for_each(|rank| rank.gpu().synchronize())?;
        next_number(ranks);
        ranks.iter_mut().zip(registrations).for_each(|(rank, one)| rank.let_go(one));
        Ok(())
    }

    /// How many mappings of other processes' memory this rank keeps for registrations to come, above those in
    /// use: the one that was used last longest ago goes first. 64 unless said otherwise. Ranks may differ.
    pub fn set_registration_limit(&mut self, mappings: usize) -> Result<()> {
        let surplus = self.registrations().set_limit(mappings);
        self.unmap(surplus)
    }

    /// What this rank's registrations have mapped.
    pub fn registration_statistics(&self) -> RegistrationStatistics {
        self.registrations_ref().statistics()
    }

    /// That `registration` is in use on this communicator.
    pub(crate) fn uses(&self, op: &'static str, registration: &Registration) -> Result<()> {
        let entry = &registration.entry;
        if entry.owner != self.registrations_ref().owner() {
            let expected = format!("one of this communicator, which is rank {}", self.rank());
            return Err(invalid(op, "registration", expected, "one of another"));
        }
        if entry.lock().is_none() {
            let got = format!("number {}, which has been deregistered", entry.number);
            return Err(invalid(op, "registration", "one that is in use".into(), got));
        }
        Ok(())
    }

    /// That the ranks can reach each other's tensors at all: the same answer on all of them.
    fn registers(&self, op: &'static str) -> Result<()> {
        if !self.group(op)?.shape.host {
            return Ok(());
        }
        let reason = "some ranks reach each other through host memory only, so none reaches another's tensors there";
        Err(Error::Unsupported { op, reason: reason.into() })
    }

    /// Takes this rank's place in its next assembly.
    fn sit(&mut self, op: &'static str) -> Result<(u64, Table)> {
        let number = self.registrations().next_number();
        let (rank, patience) = (self.rank(), self.config().deadline);
        let topic = Topic::Registration(number);
        Ok((number, self.group(op)?.assembly.sit(rank, topic, patience)?))
    }

    /// How others reach the tensor.
    fn offer(
        &self,
        tensor: DevicePtr,
        bytes: usize,
        among_processes: bool,
    ) -> Result<(Offer, Option<OwnedFd>)> {
        const OP: &str = "register";
        if bytes == 0 {
            return Err(invalid(OP, "bytes", "at least 1".into(), 0));
        }
        if tensor.0 == 0 || !tensor.0.is_multiple_of(UNIT as u64) {
            let expected = format!("a device address that is a multiple of {UNIT}");
            return Err(invalid(OP, "tensor", expected, format!("{:#x}", tensor.0)));
        }
        let own = self.gpu().properties().ordinal;
        if self.gpu().owner_of(tensor) != Some(own) {
            let expected = format!("memory of GPU {own}, where rank {} is", self.rank());
            return Err(invalid(OP, "tensor", expected, format!("{:#x}", tensor.0)));
        }
        let at = self.gpu().allocation(tensor)?;
        let offset = tensor.0 - at.base.0;
        if (at.bytes as u64 - offset) < bytes as u64 {
            let expected = format!("at most {}, where its memory ends", at.bytes as u64 - offset);
            return Err(invalid(OP, "bytes", expected, bytes));
        }
        let cannot = |why: String| Error::Unsupported { op: OP, reason: why };
        let (handle, file) = if among_processes {
            let Exported { handle, file } = self.gpu().export_any(at.base).map_err(|error| {
                cannot(format!("the memory cannot be shared with other processes: {error}"))
            })?;
            (Some(handle), file)
        } else if at.peers_reach {
            (None, None)
        } else {
            let why = "the memory comes from a pool or is mapped from parts, so other GPUs do not reach it; allocate it with cuMemAlloc or cudaMalloc";
            return Err(cannot(why.into()));
        };
        let (base, process) = (at.base.0, this_process());
        let (bytes, id, peers_reach) = (at.bytes, at.id, at.peers_reach);
        Ok((Offer { base, bytes, id, offset, handle, process, peers_reach }, file))
    }

    /// Whose the tensor of `rank` is to this process's other ranks; none if all ranks are threads of one.
    fn owner_of_tensor(&self, number: u64, rank: u32) -> Result<Option<Owner>> {
        let segment = self.group("register")?.segment();
        Ok(segment.map(|segment| (segment.number(), rank, Purpose::Tensor(number))))
    }

    /// Maps what the ranks offer.
    fn map(
        &mut self,
        number: u64,
        (own, bytes): (DevicePtr, usize),
        cards: Cards,
    ) -> Result<Registration> {
        const OP: &str = "register";
        let (me, gpu) = (self.rank(), self.gpu().clone());
        let mut addresses = [0; MAX_RANKS];
        let mut mappings = Vec::new();
        for ((rank, address), (card, file)) in (0..).zip(&mut addresses).zip(cards) {
            let Ok(Some(offer)) = card.outcome else {
                return Err(invalid(
                    OP,
                    "offer",
                    "a tensor".into(),
                    format!("none from rank {rank}"),
                ));
            };
            offer.check(OP, rank, bytes)?;
            let is_neighbour = offer.process == this_process();
            *address = if rank == me {
                own.0
            } else if offer.handle.is_none() || is_neighbour && offer.peers_reach && file.is_none()
            {
                let place = offer.base + offer.offset;
                let stranger = |owner: &Owner| !neighbours::offers(*owner, place, bytes);
                if self.owner_of_tensor(number, rank)?.as_ref().is_some_and(stranger) {
                    let expected = "the tensor of a rank of this process".into();
                    let got = format!("the address {place:#x} from rank {rank}");
                    return Err(invalid(OP, "offer", expected, got));
                }
                let owner = self.group(OP)?.ordinal(rank);
                if owner != gpu.properties().ordinal {
                    // Where mailboxes were mapped one by one, this comes first here.
                    gpu.enable_peer(owner)?;
                }
                place
            } else {
                let owner = self.group(OP)?.ordinal(rank);
                let key = Key { rank, base: offer.base, bytes: offer.bytes, id: offer.id };
                let mapping = match self.registrations().find(key) {
                    Some(mapping) => mapping,
                    None => import(&gpu, owner, key, (offer.handle.clone(), file))?,
                };
                let base = mapping.at.0;
                mappings.push(mapping);
                base + offer.offset
            };
        }
        let owner = self.registrations_ref().owner();
        let kept = Mutex::new(Some(mappings.clone()));
        let entry = Arc::new(Entry { owner, number, bytes, own, addresses, mappings: kept });
        let surplus = self.registrations().keep(&entry, mappings);
        self.unmap(surplus)?;
        Ok(Registration { entry })
    }

    /// Lets go of a registration's mappings that no other registration uses. The caller has waited for this
    /// rank's GPU.
    fn let_go(&mut self, registration: &Registration) {
        let mappings = registration.entry.lock().take().unwrap_or_default();
        self.registrations().forget(mappings);
    }

    /// Lets go of mappings that kernels may still use.
    fn unmap(&mut self, surplus: Vec<Arc<Mapping>>) -> Result<()> {
        if surplus.is_empty() { Ok(()) } else { self.gpu().synchronize() }
    }
}

/// The number of an assembly that one thread holds for all ranks: one that none of them has used.
fn next_number(ranks: &mut [&mut Communicator]) -> u64 {
    let number = ranks.iter_mut().map(|rank| rank.registrations().next_number()).max();
    let number = number.unwrap_or_default();
    ranks.iter_mut().for_each(|rank| rank.registrations().skip_to(number));
    number
}

/// Maps another process's allocation.
fn import(
    gpu: &GpuRef,
    owner: u32,
    key: Key,
    (handle, file): (Option<MemoryHandle>, Option<OwnedFd>),
) -> Result<Arc<Mapping>> {
    let exported = Exported { handle: handle.unwrap_or(MemoryHandle::File), file };
    let at = gpu.import(exported, key.bytes, owner)?;
    Ok(Arc::new(Mapping { gpu: gpu.clone(), key, at }))
}

/// That `ranks` are all ranks of one group, and as many as there are tensors.
fn one_each(op: &'static str, ranks: &[&mut Communicator], tensors: usize) -> Result<()> {
    let world = Communicator::whole_group(op, ranks)?.world_size() as usize;
    if tensors != world {
        return Err(invalid(op, "tensors", format!("{world}, one a rank"), tensors));
    }
    Ok(())
}
