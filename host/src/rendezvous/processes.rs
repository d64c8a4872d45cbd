//! How ranks meet when each is a process of its own, and how they notice that one is gone.
//!
//! The first to come hosts the meeting under a name in the abstract socket namespace: nothing
//! appears in a file system, so nothing stays behind, whoever is killed when. The host passes on a
//! segment of shared memory and carries rounds of an exchange, as [`Meeting`](super::Meeting) does
//! for threads. A connection stays open for as long as its rank belongs to the group.

use super::host::Host;
use super::segment::{Presence, Segment};
use super::socket::{Claim, Connection, Listener, wait};
use super::{PROTOCOL, life};
use crate::error::{Error, Result, clipped};
use peerlane_device::abi::MAX_RANKS;
use rustix::fd::{AsFd, OwnedFd};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::any::Any;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest name: a socket's address has 107 bytes.
const LONGEST_NAME: usize = 90;
/// Longest patience, about 30 years: what is added to it must still be a time.
const LONGEST_PATIENCE: Duration = Duration::from_secs(1_000_000_000);
/// How long a guest waits beyond its patience for the host to say who is missing.
const GRACE: Duration = Duration::from_secs(5);
/// How often a rank whose host has left looks whether the others' processes are there.
const WATCH: Duration = Duration::from_millis(50);
/// How often a rank that has left looks whether the others have.
const LOOK: Duration = Duration::from_millis(5);
/// How long it looks. After that its mailbox stays until the process ends.
const LINGER: Duration = Duration::from_secs(60);

/// Where the processes of a group meet: all of them give the same name and world size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processes {
    /// Any text of 1 to 90 bytes that no other group of this machine uses at the same time.
    pub name: String,
    /// Number of ranks.
    pub world: u32,
    /// How long the ranks wait for each other; the first to come decides.
    pub patience: Duration,
}

/// On what terms the ranks of a group meet again.
#[derive(Clone, Default)]
pub(crate) struct Terms {
    /// The ranks that do not come, a bit each. All that come say the same.
    pub(crate) without: u32,
    /// The group, and those of its ranks that do not matter any more, a bit each. Nobody waits once another's
    /// process has ended, and who comes after a failure comes to the next meeting.
    pub(crate) watched: Option<(Arc<Segment>, u32)>,
}

/// What a guest says to the host.
#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    /// `without` are the ranks that it does not wait for, a bit each; `process` is its number and the namespace in
    /// which that is its number.
    Hello {
        protocol: u32,
        version: String,
        world: u32,
        without: u32,
        rank: u32,
        process: (u32, u32),
    },
    Bring(String),
    Joined,
}

/// What the host says to a guest.
#[derive(Serialize, Deserialize)]
pub(super) enum Reply {
    /// With the segment.
    Welcome {
        host: u32,
    },
    /// With one file for each rank that brought one, in rank order.
    All {
        values: Vec<String>,
        has_file: Vec<bool>,
    },
    Failed(String),
}

/// A rank's place in a meeting.
pub(crate) struct Seat {
    connection: Connection,
    /// What the group shares.
    pub(crate) segment: Arc<Segment>,
    rank: u32,
    world: u32,
    /// Ranks that do not come, a bit each.
    without: u32,
    /// The rank whose process hosts the meeting.
    host: u32,
    deadline: Instant,
    watched: Option<(Arc<Segment>, u32)>,
}

impl Processes {
    /// Enters the meeting as `rank`, which nobody else may do.
    pub(crate) fn enter(&self, rank: u32) -> Result<Seat> {
        self.enter_on(rank, &Terms::default())
    }

    /// As `enter`, for ranks of a group.
    pub(crate) fn enter_on(&self, rank: u32, terms: &Terms) -> Result<Seat> {
        self.check(rank)?;
        let deadline = Instant::now() + self.patience;
        let fail = |reason: String| Error::Rendezvous { world: self.world, reason };
        let mut pause = Duration::from_micros(200);
        loop {
            let connection = self.reach(rank, terms).map_err(|error| {
                fail(format!("rank {rank} cannot use sockets of the abstract namespace: {error}"))
            })?;
            if let Some(connection) = connection
                && let Some(seat) = self.take_seat((rank, terms), connection, deadline)?
            {
                return Ok(seat);
            }
            if Instant::now() >= deadline {
                return Err(fail(format!("rank {rank} found no host for {:?}", self.patience)));
            }
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(20));
        }
    }

    fn check(&self, rank: u32) -> Result<()> {
        let invalid = |argument, expected: String, got: String| {
            Err(Error::InvalidArgument { op: "join", argument, expected, got })
        };
        if self.name.is_empty() || self.name.len() > LONGEST_NAME {
            let got = format!("{} bytes", self.name.len());
            return invalid("name", format!("1 to {LONGEST_NAME} bytes"), got);
        }
        if !(1..=MAX_RANKS as u32).contains(&self.world) {
            return invalid("world", format!("1 to {MAX_RANKS} ranks"), self.world.to_string());
        }
        if rank >= self.world {
            return invalid("rank", format!("0 to {}", self.world - 1), rank.to_string());
        }
        if self.patience > LONGEST_PATIENCE {
            let (expected, got) = (LONGEST_PATIENCE, self.patience);
            return invalid("patience", format!("at most {expected:?}"), format!("{got:?}"));
        }
        Ok(())
    }

    /// A connection to the host, which is this process if nobody else is.
    fn reach(&self, rank: u32, terms: &Terms) -> rustix::io::Result<Option<Connection>> {
        if let Claim::Host(listener) = Listener::claim(&self.name)? {
            let segment = Arc::new(Segment::create(self.world)?);
            let host = Host::new(listener, segment, (rank, self.world), self.patience, terms);
            let thread = thread::Builder::new().name("peerlane-host".into());
            if thread.spawn(life::inherited(move || host.run())).is_err() {
                return Err(rustix::io::Errno::AGAIN);
            }
        }
        Connection::open(&self.name)
    }

    /// Says who it is. `None` if the host has gone meanwhile, or is done with this rank.
    pub(super) fn take_seat(
        &self,
        (rank, terms): (u32, &Terms),
        connection: Connection,
        deadline: Instant,
    ) -> Result<Option<Seat>> {
        let fail = |reason: String| Err(Error::Rendezvous { world: self.world, reason });
        // Anybody may take a name of the abstract namespace.
        if !connection.is_same_user() {
            return fail(format!("the name {:?} is taken by another user", self.name));
        }
        let process = (life::pid(), pid_namespace());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (world, without) = (self.world, terms.without);
        let hello = Request::Hello { protocol: PROTOCOL, version, world, without, rank, process };
        if connection.send(&hello, &[]).is_err() {
            return Ok(None);
        }
        let (host, file) = match answer(&connection, deadline + GRACE) {
            Ok(Some((Reply::Welcome { host }, mut files)))
                if files.len() == 1 && host < self.world =>
            {
                (host, files.remove(0))
            }
            Ok(Some((Reply::Failed(reason), _))) => return fail(clipped(&reason)),
            Ok(Some(_)) => return fail(format!("rank {rank} does not understand the host")),
            Ok(None) => return Ok(None),
            Err(reason) => return fail(format!("rank {rank}: {reason}")),
        };
        let segment = match Segment::open(file, self.world) {
            Ok(segment) => Arc::new(segment),
            Err(reason) => return fail(format!("rank {rank}: {reason}")),
        };
        let (world, without, watched) = (self.world, terms.without, terms.watched.clone());
        let seat = Seat { connection, segment, rank, world, without, host, deadline, watched };
        Ok(Some(seat))
    }
}

/// The namespace of this process's number: containers may share sockets and not that.
fn pid_namespace() -> u32 {
    rustix::fs::stat("/proc/self/ns/pid").map_or(0, |namespace| namespace.st_ino as u32)
}

/// The host's next message; `None` if it is gone.
fn answer(
    connection: &Connection,
    deadline: Instant,
) -> std::result::Result<Option<(Reply, Vec<OwnedFd>)>, String> {
    match wait(&[connection.as_fd()], Some(deadline)) {
        Ok(ready) if ready[0] => connection.receive().map_err(|error| error.to_string()),
        Ok(_) => Err("the host of the meeting does not answer".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the host says something within a moment.
fn is_due(connection: &Connection) -> rustix::io::Result<bool> {
    Ok(wait(&[connection.as_fd()], Some(Instant::now() + WATCH))?[0])
}

impl Seat {
    /// How long the others wait, at least.
    pub(crate) fn patience(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Brings `value`, and a file with it, and waits for everybody else's, in rank order.
    pub(crate) fn exchange<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
        file: Option<OwnedFd>,
    ) -> Result<Vec<(T, Option<OwnedFd>)>> {
        let fail = |reason: String| Error::Rendezvous { world: self.world, reason };
        let text = serde_json::to_string(value).map_err(|error| fail(error.to_string()))?;
        let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        let gone = || {
            let pid = self.segment.pid(self.host);
            fail(format!("the process of rank {} (pid {pid}), which hosts it, ended", self.host))
        };
        self.connection.send(&Request::Bring(text), &files).map_err(|_| gone())?;
        while self.watched.is_some()
            && Instant::now() < self.deadline + GRACE
            && !is_due(&self.connection).map_err(|error| fail(error.to_string()))?
        {
            self.nobody_lost().map_err(fail)?;
        }
        // The host speaks by its own deadline, which may be later than this rank's by as much as
        // this rank came earlier: it never did, having found the host there.
        let reply = answer(&self.connection, self.deadline + GRACE)
            .map_err(|reason| fail(format!("rank {}: {reason}", self.rank)))?;
        let (values, has_file, files) = match reply {
            Some((Reply::All { values, has_file }, files)) => (values, has_file, files),
            Some((Reply::Failed(reason), _)) => return Err(fail(clipped(&reason))),
            Some((Reply::Welcome { .. }, _)) => {
                return Err(fail(format!("rank {} does not understand the host", self.rank)));
            }
            None => return Err(gone()),
        };
        let came = (values.len(), has_file.len(), has_file.iter().filter(|has| **has).count());
        let expected = (self.world - self.without.count_ones()) as usize;
        if came != (expected, expected, files.len()) {
            return Err(fail(format!(
                "rank {}: expected the values of {expected} ranks and their files, got {} values, word of {} files for {} ranks, and {} files",
                self.rank,
                came.0,
                came.2,
                came.1,
                files.len()
            )));
        }
        let mut files = files.into_iter();
        let parsed = values.iter().zip(has_file).map(|(value, has_file)| {
            let value = serde_json::from_str(value)
                .map_err(|error| fail(clipped(&format!("rank {}: {error}", self.rank))))?;
            Ok((value, if has_file { files.next() } else { None }))
        });
        parsed.collect()
    }

    /// That no rank of the group that meets, beside those that do not matter, has ended.
    fn nobody_lost(&self) -> std::result::Result<(), String> {
        let Some((group, without)) = &self.watched else { return Ok(()) };
        match lost_among(group, *without) {
            None => Ok(()),
            Some(lost) => {
                Err(format!("the process of rank {lost} (pid {}) ended", group.pid(lost)))
            }
        }
    }

    /// Turns the seat into membership of the group. `mailbox` is dropped once no other rank can
    /// write into it any more.
    pub(crate) fn join(self, mailbox: Arc<dyn Any + Send + Sync>) -> Result<Membership> {
        // All ranks have passed the last round, so all have joined. If the host has ended since, it
        // has left or is lost, which the thread finds out.
        let _ = self.connection.send(&Request::Joined, &[]);
        let Seat { connection, segment, rank, world, host, .. } = self;
        let connection = Arc::new(connection);
        let (leave, left) = channel();
        let watch = Watch { connection: connection.clone(), segment: segment.clone(), rank, host };
        let thread = watch.spawn(left, mailbox).map_err(|error| Error::Rendezvous {
            world,
            reason: format!("rank {rank} cannot start a thread: {error}"),
        })?;
        let (leave, thread) = (Some(leave), Some(thread));
        Ok(Membership { segment, rank, connection, leave, thread, patience: OnceLock::new() })
    }

    /// Ends a meeting that was held for its rounds alone.
    pub(super) fn finish(&self) {
        // Who has all values needs nobody any more, and the host is gone only if everybody has told it.
        let _ = self.connection.send(&Request::Joined, &[]);
    }

    /// Gives the seat up after a failure. `mailbox` is dropped once no other rank can write into it
    /// any more: one may still be in the round in which this rank failed.
    pub(crate) fn abandon(self, mailbox: Arc<dyn Any + Send + Sync>) {
        let Seat { connection, segment, rank, host, .. } = self;
        segment.set_presence(rank, Presence::Left);
        connection.shut_down();
        let watch = Watch { connection: Arc::new(connection), segment, rank, host };
        let (_, left) = channel();
        // Without a thread to wait for the others, keeping the memory is all that is safe.
        let kept = mailbox.clone();
        match watch.spawn(left, mailbox) {
            Ok(_) => drop(kept),
            Err(_) => std::mem::forget(kept),
        }
    }
}

/// A rank's belonging to a group. Dropping it leaves the group, after which this process must not
/// write into any mailbox.
pub(crate) struct Membership {
    /// What the group shares.
    pub(crate) segment: Arc<Segment>,
    rank: u32,
    connection: Arc<Connection>,
    /// Dropped to tell the thread.
    leave: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// How long leaving waits for the others to leave too.
    patience: OnceLock<Duration>,
}

impl Membership {
    /// From now on all ranks leave together: who leaves waits, for at most `patience`, until its memory is
    /// freed.
    pub(crate) fn leave_together(&self, patience: Duration) {
        let _ = self.patience.set(patience);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        life::message();
        self.segment.set_presence(self.rank, Presence::Left);
        self.connection.shut_down();
        self.leave = None;
        // The last to leave finds its memory freed when it returns; the others do not wait.
        if self.segment.is_last(self.rank)
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        let until = self.patience.get().map(|patience| Instant::now() + *patience);
        let is_going = || self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        while until.is_some_and(|until| Instant::now() < until) && is_going() {
            thread::sleep(Duration::from_micros(200));
        }
    }
}

/// What a rank's thread watches.
struct Watch {
    connection: Arc<Connection>,
    segment: Arc<Segment>,
    rank: u32,
    host: u32,
}

impl Watch {
    fn spawn(
        self,
        left: Receiver<()>,
        mailbox: Arc<dyn Any + Send + Sync>,
    ) -> std::io::Result<JoinHandle<()>> {
        let thread = thread::Builder::new().name("peerlane-watch".into());
        thread.spawn(life::inherited(move || self.run(&left, mailbox)))
    }

    /// Notices the end of the host's process, then keeps `mailbox` until nobody can write to it.
    fn run(self, left: &Receiver<()>, mailbox: Arc<dyn Any + Send + Sync>) {
        // What the host may still say was meant for a rank that had not joined.
        while let Ok(Some(_)) = self.connection.receive::<Reply>() {}
        if self.segment.presence(self.rank) != Presence::Left {
            self.segment.lose(self.host);
        }
        // The host may have left in order. Then nobody tells of the others any more.
        while left.recv_timeout(WATCH) == Err(RecvTimeoutError::Timeout) {
            look_for_lost(&self.segment);
        }
        let until = Instant::now() + LINGER;
        while !self.segment.is_last(self.rank) {
            if Instant::now() >= until {
                // Freeing what a peer may still write to is worse than keeping it.
                std::mem::forget(mailbox);
                return;
            }
            look_for_lost(&self.segment);
            thread::sleep(LOOK);
        }
    }
}

/// Finds processes that have ended and that no host has missed: it may have left.
fn look_for_lost(segment: &Segment) {
    life::look();
    let (count, namespace) = (segment.world(), pid_namespace());
    for rank in (0..count).filter(|rank| segment.presence(*rank) == Presence::Joined) {
        if segment.is_gone(rank, namespace) {
            segment.lose(rank);
        }
    }
}

/// The first rank beside those in `without`, a bit each, whose process has ended before it left.
pub(crate) fn lost_among(segment: &Segment, without: u32) -> Option<u32> {
    look_for_lost(segment);
    let mut present = (0..segment.world()).filter(|rank| without >> rank & 1 == 0);
    present.find(|rank| segment.presence(*rank) == Presence::Lost)
}
