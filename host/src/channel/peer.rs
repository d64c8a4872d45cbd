//! Who is at the other end, and whether that process is still there.
//!
//! Invariant: a process is its number and when it started, so a number that was used again is not taken for it. The
//! number comes from shared memory and is used to look, never to signal.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
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
        let (_, started) = look(pid).ok_or("/proc/self/stat cannot be read")?;
        Ok(Process { pid, started })
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
        look(self.pid).is_some_and(|(_, started)| started == self.started)
    }

    /// Whether it is listed and runs. One whose first thread has ended and others not looks as if it did not.
    pub(crate) fn is_running(self) -> bool {
        let own = look(self.pid).filter(|(_, started)| *started == self.started);
        own.is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
    }
}

/// The state of a process, and when it started.
fn look(pid: u32) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may hold anything, spaces and brackets too.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of all; the state was the third.
    let started: u64 = fields.nth(18)?.parse().ok()?;
    Some((state, started & TIME))
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
