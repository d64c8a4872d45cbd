//! The memory of all simulated GPUs: what is allocated, whose it is, who may touch it.
//!
//! Invariant: an address is dereferenced only after [`Memory::find`] has said that the device may
//! access it, and freed memory goes back to the allocator only while no kernel runs. So a kernel
//! with a wrong address gets an error and never reaches memory that is not simulated.
//!
//! A simulated address is the real one: every device and the host use the same. Memory that another
//! world exported has an address of its own in each world that imported it. Copies that another
//! world's kernels race with are the callers' to order, as on GPUs.

use super::backing::Backing;
use super::work::Work;
use crate::gpu::{self, DevicePtr};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// What fresh device memory holds: a value that no kernel may take for a result.
const UNDEFINED: u8 = 0xa5;

/// Which call an allocation came from; each has a call that takes it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Device memory, of `alloc` or `alloc_shared`.
    Alloc,
    /// Pinned host memory.
    AllocHost,
    /// Another world's device memory.
    Import,
    /// Pinned host memory that the caller owns.
    RegisterHost,
}

impl Origin {
    fn is_host(self) -> bool {
        matches!(self, Origin::AllocHost | Origin::RegisterHost)
    }
}

/// One allocation.
struct Allocation {
    backing: Backing,
    origin: Origin,
    /// The device whose memory it is.
    owner: u32,
    /// The device whose call it came from: the owner, but for imported memory.
    user: u32,
    /// Another process may know of it.
    outside: bool,
    /// Its number among all allocations.
    id: u64,
}

impl Allocation {
    fn range(&self) -> Range<u64> {
        self.backing.base..self.backing.base + self.backing.bytes as u64
    }

    /// What it is, for errors.
    fn describe(&self) -> String {
        let kind = if self.origin.is_host() { "pinned host" } else { "device" };
        format!("{} bytes of {kind} memory of GPU {}", self.backing.bytes, self.owner)
    }
}

/// All allocations of one world.
pub(super) struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    freed: Vec<Allocation>,
    /// `enabled[a][b]`: a may touch b's memory.
    enabled: Vec<Vec<bool>>,
    used: Vec<u64>,
    made: u64,
    /// Changes whenever an answer of `find` may change from yes to no.
    generation: u64,
}

impl Memory {
    pub(super) fn new(devices: u32) -> Memory {
        let devices = devices as usize;
        let enabled = (0..devices).map(|a| (0..devices).map(|b| a == b).collect()).collect();
        Memory {
            allocations: BTreeMap::new(),
            freed: Vec::new(),
            enabled,
            used: vec![0; devices],
            made: 0,
            generation: 1,
        }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Bytes allocated on `device`.
    pub(super) fn used(&self, device: u32) -> u64 {
        self.used[device as usize]
    }

    /// Allocates; `None` if the machine that simulates has no memory left.
    pub(super) fn alloc(&mut self, device: u32, bytes: usize, origin: Origin) -> Option<u64> {
        let value = if origin.is_host() { 0 } else { UNDEFINED };
        Some(self.add(Backing::heap(bytes, value)?, origin, device, device))
    }

    /// Allocates device memory that other worlds can map; `None` as for `alloc`.
    pub(super) fn alloc_shared(&mut self, device: u32, bytes: usize) -> Option<u64> {
        let backing = Backing::file(bytes, UNDEFINED).ok()?;
        Some(self.add(backing, Origin::Alloc, device, device))
    }

    /// Takes memory into the map; `user`'s call brought it.
    pub(super) fn add(&mut self, backing: Backing, origin: Origin, owner: u32, user: u32) -> u64 {
        let base = backing.base;
        if origin == Origin::Alloc {
            self.used[owner as usize] += backing.bytes as u64;
        }
        let outside = origin == Origin::Import;
        self.made += 1;
        let id = self.made;
        self.allocations.insert(base, Allocation { backing, origin, owner, user, outside, id });
        base
    }

    /// Takes back what a call of `user` gave; false if it did not.
    pub(super) fn free(&mut self, user: u32, base: u64, origin: Origin) -> bool {
        let matches = |a: &Allocation| a.user == user && a.origin == origin;
        if !self.allocations.get(&base).is_some_and(matches) {
            return false;
        }
        if let Some(allocation) = self.allocations.remove(&base) {
            if origin == Origin::Alloc {
                self.used[user as usize] -= allocation.backing.bytes as u64;
            }
            self.freed.push(allocation);
        }
        self.generation += 1;
        true
    }

    /// Gives freed memory back. Only while no kernel runs: a store may still be on its way to it.
    pub(super) fn release_freed(&mut self) {
        self.freed.clear();
    }

    /// The file of memory that `device` allocated with `alloc_shared`. Others know of it from now.
    pub(super) fn export(&mut self, device: u32, base: u64) -> Option<&OwnedFd> {
        let allocation = self.allocations.get_mut(&base).filter(|a| a.user == device)?;
        let file = allocation.backing.exportable()?;
        allocation.outside = true;
        Some(file)
    }

    /// The allocation of `device` that `address` lies in.
    pub(super) fn allocation(&self, device: u32, address: u64) -> Option<gpu::Allocation> {
        let allocation = self.below(address).filter(|a| a.range().contains(&address))?;
        let own = allocation.origin == Origin::Alloc && allocation.user == device;
        own.then_some(gpu::Allocation {
            base: DevicePtr(allocation.backing.base),
            bytes: allocation.backing.bytes,
            id: allocation.id,
            peers_reach: true,
        })
    }

    /// Whether another world may write into this one's memory, or wait for what this one writes.
    pub(super) fn is_shared(&self) -> bool {
        self.allocations.values().any(|allocation| allocation.outside)
    }

    pub(super) fn enable_peer(&mut self, device: u32, peer: u32) {
        self.enabled[device as usize][peer as usize] = true;
    }

    pub(super) fn peer_enabled(&self, device: u32, peer: u32) -> bool {
        self.enabled[device as usize][peer as usize]
    }

    /// The allocation with the greatest base up to `address`.
    fn below(&self, address: u64) -> Option<&Allocation> {
        self.allocations.range(..=address).next_back().map(|(_, allocation)| allocation)
    }

    /// The device whose memory `address` lies in.
    pub(super) fn owner(&self, address: u64) -> Option<u32> {
        let allocation = self.below(address)?;
        let inside = allocation.range().contains(&address) && !allocation.origin.is_host();
        inside.then_some(allocation.owner)
    }

    /// The device whose memory `address` lies in, or for which that host memory was allocated; and whether it is
    /// host memory.
    pub(super) fn whose(&self, address: u64) -> Option<(u32, bool)> {
        let allocation = self.below(address).filter(|found| found.range().contains(&address))?;
        Some((allocation.owner, allocation.origin.is_host()))
    }

    /// Whether `device` imported the memory that `address` lies in.
    pub(super) fn imported(&self, device: u32, address: u64) -> bool {
        self.below(address).is_some_and(|a| a.origin == Origin::Import && a.user == device)
    }

    /// Whether some of `range` is in the map.
    pub(super) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.below(range.end - 1).is_some_and(|below| below.range().end > range.start)
    }

    /// What lies at `address`, for errors.
    pub(super) fn describe(&self, address: u64) -> String {
        match self.below(address).filter(|below| below.range().contains(&address)) {
            Some(at) => {
                let offset = address - at.backing.base;
                let how = match (at.origin, at.backing.exportable()) {
                    (Origin::Alloc, None) => "alloc",
                    (Origin::Alloc, Some(_)) => "alloc_shared",
                    (Origin::AllocHost, _) => "alloc_host",
                    (Origin::Import, _) => "import",
                    (Origin::RegisterHost, _) => "register_host",
                };
                let what = at.describe();
                format!("{address:#x}, at offset {offset} of {what}, from {how} on GPU {}", at.user)
            }
            None => format!("{address:#x}, in no live allocation"),
        }
    }

    /// The allocation in which `device` may access `bytes` bytes at `address`, or why it may not.
    pub(super) fn find(
        &self,
        device: u32,
        address: u64,
        bytes: usize,
    ) -> Result<Range<u64>, String> {
        let Some(below) = self.below(address) else {
            return Err("it lies in no live allocation".into());
        };
        let range = below.range();
        if address >= range.end {
            let (what, past) = (below.describe(), address - range.end);
            return Err(format!(
                "it lies in no live allocation: the nearest below is {what}, which end {past} bytes before"
            ));
        }
        if range.end - address < bytes as u64 {
            let (what, offset) = (below.describe(), address - range.start);
            return Err(format!("it runs over the end of {what} at offset {offset}"));
        }
        let mapped = match below.origin {
            Origin::AllocHost => true,
            Origin::RegisterHost => false,
            Origin::Alloc | Origin::Import => self.peer_enabled(device, below.owner),
        };
        if below.user == device || mapped {
            return Ok(range);
        }
        let what = below.describe();
        Err(if below.origin.is_host() {
            format!("it lies in {what}, which GPU {device} does not map")
        } else {
            format!("it lies in {what}, whose peer access GPU {device} has not enabled")
        })
    }

    /// Whether `device` finds `value` in the word at `at`.
    pub(super) fn holds(&self, device: u32, at: u64, value: u32) -> Result<bool, String> {
        self.word(device, at)?;
        // SAFETY: checked; an atomic, since another world or the host may store there meanwhile.
        Ok(unsafe { AtomicU32::from_ptr(at as *mut u32) }.load(Ordering::Acquire) == value)
    }

    /// Checks that `device` may access the word at `at`.
    fn word(&self, device: u32, at: u64) -> Result<(), String> {
        if !at.is_multiple_of(4) {
            return Err(format!("memory operation at {at:#x}: it is not aligned to 4 bytes"));
        }
        let found = self.find(device, at, 4);
        found.map(drop).map_err(|reason| format!("memory operation at {at:#x}: {reason}"))
    }

    /// Does a write, a fill, a copy or a store for `device`; returns how many bytes it moved.
    pub(super) fn transfer(&self, device: u32, work: &Work) -> Result<usize, String> {
        let check = |what: &str, address: u64, bytes: usize| {
            let found = self.find(device, address, bytes);
            found.map_err(|reason| format!("{what} of {bytes} bytes at {address:#x}: {reason}"))
        };
        match *work {
            Work::Write { dst, ref data } => {
                check("upload", dst, data.len())?;
                // SAFETY: checked; no lane runs now, and `data` is not simulated memory.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), dst as *mut u8, data.len()) };
                Ok(data.len())
            }
            Work::Fill { dst, value, bytes } => {
                check("fill", dst, bytes)?;
                // SAFETY: checked; no lane runs now.
                unsafe { std::ptr::write_bytes(dst as *mut u8, value, bytes) };
                Ok(bytes)
            }
            Work::Copy { dst, src, bytes } => {
                check("copy from", src, bytes)?;
                check("copy to", dst, bytes)?;
                // SAFETY: both checked; no lane runs now; `copy` bears an overlap.
                unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes) };
                Ok(bytes)
            }
            Work::Store { dst, value } => {
                self.word(device, dst)?;
                // SAFETY: checked; an atomic, since another world may look at the word meanwhile.
                unsafe { AtomicU32::from_ptr(dst as *mut u32) }.store(value, Ordering::Release);
                Ok(4)
            }
            Work::Await { .. } | Work::Launch(_) | Work::Graph(_) => Ok(0),
        }
    }
}
