//! How simulated memory is touched, once [`Memory::find`](super::memory::Memory::find) allowed it.
//!
//! Invariant: an aligned access of 8 bytes or less is one access of the CPU, as it is one of a
//! GPU, and 16 bytes are two. Another process may look at shared memory at any time, so what a lane
//! stores becomes visible there in the order in which the simulator lands it: stores release and
//! loads acquire, which is the memory model of one world, where threads take turns.

use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// Loads 8 bits.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed it.
pub(super) unsafe fn load_u8(address: u64) -> u8 {
    // SAFETY: live memory, by the caller's promise; atomic, since the host may look at it too.
    unsafe { AtomicU8::from_ptr(address as *mut u8) }.load(Acquire)
}

/// Stores 8 bits.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed it.
pub(super) unsafe fn store_u8(address: u64, value: u8) {
    // SAFETY: as in `load_u8`.
    unsafe { AtomicU8::from_ptr(address as *mut u8) }.store(value, Release);
}

/// Loads 16 bits.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed it and the address is aligned.
pub(super) unsafe fn load_u16(address: u64) -> u16 {
    // SAFETY: as in `load_u8`, and aligned.
    unsafe { AtomicU16::from_ptr(address as *mut u16) }.load(Acquire)
}

/// Stores 16 bits.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed it and the address is aligned.
pub(super) unsafe fn store_u16(address: u64, value: u16) {
    // SAFETY: as in `load_u16`.
    unsafe { AtomicU16::from_ptr(address as *mut u16) }.store(value, Release);
}

/// A word of simulated memory.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed access, the address is aligned, and the
/// memory outlives the use.
#[inline(always)]
pub(super) unsafe fn word<'a>(address: u64) -> &'a AtomicU32 {
    // SAFETY: as in `load_u16`.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }
}

/// Half a unit of simulated memory.
///
/// # Safety
/// As for [`word`].
#[inline(always)]
unsafe fn half<'a>(address: u64) -> &'a AtomicU64 {
    // SAFETY: as in `load_u16`.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}

/// Loads one, two or four words.
///
/// # Safety
/// [`Memory::find`](super::memory::Memory::find) allowed it and the address is aligned to all of it.
#[inline(always)]
pub(super) unsafe fn load_words<const N: usize>(address: u64) -> [u32; N] {
    let mut words = [0; N];
    for (pair, at) in words.chunks_mut(2).zip((address..).step_by(8)) {
        match pair {
            // SAFETY: within what the caller promises.
            [one] => *one = unsafe { word(at) }.load(Acquire),
            // SAFETY: as above.
            two => two.copy_from_slice(&split(unsafe { half(at) }.load(Acquire))),
        }
    }
    words
}

/// Stores one, two or four words.
///
/// # Safety
/// As for [`load_words`].
#[inline(always)]
pub(super) unsafe fn store_words(address: u64, values: &[u32]) {
    for (pair, at) in values.chunks(2).zip((address..).step_by(8)) {
        match *pair {
            // SAFETY: within what the caller promises.
            [low, high] => unsafe { half(at) }.store(bytemuck::cast([low, high]), Release),
            // SAFETY: as above.
            _ => unsafe { word(at) }.store(pair[0], Release),
        }
    }
}

/// The two words of a half, in the order of their addresses.
fn split(half: u64) -> [u32; 2] {
    bytemuck::cast(half)
}
