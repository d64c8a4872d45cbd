//! Status codes, the message of the last error, and the wall that panics do not pass.
//!
//! Invariant: every function that returns a status runs inside [`guard`], so whatever is not
//! `PEERLANE_OK` has left its message with the calling thread.

use crate::channel::Fault;
use crate::error::{Error, Result};
use crate::transfer;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_status {
    /// It did what it should.
    PEERLANE_OK = 0,
    /// An argument is not what the call can work with. Nothing has changed.
    PEERLANE_INVALID_ARGUMENT = 1,
    /// Two ranks called different things. Nothing has changed; the rank may call again.
    PEERLANE_MISMATCH = 2,
    /// The machine cannot do it.
    PEERLANE_UNSUPPORTED = 3,
    /// No NVIDIA driver could be loaded.
    PEERLANE_NO_DRIVER = 4,
    /// A call of the CUDA driver failed.
    PEERLANE_DRIVER = 5,
    /// Two GPUs cannot reach each other.
    PEERLANE_UNREACHABLE = 6,
    /// A wait on the GPU reached its deadline.
    PEERLANE_TIMEOUT = 7,
    /// The communicator was aborted, by this rank or by another.
    PEERLANE_ABORTED = 8,
    /// The process of a rank has ended without closing its communicator.
    PEERLANE_PEER_LOST = 9,
    /// What a GPU read is not what its peer wrote.
    PEERLANE_CORRUPT = 10,
    /// The ranks did not meet.
    PEERLANE_RENDEZVOUS = 11,
    /// The communicator is closed.
    PEERLANE_CLOSED = 12,
    /// A simulated GPU found a kernel doing what hardware would not forgive.
    PEERLANE_SIMULATED = 13,
    /// A bug in Peerlane.
    PEERLANE_INTERNAL = 14,
}

use peerlane_status::*;

/// Every status with its name.
const NAMES: [(peerlane_status, &CStr); 15] = [
    (PEERLANE_OK, c"PEERLANE_OK"),
    (PEERLANE_INVALID_ARGUMENT, c"PEERLANE_INVALID_ARGUMENT"),
    (PEERLANE_MISMATCH, c"PEERLANE_MISMATCH"),
    (PEERLANE_UNSUPPORTED, c"PEERLANE_UNSUPPORTED"),
    (PEERLANE_NO_DRIVER, c"PEERLANE_NO_DRIVER"),
    (PEERLANE_DRIVER, c"PEERLANE_DRIVER"),
    (PEERLANE_UNREACHABLE, c"PEERLANE_UNREACHABLE"),
    (PEERLANE_TIMEOUT, c"PEERLANE_TIMEOUT"),
    (PEERLANE_ABORTED, c"PEERLANE_ABORTED"),
    (PEERLANE_PEER_LOST, c"PEERLANE_PEER_LOST"),
    (PEERLANE_CORRUPT, c"PEERLANE_CORRUPT"),
    (PEERLANE_RENDEZVOUS, c"PEERLANE_RENDEZVOUS"),
    (PEERLANE_CLOSED, c"PEERLANE_CLOSED"),
    (PEERLANE_SIMULATED, c"PEERLANE_SIMULATED"),
    (PEERLANE_INTERNAL, c"PEERLANE_INTERNAL"),
];

const VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version holds no NUL"),
    };

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The library's version, for example "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn peerlane_version() -> *const c_char {
    VERSION.as_ptr()
}

/// The name of a status, for example "PEERLANE_TIMEOUT". Never NULL, whatever the number.
#[unsafe(no_mangle)]
pub extern "C" fn peerlane_status_name(status: MaybeUninit<peerlane_status>) -> *const c_char {
    let bits = super::arguments::bits(status);
    let found = NAMES.iter().find(|(known, _)| *known as u32 == bits);
    found.map_or(c"unknown status", |(_, name)| name).as_ptr()
}

/// What the last call that failed on this thread had to say; empty if none has. Never NULL. Calls
/// that succeed leave it; the text is valid until the next call on this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn peerlane_last_error() -> *const c_char {
    // A thread on its way out has no message any more.
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of the function called `op`, without the prefix, and says how it went.
pub(super) fn guard(
    op: &'static str,
    body: impl FnOnce(&'static str) -> Result<()>,
) -> peerlane_status {
    // What a panic leaves half done is behind a lock or was only being made; see `peerlane_comm`.
    match catch_unwind(AssertUnwindSafe(|| body(op))) {
        Ok(Ok(())) => PEERLANE_OK,
        Ok(Err(error)) => {
            remember(error.to_string());
            code(&error)
        }
        Err(panic) => {
            remember(format!("{op}: a bug in Peerlane: {}", panic_text(&*panic)));
            // A payload may panic when dropped, and nobody is left to catch that.
            std::mem::forget(panic);
            PEERLANE_INTERNAL
        }
    }
}

fn remember(message: String) {
    let text = CString::new(message.replace('\0', "\\0")).unwrap_or_default();
    // Without thread-local storage (the thread is ending) there is nobody to tell.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn code(error: &Error) -> peerlane_status {
    match error {
        Error::InvalidArgument { .. } => PEERLANE_INVALID_ARGUMENT,
        Error::Mismatch { .. } => PEERLANE_MISMATCH,
        Error::Unsupported { .. } => PEERLANE_UNSUPPORTED,
        Error::NoDriver { .. } => PEERLANE_NO_DRIVER,
        Error::Driver { .. } => PEERLANE_DRIVER,
        Error::Unreachable { .. } => PEERLANE_UNREACHABLE,
        Error::Timeout { .. } => PEERLANE_TIMEOUT,
        Error::Aborted { .. } | Error::Stopped { .. } => PEERLANE_ABORTED,
        Error::PeerLost { .. } => PEERLANE_PEER_LOST,
        Error::Corrupt { .. } => PEERLANE_CORRUPT,
        Error::Rendezvous { .. } => PEERLANE_RENDEZVOUS,
        Error::Closed { .. } => PEERLANE_CLOSED,
        Error::Simulated { .. } => PEERLANE_SIMULATED,
        Error::Channel { fault, .. } => match fault {
            Fault::Timeout { .. } => PEERLANE_TIMEOUT,
            Fault::Died { .. } => PEERLANE_PEER_LOST,
            Fault::Closed { .. } => PEERLANE_CLOSED,
            Fault::Poisoned { .. } => PEERLANE_ABORTED,
            Fault::Corrupt { .. } => PEERLANE_CORRUPT,
        },
        Error::Transfer { fault } => match fault {
            transfer::Fault::Stale { .. } | transfer::Fault::Gone { .. } => PEERLANE_CLOSED,
            transfer::Fault::Full { .. } | transfer::Fault::NoMemory(_) => PEERLANE_UNSUPPORTED,
            transfer::Fault::Corrupt { .. } => PEERLANE_CORRUPT,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pointer: *const c_char) -> String {
        // SAFETY: the functions under test return NUL-terminated text that lives until the next
        // failure on this thread.
        unsafe { CStr::from_ptr(pointer) }.to_str().expect("it is UTF-8").to_owned()
    }

    #[test]
    fn names_are_the_codes_own() {
        for (index, (status, name)) in NAMES.iter().enumerate() {
            assert_eq!(*status as usize, index);
            assert_eq!(name.to_str(), Ok(format!("{status:?}").as_str()));
            assert_eq!(
                text(peerlane_status_name(MaybeUninit::new(*status))),
                format!("{status:?}")
            );
        }
        assert_eq!(text(peerlane_version()), env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        assert_eq!(text(peerlane_last_error()), "");
        let status = guard("barrier", |_| panic!("rank {} is on fire", 3));
        assert_eq!(status, PEERLANE_INTERNAL);
        assert_eq!(text(peerlane_last_error()), "barrier: a bug in Peerlane: rank 3 is on fire");
        assert_eq!(guard("barrier", |_| Ok(())), PEERLANE_OK);
        assert!(text(peerlane_last_error()).contains("on fire"), "a success erases nothing");
    }

    #[test]
    fn messages_survive_a_nul_and_belong_to_their_thread() {
        let reason = "a\0b".to_owned();
        let status = guard("connect", |_| Err(Error::Rendezvous { world: 2, reason }));
        assert_eq!(status, PEERLANE_RENDEZVOUS);
        assert_eq!(text(peerlane_last_error()), "rendezvous of 2 ranks: a\\0b");
        let elsewhere = std::thread::spawn(|| text(peerlane_last_error()));
        assert_eq!(elsewhere.join().expect("it does not panic"), "");
    }
}
