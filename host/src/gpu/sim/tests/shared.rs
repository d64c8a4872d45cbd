//! Memory shared between worlds, as two processes share it, and host memory that a GPU learns of.

use super::{Config, DEFAULT, SimGpu, SimLane, World, args, read};
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Exported, Gpu, HostMemory, MemoryHandle};
use peerlane_device::abi::Args;
use peerlane_device::lane::Lane;
use std::alloc::{Layout, alloc_zeroed};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: usize = 4096;

/// What one process of several has: a world like the others', of which it uses one GPU.
fn process(rank: u32, config: &Config) -> SimGpu {
    World::new(config).gpu(rank)
}

fn config(seed: u64) -> Config {
    Config { devices: 3, seed, unreachable: vec![(0, 2)], ..Config::default() }
}

/// Runs `body` on one lane and waits for it; the addresses are its first peers.
fn run(
    gpu: &SimGpu,
    peers: &[DevicePtr],
    body: impl Fn(SimLane, &[u64]) + Send + Sync + 'static,
) -> Result<()> {
    let mut args = args();
    for (to, from) in args.peers.iter_mut().zip(peers) {
        *to = from.0;
    }
    let body = move |lane, args: &Args| body(lane, &args.peers);
    gpu.launch_body("body", Arc::new(body), (1, 1), &args, DEFAULT)?;
    gpu.stream_synchronize(DEFAULT)
}

/// Memory of GPU 0 in one world, and where GPU 1 of another world finds it.
fn pair(seed: u64) -> ((SimGpu, DevicePtr), (SimGpu, DevicePtr)) {
    let (owner, peer) = (process(0, &config(seed)), process(1, &config(seed)));
    let memory = owner.alloc_shared(BYTES).unwrap();
    let imported = peer.import(owner.export(memory).unwrap(), BYTES, 0).unwrap();
    ((owner, memory), (peer, imported))
}

fn expected_and_got(result: Result<impl Sized>) -> String {
    match result {
        Err(Error::InvalidArgument { expected, got, .. }) => format!("{expected}; {got}"),
        Err(other) => panic!("expected a bad argument, got {other}"),
        Ok(_) => panic!("expected a bad argument, got none"),
    }
}

#[test]
fn both_worlds_see_what_either_writes() {
    let ((owner, memory), (peer, imported)) = pair(1);
    assert_eq!(read(&owner, memory, DEFAULT), 0xa5a5_a5a5);
    // SAFETY: inside the memory.
    run(&peer, &[imported], |lane, at| unsafe { lane.put_unit(at[0] + 16, [7; 4]) }).unwrap();
    assert_eq!(read(&owner, memory.offset(28), DEFAULT), 7);

    // SAFETY: inside the memory.
    unsafe { owner.fill(memory.offset(64), 9, 64, DEFAULT) }.unwrap();
    owner.stream_synchronize(DEFAULT).unwrap();
    let own = peer.alloc(64).unwrap();
    let copy = |lane: SimLane, at: &[u64]| {
        // SAFETY: inside the memory.
        unsafe { lane.store_u32x2(at[1], lane.load_u32x2(at[0] + 64)) };
    };
    run(&peer, &[imported, own], copy).unwrap();
    assert_eq!(read(&peer, own, DEFAULT), 0x0909_0909);

    // SAFETY: inside both; nothing else runs.
    unsafe { peer.copy(imported.offset(128), own, 8, DEFAULT) }.unwrap();
    peer.stream_synchronize(DEFAULT).unwrap();
    assert_eq!(read(&owner, memory.offset(132), DEFAULT), 0x0909_0909);
    assert_eq!(peer.owner_of(imported.offset(BYTES - 1)), Some(0));
}

#[test]
fn only_who_imported_or_enabled_the_owner_has_access() {
    let config = Config { seed: 2, ..Config::default() };
    let owner = process(0, &config);
    let world = World::new(&config);
    let (first, second) = (world.gpu(1), world.gpu(2));
    let memory = owner.alloc_shared(BYTES).unwrap();
    let imported = first.import(owner.export(memory).unwrap(), BYTES, 0).unwrap();
    // SAFETY: inside the memory.
    let put = |lane: SimLane, at: &[u64]| unsafe { lane.put_word(at[0], 1) };
    let own = second.alloc(64).unwrap();
    // SAFETY: inside both.
    let copied = unsafe { second.copy(imported, own, 64, DEFAULT) };
    assert!(matches!(copied, Err(Error::Unreachable { from: 2, to: 0, .. })));
    run(&first, &[imported], put).unwrap();
    run(&world.gpu(0), &[imported], put).unwrap();
    let third = world.gpu(3);
    third.enable_peer(0).unwrap();
    run(&third, &[imported], put).unwrap();
    let refused = run(&second, &[imported], put).unwrap_err().to_string();
    assert!(refused.contains("whose peer access GPU 2 has not enabled"), "{refused}");
}

#[test]
fn either_side_may_let_go_first() {
    // SAFETY: inside the memory, where it is still there.
    let put = |lane: SimLane, at: &[u64]| unsafe { lane.put_word(at[0], 5) };
    let ((owner, memory), (peer, imported)) = pair(3);
    // SAFETY: the owner uses it no more.
    unsafe { owner.free(memory) }.unwrap();
    run(&peer, &[imported], put).unwrap();
    // SAFETY: the peer uses it no more.
    unsafe { peer.release(imported) }.unwrap();
    assert!(run(&peer, &[imported], put).unwrap_err().to_string().contains("allocation"));

    let ((owner, memory), (peer, imported)) = pair(4);
    run(&peer, &[imported], put).unwrap();
    drop(peer);
    assert_eq!(read(&owner, memory, DEFAULT), 5);
    // SAFETY: nobody uses it any more.
    unsafe { owner.free(memory) }.unwrap();
}

#[test]
fn stores_on_their_way_to_released_memory_do_no_harm() {
    for seed in 0..20 {
        let (_, (peer, imported)) = pair(seed);
        let flag = peer.alloc(64).unwrap();
        let mut args = args();
        (args.peers[0], args.peers[1]) = (imported.0, flag.0);
        let body = |lane: SimLane, args: &Args| {
            // SAFETY: inside memory that is there when the store is made.
            unsafe {
                lane.put_unit(args.peers[0], [1; 4]);
                while lane.poll_word(args.peers[1]) != 1 {
                    lane.pause();
                }
            }
        };
        let (bytes, side) = (1u32.to_ne_bytes(), peer.stream_create().unwrap());
        peer.launch_body("body", Arc::new(body), (1, 1), &args, DEFAULT).unwrap();
        peer.stream_query(DEFAULT).unwrap();
        // SAFETY: none for the release: a store may be on its way, which is the test.
        unsafe {
            peer.release(imported).unwrap();
            peer.upload(flag, &bytes, side).unwrap();
        }
        peer.stream_synchronize(side).unwrap();
        peer.stream_synchronize(DEFAULT).unwrap();
    }
}

#[test]
fn what_cannot_be_exported_or_imported_is_refused() {
    let (owner, peer) = (process(0, &config(5)), process(1, &config(5)));
    let (plain, shared) = (owner.alloc(64).unwrap(), owner.alloc_shared(BYTES).unwrap());
    assert!(matches!(owner.alloc_shared(0), Err(Error::Driver { code: 1, .. })));
    assert!(matches!(owner.alloc_shared(9 << 30), Err(Error::Driver { code: 2, .. })));
    let text = expected_and_got(owner.export(plain));
    assert!(text.contains("alloc_shared of GPU 0") && text.contains("64 bytes"), "{text}");
    expected_and_got(owner.export(shared.offset(256)));
    expected_and_got(peer.export(shared));

    let text = expected_and_got(peer.import(owner.export(shared).unwrap(), 2 * BYTES, 0));
    assert!(text.contains("a file of 8192 bytes") && text.contains("a file of 4096"), "{text}");
    expected_and_got(peer.import(owner.export(shared).unwrap(), 0, 0));
    let text = expected_and_got(peer.import(owner.export(shared).unwrap(), BYTES, 3));
    assert!(text.contains("below 3; 3"), "{text}");
    let third = process(2, &config(5)).import(owner.export(shared).unwrap(), BYTES, 0);
    assert!(matches!(third, Err(Error::Unreachable { from: 2, to: 0, .. })));

    let handle = MemoryHandle::Ipc(vec![0; 64]);
    let text = expected_and_got(peer.import(Exported { handle, file: None }, BYTES, 0));
    assert!(text.contains("real GPU's memory, 64 bytes"), "{text}");
    let nothing = Exported { handle: MemoryHandle::File, file: None };
    assert!(expected_and_got(peer.import(nothing, BYTES, 0)).contains("no file"));
    let other = Some(std::fs::File::open("/proc/self/exe").unwrap().into());
    let other = Exported { handle: MemoryHandle::File, file: other };
    assert!(expected_and_got(peer.import(other, BYTES, 0)).contains("no simulated GPU"));
}

#[test]
fn each_call_takes_back_only_its_own() {
    let ((owner, memory), (peer, imported)) = pair(6);
    // SAFETY: nobody uses any of it; most calls must refuse.
    unsafe {
        let text = expected_and_got(owner.release(memory));
        assert!(text.contains("what import of GPU 0") && text.contains("alloc_shared"), "{text}");
        expected_and_got(peer.free(imported));
        expected_and_got(peer.release(imported.offset(256)));
        peer.release(imported).unwrap();
        let text = expected_and_got(peer.release(imported));
        assert!(text.contains("in no live allocation"), "{text}");
        owner.free(memory).unwrap();
        expected_and_got(owner.free(memory));
    }
}

/// Fresh pages that are never given back.
fn pages(count: usize) -> *mut u8 {
    let layout = Layout::from_size_align(count * BYTES, BYTES).unwrap();
    // SAFETY: the layout is not empty.
    unsafe { alloc_zeroed(layout) }
}

#[test]
fn registered_host_memory_is_shared_with_kernels() {
    let world = World::new(&Config { devices: 2, ..Config::default() });
    let (gpu, other) = (world.gpu(0), world.gpu(1));
    let at = pages(2);
    // SAFETY: two fresh pages; the host looks at them only while nothing is queued.
    unsafe {
        at.add(4).write(3);
        let memory = gpu.register_host(at, 2 * BYTES).unwrap();
        assert_eq!((memory.host, memory.bytes), (at, 2 * BYTES));
        assert_eq!(gpu.owner_of(memory.device), None);
        let double =
            |lane: SimLane, at: &[u64]| lane.put_word(at[0], 2 * lane.poll_word(at[0] + 4));
        run(&gpu, &[memory.device], double).unwrap();
        assert_eq!(at.read(), 6);
        let again = gpu.register_host(at.add(BYTES), BYTES);
        assert!(matches!(again, Err(Error::Driver { code: 712, .. })));
        let refused = run(&other, &[memory.device], double).unwrap_err().to_string();
        assert!(refused.contains("which GPU 1 does not map"), "{refused}");

        expected_and_got(gpu.free_host(memory));
        gpu.unregister_host(memory).unwrap();
        expected_and_got(gpu.unregister_host(memory));
        let memory = gpu.register_host(at, BYTES).expect("the place is free again");
        assert_eq!(at.read(), 6, "the content stays");
        gpu.unregister_host(memory).unwrap();
        assert!(run(&gpu, &[memory.device], double).is_err());
    }
}

#[test]
fn host_memory_is_registered_by_pages() {
    let gpu = process(0, &config(7));
    let at = pages(1);
    let register = |at: *mut u8, bytes: usize| -> Result<HostMemory> {
        // SAFETY: none; each call must refuse.
        unsafe { gpu.register_host(at, bytes) }
    };
    let text = expected_and_got(register(at, 100));
    assert!(text.contains("multiples of 4096") && text.ends_with("and 100"), "{text}");
    expected_and_got(register(at, 0));
    expected_and_got(register(at.wrapping_add(64), BYTES));
    expected_and_got(register(std::ptr::null_mut(), BYTES));
    expected_and_got(register(usize::MAX.wrapping_sub(BYTES - 1) as *mut u8, BYTES));
}

/// How long a kernel that waits `time` for nothing takes for real.
fn wait_for(gpu: &SimGpu, time: Duration) -> Duration {
    let start = Instant::now();
    let ns = time.as_nanos() as u64;
    run(gpu, &[], move |lane, _| {
        let begin = lane.clock_ns();
        while lane.clock_ns() - begin < ns {
            lane.pause();
        }
    })
    .unwrap();
    start.elapsed()
}

#[test]
fn time_does_not_jump_while_memory_is_shared() {
    const LONG: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(50);
    let (owner, peer) = (process(0, &config(8)), process(1, &config(8)));
    let memory = owner.alloc_shared(BYTES).unwrap();
    assert!(wait_for(&owner, LONG) < LONG, "nobody knows of the memory yet");
    let imported = peer.import(owner.export(memory).unwrap(), BYTES, 0).unwrap();
    assert!(wait_for(&owner, SHORT) >= SHORT);
    assert!(wait_for(&peer, SHORT) >= SHORT);
    // SAFETY: nobody uses it any more.
    unsafe {
        owner.free(memory).unwrap();
        peer.release(imported).unwrap();
    }
    assert!(wait_for(&owner, LONG) < LONG && wait_for(&peer, LONG) < LONG);
}
