//! The memory that all processes of a group share, and what they read in it about each other.
//!
//! Invariant: the file behind it has no name, so it goes when the last process does, and it is sealed, so nobody can
//! cut it off under those who have mapped it. Every word is
//! atomic or written by one side only; a rank's page is pinned for its own GPU, so the word that
//! another process stores there to stop a wait is the word that a kernel polls.
//!
//! ```text
//! page 0          magic, protocol, world size, the group's number
//! page 1 + rank   Status (kernel and hosts); at Board::OFFSET the Board of scheduled calls;
//!                 at HOST presence, pid, pid namespace
//! then            the call log
//! ```

use crate::call_log::{self, Entry};
use crate::mailbox::Board;
use crate::sealed;
use peerlane_device::abi::{MAX_RANKS, Status};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::Pid;
use std::ffi::c_void;
use std::hash::BuildHasher;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Says that the memory is a segment of this layout.
const MAGIC: u32 = 0x5045_4552;
/// Bytes in a rank's page.
pub(crate) const PAGE: usize = 4096;
/// Where a page's words for hosts begin.
const HOST: usize = 2048;
const _: () = assert!(size_of::<Status>() <= Board::OFFSET);
const _: () = assert!(Board::OFFSET + size_of::<Board>() <= HOST);

/// What a host stores in a status page's abort word to stop that rank's waits.
pub(crate) const ABORTED: u32 = 1;
/// What it stores because a peer is gone: this plus the peer's rank.
pub(crate) const LOST: u32 = 0x100;

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Presence {
    /// It has not joined.
    Absent = 0,
    /// It has joined.
    Joined = 1,
    /// It has closed its communicator: it writes into no mailbox any more.
    Left = 2,
    /// Its process has ended before it left.
    Lost = 3,
}

/// The shared memory, mapped.
pub(crate) struct Segment {
    file: OwnedFd,
    base: NonNull<u8>,
    world: u32,
}

// SAFETY: what other threads and processes change is reached through atomics and volatile accesses.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

fn bytes(world: u32) -> usize {
    let log = call_log::entries(world) * size_of::<Entry>();
    PAGE * (1 + world as usize) + log.next_multiple_of(PAGE)
}

impl Segment {
    /// Makes the memory for a group of `world` ranks.
    pub(super) fn create(world: u32) -> rustix::io::Result<Segment> {
        let file = sealed::create("peerlane", bytes(world))?;
        let segment = Segment::map(file, world)?;
        segment.header(0).store(MAGIC, Ordering::Relaxed);
        segment.header(1).store(super::PROTOCOL, Ordering::Relaxed);
        segment.header(2).store(world, Ordering::Relaxed);
        let number = std::hash::RandomState::new().hash_one(std::process::id());
        segment.header(3).store(number as u32, Ordering::Relaxed);
        segment.header(4).store((number >> 32) as u32, Ordering::Relaxed);
        Ok(segment)
    }

    /// Maps memory that another process has made; says what is wrong with it.
    pub(super) fn open(file: OwnedFd, world: u32) -> Result<Segment, String> {
        sealed::check(&file, bytes(world))?;
        let segment = Segment::map(file, world).map_err(|error| error.to_string())?;
        let found = [0, 1, 2].map(|index| segment.header(index).load(Ordering::Relaxed));
        let expected = [MAGIC, super::PROTOCOL, world];
        if found != expected {
            return Err(format!("expected shared memory marked {expected:x?}, got {found:x?}"));
        }
        Ok(segment)
    }

    fn map(file: OwnedFd, world: u32) -> rustix::io::Result<Segment> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses where; nothing is there.
        let base = unsafe {
            let anywhere = std::ptr::null_mut();
            rustix::mm::mmap(anywhere, bytes(world), access, MapFlags::SHARED, &file, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Segment { file, base, world })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= bytes(self.world));
        // SAFETY: inside the mapping, aligned, and accessed as an atomic by every process.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn header(&self, index: usize) -> &AtomicU32 {
        self.word(4 * index)
    }

    fn offset(rank: u32) -> usize {
        PAGE * (1 + rank as usize)
    }

    /// A number that no other group has: drawn at random when the memory was made.
    pub(crate) fn number(&self) -> u64 {
        let word = |index| u64::from(self.header(index).load(Ordering::Relaxed));
        word(3) | word(4) << 32
    }

    /// Its size.
    #[cfg(any(fuzzing, test))]
    pub(super) fn bytes(&self) -> usize {
        bytes(self.world)
    }

    /// Number of ranks.
    pub(super) fn world(&self) -> u32 {
        self.world
    }

    /// The page of `rank`, whose beginning is its [`Status`].
    pub(crate) fn page(&self, rank: u32) -> *mut u8 {
        assert!(rank < self.world);
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(Self::offset(rank)) }
    }

    /// The entries of the call log.
    pub(crate) fn log(&self) -> *const Entry {
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(Self::offset(self.world)).cast_const().cast() }
    }

    /// Where `rank` stands.
    pub(crate) fn presence(&self, rank: u32) -> Presence {
        match self.word(Self::offset(rank) + HOST).load(Ordering::Acquire) {
            1 => Presence::Joined,
            2 => Presence::Left,
            3 => Presence::Lost,
            _ => Presence::Absent,
        }
    }

    /// Says where `rank` stands.
    pub(super) fn set_presence(&self, rank: u32, presence: Presence) {
        self.word(Self::offset(rank) + HOST).store(presence as u32, Ordering::Release);
    }

    /// The process of `rank`; 0 if there is no such rank.
    pub(crate) fn pid(&self, rank: u32) -> u32 {
        if rank >= self.world {
            return 0;
        }
        self.word(Self::offset(rank) + HOST + 4).load(Ordering::Relaxed)
    }

    /// Whether the process of `rank` can be found by its number from a process in `namespace`, and
    /// is gone.
    pub(super) fn is_gone(&self, rank: u32, namespace: u32) -> bool {
        let theirs = self.word(Self::offset(rank) + HOST + 8).load(Ordering::Relaxed);
        // Any process may have written it, and a negative number would mean a group of processes.
        let number = i32::try_from(self.pid(rank)).unwrap_or_default();
        let pid = Pid::from_raw(number).filter(|_| theirs == namespace);
        pid.map(rustix::process::test_kill_process) == Some(Err(rustix::io::Errno::SRCH))
    }

    /// Notes the process of `rank`, and the namespace in which that is its number.
    pub(super) fn set_process(&self, rank: u32, pid: u32, namespace: u32) {
        self.word(Self::offset(rank) + HOST + 4).store(pid, Ordering::Relaxed);
        self.word(Self::offset(rank) + HOST + 8).store(namespace, Ordering::Relaxed);
    }

    /// Notes that the process of `lost` has ended, and stops everybody's waits, if it had joined
    /// and not left. More than one process may notice.
    pub(super) fn lose(&self, lost: u32) {
        let presence = self.word(Self::offset(lost) + HOST);
        let (from, to) = (Presence::Joined as u32, Presence::Lost as u32);
        let changed = presence.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        if changed.is_ok() {
            // A rank that takes its abort word back looks at this after that, or its word is seen here.
            fence(Ordering::SeqCst);
            for rank in 0..self.world {
                // The first reason is the one to report.
                let abort = self.word(Self::offset(rank) + std::mem::offset_of!(Status, abort));
                let _ = abort.compare_exchange(0, LOST + lost, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }

    /// Tells `rank` that `lost` is gone, whoever has stopped its waits meanwhile.
    pub(crate) fn tell_lost(&self, rank: u32, lost: u32) {
        let abort = self.word(Self::offset(rank) + std::mem::offset_of!(Status, abort));
        for before in [0, ABORTED] {
            let _ =
                abort.compare_exchange(before, LOST + lost, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Whether every rank but `rank` has left or is lost.
    pub(super) fn is_last(&self, rank: u32) -> bool {
        let others = (0..self.world).filter(|other| *other != rank);
        others.map(|other| self.presence(other)).all(|p| p != Presence::Joined)
    }
}

/// The rank that is gone, if that is why `abort` was stored in a status page.
pub(crate) fn lost_rank(abort: u32) -> Option<u32> {
    abort.checked_sub(LOST).filter(|rank| *rank < MAX_RANKS as u32)
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let base: *mut c_void = self.base.as_ptr().cast();
        // SAFETY: mapped in `map` with this size; whoever holds a pointer into it holds the segment.
        let _ = unsafe { rustix::mm::munmap(base, bytes(self.world)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::Errno;

    const WORLD: u32 = 3;

    /// The file of a segment of three ranks in which `change` was made.
    fn file(change: impl Fn(&Segment)) -> OwnedFd {
        let segment = Segment::create(WORLD).unwrap();
        change(&segment);
        segment.file.try_clone().unwrap()
    }

    fn refused(file: OwnedFd, world: u32) -> String {
        Segment::open(file, world).map(drop).unwrap_err()
    }

    #[test]
    fn what_one_process_makes_another_opens() {
        let made = Segment::create(WORLD).unwrap();
        let opened = Segment::open(made.file.try_clone().unwrap(), WORLD).unwrap();
        assert_eq!((opened.number(), opened.world()), (made.number(), WORLD));
        opened.set_presence(2, Presence::Joined);
        assert_eq!(made.presence(2), Presence::Joined);
    }

    #[test]
    fn another_world_magic_or_version_is_refused() {
        for (word, value) in [(0, 0), (0, !MAGIC), (1, super::super::PROTOCOL + 1), (2, WORLD + 1)]
        {
            let reason = refused(
                file(|segment| segment.header(word).store(value, Ordering::Relaxed)),
                WORLD,
            );
            assert!(reason.contains(&format!("{value:x}")), "{reason}");
            assert!(reason.contains("expected shared memory marked"), "{reason}");
        }
    }

    #[test]
    fn another_size_is_refused() {
        for world in [1, 2, 16] {
            let reason = refused(file(|_| {}), world);
            let (expected, found) = (bytes(world), bytes(WORLD));
            let both =
                reason.contains(&expected.to_string()) && reason.contains(&found.to_string());
            assert!(both, "{reason}");
        }
    }

    #[test]
    fn a_file_that_could_be_cut_off_is_refused() {
        let loose = |bytes: usize| {
            let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, bytes as u64).unwrap();
            file
        };
        for bytes in [0, PAGE, bytes(WORLD) - 1, bytes(WORLD), bytes(WORLD) + 1] {
            assert!(refused(loose(bytes), WORLD).contains("sealed"));
        }
        let device = std::fs::File::open("/dev/null").unwrap();
        assert!(refused(device.into(), WORLD).contains("sealed"));
    }

    #[test]
    fn nobody_can_cut_off_what_is_mapped() {
        let segment = Segment::create(WORLD).unwrap();
        let theirs = segment.file.try_clone().unwrap();
        for bytes in [0, PAGE as u64, 1 << 20] {
            assert_eq!(ftruncate(&theirs, bytes), Err(Errno::PERM));
        }
        assert_eq!(segment.presence(2), Presence::Absent, "the last page is there");
    }
}
