//! What a kernel must not do ends the launch with an error that says what it did.

use super::{Config, DEFAULT, Machine};
use crate::error::Error;
use crate::gpu::{DevicePtr, Gpu};
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;

/// The reason that a one-lane kernel on GPU 0 fails with.
fn reason(
    machine: &Machine,
    body: impl Fn(super::SimLane, &Args) + Send + Sync + 'static,
) -> String {
    machine.launch(0, (1, 1), body).unwrap();
    match machine.gpus[0].stream_synchronize(DEFAULT) {
        Err(Error::Simulated { device: 0, reason, seed: 9 }) => reason,
        other => panic!("expected a simulated error, got {other:?}"),
    }
}

fn machine() -> Machine {
    Machine::new(2, 9, 1000)
}

#[test]
fn out_of_bounds() {
    // SAFETY: none; that is the test.
    let found = reason(&machine(), |lane, args| unsafe {
        lane.load_u32(args.peers[0] + 1000);
    });
    assert!(found.contains("kernel body, block 0, thread 0: load of 4 bytes at 0x"), "{found}");
    assert!(found.contains("no live allocation"), "{found}");
}

#[test]
fn across_the_end() {
    // SAFETY: none; that is the test.
    let found = reason(&machine(), |lane, args| unsafe {
        lane.put_unit(args.peers[0] + 992, [0; 4]);
    });
    assert!(found.contains("put of 16 bytes") && found.contains("runs over the end"), "{found}");
}

#[test]
fn misaligned() {
    // SAFETY: none; that is the test.
    let found = reason(&machine(), |lane, args| unsafe {
        lane.store_u32x2(args.peers[0] + 4, [0; 2]);
    });
    assert!(found.contains("not aligned to 8 bytes"), "{found}");
}

#[test]
fn null() {
    // SAFETY: none; that is the test.
    let found = reason(&machine(), |lane, _| unsafe {
        lane.poll_word(0);
    });
    assert!(found.contains("poll of 4 bytes at 0x0: it lies in no live allocation"), "{found}");
}

#[test]
fn a_peer_without_access() {
    let config = Config { devices: 2, seed: 9, unreachable: vec![(1, 0)], ..Config::default() };
    let world = super::World::new(&config);
    let gpus = vec![world.gpu(0), world.gpu(1)];
    assert!(matches!(gpus[0].enable_peer(1), Err(Error::Unreachable { from: 0, to: 1, .. })));
    assert!(!gpus[1].peer_access(0).unwrap().access);
    let memory = gpus.iter().map(|gpu| gpu.alloc(64).unwrap()).collect();
    let machine = Machine { world, gpus, memory };
    let [own, peer] = [machine.memory[0], machine.memory[1]];
    // SAFETY: both are 64 bytes long.
    let copied = unsafe { machine.gpus[0].copy(peer, own, 64, DEFAULT) };
    assert!(matches!(copied, Err(Error::Unreachable { from: 0, to: 1, .. })));
    // SAFETY: none; that is the test.
    let found = reason(&machine, |lane, args| unsafe { lane.put_word(args.peers[1], 1) });
    assert!(found.contains("peer access GPU 0 has not enabled"), "{found}");
}

#[test]
fn pinned_host_memory_needs_no_link() {
    let one_way = vec![(0, 1), (1, 0)];
    let config = Config { devices: 2, seed: 9, one_way, ..Config::default() };
    let world = super::World::new(&config);
    let gpus = vec![world.gpu(0), world.gpu(1)];
    assert!(gpus.iter().zip([1, 0]).all(|(gpu, to)| !gpu.peer_access(to).unwrap().access));
    let memory = gpus[1].alloc_host(64).unwrap();
    let machine = Machine { world, gpus, memory: vec![memory.device; 2] };
    // SAFETY: 64 bytes long.
    machine.launch(0, (1, 1), |lane, args| unsafe { lane.put_word(args.peers[1], 5) }).unwrap();
    machine.gpus[0].stream_synchronize(DEFAULT).unwrap();
    // SAFETY: the kernel is over.
    assert_eq!(unsafe { memory.host.cast::<u32>().read() }, 5);
}

#[test]
fn freed_memory() {
    let machine = machine();
    // SAFETY: nothing uses it.
    unsafe { machine.gpus[0].free(machine.memory[0]).unwrap() };
    // SAFETY: none; that is the test.
    let found = reason(&machine, |lane, args| unsafe {
        lane.load_u8(args.peers[0]);
    });
    assert!(found.contains("allocation"), "{found}");
}

#[test]
fn a_panic() {
    let found = reason(&machine(), |_, _| panic!("seven is not {}", 8));
    assert!(found.contains("it panicked: seven is not 8"), "{found}");
}

#[test]
fn an_index_beyond_the_ranks() {
    let found = reason(&machine(), |lane, args| {
        lane.peer(args.world + 14);
    });
    assert!(found.contains("it panicked: index out of bounds"), "{found}");
}

#[test]
fn errors_stick_to_the_device_only() {
    let machine = machine();
    reason(&machine, |lane, _| lane.store_nowhere());
    let again = machine.launch(0, (1, 1), |_, _| {});
    assert!(matches!(again, Err(Error::Simulated { device: 0, .. })));
    machine.launch(1, (1, 1), |_, _| {}).unwrap();
    machine.gpus[1].stream_synchronize(DEFAULT).unwrap();
}

#[test]
fn host_calls_check_their_addresses() {
    let machine = machine();
    let [first, second] = [machine.memory[0], machine.memory[1]];
    let gpu = &machine.gpus[0];
    let mut bytes = [0; 8];
    // SAFETY: none is; each call must refuse.
    unsafe {
        assert!(gpu.upload(second, &bytes, DEFAULT).is_err());
        assert!(gpu.upload(first.offset(996), &bytes, DEFAULT).is_err());
        assert!(gpu.fill(DevicePtr(64), 0, 8, DEFAULT).is_err());
        assert!(gpu.copy(second.offset(999), first, 8, DEFAULT).is_err());
        assert!(gpu.download(&mut bytes, first.offset(999), DEFAULT).is_err());
        assert!(gpu.free(first.offset(256)).is_err());
        assert!(gpu.free(second).is_err());
    }
    machine.synchronize().unwrap();
}

#[test]
fn memory_starts_undefined_and_pinned_memory_zeroed() {
    let machine = machine();
    let fresh = machine.gpus[0].alloc(4).unwrap();
    assert_eq!(super::read(&machine.gpus[0], fresh, DEFAULT), 0xa5a5_a5a5);
    let pinned = machine.gpus[0].alloc_host(64).unwrap();
    assert_eq!(machine.gpus[0].owner_of(pinned.device), None);
    assert_eq!(machine.gpus[0].owner_of(machine.memory[1].offset(999)), Some(1));
    let mut args = machine.args(0);
    args.status = pinned.device.0;
    // SAFETY: inside the pinned memory.
    let body = |lane: super::SimLane, args: &Args| unsafe { lane.put_word(args.status, 5) };
    let body = std::sync::Arc::new(body);
    machine.gpus[0].launch_body("body", body, (1, 1), &args, DEFAULT).unwrap();
    machine.synchronize().unwrap();
    // SAFETY: the kernel is over.
    assert_eq!(unsafe { pinned.host.cast::<u32>().read_volatile() }, 5);
    // SAFETY: nobody uses it any more.
    unsafe { machine.gpus[0].free_host(pinned).unwrap() };
}

#[test]
fn memory_runs_out() {
    let config = Config { devices: 1, memory_bytes: 1 << 20, ..Config::default() };
    let world = super::World::new(&config);
    let gpu = world.gpu(0);
    let half = gpu.alloc(600 << 10).unwrap();
    assert!(matches!(gpu.alloc(600 << 10), Err(Error::Driver { code: 2, .. })));
    // SAFETY: nobody uses it.
    unsafe { gpu.free(half).unwrap() };
    gpu.alloc(600 << 10).unwrap();
}

impl super::SimLane {
    /// An access that no machine allows.
    fn store_nowhere(self) {
        // SAFETY: none; the simulator must catch it.
        unsafe { self.store_u32(16, 0) };
    }
}
