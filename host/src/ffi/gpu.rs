//! GPUs by name, their memory and their streams, for C.
//!
//! Invariant: within a process, GPUs of simulated machines of the same size are GPUs of one
//! machine, as long as somebody holds one of them; so ranks that were opened one by one can peer.

use super::arguments::{address, items, place, present, room, stream, text};
use super::status::{guard, peerlane_status};
use crate::collectives::invalid;
use crate::error::Result;
use crate::gpu::{GpuRef, cuda, sim};
use peerlane_device::abi::MAX_RANKS;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A GPU of this machine or of a simulated one.
#[derive(Clone)]
pub struct peerlane_gpu {
    pub(super) gpu: GpuRef,
    /// What it was opened as.
    pub(super) name: String,
    /// All GPUs of its simulated machine: held so that the next one opened is of the same machine.
    machine: Option<Arc<[GpuRef]>>,
}

/// The simulated machines of this process that somebody holds, by size.
static MACHINES: Mutex<BTreeMap<u32, Weak<[GpuRef]>>> = Mutex::new(BTreeMap::new());

impl peerlane_gpu {
    fn open(op: &'static str, name: &str) -> Result<peerlane_gpu> {
        let wrong = || {
            let forms = format!("cuda:K, or sim:K/N with K below N and N from 1 to {MAX_RANKS}");
            invalid(op, "name", forms, format!("\"{name}\""))
        };
        if let Some(ordinal) = name.strip_prefix("cuda:") {
            let ordinal = ordinal.parse().map_err(|_| wrong())?;
            return Ok(peerlane_gpu {
                gpu: cuda::device(ordinal)?,
                name: name.into(),
                machine: None,
            });
        }
        let simulated = name.strip_prefix("sim:").and_then(|rest| rest.split_once('/'));
        let (ordinal, count) = simulated.ok_or_else(wrong)?;
        let (ordinal, count) = (ordinal.parse::<u32>(), count.parse::<u32>());
        let (Ok(ordinal), Ok(count @ 1..)) = (ordinal, count) else { return Err(wrong()) };
        if count > MAX_RANKS as u32 || ordinal >= count {
            return Err(wrong());
        }
        let machine = machine(count);
        let gpu = machine[ordinal as usize].clone();
        Ok(peerlane_gpu { gpu, name: name.into(), machine: Some(machine) })
    }

    /// Whether the two can be ranks of one group. Simulated machines know nothing of each other and
    /// would take each other's ordinals for their own.
    pub(super) fn shares_machine(&self, other: &peerlane_gpu) -> bool {
        match (&self.machine, &other.machine) {
            (None, None) => true,
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            _ => false,
        }
    }
}

/// The GPUs of the simulated machine of `count` GPUs.
fn machine(count: u32) -> Arc<[GpuRef]> {
    let mut machines = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(machine) = machines.get(&count).and_then(Weak::upgrade) {
        return machine;
    }
    let config = sim::Config { devices: count, autonomous: true, ..Default::default() };
    let machine: Arc<[GpuRef]> = sim::devices(&config).into();
    machines.insert(count, Arc::downgrade(&machine));
    machine
}

/// Opens a GPU: "cuda:K" is the K-th that the CUDA driver shows; "sim:K/N" is the K-th of a
/// simulated machine of N, with K from 0 and N from 1 to 16. Within a process, all "sim:K/N" of one
/// N belong to one machine for as long as one of them is open or used by a communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_open(
    name: *const c_char,
    gpu: *mut *mut peerlane_gpu,
) -> peerlane_status {
    guard("gpu_open", |op| {
        // SAFETY: the header asks for text, and room for a handle.
        let (gpu, name) = unsafe { (place(op, "gpu", gpu, null_mut())?, text(op, "name", name)?) };
        *gpu = Box::into_raw(Box::new(peerlane_gpu::open(op, name)?));
        Ok(())
    })
}

/// Gives a GPU back. Communicators that use it keep what they need of it. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_close(gpu: *mut peerlane_gpu) {
    if gpu.is_null() {
        return;
    }
    guard("gpu_close", |_| {
        // SAFETY: the header asks for a handle, which is not used again.
        drop(unsafe { Box::from_raw(gpu) });
        Ok(())
    });
}

/// Allocates device memory, aligned to 256 bytes or better, with undefined content. Tensors may
/// just as well be memory of the CUDA runtime or of a framework.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_alloc(
    gpu: *const peerlane_gpu,
    bytes: usize,
    memory: *mut *mut c_void,
) -> peerlane_status {
    guard("gpu_alloc", |op| {
        // SAFETY: the header asks for a handle, and room for an address.
        let (gpu, memory) =
            unsafe { (present(op, "gpu", gpu)?, place(op, "memory", memory, null_mut())?) };
        if bytes == 0 {
            return Err(invalid(op, "bytes", "at least 1".into(), 0));
        }
        *memory = gpu.gpu.alloc(bytes)?.0 as *mut c_void;
        Ok(())
    })
}

/// Frees what `peerlane_gpu_alloc` returned, once no queued work uses it any more. Fine with NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_free(
    gpu: *const peerlane_gpu,
    memory: *mut c_void,
) -> peerlane_status {
    guard("gpu_free", |op| {
        // SAFETY: the header asks for a handle.
        let gpu = unsafe { present(op, "gpu", gpu)? };
        if memory.is_null() {
            return Ok(());
        }
        // SAFETY: the header asks that no queued work uses the memory.
        unsafe { gpu.gpu.free(super::arguments::device(memory)) }
    })
}

/// Queues a copy of `bytes` bytes from the host to the GPU. `src` may be reused when the call
/// returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_upload(
    gpu: *const peerlane_gpu,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> peerlane_status {
    guard("gpu_upload", |op| {
        // SAFETY: the header asks for a handle and for `bytes` bytes.
        let (gpu, src) =
            unsafe { (present(op, "gpu", gpu)?, items(op, "src", src.cast::<u8>(), bytes)?) };
        let dst = address(op, "dst", dst, bytes)?;
        // SAFETY: the header asks for `bytes` bytes of device memory.
        unsafe { gpu.gpu.upload(dst, src, self::stream(stream)) }
    })
}

/// Copies `bytes` bytes from the GPU to the host after everything queued on `stream`, and waits for
/// that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_gpu_download(
    gpu: *const peerlane_gpu,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> peerlane_status {
    guard("gpu_download", |op| {
        let from = address(op, "src", src, bytes)?;
        // SAFETY: the header asks for a handle and for room for `bytes` bytes.
        let (gpu, dst) = unsafe { (present(op, "gpu", gpu)?, room(op, "dst", dst, bytes)?) };
        // SAFETY: the header asks for `bytes` bytes of device memory.
        unsafe { gpu.gpu.download(dst, from, self::stream(stream)) }
    })
}

/// Makes a stream that does not wait for the default stream. Streams of the CUDA runtime or of a
/// framework do just as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_stream_create(
    gpu: *const peerlane_gpu,
    stream: *mut *mut c_void,
) -> peerlane_status {
    guard("stream_create", |op| {
        // SAFETY: the header asks for a handle, and room for a stream.
        let (gpu, stream) =
            unsafe { (present(op, "gpu", gpu)?, place(op, "stream", stream, null_mut())?) };
        *stream = gpu.gpu.stream_create()?.0 as *mut c_void;
        Ok(())
    })
}

/// Destroys a stream of `peerlane_stream_create`; work queued on it still completes. Fine with
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_stream_destroy(
    gpu: *const peerlane_gpu,
    stream: *mut c_void,
) -> peerlane_status {
    guard("stream_destroy", |op| {
        // SAFETY: the header asks for a handle.
        let gpu = unsafe { present(op, "gpu", gpu)? };
        if stream.is_null() {
            return Ok(());
        }
        // SAFETY: the header asks for a stream of ours that is not used again.
        unsafe { gpu.gpu.stream_destroy(self::stream(stream)) }
    })
}

/// Waits until everything queued on a stream is done. `peerlane_comm_synchronize` also says whether
/// the communicator's calls went well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_stream_synchronize(
    gpu: *const peerlane_gpu,
    stream: *mut c_void,
) -> peerlane_status {
    guard("stream_synchronize", |op| {
        // SAFETY: the header asks for a handle.
        let gpu = unsafe { present(op, "gpu", gpu)? };
        gpu.gpu.stream_synchronize(self::stream(stream))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(name: &str) -> peerlane_gpu {
        peerlane_gpu::open("gpu_open", name).expect("it is there")
    }

    #[test]
    fn simulated_gpus_of_one_size_are_of_one_machine_while_somebody_holds_it() {
        let (first, second) = (opened("sim:0/13"), opened("sim:12/13"));
        assert!(first.shares_machine(&second));
        assert_eq!(second.gpu.properties().ordinal, 12);
        assert!(!first.shares_machine(&opened("sim:0/12")));
        let memory = first.gpu.alloc(256).expect("there is memory");
        drop(first);
        assert_eq!(opened("sim:0/13").gpu.owner_of(memory), Some(0), "the machine is another");
    }

    #[test]
    fn names_that_name_nothing_are_shown() {
        for name in
            ["", "cuda", "cuda:", "cuda:x", "sim:1", "sim:2/2", "sim:0/0", "sim:0/17", "sim:/3"]
        {
            let error = peerlane_gpu::open("gpu_open", name).err().expect("it is refused");
            let text = error.to_string();
            assert!(text.starts_with("gpu_open: name: expected cuda:K, or sim:K/N"), "{text}");
            assert!(text.ends_with(&format!("got \"{name}\"")), "{text}");
        }
    }
}
