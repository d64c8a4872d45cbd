//! The PTX that is built into the library, and loading it on a device.
//!
//! Invariant: a device gets the highest variant that it can run and the driver can compile. PTX for
//! one architecture runs on every later one, so the lowest variant is enough for any supported
//! device; the higher ones have cheaper instructions.

use super::call::{self, INVALID_PTX, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION, check, code, cu};
use super::context::Context;
use super::driver;
use crate::error::{Error, Result};
use crate::gpu::Properties;
use cust::sys;
use peerlane_device::abi::Kernel;
use std::borrow::Cow;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;

/// The environment variable that names the one variant to load, or a file of PTX to load instead: one that
/// was built to be measured.
pub const VARIANT_VARIABLE: &str = "PEERLANE_PTX";

const KERNELS: usize = Kernel::ALL.len();

/// Bytes of the compiler's message that are kept.
const LOG_BYTES: usize = 4096;

/// All kernels as PTX for one architecture.
#[derive(Clone)]
struct Variant {
    name: &'static str,
    compute_capability: (u32, u32),
    ptx: Cow<'static, str>,
}

macro_rules! variant {
    ($name:literal, $major:literal, $minor:literal) => {
        Variant {
            name: $name,
            compute_capability: ($major, $minor),
            ptx: Cow::Borrowed(include_str!(concat!(env!("OUT_DIR"), "/kernels_", $name, ".ptx"))),
        }
    };
}

/// What host/build.rs had compiled, lowest first.
static VARIANTS: [Variant; 3] =
    [variant!("sm_75", 7, 5), variant!("sm_80", 8, 0), variant!("sm_90", 9, 0)];

/// The kernels of checked calls, which come for the oldest devices only.
static CHECKED: Variant = variant!("sm_75_checked", 7, 5);

/// The kernels of one device, ready to launch.
pub(super) struct Kernels {
    module: sys::CUmodule,
    functions: [sys::CUfunction; KERNELS],
    variant: &'static str,
    refusals: Vec<String>,
}

// SAFETY: the driver allows every call on a module and its functions from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads the kernels into `context`.
    pub(super) fn load(context: &Context, properties: &Properties) -> Result<Kernels> {
        let forced = std::env::var(VARIANT_VARIABLE).ok();
        let variants = candidates(properties.compute_capability, forced.as_deref())?;
        let _entered = context.enter()?;
        let mut refusals = Vec::new();
        for variant in &variants {
            match load_module(context, variant)? {
                Ok(module) => {
                    let mut kernels = find_functions(context, variant, module)?;
                    kernels.refusals = refusals;
                    return Ok(kernels);
                }
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(none_left(properties, &refusals))
    }

    /// Loads the kernels of checked calls into `context`.
    pub(super) fn load_checked(context: &Context) -> Result<Kernels> {
        let _entered = context.enter()?;
        match load_module(context, &CHECKED)? {
            Ok(module) => find_functions(context, &CHECKED, module),
            Err(refusal) => Err(Error::Unsupported { op: "load_checked_kernels", reason: refusal }),
        }
    }

    /// The driver's handle of a kernel.
    #[inline]
    pub(super) fn function(&self, kernel: Kernel) -> sys::CUfunction {
        self.functions[kernel as usize]
    }

    /// The architecture that the loaded PTX was made for.
    pub(super) fn variant(&self) -> &'static str {
        self.variant
    }

    /// Why better variants were not loaded, one line for each.
    pub(super) fn refusals(&self) -> &[String] {
        &self.refusals
    }

    /// Unloads the module.
    ///
    /// # Safety
    /// Its context is current and none of its kernels is queued.
    pub(super) unsafe fn unload(&self) {
        // SAFETY: as the caller says. It can fail only when the driver is going down.
        unsafe { code!(cuModuleUnload(self.module)) };
    }
}

/// The variants to try on a device, best first.
fn candidates(capability: (u32, u32), forced: Option<&str>) -> Result<Vec<Variant>> {
    let Some(name) = forced else {
        let runs = |variant: &&Variant| variant.compute_capability <= capability;
        return Ok(VARIANTS.iter().rev().filter(runs).cloned().collect());
    };
    if let Some(variant) = VARIANTS.iter().find(|variant| variant.name == name) {
        return Ok(vec![variant.clone()]);
    }
    let wrong = |got: String| Error::InvalidArgument {
        op: "load_kernels",
        argument: VARIANT_VARIABLE,
        expected: format!("one of {}, or a file that ends in .ptx", names(&VARIANTS)),
        got,
    };
    if !name.ends_with(".ptx") {
        return Err(wrong(format!("{name:?}")));
    }
    let ptx = std::fs::read_to_string(name).map_err(|error| wrong(format!("{name}: {error}")))?;
    let ptx = Cow::Owned(ptx);
    Ok(vec![Variant { name: "a file's", compute_capability: capability, ptx }])
}

fn names<'a>(variants: impl IntoIterator<Item = &'a Variant>) -> String {
    let names: Vec<_> = variants.into_iter().map(|variant| variant.name).collect();
    names.join(", ")
}

/// Loads a variant. The inner error says why this driver cannot use it; another variant may do.
fn load_module(
    context: &Context,
    variant: &Variant,
) -> Result<std::result::Result<sys::CUmodule, String>> {
    let image = CString::new(&*variant.ptx).map_err(|_| Error::Unsupported {
        op: "load_kernels",
        reason: format!("the PTX for {} holds a zero byte", variant.name),
    })?;
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    // The driver takes the size in the pointer's place.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), LOG_BYTES as *mut c_void];
    let mut module = null_mut();
    // SAFETY: `image` ends with a zero byte, the arrays have the two entries announced, and the
    // log has the size given; all outlive the call. The context is current.
    let code = unsafe {
        code!(cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr()
        ))
    };
    if code == 0 {
        return Ok(Ok(module));
    }
    let refusal = refusal(variant.name, &call::error_name(code), &log);
    match code {
        UNSUPPORTED_PTX_VERSION | INVALID_PTX | NO_BINARY_FOR_GPU => Ok(Err(refusal)),
        _ => Err(Error::Driver {
            call: "cuModuleLoadDataEx",
            device: context.ordinal(),
            code,
            name: refusal,
        }),
    }
}

/// "sm_90: CUDA_ERROR_INVALID_PTX: what the compiler wrote".
fn refusal(variant: &str, error: &str, log: &[u8]) -> String {
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]);
    let log: Vec<_> = log.split_whitespace().collect();
    if log.is_empty() {
        format!("{variant}: {error}")
    } else {
        format!("{variant}: {error}: {}", log.join(" "))
    }
}

/// The error when no variant could be used.
fn none_left(properties: &Properties, refusals: &[String]) -> Error {
    let (major, minor) = properties.compute_capability;
    let driver = driver::version()
        .map_or_else(|error| error.to_string(), |(major, minor)| format!("CUDA {major}.{minor}"));
    let why = if refusals.is_empty() {
        format!("there is PTX for {} and later only", VARIANTS[0].name)
    } else {
        refusals.join("; ")
    };
    Error::Unsupported {
        op: "load_kernels",
        reason: format!(
            "no PTX variant runs on GPU {} ({}, sm_{major}{minor}) with driver {driver}: {why}",
            properties.ordinal, properties.name
        ),
    }
}

/// Looks up every kernel. Unloads the module if one is missing.
fn find_functions(context: &Context, variant: &Variant, module: sys::CUmodule) -> Result<Kernels> {
    let mut kernels = Kernels {
        module,
        functions: [null_mut(); KERNELS],
        variant: variant.name,
        refusals: Vec::new(),
    };
    for &kernel in Kernel::ALL {
        match find_function(context, module, kernel) {
            Ok(function) => kernels.functions[kernel as usize] = function,
            Err(error) => {
                // SAFETY: the context is current, and nothing was launched yet.
                unsafe { kernels.unload() };
                return Err(error);
            }
        }
    }
    Ok(kernels)
}

fn find_function(
    context: &Context,
    module: sys::CUmodule,
    kernel: Kernel,
) -> Result<sys::CUfunction> {
    let symbol = CString::new(kernel.symbol()).expect("a symbol holds no zero byte");
    let mut function = null_mut();
    // SAFETY: `symbol` is a C string and `function` a place; both outlive the call.
    let code = unsafe { code!(cuModuleGetFunction(&mut function, module, symbol.as_ptr())) };
    if code != 0 {
        return Err(Error::Driver {
            call: "cuModuleGetFunction",
            device: context.ordinal(),
            code,
            name: format!("{} ({})", call::error_name(code), kernel.symbol()),
        });
    }
    finish_loading(context, function)?;
    Ok(function)
}

/// Loads the code of a function now.
///
/// Drivers load lazily, and loading may wait for the device: a first launch behind a kernel that
/// spins for that very launch would never come. Asking for an attribute loads the function; since
/// CUDA 12.4 there is a call that promises it.
fn finish_loading(context: &Context, function: sys::CUfunction) -> Result<()> {
    let mut registers = 0;
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
    // SAFETY: `registers` outlives the call and `function` came from the driver.
    unsafe { cu!(context.ordinal(), cuFuncGetAttribute(&mut registers, attribute, function)) }?;
    let Some(address) = driver::optional("cuFuncLoad") else {
        return Ok(());
    };
    // SAFETY: the address is the driver's `CUresult cuFuncLoad(CUfunction)`.
    let func_load = unsafe {
        std::mem::transmute::<*const c_void, unsafe extern "C" fn(sys::CUfunction) -> u32>(address)
    };
    // SAFETY: `function` came from the driver and its context is current.
    check(context.ordinal(), "cuFuncLoad", unsafe { func_load(function) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(capability: (u32, u32), forced: Option<&str>) -> String {
        names(&candidates(capability, forced).unwrap())
    }

    #[test]
    fn a_device_tries_what_it_can_run_best_first() {
        assert_eq!(order((12, 0), None), "sm_90, sm_80, sm_75");
        assert_eq!(order((9, 0), None), "sm_90, sm_80, sm_75");
        assert_eq!(order((8, 9), None), "sm_80, sm_75");
        assert_eq!(order((8, 0), None), "sm_80, sm_75");
        assert_eq!(order((7, 5), None), "sm_75");
        assert_eq!(order((7, 0), None), "");
    }

    #[test]
    fn a_forced_variant_is_the_only_one() {
        assert_eq!(order((9, 0), Some("sm_80")), "sm_80");
        let error = candidates((9, 0), Some("/nowhere/k.ptx")).err().unwrap().to_string();
        assert!(error.contains("got /nowhere/k.ptx: No such file"), "{error}");
        let error = candidates((9, 0), Some("sm_42")).err().unwrap();
        assert_eq!(
            error.to_string(),
            "load_kernels: PEERLANE_PTX: expected one of sm_75, sm_80, sm_90, or a file that ends in .ptx, got \"sm_42\""
        );
    }

    #[test]
    fn a_refusal_carries_the_compilers_words() {
        let mut log = [0; 32];
        log[..15].copy_from_slice(b"line 1:\n  error");
        assert_eq!(refusal("sm_90", "E", &log), "sm_90: E: line 1: error");
        assert_eq!(refusal("sm_90", "E", &[0; 4]), "sm_90: E");
    }

    #[test]
    fn an_old_device_learns_what_is_needed() {
        let properties = Properties {
            ordinal: 1,
            name: "Tesla V100".into(),
            uuid: String::new(),
            pci_bus_id: String::new(),
            compute_capability: (7, 0),
            multiprocessors: 80,
            memory_bytes: 0,
        };
        let text = none_left(&properties, &[]).to_string();
        assert!(text.contains("GPU 1 (Tesla V100, sm_70)"), "{text}");
        assert!(text.ends_with("there is PTX for sm_75 and later only"), "{text}");
    }
}
