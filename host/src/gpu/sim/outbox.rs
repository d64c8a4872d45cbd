//! Store buffers: where puts stay until they land in memory.
//!
//! Invariant: stores of one lane to one address land in the order they were made, and a store that
//! happened before another to the same address (through a block barrier) never overwrites it.
//! Nothing else is ordered, and each half of a unit, 8 bytes, lands by itself, in one piece.
//!
//! A lane's puts wait in its [`Outbox`]. A block barrier moves them to the block's [`Published`]
//! stores: every lane of the block sees those, and any of its lanes can fence them.

use super::access::store_words;
use super::random::{Chance, Random};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

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
        if self.is_empty() {
            return;
        }
        let chosen = {
            let stores = self.0.borrow();
            stores[random.below(stores.len())].address
        };
        let mask = if random.chance(tear) { HALF_MASK } else { UNIT_MASK };
        self.land(published, |address| address & mask == chosen & mask);
    }

    /// Lands every store to the halves of units that the `bytes` bytes at `address` touch.
    pub(super) fn land_range(&self, published: &Published, address: u64, bytes: u64) {
        let halves = address & HALF_MASK..(address + bytes).next_multiple_of(8);
        self.land(published, |address| halves.contains(&address));
    }

    pub(super) fn land_all(&self, published: &Published) {
        self.land(published, |_| true);
    }

    /// Lands the stores to some addresses, oldest first: coherence. The words of a half that were
    /// put together are neighbours here, and land as one.
    fn land(&self, published: &Published, hit: impl Fn(u64) -> bool) {
        let mut first: Option<Store> = None;
        self.0.borrow_mut().retain(|store| {
            if !hit(store.address) {
                return true;
            }
            // They are newer than any published store to their address.
            published.0.borrow_mut().take(store.address);
            match first.take() {
                Some(low) if low.address + 4 == store.address => {
                    land(low.address, &[low.value, store.value]);
                    return false;
                }
                Some(other) => land(other.address, &[other.value]),
                None => {}
            }
            if store.address & HALF_MASK == store.address {
                first = Some(*store);
            } else {
                land(store.address, &[store.value]);
            }
            false
        });
        if let Some(last) = first {
            land(last.address, &[last.value]);
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

    /// Lands what there is of half a unit, as one store if it is whole.
    fn land_half(&mut self, half: u64) {
        match (self.take(half), self.take(half + 4)) {
            (Some(low), Some(high)) => land(half, &[low, high]),
            (Some(low), None) => land(half, &[low]),
            (None, Some(high)) => land(half + 4, &[high]),
            (None, None) => {}
        }
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

    pub(super) fn land_some(&self, random: &Random, tear: Chance) {
        let table = &mut *self.0.borrow_mut();
        if table.addresses.is_empty() {
            return;
        }
        let chosen = table.addresses[random.below(table.addresses.len())];
        let mask = if random.chance(tear) { HALF_MASK } else { UNIT_MASK };
        let unit = chosen & UNIT_MASK;
        for half in [unit, unit + 8].into_iter().filter(|half| half & mask == chosen & mask) {
            table.land_half(half);
        }
    }

    /// Lands every store to the halves of units that the `bytes` bytes at `address` touch.
    pub(super) fn land_range(&self, address: u64, bytes: u64) {
        let table = &mut *self.0.borrow_mut();
        for half in (address & HALF_MASK..address + bytes).step_by(8) {
            table.land_half(half);
        }
    }

    pub(super) fn land_all(&self) {
        let table = &mut *self.0.borrow_mut();
        while let Some(&address) = table.addresses.last() {
            table.land_half(address & HALF_MASK);
        }
    }
}

/// Stores a word, or both of a half.
fn land(address: u64, values: &[u32]) {
    // SAFETY: the put checked the address, and memory is not given back while kernels run.
    unsafe { store_words(address, values) };
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
