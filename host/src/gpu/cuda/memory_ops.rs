//! Waits for and stores to words of memory that a stream does by itself.
//!
//! Invariant: the second version of the driver's call or none. The first one works only where an
//! administrator has switched it on, and cust_raw's declaration is of that one.

use super::call::{CAPTURE_UNSUPPORTED, NOT_SUPPORTED, check, error_name};
use super::device::{CudaGpu, raw_stream};
use super::driver;
use crate::error::{Error, Result};
use crate::gpu::{MemoryOp, Stream};
use cust::sys;
use std::ffi::c_void;
use std::sync::OnceLock;

/// Most operations that the driver takes at once.
const BATCH: usize = 64;

/// `CUstreamBatchMemOpParams`: 48 bytes, all 0 where an operation has nothing to say.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Parameters {
    operation: u32,
    _padding: u32,
    address: u64,
    value: u64,
    flags: u32,
    _more_padding: u32,
    _alias: u64,
    _reserved: u64,
}

const _: () = assert!(size_of::<Parameters>() == 48);

/// `CU_STREAM_MEM_OP_WAIT_VALUE_32`.
const WAIT_VALUE_32: u32 = 1;
/// `CU_STREAM_MEM_OP_WRITE_VALUE_32`.
const WRITE_VALUE_32: u32 = 2;
/// `CU_STREAM_WAIT_VALUE_EQ`.
const WAIT_EQUAL: u32 = 1;
/// `CU_STREAM_WAIT_VALUE_FLUSH`: what a peer wrote before the word is there for what follows.
const WAIT_FLUSH: u32 = 1 << 30;

/// `cuStreamBatchMemOp_v2`.
type Batch = unsafe extern "C" fn(sys::CUstream, u32, *mut Parameters, u32) -> u32;

/// The driver's call, if it has it.
fn batch() -> Option<Batch> {
    static FOUND: OnceLock<Option<Batch>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let address = driver::optional("cuStreamBatchMemOp_v2")?;
        // SAFETY: the address is the driver's `CUresult cuStreamBatchMemOp_v2(CUstream, unsigned,
        // CUstreamBatchMemOpParams *, unsigned)`, and `CUresult` is 32 bits in C.
        Some(unsafe { std::mem::transmute::<*const c_void, Batch>(address) })
    })
}

impl CudaGpu {
    /// As `stream_memory`.
    ///
    /// # Safety
    /// As for `stream_memory`.
    pub(super) unsafe fn queue_memory_ops(
        &self,
        stream: Stream,
        operations: &[MemoryOp],
    ) -> Result<()> {
        const CALL: &str = "cuStreamBatchMemOp_v2";
        let Some(batch) = batch() else {
            return Err(unsupported(format!("this driver has no {CALL}")));
        };
        let wait_flags = WAIT_EQUAL | if self.can_flush { WAIT_FLUSH } else { 0 };
        let _entered = self.enter()?;
        for some in operations.chunks(BATCH) {
            let mut parameters = [Parameters::default(); BATCH];
            for (to, operation) in parameters.iter_mut().zip(some) {
                *to = translated(*operation, wait_flags);
            }
            // SAFETY: the array has the entries announced and outlives the call, which copies
            // them; the caller answers for the addresses in it.
            let code =
                unsafe { batch(raw_stream(stream), some.len() as u32, parameters.as_mut_ptr(), 0) };
            if code == NOT_SUPPORTED || code == CAPTURE_UNSUPPORTED {
                return Err(unsupported(format!("{CALL}: {}", error_name(code))));
            }
            check(self.ordinal(), CALL, code)?;
        }
        Ok(())
    }
}

fn translated(operation: MemoryOp, wait_flags: u32) -> Parameters {
    let (operation, address, value, flags) = match operation {
        MemoryOp::Wait(at, value) => (WAIT_VALUE_32, at, value, wait_flags),
        // CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER is refused (CUDA_ERROR_INVALID_VALUE, driver 580).
        MemoryOp::Write(to, value) => (WRITE_VALUE_32, to, value, 0),
    };
    Parameters { operation, address: address.0, value: value.into(), flags, ..Default::default() }
}

fn unsupported(reason: String) -> Error {
    Error::Unsupported { op: "stream_memory", reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::DevicePtr;

    #[test]
    fn operations_lie_where_the_driver_reads_them() {
        let wait = translated(MemoryOp::Wait(DevicePtr(0x1234), 7), WAIT_EQUAL | WAIT_FLUSH);
        // SAFETY: 48 bytes without padding, as the assertion on the size says.
        let words = unsafe { std::mem::transmute::<Parameters, [u32; 12]>(wait) };
        assert_eq!(words, [1, 0, 0x1234, 0, 7, 0, 0x4000_0001, 0, 0, 0, 0, 0]);
        assert_eq!(translated(MemoryOp::Write(DevicePtr(4), 1), 9).flags, 0);
    }
}
