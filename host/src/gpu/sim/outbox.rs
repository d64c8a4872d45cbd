//! Store buffers: where puts stay until they land in memory.
//!
//! Invariant: stores of one lane to one address land in the order they were made, and a store that
//! happened before another to the same address (through a block barrier) never overwrites it.
//! Nothing else is ordered, and each half of a unit, 8 bytes, lands by itself.
//!
//! A lane's puts wait in its [`Outbox`]. A block barrier moves them to the block's [`Published`]
//! stores: every lane of the block sees those, and any of its lanes can fence them.

use super::memory::word;
use super::random::{Chance, Random};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::Ordering;

/// Words that an outbox holds before it counts as full; a put makes another land first then.
const CAPACITY: usize = 64;
const UNIT_MASK: u64 = !15;
const HALF_MASK: u64 = !7;

#[derive(Clone, Copy)]
struct Store {
    address: u64,
    value: u32,
}

/// The puts of one lane since its last block barrier, oldest first.
#[derive(Default)]
pub(super) struct Outbox(RefCell<Vec<Store>>);

impl Outbox {
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.borrow().len() >= CAPACITY
    }

    pub(super) fn put(&self, address: u64, value: u32) {
        self.0.borrow_mut().push(Store { address, value });
    }

    /// The value that this lane sees at `address`, if one is on its way.
    pub(super) fn newest(&self, address: u64) -> Option<u32> {
        self.0.borrow().iter().rev().find(|s| s.address == address).map(|s| s.value)
    }

    /// Lands the unit, or half of one, that a store chosen at random belongs to.
    pub(super) fn land_some(&self, published: &Published, random: &Random, tear: Chance) {
        let mut stores = self.0.borrow_mut();
        if stores.is_empty() {
            return;
        }
        let chosen = stores[random.below(stores.len())].address;
        let mask = if random.chance(tear) { HALF_MASK } else { UNIT_MASK };
        // All stores there, oldest first: coherence.
        stores.retain(|store| {
            let stays = store.address & mask != chosen & mask;
            if !stays {
                published.land_over(*store);
            }
            stays
        });
    }

    /// Lands every store to the `bytes` bytes at `address`.
    pub(super) fn land_range(&self, published: &Published, address: u64, bytes: u64) {
        self.0.borrow_mut().retain(|store| {
            let hit = store.address < address + bytes && address < store.address + 4;
            if hit {
                published.land_over(*store);
            }
            !hit
        });
    }

    pub(super) fn land_all(&self, published: &Published) {
        for store in self.0.borrow_mut().drain(..) {
            published.land_over(store);
        }
    }

    /// Moves everything to the block's published stores: the lane has come to a block barrier.
    pub(super) fn publish(&self, published: &Published) {
        for store in self.0.borrow_mut().drain(..) {
            published.add(store);
        }
    }
}

/// The puts of a block that its lanes all see and memory does not hold yet.
///
/// One value per address: a later store to the same address replaces an earlier one, as if both
/// had landed at once.
#[derive(Default)]
pub(super) struct Published(RefCell<Table>);

#[derive(Default)]
struct Table {
    /// Address to value and index in `addresses`.
    stores: HashMap<u64, (u32, usize), BuildHasherDefault<AddressHasher>>,
    /// All keys, so that one can be chosen at random without depending on the hash order.
    addresses: Vec<u64>,
}

impl Table {
    fn take(&mut self, address: u64) -> Option<u32> {
        let (value, index) = self.stores.remove(&address)?;
        self.addresses.swap_remove(index);
        if let Some(moved) = self.addresses.get(index)
            && let Some(entry) = self.stores.get_mut(moved)
        {
            entry.1 = index;
        }
        Some(value)
    }
}

impl Published {
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().addresses.is_empty()
    }

    pub(super) fn newest(&self, address: u64) -> Option<u32> {
        self.0.borrow().stores.get(&address).map(|entry| entry.0)
    }

    fn add(&self, store: Store) {
        let table = &mut *self.0.borrow_mut();
        let next = table.addresses.len();
        let entry = table.stores.entry(store.address).or_insert((store.value, next));
        entry.0 = store.value;
        if entry.1 == next {
            table.addresses.push(store.address);
        }
    }

    /// Lands a store of a lane, which is newer than any published one to its address.
    fn land_over(&self, store: Store) {
        self.0.borrow_mut().take(store.address);
        land(store);
    }

    pub(super) fn land_some(&self, random: &Random, tear: Chance) {
        let table = &mut *self.0.borrow_mut();
        if table.addresses.is_empty() {
            return;
        }
        let chosen = table.addresses[random.below(table.addresses.len())];
        let mask = if random.chance(tear) { HALF_MASK } else { UNIT_MASK };
        let unit = chosen & UNIT_MASK;
        for address in (0..4).map(|word| unit + 4 * word).filter(|a| a & mask == chosen & mask) {
            if let Some(value) = table.take(address) {
                land(Store { address, value });
            }
        }
    }

    /// Lands every store to the `bytes` bytes at `address`.
    pub(super) fn land_range(&self, address: u64, bytes: u64) {
        let first = address & !3;
        for address in (first..address + bytes).step_by(4) {
            let value = self.0.borrow_mut().take(address);
            if let Some(value) = value {
                land(Store { address, value });
            }
        }
    }

    pub(super) fn land_all(&self) {
        let table = &mut *self.0.borrow_mut();
        for address in table.addresses.drain(..) {
            if let Some((value, _)) = table.stores.remove(&address) {
                land(Store { address, value });
            }
        }
    }
}

fn land(store: Store) {
    // SAFETY: the put checked the address, and memory is not given back while kernels run.
    unsafe { word(store.address) }.store(store.value, Ordering::Relaxed);
}

/// Addresses are distinct already; one multiplication spreads them.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}
