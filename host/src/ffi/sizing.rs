//! Sizes that follow the workload, and what the workload was, for C.

use super::arguments::{check_size, items, place, present};
use super::comm::peerlane_comm;
use super::status::{guard, peerlane_status};
use crate::collectives::invalid;
use crate::communicator::Communicator;
use crate::usage::{Counts, Family, Usage};
use peerlane_device::abi::MAX_RANKS;
use std::ffi::c_int;

/// What the calls of one family have brought. A call's bytes are those of its tensor: of the whole one for
/// all-reduces and broadcasts, of one rank's part for reduce-scatters and all-gathers, of the largest
/// rank's rows for gathers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct peerlane_counts {
    /// Calls that were queued.
    pub calls: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes of the largest call ever.
    pub largest: u64,
    /// Bytes of the largest call since `peerlane_comm_adapt`.
    pub largest_since: u64,
    /// Calls that did not fit the mailbox or the staging area at once.
    pub several_turns: u64,
}

/// What a rank's calls have brought.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct peerlane_usage {
    /// sizeof(peerlane_usage).
    pub size: usize,
    /// All-reduces that are one kernel each.
    pub all_reduce: peerlane_counts,
    /// All-reduces by the copy engines, through the staging area.
    pub scheduled: peerlane_counts,
    /// Reduce-scatters.
    pub reduce_scatter: peerlane_counts,
    /// All-gathers.
    pub all_gather: peerlane_counts,
    /// Broadcasts.
    pub broadcast: peerlane_counts,
    /// Gathers.
    pub gather: peerlane_counts,
    /// Barriers.
    pub barrier: peerlane_counts,
    /// Calls captured in CUDA graphs; counted only if `peerlane_config.adaptive` was set.
    pub captured: u64,
    /// How often the ranks have looked at their sizes together.
    pub adapts: u64,
    /// How often sizes have changed.
    pub resizes: u64,
    /// Most bytes of device memory for this rank's mailbox.
    pub mailbox_bytes: usize,
    /// Bytes of this rank's staging area.
    pub staging_bytes: usize,
}

impl From<&Counts> for peerlane_counts {
    fn from(counts: &Counts) -> peerlane_counts {
        let Counts { calls, bytes, largest, largest_since, several_turns } = *counts;
        peerlane_counts { calls, bytes, largest, largest_since, several_turns }
    }
}

impl From<&Usage> for peerlane_usage {
    fn from(usage: &Usage) -> peerlane_usage {
        let of = |family| usage.of(family).into();
        peerlane_usage {
            size: size_of::<peerlane_usage>(),
            all_reduce: of(Family::AllReduce),
            scheduled: of(Family::Scheduled),
            reduce_scatter: of(Family::ReduceScatter),
            all_gather: of(Family::AllGather),
            broadcast: of(Family::Broadcast),
            gather: of(Family::Gather),
            barrier: of(Family::Barrier),
            captured: usage.captured,
            adapts: usage.adapts,
            resizes: usage.resizes,
            mailbox_bytes: usage.sizes.mailbox_bytes,
            staging_bytes: usage.sizes.staging_bytes,
        }
    }
}

/// Says what this rank's calls have brought. `size` is sizeof(peerlane_usage).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_usage(
    comm: *const peerlane_comm,
    usage: *mut peerlane_usage,
    size: usize,
) -> peerlane_status {
    guard("comm_usage", |op| {
        check_size::<peerlane_usage>(op, "size", size)?;
        // SAFETY: the header asks for a handle, and room for one.
        unsafe {
            let found = peerlane_usage::from(&present(op, "comm", comm)?.shared().usage());
            place(op, "usage", usage, found)?;
        }
        Ok(())
    })
}

/// Lets the sizes of mailboxes and staging areas follow the calls since the last time, if
/// `peerlane_config.adaptive` was set; *changed says whether there is new memory. All ranks call it, each
/// from its thread or process, after the same calls. Waits for the others, and for this rank's calls if
/// sizes change, for as long as the deadline. On failure all ranks go on with the memory they have. A
/// rank with calls captured in a CUDA graph refuses for all. The stream of the last call still exists.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_adapt(
    comm: *mut peerlane_comm,
    changed: *mut c_int,
) -> peerlane_status {
    guard("comm_adapt", |op| {
        // SAFETY: the header asks for a handle, and room for a number.
        let (comm, changed) =
            unsafe { (present(op, "comm", comm)?, place(op, "changed", changed, 0)?) };
        *changed = c_int::from(comm.alone().adapt()?.changed());
        Ok(())
    })
}

/// `peerlane_comm_adapt` for all ranks of a group of `peerlane_connect`, in rank order, by one thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_adapt_all(
    comms: *const *mut peerlane_comm,
    world_size: u32,
    changed: *mut c_int,
) -> peerlane_status {
    guard("adapt_all", |op| {
        let world = world_size as usize;
        if !(1..=MAX_RANKS).contains(&world) {
            return Err(invalid(op, "world_size", format!("1 to {MAX_RANKS}"), world_size));
        }
        // SAFETY: the header asks for `world_size` handles, and room for a number.
        let (comms, changed) =
            unsafe { (items(op, "comms", comms, world)?, place(op, "changed", changed, 0)?) };
        let twice = |(index, comm)| comms[..index].contains(comm);
        if comms.iter().enumerate().any(twice) {
            return Err(invalid(op, "comms", "a handle for each rank".into(), "one twice"));
        }
        // SAFETY: the header asks for handles.
        let handles = comms.iter().map(|comm| unsafe { present(op, "comms", *comm) });
        let handles = handles.collect::<crate::Result<Vec<_>>>()?;
        let mut guards: Vec<_> = handles.into_iter().map(peerlane_comm::alone).collect();
        let mut ranks: Vec<&mut Communicator> =
            guards.iter_mut().map(|guard| &mut **guard).collect();
        *changed = c_int::from(Communicator::adapt_all(&mut ranks)?.changed());
        Ok(())
    })
}
