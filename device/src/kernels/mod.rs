//! One algorithm a file, and the table that joins them to their names.

use crate::abi::{Args, Kernel};
use crate::lane::Lane;

/// Runs one thread of `kernel`: what a simulated GPU executes where a real one jumps to the entry.
///
/// # Safety
/// Every address that `kernel` derives from `args` is what [`Args`] says it is, and all threads of
/// the block run it.
pub unsafe fn run<L: Lane>(kernel: Kernel, lane: L, args: &Args) {
    let _ = (kernel, lane, args);
}
