//! Messages between the processes of a meeting: whole, in order, with file descriptors if need be.
//!
//! Sockets are of the abstract namespace, whose names vanish with the last socket, so a killed
//! process leaves nothing behind. A message is one packet of a `SOCK_SEQPACKET` connection.

use super::life;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, Result};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::time::Instant;

/// Longest message: 16 ranks' cards are a tenth of that.
const LONGEST: usize = 64 << 10;
/// Most file descriptors in a message: one for each rank.
const MOST_FILES: usize = 16;

/// One end of a connection.
pub(super) struct Connection {
    /// Forgets the socket before it is closed.
    _life: life::Entry,
    socket: OwnedFd,
}

/// Where connections arrive.
pub(super) struct Listener {
    /// Forgets the socket before it is closed.
    _life: life::Entry,
    socket: OwnedFd,
}

/// How an attempt to be the host of a name ended.
pub(super) enum Claim {
    /// The name is this process's now.
    Host(Listener),
    /// Somebody else has it.
    Taken,
}

fn address(name: &str) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new_abstract_name(format!("peerlane/{name}").as_bytes())
}

fn socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

impl Listener {
    /// Takes `name`, if nobody has it.
    pub(super) fn claim(name: &str) -> Result<Claim> {
        let socket = socket()?;
        match rustix::net::bind(&socket, &address(name)?) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => return Ok(Claim::Taken),
            Err(error) => return Err(error),
        }
        rustix::net::listen(&socket, 64)?;
        Ok(Claim::Host(Listener { _life: life::Entry::of(&socket), socket }))
    }

    /// The next connection that waits.
    pub(super) fn accept(&self) -> Result<Connection> {
        life::look();
        rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC).map(Connection::over)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    fn over(socket: OwnedFd) -> Connection {
        Connection { _life: life::Entry::of(&socket), socket }
    }

    /// Connects to the host of `name`; `None` if there is none that listens.
    pub(super) fn open(name: &str) -> Result<Option<Connection>> {
        let socket = socket()?;
        match rustix::net::connect(&socket, &address(name)?) {
            Ok(()) => Ok(Some(Connection::over(socket))),
            Err(Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the process at the other end belongs to the same user.
    pub(super) fn is_same_user(&self) -> bool {
        let peer = rustix::net::sockopt::socket_peercred(&self.socket);
        peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid())
    }

    /// Sends a message, or fails with `AGAIN` if the other end has left so many unread that it does not fit.
    pub(super) fn send(&self, message: &impl Serialize, files: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
        if bytes.len() > LONGEST || files.len() > MOST_FILES {
            return Err(Errno::MSGSIZE);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let parts = [IoSlice::new(&bytes)];
        life::message();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.socket, &parts, &mut control, flags).map(drop)
    }

    /// Receives a message that has come or is about to; `None` if the other end is closed. One that is
    /// larger than a message may be, brings too many files or does not say a `T` is `BADMSG`.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags) {
            Ok(received) => received,
            // What a process that is killed leaves unread resets the connection.
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error),
        };
        life::look();
        let (received, flags) = (received.bytes, received.flags);
        if received == 0 {
            return Ok(None);
        }
        life::message();
        let files = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let files = files.flatten().collect();
        if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Errno::BADMSG);
        }
        let message = serde_json::from_slice(&bytes[..received]).map_err(|_| Errno::BADMSG)?;
        Ok(Some((message, files)))
    }

    /// Tells the other end, and whoever waits at this one, that nothing more will come.
    pub(super) fn shut_down(&self) {
        // It fails only if the other end was faster.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

/// Waits until one of `ends` has something, at most until `deadline`; says which of them have.
pub(super) fn wait(ends: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<Vec<bool>> {
    let mut polled: Vec<_> =
        ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::IN)).collect();
    loop {
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let found = poll(&mut polled, timeout.as_ref());
        life::look();
        match found {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(polled.iter().map(|end| !end.revents().is_empty()).collect()),
        }
    }
}
