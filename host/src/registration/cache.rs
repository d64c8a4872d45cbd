//! Other processes' allocations that this rank has mapped.
//!
//! Invariant: one entry for each allocation, however many tensors in it are registered. What no registration in
//! use needs stays for the next one, up to a limit; what one needs stays in any case. An allocation is told
//! by its number, so memory that was freed and made again at the same address is another.

use super::Entry;
use crate::gpu::{DevicePtr, GpuRef};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Mappings that are kept for registrations to come.
const LIMIT: usize = 64;

/// Which allocation of which rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) rank: u32,
    pub(super) base: u64,
    pub(super) bytes: usize,
    pub(super) id: u64,
}

/// An allocation of another process, mapped here as long as this lives.
pub(super) struct Mapping {
    pub(super) gpu: GpuRef,
    pub(super) key: Key,
    /// Its first byte, as this rank's GPU reaches it.
    pub(super) at: DevicePtr,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Failing to unmap cannot be reported from here, and there is nothing else to do about it.
        // SAFETY: who lets the last one go has waited for this rank's GPU.
        let _ = unsafe { self.gpu.release(self.at) };
    }
}

/// What a rank's registrations have mapped of other processes' memory. Ranks of one process map nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationStatistics {
    /// Registrations in use.
    pub registrations: usize,
    /// Allocations that are mapped.
    pub entries: usize,
    /// Bytes of these.
    pub mapped_bytes: usize,
    /// Times that an allocation was mapped already.
    pub hits: u64,
    /// Times that one had to be mapped.
    pub misses: u64,
}

/// One rank's registrations.
pub(crate) struct Registrations {
    /// This table among all of the process.
    owner: u64,
    /// The next assembly's number.
    next: u64,
    limit: usize,
    /// The one that was used last longest ago first.
    mappings: Vec<Arc<Mapping>>,
    /// Those that may be in use.
    entries: Vec<Weak<Entry>>,
    hits: u64,
    misses: u64,
}

impl Default for Registrations {
    fn default() -> Registrations {
        static OWNERS: AtomicU64 = AtomicU64::new(0);
        Registrations {
            owner: OWNERS.fetch_add(1, Ordering::Relaxed),
            next: 0,
            limit: LIMIT,
            mappings: Vec::new(),
            entries: Vec::new(),
            hits: 0,
            misses: 0,
        }
    }
}

impl Registrations {
    pub(super) fn owner(&self) -> u64 {
        self.owner
    }

    /// The number of this rank's next assembly.
    pub(super) fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The number of the last assembly.
    pub(crate) fn last_number(&self) -> u64 {
        self.next
    }

    /// Makes `number` the one that was used last.
    pub(crate) fn skip_to(&mut self, number: u64) {
        self.next = number;
    }

    /// The mapping of an allocation, if there is one.
    pub(super) fn find(&mut self, key: Key) -> Option<Arc<Mapping>> {
        let found = self.mappings.iter().position(|mapping| mapping.key == key);
        match found {
            Some(at) => {
                self.hits += 1;
                let used = self.mappings.remove(at);
                self.mappings.push(used.clone());
                Some(used)
            }
            None => {
                self.misses += 1;
                None
            }
        }
    }

    /// Notes a registration and its mappings. Returns those beyond the limit, to be dropped when no kernel
    /// uses them.
    #[must_use]
    pub(super) fn keep(
        &mut self,
        entry: &Arc<Entry>,
        mappings: Vec<Arc<Mapping>>,
    ) -> Vec<Arc<Mapping>> {
        self.entries.retain(|entry| entry.upgrade().is_some_and(|entry| entry.lock().is_some()));
        self.entries.push(Arc::downgrade(entry));
        for mapping in mappings {
            if !self.mappings.iter().any(|known| known.key == mapping.key) {
                self.mappings.push(mapping);
            }
        }
        self.surplus()
    }

    /// As [`Registrations::keep`], with another limit.
    #[must_use]
    pub(super) fn set_limit(&mut self, limit: usize) -> Vec<Arc<Mapping>> {
        self.limit = limit;
        self.surplus()
    }

    fn surplus(&mut self) -> Vec<Arc<Mapping>> {
        let mut surplus = Vec::new();
        let is_idle = |mapping: &Arc<Mapping>| Arc::strong_count(mapping) == 1;
        let mut idle = self.mappings.iter().filter(|mapping| is_idle(mapping)).count();
        let mut at = 0;
        while idle > self.limit {
            if is_idle(&self.mappings[at]) {
                surplus.push(self.mappings.remove(at));
                idle -= 1;
            } else {
                at += 1;
            }
        }
        surplus
    }

    /// Unmaps those of `mappings` that nobody else uses. Only while no kernel does.
    pub(super) fn forget(&mut self, mappings: Vec<Arc<Mapping>>) {
        let keys: Vec<Key> = mappings.iter().map(|mapping| mapping.key).collect();
        drop(mappings);
        self.mappings
            .retain(|mapping| !keys.contains(&mapping.key) || Arc::strong_count(mapping) > 1);
    }

    /// Ends the use of all registrations and unmaps everything. Only while no kernel uses any of it.
    pub(crate) fn clear(&mut self) {
        for entry in self.entries.drain(..).filter_map(|entry| entry.upgrade()) {
            entry.lock().take();
        }
        self.mappings.clear();
    }

    pub(super) fn statistics(&self) -> RegistrationStatistics {
        let in_use =
            |entry: &&Weak<Entry>| entry.upgrade().is_some_and(|entry| entry.lock().is_some());
        RegistrationStatistics {
            registrations: self.entries.iter().filter(in_use).count(),
            entries: self.mappings.len(),
            mapped_bytes: self.mappings.iter().map(|mapping| mapping.key.bytes).sum(),
            hits: self.hits,
            misses: self.misses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::sim;
    use peerlane_device::abi::MAX_RANKS;
    use std::sync::Mutex;

    /// A GPU of another process's machine, and memory of that process.
    fn mapping(gpu: &GpuRef, id: u64) -> Arc<Mapping> {
        let config = sim::Config { devices: 2, ..Default::default() };
        let owner = sim::devices(&config)[0].clone();
        let base = owner.alloc_shared(4096).unwrap();
        let at = gpu.import(owner.export(base).unwrap(), 4096, 0).unwrap();
        let key = Key { rank: 0, base: base.0, bytes: 4096, id };
        Arc::new(Mapping { gpu: gpu.clone(), key, at })
    }

    fn entry(owner: u64, mappings: &[Arc<Mapping>]) -> Arc<Entry> {
        let kept = Mutex::new(Some(mappings.to_vec()));
        let (addresses, own) = ([0; MAX_RANKS], DevicePtr(0));
        Arc::new(Entry { owner, number: 1, bytes: 4096, own, addresses, mappings: kept })
    }

    fn gpu() -> GpuRef {
        sim::devices(&sim::Config { devices: 2, ..Default::default() })[1].clone()
    }

    #[test]
    fn idle_mappings_go_beyond_the_limit_the_longest_unused_first() {
        let (gpu, mut table) = (gpu(), Registrations::default());
        let keys: Vec<Key> = (0..3)
            .map(|id| {
                let mapping = mapping(&gpu, id);
                let key = mapping.key;
                let entry = entry(table.owner(), std::slice::from_ref(&mapping));
                assert!(table.find(key).is_none());
                // The entry, and so the registration, ends here: the mapping is idle.
                assert!(table.keep(&entry, vec![mapping]).is_empty());
                key
            })
            .collect();
        assert_eq!(table.statistics().entries, 3);
        assert!(table.find(keys[0]).is_some());
        let gone: Vec<u64> = table.set_limit(1).iter().map(|mapping| mapping.key.id).collect();
        assert_eq!(gone, [1, 2]);
        let reused = Key { id: 9, ..keys[0] };
        assert!(table.find(reused).is_none() && table.find(keys[0]).is_some());
        let RegistrationStatistics { registrations, entries, mapped_bytes, hits, misses } =
            table.statistics();
        assert_eq!((registrations, entries, mapped_bytes, hits, misses), (0, 1, 4096, 2, 4));
    }

    #[test]
    fn mappings_in_use_stay_whatever_the_limit_and_end_with_the_last_use() {
        let (gpu, mut table) = (gpu(), Registrations::default());
        assert!(table.set_limit(0).is_empty());
        let shared = mapping(&gpu, 1);
        let (address, uses) =
            (shared.at, [0; 2].map(|_| entry(table.owner(), std::slice::from_ref(&shared))));
        assert!(uses.iter().all(|one| table.keep(one, vec![shared.clone()]).is_empty()));
        drop(shared);
        let end = |one: &Entry| one.lock().take().unwrap_or_default();
        table.forget(end(&uses[0]));
        assert_eq!((table.statistics().registrations, table.statistics().entries), (1, 1));
        table.forget(end(&uses[1]));
        assert_eq!(table.statistics().entries, 0);
        // SAFETY: nothing uses it.
        assert!(unsafe { gpu.release(address) }.is_err(), "it was still mapped");
    }

    #[test]
    fn the_end_of_a_communicator_ends_all_uses() {
        let (gpu, mut table) = (gpu(), Registrations::default());
        let mapping = mapping(&gpu, 1);
        let (address, one) = (mapping.at, entry(table.owner(), std::slice::from_ref(&mapping)));
        assert!(table.keep(&one, vec![mapping]).is_empty());
        table.clear();
        assert!(one.lock().is_none());
        // SAFETY: nothing uses it.
        assert!(unsafe { gpu.release(address) }.is_err(), "it was still mapped");
    }
}
