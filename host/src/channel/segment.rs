//! The memory of a channel, and the text by which another process opens it.
//!
//! Invariant: a segment that was opened is a sealed memory file of this user, of the size that its own first line says,
//! made by the writer that the handle names. The first line is read once and copied; after that every word is a number that may
//! be anything, and no offset leaves the mapping whatever the words say.
//!
//! ```text
//! line 0     magic, version and readers, capacity, token, user, pid namespace, the writer's process
//! line 1     state: open, closed, poisoned
//! line 2, 3  bell of data: rings, asleep        line 4, 5  bell of space
//! line 8+4r  reader r: skip, due, forgotten     + 1  tail     + 2  its process
//! a page     data
//! ```

use super::bell::Bell;
use super::peer::Process;
use super::primitive::{AtomicU32, AtomicU64, Ordering};
use super::ring::{LINE, Lane, Memory, VERSION};
use super::state::State;
use super::{CAPACITY, MAX_READERS};
use crate::error::clipped;
use crate::sealed::{self, Mapping};
use std::fmt;
use std::hash::BuildHasher;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

/// "PLCHANNL".
const MAGIC: u64 = 0x4c4e_4e41_4843_4c50;
const PAGE: usize = 4096;
const READERS_AT: usize = 8;
const LINES_EACH: usize = 4;

/// Where a segment is found: the text that the writer gives to its readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pid: u32,
    descriptor: u32,
    token: u64,
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Handle { pid, descriptor, token } = self;
        write!(f, "peerlane-channel:{VERSION}:{pid}:{descriptor}:{token:016x}")
    }
}

impl FromStr for Handle {
    type Err = ();

    fn from_str(text: &str) -> Result<Handle, ()> {
        let begin = format!("peerlane-channel:{VERSION}:");
        let mut parts = text.strip_prefix(&begin).ok_or(())?.splitn(3, ':');
        let mut part = || parts.next().ok_or(());
        let pid = part()?.parse().map_err(drop)?;
        let descriptor = part()?.parse().map_err(drop)?;
        let token = u64::from_str_radix(part()?, 16).map_err(drop)?;
        let handle = Handle { pid, descriptor, token };
        // Only the text that was made: no signs, no leading zeros.
        if handle.to_string() == text { Ok(handle) } else { Err(()) }
    }
}

/// The memory, mapped.
pub(super) struct Segment {
    file: OwnedFd,
    memory: Mapping,
    pub(super) readers: u32,
    capacity: u64,
    token: u64,
    /// The writer's process.
    pub(super) writer: Process,
}

fn data_at(readers: u32) -> usize {
    let lines = READERS_AT + LINES_EACH * readers as usize;
    (lines * LINE as usize).next_multiple_of(PAGE)
}

/// The namespace of process numbers.
fn namespace() -> u64 {
    rustix::fs::stat("/proc/self/ns/pid").map_or(0, |file| file.st_ino)
}

impl Segment {
    /// Makes the memory. `capacity` and `readers` are in their bounds.
    pub(super) fn create(capacity: u64, readers: u32) -> Result<Segment, String> {
        let bytes = data_at(readers) + capacity as usize;
        let file = sealed::create("peerlane-channel", bytes).map_err(|e| e.to_string())?;
        sealed::back(&file, bytes)?;
        let writer = Process::this()?;
        let token = std::hash::RandomState::new().hash_one(std::process::id());
        let segment = Segment::map(file, (readers, capacity, token), writer)?;
        for (index, value) in segment.first_line().into_iter().enumerate() {
            segment.wide(8 * index).store(value.to_le(), Ordering::Relaxed);
        }
        Ok(segment)
    }

    /// Opens what the writer that made `handle` has; says what is wrong with it.
    pub(super) fn open(handle: &Handle) -> Result<Segment, String> {
        let file = sealed::open_of(handle.pid, handle.descriptor)?;
        Segment::check(file, handle.token)
    }

    /// Maps `file` if it is a channel's of this user and has that token.
    pub(super) fn check(file: OwnedFd, token: u64) -> Result<Segment, String> {
        let bytes = sealed::size_of(&file)?;
        let user = rustix::process::geteuid().as_raw();
        let mut line = [0; LINE as usize];
        let count = rustix::io::pread(&file, &mut line, 0).map_err(|error| error.to_string())?;
        if count < line.len() {
            return Err(format!("expected at least {} bytes, got {count}", line.len()));
        }
        let words: Vec<u64> =
            line.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let expect = |what: &str, expected: u64, got: u64| {
            if expected == got {
                return Ok(());
            }
            Err(format!("{what}: expected {expected:#x}, got {got:#x}"))
        };
        expect("magic", MAGIC, words[0])?;
        expect("version", u64::from(VERSION), words[1] & 0xffff_ffff)?;
        if words[3] != token {
            return Err("its token is not the handle's".into());
        }
        expect("user", u64::from(user), words[4])?;
        expect("pid namespace", namespace(), words[5])?;
        let (readers, capacity) = (words[1] >> 32, words[2]);
        expect("number of readers", readers.clamp(1, u64::from(MAX_READERS)), readers)?;
        let bounded = capacity.clamp(*CAPACITY.start(), *CAPACITY.end()).next_power_of_two();
        expect("capacity", bounded, capacity)?;
        expect("size", data_at(readers as u32) as u64 + capacity, bytes as u64)?;
        let writer = Process::unpack(words[6]).ok_or("it names no writer")?;
        Segment::map(file, (readers as u32, capacity, token), writer)
    }

    fn map(
        file: OwnedFd,
        (readers, capacity, token): (u32, u64, u64),
        writer: Process,
    ) -> Result<Segment, String> {
        let memory = Mapping::new(&file, data_at(readers) + capacity as usize)?;
        Ok(Segment { file, memory, readers, capacity, token, writer })
    }

    fn first_line(&self) -> [u64; 7] {
        let version = u64::from(VERSION) | u64::from(self.readers) << 32;
        let user = rustix::process::geteuid().as_raw();
        let (token, writer) = (self.token, self.writer.pack());
        [MAGIC, version, self.capacity, token, user.into(), namespace(), writer]
    }

    /// What a message is called in traces: no other channel has one of that name.
    pub(super) fn message(&self, sequence: u64) -> String {
        format!("{:x}/{sequence}", self.token)
    }

    /// What readers open it by.
    pub(super) fn handle(&self) -> Handle {
        let descriptor = self.file.as_raw_fd() as u32;
        Handle { pid: self.writer.pid(), descriptor, token: self.token }
    }

    /// The word at `offset`, which is a multiple of 8.
    pub(super) fn wide(&self, offset: usize) -> &AtomicU64 {
        self.memory.wide(offset)
    }

    fn narrow(&self, offset: usize) -> &AtomicU32 {
        self.memory.narrow(offset)
    }

    fn bell(&self, line: usize) -> Bell<'_> {
        let at = line * LINE as usize;
        Bell { rings: self.narrow(at), asleep: self.narrow(at + LINE as usize) }
    }

    /// Rings for readers.
    pub(super) fn data_bell(&self) -> Bell<'_> {
        self.bell(2)
    }

    /// Rings for the writer.
    pub(super) fn space_bell(&self) -> Bell<'_> {
        self.bell(4)
    }

    /// Whether it is open, and who ended it.
    pub(super) fn state(&self) -> State<'_> {
        State { word: self.wide(LINE as usize), segment: self }
    }

    /// Its size.
    #[cfg(any(fuzzing, test))]
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn reader_at(&self, reader: u32) -> usize {
        assert!(reader < self.readers);
        (READERS_AT + LINES_EACH * reader as usize) * LINE as usize
    }

    /// The word that names the process of `reader`.
    pub(super) fn process(&self, reader: u32) -> &AtomicU64 {
        self.wide(self.reader_at(reader) + 2 * LINE as usize)
    }
}

impl Memory for Segment {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn lane(&self, reader: u32) -> Lane<'_> {
        let at = self.reader_at(reader);
        let [skip, due, forgotten, tail] = [0, 8, 16, LINE as usize].map(|o| self.wide(at + o));
        Lane { skip, due, forgotten, tail }
    }

    fn word(&self, position: u64) -> &AtomicU64 {
        // Masked, so that any position is inside; to a multiple of 8, so that any is aligned.
        let offset = position & (self.capacity - 1) & !7;
        self.wide(data_at(self.readers) + offset as usize)
    }
}

/// What is told of a handle that is none.
pub(super) fn shown(text: &str) -> String {
    clipped(text).chars().take(80).collect()
}
