//! Finds the NVIDIA driver at run time and gives `cust` its functions.
//!
//! Invariant: this module defines every `cu*` symbol that cust_raw declares, so no program needs
//! libcuda to link or to start. Each symbol is a jump through one slot of a table. A slot leads to
//! the driver's function once [`load`] has found it, and until then, or if the driver lacks it, to
//! a function that returns `CUDA_ERROR_SHARED_OBJECT_INIT_FAILED`. The symbols are hidden: another
//! library of the process that links libcuda never sees them.

use super::call::cu;
use super::symbols::for_each_symbol;
use crate::error::{Error, Result};
use libloading::Library;
use std::error::Error as _;
use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What a function of the driver returns that is not there.
pub(super) const SHARED_OBJECT_INIT_FAILED: u32 = 303;

/// Names to try, the one that the driver package itself installs first.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Stands for a function that is not there. Its caller passes arguments that it ignores, which the
/// C calling convention allows.
extern "C" fn absent() -> u32 {
    SHARED_OBJECT_INIT_FAILED
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the jumps into the CUDA driver are written for x86_64 and aarch64 only");

#[cfg(target_arch = "x86_64")]
macro_rules! jump {
    ($offset:literal) => {
        concat!("jmp *{table}+", $offset, "(%rip)\n")
    };
}

// x16 is the register that the procedure call standard leaves to such veneers.
#[cfg(target_arch = "aarch64")]
macro_rules! jump {
    ($offset:literal) => {
        concat!(
            "adrp x16, {table}+",
            $offset,
            "\nldr x16, [x16, :lo12:{table}+",
            $offset,
            "]\nbr x16\n"
        )
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! assemble {
    ($($text:tt)*) => { std::arch::global_asm!($($text)*, options(att_syntax)); };
}

#[cfg(target_arch = "aarch64")]
macro_rules! assemble {
    ($($text:tt)*) => { std::arch::global_asm!($($text)*); };
}

macro_rules! trampolines {
    ($($name:literal $offset:literal;)*) => {
        /// The functions of the table, in its order.
        const NAMES: &[&str] = &[$($name),*];

        assemble!(
            ".text",
            $(concat!(
                ".p2align 4\n.globl ", $name, "\n.hidden ", $name, "\n.type ", $name, ",@function\n",
                $name, ":\n", jump!($offset), ".size ", $name, ", . - ", $name,
            ),)*
            table = sym TABLE
        );
    };
}
for_each_symbol!(trampolines);

/// Where each trampoline leads.
static TABLE: [AtomicPtr<c_void>; NAMES.len()] =
    [const { AtomicPtr::new(absent as *mut c_void) }; NAMES.len()];

/// The driver library, which is never closed: the table leads into it.
static LIBRARY: OnceLock<Library> = OnceLock::new();

/// Loads the driver and initialises it, once for the process. Later calls repeat the first answer.
///
/// # Errors
/// [`Error::NoDriver`] with the loader's words if there is no driver library, [`Error::Driver`] if
/// the library is there but cannot start.
pub fn load() -> Result<()> {
    static ANSWER: OnceLock<Result<()>> = OnceLock::new();
    let answer = ANSWER.get_or_init(|| {
        let library = open(&LIBRARIES)?;
        fill(LIBRARY.get_or_init(|| library));
        // SAFETY: cuInit takes no pointer.
        unsafe { cu!(0, cuInit(0)) }
    });
    answer.clone()
}

/// The driver's CUDA version as (major, minor).
pub fn version() -> Result<(u32, u32)> {
    load()?;
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    unsafe { cu!(0, cuDriverGetVersion(&mut version)) }?;
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

/// A function of the driver that cust_raw does not declare; `None` if this driver lacks it.
pub(super) fn optional(name: &str) -> Option<*const c_void> {
    // SAFETY: the symbol is only turned into an address; who calls it says what it is.
    let symbol = unsafe { LIBRARY.get()?.get::<*const c_void>(name) };
    symbol.ok().map(|symbol| *symbol)
}

fn open(names: &[&str]) -> Result<Library> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: the driver's initialisers are those that every CUDA program runs.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(error) => reasons.push(loader_words(&error)),
        }
    }
    Err(Error::NoDriver { reason: reasons.join("; ") })
}

/// What the loader said; libloading wraps it.
fn loader_words(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |words| words.to_string())
}

/// Points every slot whose function `library` has at that function.
fn fill(library: &Library) {
    for (name, slot) in NAMES.iter().zip(&TABLE) {
        // SAFETY: the symbol is only turned into an address; it is called through cust_raw's
        // declaration of the same name.
        if let Ok(symbol) = unsafe { library.get::<*mut c_void>(*name) } {
            slot.store(*symbol, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trampoline_has_its_own_slot() {
        macro_rules! offsets {
            ($($name:literal $offset:literal;)*) => { [$($offset),*] };
        }
        let offsets: &[usize] = &for_each_symbol!(offsets);
        assert!(offsets.iter().enumerate().all(|(index, &offset)| offset == 8 * index));
    }

    #[test]
    fn absence_is_an_error_that_says_what_the_loader_said() {
        let error = open(&["libno-such-driver.so.1", "libno-such-driver.so"]).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("no NVIDIA driver: "), "{text}");
        assert!(text.contains("libno-such-driver.so.1: cannot open"), "{text}");
        assert!(text.contains("libno-such-driver.so: cannot open"), "{text}");
    }

    #[test]
    fn calls_fail_in_order_while_there_is_no_driver() {
        if !matches!(load(), Err(Error::NoDriver { .. })) {
            return; // A machine with a driver; the tests of `device` run there.
        }
        assert!(matches!(version(), Err(Error::NoDriver { .. })));
        assert!(optional("cuFuncLoad").is_none());
        let mut count = 0;
        // SAFETY: `count` outlives the call.
        let answer = unsafe { cu!(3, cuDeviceGetCount(&mut count)) };
        assert_eq!(
            answer,
            Err(Error::Driver {
                call: "cuDeviceGetCount",
                device: 3,
                code: SHARED_OBJECT_INIT_FAILED,
                name: "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED".into(),
            })
        );
    }
}
