//! Reads what a device is.
//!
//! Invariant: names are spelled as NVML and `nvidia-smi` spell them, so that a device found by one
//! is found by the other.

use super::call::{code, cu};
use super::context::Context;
use super::driver::SHARED_OBJECT_INIT_FAILED;
use crate::error::Result;
use crate::gpu::Properties;
use cust::sys::{self, CUdevice_attribute as Attribute};
use std::ffi::{CStr, c_char};

/// Reads the properties of the device that `context` is on.
pub(super) fn read(context: &Context) -> Result<Properties> {
    let (ordinal, device) = (context.ordinal(), context.device());
    let mut name = [0; 256];
    let mut bus = [0; 32];
    let mut memory_bytes = 0;
    // SAFETY: the buffers have the sizes given, and all places outlive the calls.
    unsafe {
        cu!(ordinal, cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
        cu!(ordinal, cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32 - 1, device))?;
        cu!(ordinal, cuDeviceTotalMem_v2(&mut memory_bytes, device))?;
    }
    Ok(Properties {
        ordinal,
        name: text(&name),
        uuid: uuid(context)?,
        pci_bus_id: text(&bus).to_ascii_lowercase(),
        compute_capability: (
            attribute(context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(context, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory_bytes as u64,
    })
}

/// Whether a wait for a word can also wait for what a peer wrote before the word.
pub(super) fn can_flush(context: &Context) -> Result<bool> {
    attribute(context, Attribute::CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES).map(|can| can != 0)
}

fn attribute(context: &Context, attribute: Attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: `value` outlives the call.
    unsafe {
        cu!(context.ordinal(), cuDeviceGetAttribute(&mut value, attribute, context.device()))
    }?;
    Ok(value as u32)
}

fn uuid(context: &Context) -> Result<String> {
    let mut uuid = sys::CUuuid::default();
    // SAFETY: `uuid` outlives the call.
    let code = unsafe { code!(cuDeviceGetUuid_v2(&mut uuid, context.device())) };
    if code == SHARED_OBJECT_INIT_FAILED {
        // Before CUDA 11.4 there is only the first version, which differs for MIG devices alone.
        // SAFETY: as above.
        unsafe { cu!(context.ordinal(), cuDeviceGetUuid(&mut uuid, context.device())) }?;
    } else {
        super::call::check(context.ordinal(), "cuDeviceGetUuid_v2", code)?;
    }
    Ok(uuid_text(uuid.bytes.map(|byte| byte as u8)))
}

/// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
fn uuid_text(bytes: [u8; 16]) -> String {
    let digits = |range: std::ops::Range<usize>| {
        bytes[range].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let groups = [digits(0..4), digits(4..6), digits(6..8), digits(8..10), digits(10..16)];
    format!("GPU-{}", groups.join("-"))
}

/// The text in a buffer whose last byte the driver never wrote.
fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|&byte| byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_in_nvidia_smi() {
        let bytes = std::array::from_fn(|index| 0x10 * index as u8 + 0x0f);
        assert_eq!(uuid_text(bytes), "GPU-0f1f2f3f-4f5f-6f7f-8f9f-afbfcfdfefff");
    }

    #[test]
    fn a_name_ends_at_its_zero_byte() {
        assert_eq!(text(&[72, 50, 48, 48, 0, 0].map(|byte| byte as c_char)), "H200");
    }
}
