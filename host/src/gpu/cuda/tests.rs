//! What needs a real GPU. libtest counts these tests as ignored, with the reason, unless they are asked
//! for: `cargo test -p peerlane --lib gpu::cuda -- --include-ignored`.
//!
//! Invariant: a test leaves no error on the device, so their order does not matter.

mod memory_ops;
mod shared;

use super::call::code;
use super::*;
use crate::gpu::{Backend, DevicePtr, Gpu, Stream};
use peerlane_device::abi::{Args, Kernel};
use std::ptr::null_mut;

/// The GPUs to test on.
fn gpus() -> Vec<GpuRef> {
    let gpus = devices().expect("tests that need a GPU run only when asked for");
    assert!(!gpus.is_empty(), "the driver shows no GPU");
    gpus
}

fn current_context() -> usize {
    let mut context = null_mut();
    // SAFETY: `context` outlives the call.
    assert_eq!(unsafe { code!(cuCtxGetCurrent(&mut context)) }, 0);
    context as usize
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * 7 + index / 251) as u8).collect()
}

#[test]
fn an_index_too_high_is_an_error_that_names_the_count() {
    let count = devices().map_or(0, |gpus| gpus.len());
    match device(1000) {
        Err(Error::InvalidArgument { argument: "ordinal", expected, got, .. }) => {
            assert_eq!(got, "1000");
            assert!(count == 0 || expected.contains(&format!("{count} GPU")), "{expected}");
        }
        Err(Error::NoDriver { reason }) => assert!(reason.contains("libcuda.so.1"), "{reason}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("there are no 1001 GPUs"),
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_device_knows_itself() {
    for (index, gpu) in gpus().iter().enumerate() {
        let properties = gpu.properties();
        eprintln!("{properties:?}");
        assert_eq!(gpu.backend(), Backend::Cuda);
        assert_eq!(properties.ordinal as usize, index);
        assert_eq!(properties.uuid.len(), 40);
        assert!(properties.memory_bytes > 1 << 30 && properties.multiprocessors > 0);
        let again = device(index as u32).unwrap();
        assert!(Arc::ptr_eq(gpu, &again), "two calls give one device");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn memory_moves_and_knows_its_owner() {
    for gpu in gpus() {
        let bytes = (3 << 20) + 5;
        let stream = gpu.stream_create().unwrap();
        let (a, b) = (gpu.alloc(bytes).unwrap(), gpu.alloc(bytes).unwrap());
        let data = pattern(bytes);
        let mut back = vec![0; bytes];
        // SAFETY: each range lies within its allocation, and all is done before it is freed.
        unsafe {
            gpu.upload(a, &data, stream).unwrap();
            gpu.fill(b, 0x5a, bytes, stream).unwrap();
            gpu.copy(b, a, bytes - 5, stream).unwrap();
            gpu.download(&mut back, b, stream).unwrap();
        }
        assert_eq!(back[..bytes - 5], data[..bytes - 5]);
        assert_eq!(back[bytes - 5..], [0x5a; 5]);

        let ordinal = Some(gpu.properties().ordinal);
        assert_eq!(gpu.owner_of(a.offset(bytes - 1)), ordinal);
        assert_eq!(gpu.owner_of(DevicePtr(data.as_ptr() as u64)), None);
        assert_eq!(gpu.owner_of_stream(stream), ordinal);
        assert_eq!(gpu.owner_of_stream(Stream(0)), ordinal);
        assert!(gpu.stream_query(stream).unwrap());
        // SAFETY: nothing is queued any more.
        unsafe {
            gpu.free(a).unwrap();
            gpu.free(b).unwrap();
            gpu.stream_destroy(stream).unwrap();
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn host_memory_is_zeroed_and_seen_by_both_sides() {
    for gpu in gpus() {
        let memory = gpu.alloc_host(8192).unwrap();
        // SAFETY: the memory has 8192 bytes, and nothing else uses it.
        let host = unsafe { std::slice::from_raw_parts_mut(memory.host, memory.bytes) };
        assert!(host.iter().all(|&byte| byte == 0));
        assert_eq!(gpu.owner_of(memory.device), None);
        // SAFETY: as above; the stream is synchronised before the host reads.
        unsafe { gpu.fill(memory.device, 7, 4096, Stream(0)) }.unwrap();
        gpu.stream_synchronize(Stream(0)).unwrap();
        assert!(host[..4096].iter().all(|&byte| byte == 7) && host[4096] == 0);
        // SAFETY: neither side uses it any more.
        unsafe { gpu.free_host(memory) }.unwrap();
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_callers_context_stays_current() {
    let gpus = gpus();
    let Some(first) = gpus.first() else { return };
    assert_eq!(current_context(), 0);
    free_host(first, first.alloc_host(1).unwrap());
    assert_eq!(current_context(), 0, "no context before, none after");

    let mine = context::Context::of(0).unwrap();
    let entered = mine.enter().unwrap();
    for gpu in &gpus {
        let memory = gpu.alloc(16).unwrap();
        assert_eq!(gpu.owner_of(memory), Some(gpu.properties().ordinal));
        // SAFETY: nothing uses it.
        unsafe { gpu.free(memory) }.unwrap();
        assert!(gpu.alloc(usize::MAX / 2).is_err());
        assert_eq!(current_context(), mine.raw().unwrap() as usize);
    }
    drop(entered);
    assert_eq!(current_context(), 0);
}

fn free_host(gpu: &GpuRef, memory: crate::gpu::HostMemory) {
    // SAFETY: nothing uses the memory; the caller just made it.
    unsafe { gpu.free_host(memory) }.unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn events_order_streams_and_measure() {
    for gpu in gpus() {
        let streams = [gpu.stream_create().unwrap(), gpu.stream_create().unwrap()];
        let events = [gpu.event_create_timed().unwrap(), gpu.event_create_timed().unwrap()];
        let memory = gpu.alloc(1 << 26).unwrap();
        let mut last = [0; 4];
        gpu.event_record(events[0], streams[0]).unwrap();
        // SAFETY: the ranges lie within the allocation.
        unsafe { gpu.fill(memory, 1, 1 << 26, streams[0]) }.unwrap();
        gpu.event_record(events[1], streams[0]).unwrap();
        gpu.stream_wait(streams[1], events[1]).unwrap();
        // SAFETY: as above.
        unsafe { gpu.download(&mut last, memory.offset((1 << 26) - 4), streams[1]) }.unwrap();
        assert_eq!(last, [1; 4]);
        assert!(gpu.event_elapsed_ms(events[0], events[1]).unwrap() > 0.0);
        // SAFETY: all is done, and nothing is used again.
        unsafe {
            gpu.free(memory).unwrap();
            for (stream, event) in streams.into_iter().zip(events) {
                gpu.stream_destroy(stream).unwrap();
                gpu.event_destroy(event).unwrap();
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_captured_graph_replays() {
    for gpu in gpus() {
        let stream = gpu.stream_create().unwrap();
        let memory = gpu.alloc(64).unwrap();
        let mut back = [0; 64];
        gpu.capture_begin(stream).unwrap();
        assert!(gpu.is_capturing(stream).unwrap());
        // SAFETY: the range lies within the allocation.
        unsafe { gpu.fill(memory, 9, 64, stream) }.unwrap();
        // SAFETY: as above.
        let refused = unsafe { gpu.upload(memory, &[1; 64], stream) };
        assert!(matches!(refused, Err(Error::Unsupported { op: "upload", .. })));
        assert!(gpu.stream_synchronize(stream).is_err());
        let graph = gpu.capture_end(stream).expect("a refused call does not end the recording");
        assert!(!gpu.is_capturing(stream).unwrap());
        // SAFETY: as above; the graph ends before it is destroyed.
        unsafe {
            gpu.upload(memory, &[0; 64], stream).unwrap();
            gpu.graph_launch(graph, stream).unwrap();
            gpu.download(&mut back, memory, stream).unwrap();
            gpu.graph_destroy(graph).unwrap();
            gpu.free(memory).unwrap();
            gpu.stream_destroy(stream).unwrap();
        }
        assert_eq!(back, [9; 64]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn peers_reach_each_other() {
    let gpus = gpus();
    for from in &gpus {
        let own = from.properties().ordinal;
        assert!(from.peer_access(own).unwrap().access);
        from.enable_peer(own).unwrap();
        assert!(matches!(from.peer_access(1000), Err(Error::InvalidArgument { .. })));
        for to in &gpus {
            let peer = to.properties().ordinal;
            let access = from.peer_access(peer).unwrap();
            eprintln!("{own} -> {peer}: {access:?}");
            if !access.access || peer == own {
                continue;
            }
            from.enable_peer(peer).unwrap();
            from.enable_peer(peer).expect("a second time is fine");
            copy_between(from, to);
        }
    }
}

fn copy_between(from: &GpuRef, to: &GpuRef) {
    let data = pattern(100_000);
    let mut back = vec![0; data.len()];
    let (src, dst) = (from.alloc(data.len()).unwrap(), to.alloc(data.len()).unwrap());
    // SAFETY: the ranges lie within their allocations; the source's stream is synchronised before
    // the other device reads, and all is done before anything is freed.
    unsafe {
        from.upload(src, &data, Stream(0)).unwrap();
        from.copy(dst, src, data.len(), Stream(0)).unwrap();
        from.stream_synchronize(Stream(0)).unwrap();
        to.download(&mut back, dst, Stream(0)).unwrap();
        from.free(src).unwrap();
        to.free(dst).unwrap();
    }
    assert_eq!(back, data);
}

#[test]
#[ignore = "needs a GPU"]
fn every_kernel_loads_and_fits() {
    for gpu in gpus() {
        gpu.load_kernels().unwrap();
        gpu.load_kernels().expect("a second time is fine");
        for &kernel in Kernel::ALL {
            let blocks = gpu.resident_blocks(kernel, 512).unwrap();
            assert!(blocks >= gpu.properties().multiprocessors, "{kernel:?}: {blocks} blocks");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn loading_tells_what_it_chose() {
    for gpu in gpus() {
        let gpu = open(gpu.properties().ordinal).unwrap();
        gpu.load_kernels().unwrap();
        eprintln!("{:?} {:?}", gpu.ptx_variant(), gpu.ptx_refusals());
        assert!(gpu.ptx_variant().is_some());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_kernel_launches_once_it_is_loaded() {
    let gpu = CudaGpu::open(0).unwrap();
    // SAFETY: `Args` holds integers and one float, for all of which zero is a value.
    let nothing: Args = unsafe { std::mem::zeroed() };
    let launch = |gpu: &CudaGpu| {
        // SAFETY: zero bytes are reduced, so no address is followed.
        unsafe { gpu.launch(Kernel::LocalReduceF32, 1, 32, &nothing, Stream(0)) }
    };
    assert!(matches!(launch(&gpu), Err(Error::Unsupported { op: "launch", .. })));
    gpu.load_kernels().unwrap();
    launch(&gpu).unwrap();
    gpu.stream_synchronize(Stream(0)).unwrap();
}
