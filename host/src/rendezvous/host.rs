//! The one who hosts a meeting of processes: a thread of whichever rank came first.
//!
//! Invariant: it ends only when every rank has been answered or has gone. While the ranks meet it
//! passes their values on and tells all of them the same reason if one fails, is late or ends; once
//! they have met it notices, by the end of its connection, a process that ends without leaving.

use super::assembly::other_party;
use super::processes::{Reply, Request, Terms};
use super::segment::{Presence, Segment};
use super::socket::{Connection, Listener, wait};
use super::{PROTOCOL, ranks};
use crate::error::clipped;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most connections that have said nothing: every rank says who it is as soon as it is connected.
pub(super) const MOST_STRANGERS: usize = 64;
/// How long the host waits before it tries again to accept a connection.
const PAUSE: Duration = Duration::from_millis(1);

/// A rank, as the host sees it.
#[derive(Default)]
struct Guest {
    /// None before it came and after it went.
    connection: Option<Connection>,
    pid: u32,
    /// What it brought to the round that is going on.
    value: Option<(String, Option<OwnedFd>)>,
    /// It has all it came for.
    joined: bool,
    /// It has been told why the meeting failed.
    told: bool,
    /// It is not waited for.
    excused: bool,
}

impl Guest {
    /// Whether the round waits for it.
    fn is_awaited(&self) -> bool {
        self.value.is_none() && !self.excused
    }
}

/// The host.
pub(super) struct Host {
    listener: Listener,
    segment: Arc<Segment>,
    /// The rank whose process this is.
    rank: u32,
    /// The ranks that do not come, a bit each.
    without: u32,
    /// Whether who comes after a failure is told of it, instead of coming to the next meeting.
    lingers: bool,
    deadline: Instant,
    patience: Duration,
    guests: Vec<Guest>,
    /// Connections that have not said who they are.
    strangers: Vec<Connection>,
}

impl Host {
    /// The host of a meeting of `world` ranks.
    pub(super) fn new(
        listener: Listener,
        segment: Arc<Segment>,
        (rank, world): (u32, u32),
        patience: Duration,
        terms: &Terms,
    ) -> Host {
        let (without, lingers) = (terms.without, terms.watched.is_none());
        let guest = |rank| {
            let excused = without >> rank & 1 != 0;
            Guest { excused, joined: excused, ..Guest::default() }
        };
        Host {
            listener,
            segment,
            rank,
            without,
            lingers,
            deadline: Instant::now() + patience,
            patience,
            guests: (0..world).map(guest).collect(),
            strangers: Vec::new(),
        }
    }

    /// Does all of it.
    pub(super) fn run(mut self) {
        if let Err(reason) = self.meet() {
            self.fail(&reason);
        }
        // The name is free for the next group; what is left is to notice who ends.
        let Host { listener, strangers, segment, guests, .. } = self;
        drop((listener, strangers));
        let connections = guests.into_iter().map(|guest| guest.connection).collect();
        watch(&segment, connections);
    }

    fn meet(&mut self) -> Result<(), String> {
        while !self.guests.iter().all(|guest| guest.joined) {
            self.turn(Some(self.deadline))?;
            if Instant::now() >= self.deadline {
                return Err(self.late());
            }
            if !self.guests.iter().any(Guest::is_awaited) {
                self.hand_out()?;
            }
        }
        Ok(())
    }

    /// Reacts to what has come, and waits for nothing.
    #[cfg(any(fuzzing, test))]
    pub(super) fn react(&mut self) -> Result<(), String> {
        self.turn(Some(Instant::now()))?;
        if self.guests.iter().all(|guest| guest.value.is_some()) {
            self.hand_out()?;
        }
        Ok(())
    }

    /// Who did not come in time.
    fn late(&self) -> String {
        let late = |guest: &Guest| guest.is_awaited() && !guest.joined;
        let missing =
            (0..).zip(&self.guests).filter(|(_, guest)| late(guest)).map(|(rank, _)| rank);
        format!("waited {:?} in vain for {}", self.patience, ranks(missing))
    }

    /// Waits for something to happen and reacts to it.
    fn turn(&mut self, deadline: Option<Instant>) -> Result<(), String> {
        let present = (0..self.guests.len()).filter(|rank| self.guests[*rank].connection.is_some());
        let present: Vec<usize> = present.collect();
        let guests = present.iter().filter_map(|rank| self.guests[*rank].connection.as_ref());
        let mut ends: Vec<BorrowedFd<'_>> = vec![self.listener.as_fd()];
        ends.extend(guests.chain(&self.strangers).map(AsFd::as_fd));
        let ready = wait(&ends, deadline).map_err(|error| error.to_string())?;
        let strangers = std::mem::take(&mut self.strangers);
        for (stranger, ready) in strangers.into_iter().zip(&ready[1 + present.len()..]) {
            if *ready {
                self.admit(stranger)?;
            } else {
                self.strangers.push(stranger);
            }
        }
        if ready[0] {
            match self.listener.accept() {
                Ok(connection) if connection.is_same_user() => self.strangers.push(connection),
                Ok(_) => {}
                // One that is gone again is nobody's loss; for one more descriptor there may be room later.
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        // The oldest come first.
        let surplus = self.strangers.len().saturating_sub(MOST_STRANGERS);
        self.strangers.drain(..surplus);
        let speaking = present.iter().zip(&ready[1..]).filter(|(_, ready)| **ready);
        speaking.into_iter().try_for_each(|(rank, _)| self.hear(*rank))
    }

    /// Lets a connection take its rank's place. A wrong rank is refused, a wrong world ends the
    /// meeting: it can never be complete.
    fn admit(&mut self, connection: Connection) -> Result<(), String> {
        let Ok(Some((Request::Hello { protocol, version, world, without, rank, process }, _))) =
            connection.receive::<Request>()
        else {
            return Ok(());
        };
        let (pid, namespace) = process;
        let own = (PROTOCOL, env!("CARGO_PKG_VERSION"), self.guests.len() as u32);
        if (protocol, version.as_str(), world) != own {
            let version = clipped(&version);
            let reason = format!(
                "rank {} has version {} (protocol {}) and expects {} ranks, rank {rank} has version {version} (protocol {protocol}) and expects {world}",
                self.rank, own.1, own.0, own.2
            );
            let _ = connection.send(&Reply::Failed(reason.clone()), &[]);
            return Err(reason);
        }
        let expected = self.guests.get(rank as usize).is_some_and(|guest| !guest.excused);
        if without != self.without && expected {
            let reason = other_party((self.rank, self.without), (rank, without));
            let _ = connection.send(&Reply::Failed(reason.clone()), &[]);
            return Err(reason);
        }
        let refusal = match self.guests.get(rank as usize) {
            None => Some(format!("rank {rank} does not exist; ranks go from 0 to {}", world - 1)),
            // Whom the others do not expect takes nobody with it.
            Some(guest) if guest.excused => {
                Some(other_party((self.rank, self.without), (rank, without)))
            }
            // It has all it came for, and comes to the next meeting of this name.
            Some(guest) if guest.joined => return Ok(()),
            Some(guest) if guest.pid != 0 => {
                Some(format!("rank {rank} is used twice, first by pid {}", guest.pid))
            }
            Some(_) if pid == 0 || i32::try_from(pid).is_err() => {
                Some(format!("rank {rank} says that its process is number {pid}"))
            }
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            let _ = connection.send(&Reply::Failed(refusal), &[]);
            return Ok(());
        }
        self.segment.set_process(rank, pid, namespace);
        self.segment.set_presence(rank, Presence::Joined);
        // One that has gone again is noticed when its connection is read.
        let _ = connection.send(&Reply::Welcome { host: self.rank }, &[self.segment.as_fd()]);
        self.guests[rank as usize] =
            Guest { connection: Some(connection), pid, ..Guest::default() };
        Ok(())
    }

    /// Takes a message of a guest.
    fn hear(&mut self, rank: usize) -> Result<(), String> {
        let guest = &mut self.guests[rank];
        let Some(connection) = &guest.connection else { return Ok(()) };
        match connection.receive::<Request>() {
            Ok(Some((Request::Bring(value), files))) => {
                if files.len() > 1 || guest.joined || guest.value.is_some() {
                    let count = files.len();
                    return Err(format!(
                        "rank {rank} brings {count} files, or more than one value"
                    ));
                }
                guest.value = Some((value, files.into_iter().next()));
                Ok(())
            }
            Ok(Some((Request::Joined, _))) => {
                guest.joined = true;
                Ok(())
            }
            Ok(Some((Request::Hello { .. }, _))) => Err(format!("rank {rank} came twice")),
            Err(Errno::BADMSG) if !guest.joined => {
                Err(format!("rank {rank} says what nobody understands"))
            }
            Ok(None) | Err(_) => {
                guest.connection = None;
                self.segment.lose(rank as u32);
                if guest.joined {
                    return Ok(());
                }
                guest.told = true;
                Err(format!("the process of rank {rank} (pid {}) ended", guest.pid))
            }
        }
    }

    /// All ranks, this process's own at the end: what it learns may make it exit, and this thread
    /// with it, before the others have been told.
    fn own_last(&self) -> impl Iterator<Item = usize> + use<> {
        let (own, count) = (self.rank as usize, self.guests.len());
        (0..count).filter(move |rank| *rank != own).chain([own])
    }

    /// Gives everybody everybody's values.
    fn hand_out(&mut self) -> Result<(), String> {
        let taken: Vec<_> = self.guests.iter_mut().filter_map(|guest| guest.value.take()).collect();
        let (values, files): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
        let has_file = files.iter().map(Option::is_some).collect();
        let reply = Reply::All { values, has_file };
        let files: Vec<_> = files.iter().flatten().map(AsFd::as_fd).collect();
        for rank in self.own_last() {
            let connection = self.guests[rank].connection.as_ref();
            // One that has gone is noticed when its connection is read.
            match connection.map(|c| c.send(&reply, &files)) {
                Some(Err(Errno::MSGSIZE)) => {
                    return Err("the ranks bring more than a message holds".into());
                }
                Some(Err(Errno::AGAIN)) => {
                    return Err(format!("rank {rank} does not read what it is told"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Tells everybody why the meeting failed: those who are here, and if it lingers, for as long as ranks may
    /// still come, those who come. A rank that comes again starts a new meeting.
    fn fail(&mut self, reason: &str) {
        let reply = Reply::Failed(reason.to_owned());
        for rank in self.own_last() {
            let guest = &mut self.guests[rank];
            if let Some(connection) = guest.connection.as_ref().filter(|_| !guest.joined) {
                let _ = connection.send(&reply, &[]);
                guest.told = true;
            }
        }
        while self.lingers && !self.guests.iter().all(|guest| guest.told || guest.joined) {
            if Instant::now() >= self.deadline {
                return;
            }
            let Ok(ready) = wait(&[self.listener.as_fd()], Some(self.deadline)) else { return };
            let Some(Ok(late)) = ready[0].then(|| self.listener.accept()) else {
                std::thread::sleep(PAUSE);
                continue;
            };
            if !late.is_same_user() {
                continue;
            }
            let soon = Some(self.deadline.min(Instant::now() + Duration::from_secs(1)));
            if !wait(&[late.as_fd()], soon).is_ok_and(|ready| ready[0]) {
                continue;
            }
            let Ok(Some((Request::Hello { rank, .. }, _))) = late.receive::<Request>() else {
                continue;
            };
            match self.guests.get_mut(rank as usize) {
                Some(guest) if !guest.told => {
                    let _ = late.send(&reply, &[]);
                    guest.told = true;
                }
                _ => return,
            }
        }
    }
}

/// Notices which processes end without having left.
fn watch(segment: &Segment, mut connections: Vec<Option<Connection>>) {
    while connections.iter().any(Option::is_some) {
        let present: Vec<_> =
            (0..connections.len()).filter(|r| connections[*r].is_some()).collect();
        let ends: Vec<_> = connections.iter().flatten().map(AsFd::as_fd).collect();
        let Ok(ready) = wait(&ends, None) else { return };
        for (rank, _) in present.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            let more = connections[rank].as_ref().map(Connection::receive::<Request>);
            if !matches!(more, Some(Ok(Some(_)))) {
                connections[rank] = None;
                segment.lose(rank as u32);
            }
        }
    }
}
