//! Every Peerlane kernel, and everything that host and device must agree on.
//!
//! The crate builds twice from the same source. For `nvptx64-nvidia-cuda` it becomes PTX
//! (`builder/` drives that), with [`lane::Lane`] implemented by `ptx.rs`. For the host it becomes
//! an ordinary library whose kernels the simulator runs, one coroutine per GPU thread, with its
//! own `Lane`. Algorithms never mention either: they are written against [`lane::Lane`] and the
//! verbs of [`pipe`].
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, link_llvm_intrinsics))]
#![cfg_attr(
    target_arch = "nvptx64",
    allow(internal_features, reason = "barriers must be LLVM intrinsics")
)]

pub mod abi;
mod check;
pub mod element;
pub mod kernels;
pub mod lane;
pub mod pipe;
pub mod tensor;

#[cfg(target_arch = "nvptx64")]
mod entry;
#[cfg(target_arch = "nvptx64")]
mod ptx;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Kernels are written without panics; one that appears all the same must not spin for ever.
    ptx::trap()
}
