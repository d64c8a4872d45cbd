//! Memory shared with another process, which is this test program once more, and host memory that a
//! GPU learns of.

use super::super::shared::wants_parts;
use super::super::{CudaGpu, count};
use super::{gpus, pattern};
use crate::error::Error;
use crate::gpu::{DevicePtr, Exported, Gpu, MemoryHandle, Stream};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io::stdin;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

const BYTES: usize = (3 << 20) + 4096;
/// Tells the other process the handle. A file descriptor is its standard input.
const HANDLE_VARIABLE: &str = "PEERLANE_TEST_HANDLE";
const OTHER_PROCESS: &str = "gpu::cuda::tests::shared::the_other_process";

fn content(gpu: &dyn Gpu, memory: DevicePtr) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    // SAFETY: every test's memory is of that size.
    unsafe { gpu.download(&mut bytes, memory, Stream(0)) }.unwrap();
    bytes
}

/// Shares memory of GPU 0 with another process, which uses the last GPU.
fn share(parts: bool) {
    let gpu = CudaGpu::open(0).unwrap();
    let memory = gpu.allocate_shared(BYTES, parts).unwrap();
    // SAFETY: the memory is of that size.
    unsafe { gpu.upload(memory, &pattern(BYTES), Stream(0)) }.unwrap();
    gpu.synchronize().unwrap();
    let exported = gpu.export(memory).unwrap();
    eprintln!("{exported:?}");
    assert!(!parts || exported.handle == MemoryHandle::File);
    let other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", OTHER_PROCESS, "--ignored", "--nocapture"])
        .env(HANDLE_VARIABLE, serde_json::to_string(&exported.handle).unwrap())
        .stdin(exported.file.map_or_else(Stdio::null, Stdio::from))
        .output()
        .unwrap();
    assert!(other.status.success(), "{}", String::from_utf8_lossy(&other.stderr));
    assert!(content(&gpu, memory).iter().all(|&byte| byte == 0x3c));
    // SAFETY: nobody uses it any more.
    unsafe { gpu.free(memory) }.unwrap();
    assert!(gpu.table().is_empty());
}

#[test]
#[ignore = "another test starts it"]
fn the_other_process() {
    let Ok(handle) = std::env::var(HANDLE_VARIABLE) else { return };
    let handle: MemoryHandle = serde_json::from_str(&handle).unwrap();
    let file =
        (handle == MemoryHandle::File).then(|| stdin().as_fd().try_clone_to_owned().unwrap());
    let gpu = CudaGpu::open(count().unwrap() - 1).unwrap();
    let memory = gpu.import(Exported { handle, file }, BYTES, 0).unwrap();
    assert!(content(&gpu, memory) == pattern(BYTES));
    // SAFETY: the memory is of that size, and all is done before it is released.
    unsafe {
        gpu.fill(memory, 0x3c, BYTES, Stream(0)).unwrap();
        gpu.synchronize().unwrap();
        gpu.release(memory).unwrap();
    }
    assert!(gpu.table().is_empty());
}

#[test]
#[ignore = "needs a GPU"]
fn another_process_finds_memory_by_its_handle() {
    share(false);
}

#[test]
#[ignore = "needs a GPU"]
fn another_process_finds_memory_by_its_file() {
    share(true);
}

#[test]
#[ignore = "needs a GPU"]
fn memory_made_from_parts_is_mapped_twice() {
    let gpu = CudaGpu::open(0).unwrap();
    let memory = gpu.allocate_shared(BYTES, true).unwrap();
    let again = gpu.import(gpu.export(memory).unwrap(), BYTES, 0).unwrap();
    assert_ne!(memory, again);
    assert_eq!(gpu.owner_of(memory.offset(BYTES - 1)), Some(0));
    let data = pattern(BYTES);
    // SAFETY: the memory is of that size, and nothing uses what is taken back.
    unsafe {
        gpu.upload(memory, &data, Stream(0)).unwrap();
        assert!(content(&gpu, again) == data);
        gpu.free(memory).unwrap();
        assert!(content(&gpu, again) == data, "the importer holds it");
        gpu.release(again).unwrap();
        let twice = gpu.release(again);
        assert!(matches!(twice, Err(Error::InvalidArgument { argument: "imported", .. })));
    }
    assert!(gpu.table().is_empty());
}

#[test]
#[ignore = "needs a GPU"]
fn what_cannot_be_shared_is_refused() {
    let gpu = CudaGpu::open(0).unwrap();
    assert!(gpu.alloc_shared(0).is_err() && gpu.alloc_shared(usize::MAX).is_err());
    let plain = gpu.alloc(64).unwrap();
    assert!(matches!(gpu.export(plain), Err(Error::InvalidArgument { argument: "memory", .. })));
    // SAFETY: nothing uses it.
    unsafe { gpu.free(plain) }.unwrap();
    for handle in [MemoryHandle::Ipc(vec![0; 3]), MemoryHandle::File] {
        let bad = gpu.import(Exported { handle, file: None }, BYTES, 0);
        assert!(matches!(bad, Err(Error::InvalidArgument { argument: "exported", .. })));
    }
    let nowhere = Exported { handle: MemoryHandle::Ipc(vec![0; 64]), file: None };
    assert!(matches!(gpu.import(nowhere, BYTES, 1000), Err(Error::InvalidArgument { .. })));
}

#[test]
fn the_environment_chooses_how_to_export() {
    assert_eq!(wants_parts(None), Ok(false));
    assert_eq!(wants_parts(Some("vmm")), Ok(true));
    let error = wants_parts(Some("ipc")).unwrap_err().to_string();
    assert_eq!(
        error,
        "alloc_shared: PEERLANE_EXPORT: expected vmm, or that it is not set, got ipc"
    );
}

#[test]
#[ignore = "needs a GPU"]
fn host_memory_that_exists_is_registered() {
    let layout = Layout::from_size_align(3 * 4096, 4096).unwrap();
    for gpu in gpus() {
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc_zeroed(layout) };
        // SAFETY: three fresh pages, which the host looks at only while nothing is queued.
        unsafe {
            at.write(5);
            let memory = gpu.register_host(at, layout.size()).unwrap();
            assert_eq!((memory.host, memory.bytes), (at, layout.size()));
            assert_eq!((at.read(), gpu.owner_of(memory.device)), (5, None));
            gpu.fill(memory.device.offset(4096), 7, 4096, Stream(0)).unwrap();
            gpu.stream_synchronize(Stream(0)).unwrap();
            assert_eq!((at.read(), at.add(4095).read(), at.add(8191).read()), (5, 0, 7));
            assert!(gpu.register_host(at, layout.size()).is_err());
            gpu.unregister_host(memory).unwrap();
            assert!(gpu.unregister_host(memory).is_err());
            dealloc(at, layout);
        }
    }
}
