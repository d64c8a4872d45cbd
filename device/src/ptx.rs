//! [`Lane`] on nvptx64: the only `asm!` and the only intrinsics of the crate.
//!
//! Two rules, each learned from a miscompiled kernel (docs/memory-model.md): what is convergent
//! (barriers) goes through LLVM intrinsics, since `asm!` may be duplicated; what is ordered or
//! scoped goes through `asm!`, since LLVM drops scope and ordering of atomic read-modify-writes.
//! Loads and stores say `.global` themselves: a pointer that comes out of a struct is generic.

use crate::abi::Args;
use crate::lane::{Lane, Unit};
use core::arch::asm;
use core::marker::PhantomData;
use core::mem::offset_of;

unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_sync(id: u32);
    #[link_name = "llvm.nvvm.barrier0.or"]
    fn barrier_or(predicate: i32) -> i32;
    #[link_name = "llvm.nvvm.read.ptx.sreg.tid.x"]
    fn tid_x() -> u32;
    #[link_name = "llvm.nvvm.read.ptx.sreg.ntid.x"]
    fn ntid_x() -> u32;
    #[link_name = "llvm.nvvm.read.ptx.sreg.ctaid.x"]
    fn ctaid_x() -> u32;
    #[link_name = "llvm.nvvm.read.ptx.sreg.nctaid.x"]
    fn nctaid_x() -> u32;
}

/// Reads the arrays of an entry's parameter, `Args`, at run-time indexes.
///
/// Indexing a by-value struct in Rust copies all of it to local memory; the parameter bank can be
/// indexed directly, but only by the parameter's name, which only the entry knows.
pub trait Parameters: Copy {
    /// The 8 bytes at `offset` of the entry's parameter.
    fn load_u64(offset: u64) -> u64;
}

/// A thread of the kernel whose parameter `P` reads.
#[derive(Clone, Copy)]
pub struct PtxLane<P>(PhantomData<P>);

impl<P: Parameters> PtxLane<P> {
    /// The running thread.
    ///
    /// # Safety
    /// Only the entry that `P` belongs to may call this, and everything that uses the lane must be
    /// inlined into it.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn current() -> Self {
        PtxLane(PhantomData)
    }
}

/// Ends the kernel with an error.
pub fn trap() -> ! {
    // SAFETY: takes no operand; the launch fails with an error.
    unsafe { asm!("trap;", options(noreturn)) }
}

// SAFETY of every block below: special registers are always readable; the address contracts are
// those of `Lane`, passed on to the caller; the conversions work on registers alone.
impl<P: Parameters> Lane for PtxLane<P> {
    const BREAKABLE: bool = false;
    const CHECKED: bool = cfg!(feature = "checked");
    const BOUNDED: bool = !cfg!(feature = "unbounded");

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn thread(self) -> u32 {
        // SAFETY: reads a special register.
        unsafe { tid_x() }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn threads(self) -> u32 {
        // SAFETY: reads a special register.
        unsafe { ntid_x() }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn block(self) -> u32 {
        // SAFETY: reads a special register.
        unsafe { ctaid_x() }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn blocks(self) -> u32 {
        // SAFETY: reads a special register.
        unsafe { nctaid_x() }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn peer(self, rank: u32) -> u64 {
        P::load_u64((offset_of!(Args, peers) + 8 * rank as usize) as u64)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn table(self, index: u32) -> u64 {
        P::load_u64((offset_of!(Args, table) + 8 * index as usize) as u64)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn sync_threads(self) {
        // SAFETY: every thread of the block comes here (contract of `Lane`).
        unsafe { barrier_sync(0) }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn sync_threads_or(self, value: bool) -> bool {
        // SAFETY: every thread of the block comes here (contract of `Lane`).
        unsafe { barrier_or(value as i32) != 0 }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load_u8(self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.global.u8 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load_u16(self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.global.u16 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load_u32(self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load_u32x2(self, address: u64) -> [u32; 2] {
        let (a, b): (u32, u32);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.global.v2.u32 {{{0},{1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address, options(nostack, preserves_flags))
        };
        [a, b]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn load_u32x4(self, address: u64) -> Unit {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.global.v4.u32 {{{0},{1},{2},{3}}}, [{4}];", out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address, options(nostack, preserves_flags))
        };
        [a, b, c, d]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_u8(self, address: u64, value: u32) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.global.u8 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_u16(self, address: u64, value: u32) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.global.u16 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_u32(self, address: u64, value: u32) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.global.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_u32x2(self, address: u64, value: [u32; 2]) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.global.v2.u32 [{0}], {{{1},{2}}};", in(reg64) address, in(reg32) value[0], in(reg32) value[1], options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn store_u32x4(self, address: u64, value: Unit) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.global.v4.u32 [{0}], {{{1},{2},{3},{4}}};", in(reg64) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3], options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn put_unit(self, address: u64, value: Unit) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.relaxed.sys.global.v4.u32 [{0}], {{{1},{2},{3},{4}}};", in(reg64) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3], options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn poll_unit(self, address: u64) -> Unit {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.relaxed.sys.global.v4.u32 {{{0},{1},{2},{3}}}, [{4}];", out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address, options(nostack, preserves_flags))
        };
        [a, b, c, d]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn put_word(self, address: u64, value: u32) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("st.relaxed.sys.global.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn poll_word(self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.relaxed.sys.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn poll_word_acquire(self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.acquire.sys.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn add_word(self, address: u64, value: u32) {
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("red.relaxed.gpu.global.add.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags))
        };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn claim_word(self, address: u64) -> bool {
        let old: u32;
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("atom.acq_rel.gpu.global.cas.b32 {0}, [{1}], 0, 1;", out(reg32) old, in(reg64) address, options(nostack, preserves_flags))
        };
        old == 0
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn fence_system(self) {
        // SAFETY: a fence has no operand.
        unsafe { asm!("fence.acq_rel.sys;", options(nostack, preserves_flags)) };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn clock_ns(self) -> u64 {
        let value: u64;
        // SAFETY: reads a special register; volatile, since it changes.
        unsafe {
            asm!("mov.u64 {0}, %globaltimer;", out(reg64) value, options(nostack, nomem, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn pause(self) {}

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn sleep(self, ns: u32) {
        // SAFETY: suspends this thread only.
        unsafe { asm!("nanosleep.u32 {0};", in(reg32) ns, options(nostack, preserves_flags)) };
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn f16_from_f32(self, value: f32) -> u32 {
        let bits: u16;
        // SAFETY: works on registers alone.
        unsafe {
            asm!("cvt.rn.f16.f32 {0}, {1};", out(reg16) bits, in(reg32) value, options(pure, nomem, nostack, preserves_flags))
        };
        bits as u32
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn f16_to_f32(self, bits: u32) -> f32 {
        let value: f32;
        // SAFETY: works on registers alone.
        unsafe {
            asm!("cvt.f32.f16 {0}, {1};", out(reg32) value, in(reg16) bits as u16, options(pure, nomem, nostack, preserves_flags))
        };
        value
    }

    #[cfg(target_feature = "sm_80")]
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn bf16x2_from_f32(self, low: f32, high: f32) -> u32 {
        let bits: u32;
        // SAFETY: works on registers alone.
        unsafe {
            asm!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", out(reg32) bits, in(reg32) high, in(reg32) low, options(pure, nomem, nostack, preserves_flags))
        };
        bits
    }

    #[cfg(not(target_feature = "sm_80"))]
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn bf16x2_from_f32(self, low: f32, high: f32) -> u32 {
        crate::element::bf16_round(low) | crate::element::bf16_round(high) << 16
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn max_f32(self, a: f32, b: f32) -> f32 {
        let value: f32;
        // SAFETY: works on registers alone.
        unsafe {
            asm!("max.f32 {0}, {1}, {2};", out(reg32) value, in(reg32) a, in(reg32) b, options(pure, nomem, nostack, preserves_flags))
        };
        value
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn min_f32(self, a: f32, b: f32) -> f32 {
        let value: f32;
        // SAFETY: works on registers alone.
        unsafe {
            asm!("min.f32 {0}, {1}, {2};", out(reg32) value, in(reg32) a, in(reg32) b, options(pure, nomem, nostack, preserves_flags))
        };
        value
    }
}
