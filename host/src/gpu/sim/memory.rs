//! The memory of all simulated GPUs: what is allocated, whose it is, who may touch it.
//!
//! Invariant: an address is dereferenced only after [`Memory::find`] has said that the device may
//! access it, and freed memory goes back to the allocator only while no kernel runs. So a kernel
//! with a wrong address gets an error and never reaches memory that is not simulated.
//!
//! A simulated address is the real one: every device and the host use the same.

use super::work::Work;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ops::Range;

/// What fresh device memory holds: a value that no kernel may take for a result.
const UNDEFINED: u8 = 0xa5;
const ALIGNMENT: usize = 256;

/// One allocation; dropping it frees the memory.
struct Allocation {
    base: u64,
    bytes: usize,
    layout: Layout,
    device: u32,
    pinned_host: bool,
}

impl Allocation {
    fn range(&self) -> Range<u64> {
        self.base..self.base + self.bytes as u64
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc` with this layout and is freed here only.
        unsafe { dealloc(self.base as *mut u8, self.layout) }
    }
}

/// All allocations of one world.
pub(super) struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    freed: Vec<Allocation>,
    /// `enabled[a][b]`: a may touch b's memory.
    enabled: Vec<Vec<bool>>,
    used: Vec<u64>,
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
    pub(super) fn alloc(&mut self, device: u32, bytes: usize, pinned_host: bool) -> Option<u64> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok().filter(|l| l.size() > 0)?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return None;
        }
        let value = if pinned_host { 0 } else { UNDEFINED };
        // SAFETY: `memory` points to `bytes` fresh bytes.
        unsafe { memory.write_bytes(value, bytes) };
        let base = memory as u64;
        self.allocations.insert(base, Allocation { base, bytes, layout, device, pinned_host });
        if !pinned_host {
            self.used[device as usize] += bytes as u64;
        }
        Some(base)
    }

    /// Frees what `alloc` returned; false if it did not return that.
    pub(super) fn free(&mut self, device: u32, base: u64, pinned_host: bool) -> bool {
        let matches = |a: &Allocation| a.device == device && a.pinned_host == pinned_host;
        if !self.allocations.get(&base).is_some_and(matches) {
            return false;
        }
        if let Some(allocation) = self.allocations.remove(&base) {
            if !pinned_host {
                self.used[device as usize] -= allocation.bytes as u64;
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

    pub(super) fn enable_peer(&mut self, device: u32, peer: u32) {
        self.enabled[device as usize][peer as usize] = true;
    }

    pub(super) fn peer_enabled(&self, device: u32, peer: u32) -> bool {
        self.enabled[device as usize][peer as usize]
    }

    /// The device whose memory `address` lies in.
    pub(super) fn owner(&self, address: u64) -> Option<u32> {
        let (_, allocation) = self.allocations.range(..=address).next_back()?;
        let inside = allocation.range().contains(&address) && !allocation.pinned_host;
        inside.then_some(allocation.device)
    }

    /// The allocation in which `device` may access `bytes` bytes at `address`, or why it may not.
    pub(super) fn find(
        &self,
        device: u32,
        address: u64,
        bytes: usize,
    ) -> Result<Range<u64>, String> {
        let Some((_, below)) = self.allocations.range(..=address).next_back() else {
            return Err("it lies in no live allocation".into());
        };
        let range = below.range();
        let kind = if below.pinned_host { "pinned host" } else { "device" };
        let what = format_args!("{} bytes of {kind} memory of GPU {}", below.bytes, below.device);
        if address >= range.end {
            let past = address - range.end;
            return Err(format!(
                "it lies in no live allocation: the nearest below is {what}, which end {past} bytes before"
            ));
        }
        if range.end - address < bytes as u64 {
            return Err(format!(
                "it runs over the end of {what} at offset {}",
                address - range.start
            ));
        }
        if below.pinned_host && below.device != device {
            return Err(format!("it lies in {what}, which GPU {device} does not map"));
        }
        if !self.peer_enabled(device, below.device) {
            return Err(format!(
                "it lies in {what}, whose peer access GPU {device} has not enabled"
            ));
        }
        Ok(range)
    }

    /// Does a write, a fill or a copy for `device`; returns how many bytes it moved.
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
            Work::Launch(_) | Work::Graph(_) => Ok(0),
        }
    }
}
