//! Tensors that all ranks reach, for C.
//!
//! Invariant: a handle may outlive its communicator, which then refuses it; freeing it tells nobody. All ranks of a
//! thread are locked in their order, each once.

use super::arguments::{device, items, place, present, stream};
use super::comm::{peerlane_comm, size, with_all};
use super::status::{guard, peerlane_status};
use super::types::{dtype, peerlane_dtype, peerlane_op, peerlane_reduce_options, reduce_op};
use crate::communicator::Communicator;
use crate::error::Result;
use crate::registration::Registration;
use crate::request::AllReduceRegistered;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

/// A tensor of each rank that all ranks reach.
pub struct peerlane_registration {
    registration: Registration,
}

impl peerlane_registration {
    fn handle(registration: Registration) -> *mut peerlane_registration {
        Box::into_raw(Box::new(peerlane_registration { registration }))
    }
}

/// Lets every rank reach `bytes` bytes at `tensor` of every other: the same size on every rank, at a
/// multiple of 16. Every rank calls it, from a thread or a process of its own, and waits for the others, but no
/// longer than the deadline. All ranks succeed, or none does. The memory stays allocated until
/// `peerlane_deregister` has returned or all ranks have closed their communicators, and as long as a graph
/// exists in which a call on it was captured. On failure *registration is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_register(
    comm: *mut peerlane_comm,
    tensor: *mut c_void,
    bytes: usize,
    registration: *mut *mut peerlane_registration,
) -> peerlane_status {
    guard("register", |op| {
        // SAFETY: the header asks for room for a handle, and for a handle.
        let (registration, comm) = unsafe {
            (place(op, "registration", registration, null_mut())?, present(op, "comm", comm)?)
        };
        // SAFETY: the header asks of the memory what the communicator asks.
        let made = unsafe { comm.alone().register(device(tensor), bytes)? };
        *registration = peerlane_registration::handle(made);
        Ok(())
    })
}

/// `peerlane_register` for one thread that has all ranks of a group: rank r's communicator is `comms[r]`, its
/// tensor `tensors[r]`, its registration `registrations[r]`. On failure all of these are NULL, unless it is
/// `world_size` that is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_register_all(
    comms: *const *mut peerlane_comm,
    world_size: u32,
    tensors: *const *mut c_void,
    bytes: usize,
    registrations: *mut *mut peerlane_registration,
) -> peerlane_status {
    guard("register_all", |op| {
        let world = size(op, world_size)?;
        // SAFETY: the header asks for room for `world_size` handles.
        let places = (0..world).map(|rank| unsafe {
            let at = registrations;
            place(op, "registrations", if at.is_null() { at } else { at.add(rank) }, null_mut())
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        // SAFETY: the header asks for `world_size` addresses.
        let tensors = unsafe { items(op, "tensors", tensors, world)? };
        let tensors: Vec<_> = tensors.iter().map(|tensor| (device(*tensor), bytes)).collect();
        // SAFETY: the header asks for `world_size` handles, and of the memory what the communicator asks.
        let made = unsafe {
            with_all(op, comms, world, |ranks| Communicator::register_all(ranks, &tensors))?
        };
        for (place, registration) in places.into_iter().zip(made) {
            *place = peerlane_registration::handle(registration);
        }
        Ok(())
    })
}

/// Ends the use of a registration, after everything queued on this rank's GPU. Every rank calls it, as
/// `peerlane_register`. Once it has returned no rank maps the memory any more. The handle is still to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_deregister(
    comm: *mut peerlane_comm,
    registration: *const peerlane_registration,
) -> peerlane_status {
    guard("deregister", |op| {
        // SAFETY: the header asks for handles.
        let (comm, registration) =
            unsafe { (present(op, "comm", comm)?, present(op, "registration", registration)?) };
        comm.alone().deregister(&registration.registration)
    })
}

/// `peerlane_deregister` for one thread that has all ranks of a group, in rank order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_deregister_all(
    comms: *const *mut peerlane_comm,
    world_size: u32,
    registrations: *const *mut peerlane_registration,
) -> peerlane_status {
    guard("deregister_all", |op| {
        let world = size(op, world_size)?;
        // SAFETY: the header asks for `world_size` handles.
        let all = unsafe { items(op, "registrations", registrations, world)? };
        // SAFETY: the header asks for handles.
        let all = all.iter().map(|one| unsafe {
            present(op, "registrations", *one).map(|one| one.registration.clone())
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        // SAFETY: the header asks for `world_size` handles.
        unsafe { with_all(op, comms, world, |ranks| Communicator::deregister_all(ranks, &all)) }
    })
}

/// Frees the handle and tells nobody: the tensors stay mapped, and must stay allocated, until the communicators
/// are closed. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_registration_free(registration: *mut peerlane_registration) {
    if registration.is_null() {
        return;
    }
    guard("registration_free", |_| {
        // SAFETY: the header asks for a handle, which is not used again.
        drop(unsafe { Box::from_raw(registration) });
        Ok(())
    });
}

/// Reduces `count` elements of all ranks' registered tensors, in place and without a mailbox: those from byte `offset` on,
/// a multiple of 16 that is the same on every rank. `options` may be NULL; its algorithm must be
/// PEERLANE_ALGORITHM_AUTO.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as in every library of collectives")]
pub unsafe extern "C" fn peerlane_all_reduce_registered(
    comm: *mut peerlane_comm,
    registration: *const peerlane_registration,
    offset: usize,
    count: usize,
    dtype: MaybeUninit<peerlane_dtype>,
    op: MaybeUninit<peerlane_op>,
    options: *const peerlane_reduce_options,
    stream: *mut c_void,
) -> peerlane_status {
    guard("all_reduce_registered", |name| {
        // SAFETY: the header asks for handles, and for options or NULL.
        let (comm, registration, options) = unsafe {
            (
                present(name, "comm", comm)?,
                present(name, "registration", registration)?,
                peerlane_reduce_options::read(name, options)?.without_algorithm(name)?,
            )
        };
        let (dtype, op) = (self::dtype(name, dtype)?, reduce_op(name, op)?);
        let (wire, contribution) = (options.wire, options.contribution);
        let call = AllReduceRegistered { offset, count, dtype, op, wire, contribution };
        let stream = self::stream(stream);
        // SAFETY: the header asks of tensors and stream what the communicator asks.
        unsafe { comm.alone().all_reduce_registered(&registration.registration, &call, stream) }
    })
}
