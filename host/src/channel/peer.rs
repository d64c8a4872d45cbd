//! Who is at the other end, and whether that process is still there.
//!
//! Invariant: a process is its number and when it started, so a number that was used again is not taken for it. The
//! number comes from shared memory and is used to look, never to signal.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Least time between two looks at one process: less than a wait sleeps without a look.
const AGAIN: Duration = Duration::from_millis(10);

/// A process, in one word: its number (22 bits, as many as Linux gives them), when it started (40 bits of clock ticks), and
/// two bits that say it is there and whether it has closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pid: u32,
    started: u64,
}

const NUMBER: u64 = (1 << 22) - 1;
const TIME: u64 = (1 << 40) - 1;
const THERE: u64 = 1 << 62;
/// Set beside the process when it has closed its end.
pub(super) const GONE: u64 = 1 << 63;

impl Process {
    /// This one.
    pub(crate) fn this() -> Result<Process, String> {
        let pid = std::process::id();
        match look(pid) {
            Look::There { started, .. } => Ok(Process { pid, started }),
            _ => Err("/proc/self/stat cannot be read".into()),
        }
    }

    pub(crate) fn pid(self) -> u32 {
        self.pid
    }

    pub(crate) fn pack(self) -> u64 {
        THERE | u64::from(self.pid) & NUMBER | self.started << 22
    }

    /// The process that a word names, if it names one.
    pub(crate) fn unpack(word: u64) -> Option<Process> {
        let pid = (word & NUMBER) as u32;
        let there = word & THERE != 0 && pid != 0;
        there.then_some(Process { pid, started: word >> 22 & TIME })
    }

    /// Whether its number is still its own.
    fn is_listed(self) -> bool {
        matches!(look(self.pid), Look::There { started, .. } if started == self.started)
    }

    /// Whether it may be running still: not if it is known to have ended.
    pub(crate) fn is_running(self) -> bool {
        match look(self.pid) {
            Look::Gone => false,
            // Too many open files, say: no reason to think that it has ended.
            Look::Unknown => true,
            Look::There { started, .. } if started != self.started => false,
            // Its first thread has ended, and others may not have.
            Look::There { state: b'Z' | b'X', .. } => threads(self.pid) > 1,
            Look::There { .. } => true,
        }
    }
}

/// What the kernel says of a process.
enum Look {
    Gone,
    Unknown,
    There { state: u8, started: u64 },
}

fn look(pid: u32) -> Look {
    let stat = match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) => {
            let gone = [Errno::NOENT, Errno::SRCH].map(|errno| Some(errno.raw_os_error()));
            return if gone.contains(&error.raw_os_error()) { Look::Gone } else { Look::Unknown };
        }
    };
    // The name of the program may hold anything, spaces, brackets and what is no text too.
    let fields = || {
        let name = stat.iter().rposition(|byte| *byte == b')')?;
        let mut fields = std::str::from_utf8(&stat[name + 1..]).ok()?.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        // Field 22 of all; the state was the third.
        let started: u64 = fields.nth(18)?.parse().ok()?;
        Some(Look::There { state, started: started & TIME })
    };
    fields().unwrap_or(Look::Unknown)
}

fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// Watches a process.
pub(super) struct Watch {
    pub(super) process: Process,
    how: How,
    looked: Option<Instant>,
}

enum How {
    /// It becomes readable when the process ends.
    Descriptor(OwnedFd),
    /// Where there are no such descriptors.
    Look,
    /// This process: whoever asks is there.
    Own,
}

impl Watch {
    pub(super) fn new(process: Process) -> Watch {
        let looked = None;
        if process.pid == std::process::id() && process.is_listed() {
            return Watch { process, how: How::Own, looked };
        }
        let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
        let opened = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Looked at after it was opened: if the number is the process's own now, so is the descriptor.
        let how = match opened.filter(|_| process.is_listed()) {
            Some(descriptor) => How::Descriptor(descriptor),
            None => How::Look,
        };
        Watch { process, how, looked }
    }

    /// Whether it has ended, or had when it was looked last, a moment ago: who polls in a loop does not pay for a look
    /// each time.
    pub(super) fn is_gone(&mut self) -> bool {
        let now = Instant::now();
        if self.looked.is_some_and(|looked| now - looked < AGAIN) {
            return false;
        }
        self.looked = Some(now);
        match &self.how {
            How::Own => false,
            How::Look => !self.process.is_running(),
            How::Descriptor(descriptor) => {
                let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                matches!(poll(&mut polled, Some(&now)), Ok(1..))
            }
        }
    }
}
