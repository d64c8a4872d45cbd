//! Registered tensors: of a whole group, and of a rank that is a process and does what its test tells it to.

use crate::group::{Group, Memory, Rank};
use peerlane::gpu::{Backend, DevicePtr};
use peerlane::{AllReduceRegistered, Communicator, DType, Error, Registration};

/// Registers a tensor of zeros on every rank of a group in one thread. The memory comes with it, to be dropped after
/// the group's last call.
///
/// # Panics
/// If they cannot be registered.
pub fn register_all(group: &mut Group, bytes: usize) -> (Vec<Memory>, Vec<Registration>) {
    let image = vec![0; bytes];
    let memory: Vec<Memory> = (group.ranks.iter())
        .map(|rank| Memory::with_image(&rank.gpu, rank.stream, &image).expect("memory"))
        .collect();
    let tensors: Vec<_> = memory.iter().map(|memory| (memory.base, bytes)).collect();
    let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
    // SAFETY: the caller keeps the memory for as long as the group makes calls.
    let registered = unsafe { Communicator::register_all(&mut ranks, &tensors) };
    (memory, registered.expect("all ranks bring a tensor"))
}

/// Memory that other processes can map.
fn allocate(rank: &Rank, bytes: usize) -> Result<DevicePtr, Error> {
    match rank.gpu.backend() {
        // Whatever an application allocates.
        Backend::Cuda => rank.gpu.alloc(bytes),
        Backend::Sim => rank.gpu.alloc_shared(bytes),
    }
}

/// Registers `tensors` tensors of one allocation, `bytes` bytes each, twice the last, reduces each and compares it.
/// Answers with what was mapped, and what was left after the end of all but the last registration and of all.
pub fn reduce(rank: &mut Rank, tensors: usize, bytes: usize) -> Result<String, Error> {
    let memory = allocate(rank, tensors * bytes)?;
    let (number, world) = (rank.communicator.rank(), rank.communicator.world_size());
    let count = bytes / 4;
    let image = |value: &dyn Fn(usize) -> u32| -> Vec<u8> {
        (0..count).flat_map(|index| (value(index) as f32).to_le_bytes()).collect()
    };
    let before = image(&|index| number + 1 + (index % 7) as u32);
    let after = image(&|index| world * (world + 1) / 2 + world * (index % 7) as u32);
    let mut registrations = Vec::new();
    for tensor in (0..tensors).chain([tensors - 1]) {
        let at = memory.offset(tensor * bytes);
        // SAFETY: the memory is freed behind all registrations.
        registrations.push(unsafe { rank.communicator.register(at, bytes)? });
    }
    for registration in &registrations[..tensors] {
        let call = AllReduceRegistered::new(count, DType::F32);
        let (at, stream) = (registration.tensor(), rank.stream);
        let mut found = vec![0; after.len()];
        // SAFETY: the tensor has that size.
        unsafe {
            rank.gpu.upload(at, &before, stream)?;
            rank.communicator.all_reduce_registered(registration, &call, stream)?;
            rank.gpu.download(&mut found, at, stream)?;
        }
        rank.finish()?;
        assert!(found == after, "rank {number} holds another sum");
    }
    let mapped = rank.communicator.registration_statistics();
    let (last, others) = registrations.split_last().expect("at least two");
    others.iter().try_for_each(|one| rank.communicator.deregister(one))?;
    let left = rank.communicator.registration_statistics().entries;
    rank.communicator.deregister(last)?;
    let end = rank.communicator.registration_statistics();
    // SAFETY: no rank maps it any more.
    unsafe { rank.gpu.free(memory)? };
    Ok(format!(
        "mapped {} in {} bytes, {} hits, {} misses, {left} left, {} at the end",
        mapped.entries, mapped.mapped_bytes, mapped.hits, mapped.misses, end.entries
    ))
}

/// Registers memory of this many bytes, which may be such that other processes cannot map it, and keeps nothing.
pub fn register(rank: &mut Rank, bytes: usize, shared: bool) -> Result<String, Error> {
    let memory = if shared { allocate(rank, bytes)? } else { rank.gpu.alloc(bytes)? };
    let communicator: &mut Communicator = &mut rank.communicator;
    // SAFETY: the memory is freed behind the registration, if there is one.
    let outcome = unsafe { communicator.register(memory, bytes) };
    let outcome = outcome.and_then(|registration| communicator.deregister(&registration));
    // SAFETY: no rank maps it any more.
    unsafe { rank.gpu.free(memory)? };
    outcome.map(|()| "registered".into())
}
