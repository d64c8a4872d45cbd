//! Communicators for C: how they come about, what they say, how they end.
//!
//! Invariant: a handle's lock makes every mistake in threading a wait instead of a race. Calls and
//! `close` hold it alone; what only asks or waits shares it. Aborting needs no lock: whoever waits
//! under one can be freed.

use super::arguments::{items, place, present, stream, text};
use super::gpu::peerlane_gpu;
use super::status::{guard, peerlane_status};
use super::types::{peerlane_config, peerlane_transport};
use crate::collectives::invalid;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::gpu::GpuRef;
use crate::group::Aborter;
use crate::rendezvous::Processes;
use peerlane_device::abi::MAX_RANKS;
use std::ffi::{c_char, c_void};
use std::ptr::{eq, null_mut};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// One rank's end of a group of GPUs.
pub struct peerlane_comm {
    communicator: RwLock<Communicator>,
    aborter: Aborter,
    /// Keeps a simulated machine the one that later calls of `peerlane_gpu_open` find.
    _gpu: peerlane_gpu,
}

impl peerlane_comm {
    fn handle(communicator: Communicator, gpu: &peerlane_gpu) -> *mut peerlane_comm {
        let aborter = communicator.aborter();
        let communicator = RwLock::new(communicator);
        Box::into_raw(Box::new(peerlane_comm { communicator, aborter, _gpu: gpu.clone() }))
    }

    // A panic under the lock was reported as PEERLANE_INTERNAL. It leaves a communicator that can
    // still be aborted and closed, which is what is left to do.

    pub(super) fn shared(&self) -> RwLockReadGuard<'_, Communicator> {
        self.communicator.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn alone(&self) -> RwLockWriteGuard<'_, Communicator> {
        self.communicator.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That `gpus` can be the ranks of one group.
fn check_machine(op: &'static str, gpus: &[&peerlane_gpu]) -> Result<()> {
    let stranger = gpus.iter().find(|gpu| !gpu.shares_machine(gpus[0]));
    let Some(stranger) = stranger else { return Ok(()) };
    let got = format!("{} and {}", gpus[0].name, stranger.name);
    Err(invalid(op, "gpus", "GPUs of one machine".into(), got))
}

/// Makes all ranks of a group at once, rank r on `gpus[r]`, for a process that has them all.
/// Several ranks may share a GPU. `config` may be NULL. `comms` has room for `world_size` handles;
/// they may go to threads of their own. On failure all of them are NULL, unless it is `world_size`
/// that is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_connect(
    gpus: *const *mut peerlane_gpu,
    world_size: u32,
    config: *const peerlane_config,
    comms: *mut *mut peerlane_comm,
) -> peerlane_status {
    guard("connect", |op| {
        let world = world_size as usize;
        if !(1..=MAX_RANKS).contains(&world) {
            return Err(invalid(op, "world_size", format!("1 to {MAX_RANKS}"), world_size));
        }
        // SAFETY: the header asks for room for `world_size` handles.
        let places = (0..world).map(|r| unsafe {
            place(op, "comms", if comms.is_null() { comms } else { comms.add(r) }, null_mut())
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        // SAFETY: the header asks for `world_size` handles, and for a configuration or NULL.
        let (gpus, config) =
            unsafe { (items(op, "gpus", gpus, world)?, peerlane_config::read(op, config)?) };
        // SAFETY: the header asks for handles.
        let gpus = gpus.iter().map(|gpu| unsafe { present(op, "gpus", *gpu) });
        let gpus = gpus.collect::<Result<Vec<_>>>()?;
        check_machine(op, &gpus)?;
        let refs: Vec<GpuRef> = gpus.iter().map(|gpu| gpu.gpu.clone()).collect();
        let made = Communicator::connect(&refs, &config)?;
        for ((place, communicator), gpu) in places.into_iter().zip(made).zip(gpus) {
            *place = peerlane_comm::handle(communicator, gpu);
        }
        Ok(())
    })
}

/// Joins a group as `rank`, each rank a process of its own; returns once all ranks have joined.
/// Every process gives the same `name`, up to 90 bytes that no other group of this machine uses at
/// the same time, the same `world_size`, and its own `gpu`. `patience_ms` is how long it waits for
/// the others. `config` may be NULL. On failure *comm is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_join_processes(
    name: *const c_char,
    rank: u32,
    world_size: u32,
    patience_ms: u64,
    gpu: *const peerlane_gpu,
    config: *const peerlane_config,
    comm: *mut *mut peerlane_comm,
) -> peerlane_status {
    guard("join_processes", |op| {
        // SAFETY: the header asks for room for a handle, for text and for a handle.
        let (comm, name, gpu) = unsafe {
            (
                place(op, "comm", comm, null_mut())?,
                text(op, "name", name)?,
                present(op, "gpu", gpu)?,
            )
        };
        // SAFETY: the header asks for a configuration or NULL.
        let config = unsafe { peerlane_config::read(op, config)? };
        let patience = Duration::from_millis(patience_ms);
        let meeting = Processes { name: name.into(), world: world_size, patience };
        let communicator = Communicator::join_processes(&meeting, rank, &gpu.gpu, &config)?;
        *comm = peerlane_comm::handle(communicator, gpu);
        Ok(())
    })
}

/// Which rank it is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_rank(
    comm: *const peerlane_comm,
    rank: *mut u32,
) -> peerlane_status {
    guard("comm_rank", |op| {
        // SAFETY: the header asks for a handle, and room for a number.
        let (comm, rank) = unsafe { (present(op, "comm", comm)?, place(op, "rank", rank, 0)?) };
        *rank = comm.shared().rank();
        Ok(())
    })
}

/// How many ranks its group has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_world_size(
    comm: *const peerlane_comm,
    world_size: *mut u32,
) -> peerlane_status {
    guard("comm_world_size", |op| {
        // SAFETY: the header asks for a handle, and room for a number.
        let (comm, world_size) =
            unsafe { (present(op, "comm", comm)?, place(op, "world_size", world_size, 0)?) };
        *world_size = comm.shared().world_size();
        Ok(())
    })
}

/// What carries data from rank `from` to rank `to`: PEERLANE_TRANSPORT_P2P or PEERLANE_TRANSPORT_HOST.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_transport(
    comm: *const peerlane_comm,
    from: u32,
    to: u32,
    transport: *mut peerlane_transport,
) -> peerlane_status {
    guard("comm_transport", |op| {
        let before = peerlane_transport::PEERLANE_TRANSPORT_AUTO;
        // SAFETY: the header asks for a handle, and room for a transport.
        let (comm, transport) =
            unsafe { (present(op, "comm", comm)?, place(op, "transport", transport, before)?) };
        *transport = comm.shared().transport(from, to)?.into();
        Ok(())
    })
}

/// The first error that a call of this rank met on the GPU. It stays, and every later call returns it too: all ranks
/// may recover (`peerlane_recover`), go on without the rank that is gone (`peerlane_shrink`), or close. Does not
/// wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_health(comm: *const peerlane_comm) -> peerlane_status {
    guard("comm_health", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "comm", comm)? }.shared().health()
    })
}

/// How long this rank's waits may last from its next call on. Ranks may differ.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_set_deadline(
    comm: *mut peerlane_comm,
    deadline_ms: u64,
) -> peerlane_status {
    guard("comm_set_deadline", |op| {
        // SAFETY: the header asks for a handle.
        let comm = unsafe { present(op, "comm", comm)? };
        comm.alone().set_deadline(Duration::from_millis(deadline_ms));
        Ok(())
    })
}

/// Waits until everything queued on `stream` is done, and says whether this rank's calls went well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_synchronize(
    comm: *const peerlane_comm,
    stream: *mut c_void,
) -> peerlane_status {
    guard("comm_synchronize", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "comm", comm)? }.shared().synchronize(self::stream(stream))
    })
}

/// Ends every wait of every rank of the group; their calls return PEERLANE_ABORTED from then on,
/// until they recover.
/// Any thread may call it at any time before `peerlane_comm_destroy` begins.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_abort(comm: *const peerlane_comm) -> peerlane_status {
    guard("comm_abort", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "comm", comm)? }.aborter.abort();
        Ok(())
    })
}

/// Ends the communicator: waits for everything queued on its GPU, says whether its calls went well,
/// and lets go of the group, whose memory is freed when all ranks have. A second call does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_close(comm: *mut peerlane_comm) -> peerlane_status {
    guard("comm_close", |op| {
        // SAFETY: the header asks for a handle.
        unsafe { present(op, "comm", comm)? }.alone().close()
    })
}

/// Closes the communicator if it is open, and frees the handle. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_comm_destroy(comm: *mut peerlane_comm) {
    if comm.is_null() {
        return;
    }
    guard("comm_destroy", |_| {
        // SAFETY: the header asks for a handle, which is not used again.
        drop(unsafe { Box::from_raw(comm) });
        Ok(())
    });
}

/// `world_size`, if a group can have so many ranks.
pub(super) fn size(op: &'static str, world_size: u32) -> Result<usize> {
    match world_size as usize {
        world @ 1..=MAX_RANKS => Ok(world),
        _ => Err(invalid(op, "world_size", format!("1 to {MAX_RANKS}"), world_size)),
    }
}

/// Does something with all of a thread's communicators.
///
/// # Safety
/// `comms` is NULL or leads to `world` handles or NULLs.
pub(super) unsafe fn with_all<T>(
    op: &'static str,
    comms: *const *mut peerlane_comm,
    world: usize,
    call: impl FnOnce(&mut [&mut Communicator]) -> Result<T>,
) -> Result<T> {
    // SAFETY: the caller's contract.
    let comms = unsafe { items(op, "comms", comms, world)? };
    // SAFETY: the caller's contract.
    let comms = comms.iter().map(|comm| unsafe { present(op, "comms", *comm) });
    let comms = comms.collect::<Result<Vec<_>>>()?;
    let twice = |at: usize| comms[..at].iter().any(|other| eq(*other, comms[at]));
    if (0..world).any(twice) {
        return Err(invalid(op, "comms", "each rank's once".into(), "one of them twice"));
    }
    let mut locked: Vec<_> = comms.iter().map(|comm| comm.alone()).collect();
    let mut ranks: Vec<&mut Communicator> = locked.iter_mut().map(|rank| &mut **rank).collect();
    call(&mut ranks)
}
