//! Recovering and shrinking, for C.

use super::arguments::{items, place, present};
use super::comm::{peerlane_comm, size, with_all};
use super::status::{guard, peerlane_status};
use crate::communicator::Communicator;

/// Brings the communicator back after an abort, a time-out or any other error of its calls; of a healthy one it is a
/// reset. All ranks call it, each from its thread or process, and no other call is made meanwhile, nor a graph
/// launched with one. Waits for the others for as long as the deadline, and for everything on this rank's GPU.
/// Tensors, registrations and CUDA graphs stay valid. On failure the communicator stays aborted on all ranks, and may
/// try again; PEERLANE_PEER_LOST says that a rank's process has ended, without which only `peerlane_shrink` goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_recover(comm: *mut peerlane_comm) -> peerlane_status {
    guard("recover", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "comm", comm)? }.alone().recover()
    })
}

/// `peerlane_recover` for one thread that has all ranks of a group, in rank order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_recover_all(
    comms: *const *mut peerlane_comm,
    world_size: u32,
) -> peerlane_status {
    guard("recover_all", |op| {
        let world = size(op, world_size)?;
        // SAFETY: the header asks for `world_size` handles.
        unsafe { with_all(op, comms, world, Communicator::recover_all) }
    })
}

/// Goes on without `count` ranks, which are gone or hang. All others call it with the same ranks and become a smaller
/// group, numbered anew in the order they had. Waits as `peerlane_recover` does. The memory is new: CUDA graphs
/// with earlier calls must not be launched any more, and tensors are registered again. On failure the
/// communicator stays aborted on all ranks, and may try again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_shrink(
    comm: *mut peerlane_comm,
    without: *const u32,
    count: usize,
) -> peerlane_status {
    guard("shrink", |op| {
        // SAFETY: the header asks for a handle, and for `count` numbers.
        let (comm, without) =
            unsafe { (present(op, "comm", comm)?, items(op, "without", without, count)?) };
        comm.alone().shrink(without)
    })
}

/// `peerlane_shrink` for one thread that has all ranks that are left, `world_size` of them, in rank order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_shrink_all(
    comms: *const *mut peerlane_comm,
    world_size: u32,
    without: *const u32,
    count: usize,
) -> peerlane_status {
    guard("shrink_all", |op| {
        let world = size(op, world_size)?;
        // SAFETY: the header asks for `count` numbers, and for `world_size` handles.
        unsafe {
            let without = items(op, "without", without, count)?;
            with_all(op, comms, world, |ranks| Communicator::shrink_all(ranks, without))
        }
    })
}

/// How often the ranks have recovered or shrunk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_generation(
    comm: *const peerlane_comm,
    generation: *mut u64,
) -> peerlane_status {
    guard("generation", |op| {
        // SAFETY: the header asks for a handle, and room for a number.
        let (comm, generation) =
            unsafe { (present(op, "comm", comm)?, place(op, "generation", generation, 0)?) };
        *generation = comm.shared().generation();
        Ok(())
    })
}
