//! For fuzzing and tests: messages, byte by byte, to the host of a meeting and to a guest, and a segment of any bytes.
//!
//! Invariant: nothing in here waits. A scene ends when what was sent has been read.

use super::host::Host;
use super::processes::{Processes, Terms};
use super::segment::{self, Segment};
use super::socket::{Claim, Connection, Listener};
use crate::call_log::{CallLog, Signature};
use crate::mailbox::Board;
use peerlane_device::abi::{Operation, ReduceOp};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Result;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Most files that a scene sends with a message.
const FILES: usize = 20;
/// A meeting's patience that does not end while a scene lasts.
const LONG: Duration = Duration::from_secs(3600);

/// A name that no other meeting has.
fn name() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("raw/{}/{number}", std::process::id())
}

/// Sends `bytes` as they are.
pub(super) fn send(to: &Connection, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
}

/// Two ends of a connection: that of a host, and that of a guest.
pub(super) fn pair() -> Option<(Connection, Connection)> {
    let name = name();
    let Ok(Claim::Host(listener)) = Listener::claim(&name) else { return None };
    let guest = Connection::open(&name).ok()??;
    Some((listener.accept().ok()?, guest))
}

/// A file that says nothing.
pub(super) fn empty_file() -> Option<OwnedFd> {
    memfd_create("peerlane test", MemfdFlags::CLOEXEC).ok()
}

/// A sealed file of two pages.
pub(crate) fn small_file() -> Option<OwnedFd> {
    let file =
        memfd_create("peerlane test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).ok()?;
    ftruncate(&file, 8192).ok()?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).ok()?;
    Some(file)
}

/// A byte from the front.
fn byte(data: &mut &[u8]) -> Option<u8> {
    let (first, rest) = data.split_first()?;
    *data = rest;
    Some(*first)
}

/// Up to a byte 0, which no JSON holds, from the front.
fn line<'a>(data: &mut &'a [u8]) -> &'a [u8] {
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (line, rest) = data.split_at(end);
    *data = rest.get(1..).unwrap_or_default();
    line
}

/// What a host of a meeting does with messages: for each a byte that says which of four connections it comes
/// from and how many files it brings, and its bytes up to a 0.
pub(crate) fn host_hears(mut data: &[u8]) {
    let world = 1 + u32::from(byte(&mut data).unwrap_or_default() % 3);
    let name = name();
    let Ok(Claim::Host(listener)) = Listener::claim(&name) else { return };
    let Ok(segment) = Segment::create(world) else { return };
    let mut host = Host::new(listener, Arc::new(segment), (0, world), LONG, &Terms::default());
    let mut guests: [Option<Connection>; 4] = Default::default();
    let Some(file) = empty_file() else { return };
    while let Some(head) = byte(&mut data) {
        let guest = &mut guests[usize::from(head & 3)];
        if head & 4 != 0 || guest.is_none() {
            *guest = Connection::open(&name).ok().flatten();
        }
        let files = vec![file.as_fd(); usize::from(head >> 3) % (FILES + 1)];
        if let Some(guest) = guest {
            let _ = send(guest, line(&mut data), &files);
        }
        // One turn accepts, the next lets in or hears.
        if host.react().and_then(|()| host.react()).is_err() {
            return;
        }
    }
}

/// What a guest does with what its host says: a byte for world and rank, then two messages as above.
pub(crate) fn guest_hears(mut data: &[u8]) {
    let head = byte(&mut data).unwrap_or_default();
    let world = 1 + u32::from(head % 3);
    let Some((host, guest)) = pair() else { return };
    let Ok(segment) = Segment::create(world) else { return };
    while let Some(head) = byte(&mut data) {
        // The segment is what a guest wants first.
        let files = vec![segment.as_fd(); usize::from(head) % (FILES + 1)];
        let _ = send(&host, line(&mut data), &files);
    }
    let _ = rustix::net::shutdown(&host, rustix::net::Shutdown::Write);
    let meeting = Processes { name: "raw".into(), world, patience: LONG };
    let rank = u32::from(head >> 4) % world;
    let Ok(Some(seat)) = meeting.take_seat((rank, &Terms::default()), guest, Instant::now() + LONG)
    else {
        return;
    };
    if let Ok(all) = seat.exchange(&serde_json::Value::Null, None) {
        assert_eq!(all.len(), world as usize, "the values of all ranks, or none");
    }
}

/// What a process reads in a segment of which anybody has written anything: a byte for the world, one that asks for
/// a file of these very bytes, and pieces (offset in words, length, bytes) for a segment.
pub(crate) fn segment(mut data: &[u8]) {
    let world = 1 + u32::from(byte(&mut data).unwrap_or_default() % 16);
    let whole = byte(&mut data).unwrap_or_default() & 1 != 0;
    if whole {
        let Some(file) = empty_file() else { return };
        if ftruncate(&file, data.len() as u64).is_ok() {
            let _ = rustix::io::pwrite(&file, data, 0);
            if let Ok(segment) = Segment::open(file, world) {
                read(&segment, world);
            }
        }
        return;
    }
    let Ok(made) = Segment::create(world) else { return };
    let Ok(file) = made.as_fd().try_clone_to_owned() else { return };
    while let [low, high, length, rest @ ..] = data {
        let (piece, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        let at = 4 * u64::from(u16::from_le_bytes([*low, *high]));
        if at + piece.len() as u64 <= made.bytes() as u64 {
            let _ = rustix::io::pwrite(&file, piece, at);
        }
        data = rest;
    }
    if let Ok(segment) = Segment::open(file, world) {
        read(&segment, world);
    }
}

/// Reads all of it.
fn read(segment: &Segment, world: u32) {
    let _ = segment.number();
    for rank in 0..world {
        let _ = (segment.presence(rank), segment.pid(rank), segment.is_last(rank));
        let _ = segment.is_gone(rank, 0);
        // SAFETY: a board lies in every page, and all its bytes mean something.
        let board =
            unsafe { segment.page(rank).add(Board::OFFSET).cast::<Board>().read_volatile() };
        if let Some((_, peer)) = board.waits() {
            assert!(peer < 16);
        }
        // SAFETY: the page begins with the abort word.
        let abort = unsafe { segment.page(rank).cast::<u32>().read_volatile() };
        if let Some(lost) = segment::lost_rank(abort) {
            let _ = segment.pid(lost);
        }
        segment.lose(rank);
    }
    let Ok(again) = segment.as_fd().try_clone_to_owned() else { return };
    let Ok(again) = Segment::open(again, world) else { return };
    let log = CallLog::shared(world, Arc::new(again));
    let signature = Signature {
        operation: Operation::AllReduce,
        element: None,
        op: ReduceOp::Sum,
        algorithm: 1,
        root: 0,
        bytes: 64,
        shape: 0,
    };
    for rank in 0..world {
        let everyone = ((1 << world) - 1) & !(1 << rank);
        if let Err(error) = log.enter(rank, everyone, &mut vec![0; world as usize], signature) {
            assert!(error.to_string().len() < 1000);
        }
    }
}
