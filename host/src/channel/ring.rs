//! Words of the ring's memory that both ends use, and the record: a header and a payload.
//!
//! Invariant: one writer per word. The writer of the ring owns `skip`, `due`, `forgotten` and the data, each reader its
//! `tail`. All are positions: bytes since the beginning, which only grow. Data are read and written as relaxed
//! atomic words, so that no interference of another process is undefined behaviour.
//!
//! A reader has something to read if `tail < due`; then the writer leaves everything from `max(tail, skip)` to `due`
//! alone. A reader with `tail == due` keeps nothing, so who is not addressed holds nobody up; the next message
//! to it says in `skip` where to go on.

use super::primitive::{AtomicU64, Ordering};

/// What positions and records are multiples of: a cache line.
pub(super) const LINE: u64 = 64;
/// Bytes of a header.
pub(super) const HEADER: u64 = 32;
/// The version of header and segment.
pub(super) const VERSION: u16 = 1;
/// What a record's `kind` word says when it only fills the ring up to its end.
const PADDING: u16 = 1;

/// The memory of one ring.
pub(super) trait Memory {
    /// Bytes of the data: a power of two.
    fn capacity(&self) -> u64;
    /// The words of a reader that exists.
    fn lane(&self, reader: u32) -> Lane<'_>;
    /// The word of data that holds `position`.
    fn word(&self, position: u64) -> &AtomicU64;
}

/// The words of one reader.
pub(super) struct Lane<'a> {
    /// Where its messages begin, if it had read all that came before.
    pub(super) skip: &'a AtomicU64,
    /// Where its last message ends.
    pub(super) due: &'a AtomicU64,
    /// Not 0: the writer goes on without it.
    pub(super) forgotten: &'a AtomicU64,
    /// How far it has read.
    pub(super) tail: &'a AtomicU64,
}

/// Something in shared memory that cannot be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Damage {
    pub(super) what: &'static str,
    pub(super) expected: String,
    pub(super) got: u64,
}

/// That `good`, or what is wrong with `what`.
pub(super) fn sound(
    good: bool,
    what: &'static str,
    expected: impl FnOnce() -> String,
    got: u64,
) -> Result<(), Damage> {
    if good { Ok(()) } else { Err(Damage { what, expected: expected(), got }) }
}

/// What stands before a payload. Four little-endian words: version, record kind, message kind, flags (16 bits each);
/// length; sequence number; readers (32 bits) and zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) length: u64,
    pub(super) sequence: u64,
    pub(super) readers: u32,
    padding: bool,
}

impl Record {
    pub(super) fn new(
        (kind, flags): (u16, u16),
        length: u64,
        sequence: u64,
        readers: u32,
    ) -> Record {
        Record { kind, flags, length, sequence, readers, padding: false }
    }

    /// What fills `bytes`.
    pub(super) fn padding(bytes: u64) -> Record {
        Record { length: bytes - HEADER, padding: true, ..Record::default() }
    }

    pub(super) fn is_padding(&self) -> bool {
        self.padding
    }

    /// Bytes with header and fill.
    pub(super) fn bytes(length: u64) -> u64 {
        (HEADER + length).next_multiple_of(LINE)
    }

    /// Stores it at `position`.
    pub(super) fn store(&self, memory: &impl Memory, position: u64) {
        let shorts = [VERSION, if self.padding { PADDING } else { 0 }, self.kind, self.flags];
        let first = shorts.iter().rev().fold(0, |word, short| word << 16 | u64::from(*short));
        let words = [first, self.length, self.sequence, u64::from(self.readers)];
        for (at, word) in (position..).step_by(8).zip(words) {
            memory.word(at).store(word.to_le(), Ordering::Relaxed);
        }
    }

    /// Loads what stands at `position`, which must end at `limit` at the latest.
    pub(super) fn load(memory: &impl Memory, position: u64, limit: u64) -> Result<Record, Damage> {
        let word = |at: u64| u64::from_le(memory.word(position + 8 * at).load(Ordering::Relaxed));
        let [first, length, sequence, last] = [0, 1, 2, 3].map(word);
        let short = |at: u32| (first >> (16 * at)) as u16;
        let version = || format!("version {VERSION}");
        sound(short(0) == VERSION, "a header's version", version, short(0).into())?;
        sound(short(1) <= PADDING, "a record's kind", || "0 or 1".into(), short(1).into())?;
        // Up to the end of the ring, and of what the writer has published.
        let room = (limit - position).min(memory.capacity() - position % memory.capacity());
        let fits = room.checked_sub(HEADER).is_some_and(|most| length <= most);
        sound(
            fits && Record::bytes(length) <= room,
            "a length",
            || format!("at most {room}"),
            length,
        )?;
        sound(last >> 32 == 0, "a header's last word", || "32 bits".into(), last)?;
        let (kind, flags, padding) = (short(2), short(3), short(1) == PADDING);
        Ok(Record { kind, flags, length, sequence, readers: last as u32, padding })
    }
}

/// Stores `bytes` from `position` on, which lie before the end of the ring.
pub(super) fn write(memory: &impl Memory, position: u64, bytes: &[u8]) {
    let (words, rest) = bytes.as_chunks::<8>();
    for (at, word) in (position..).step_by(8).zip(words) {
        memory.word(at).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        let at = position + 8 * words.len() as u64;
        memory.word(at).store(u64::from_ne_bytes(last), Ordering::Relaxed);
    }
}

/// Loads as many bytes as `bytes` has from `position` on.
pub(super) fn read(memory: &impl Memory, position: u64, bytes: &mut [u8]) {
    let (words, rest) = bytes.as_chunks_mut::<8>();
    let after = position + 8 * words.len() as u64;
    for (at, word) in (position..).step_by(8).zip(words) {
        *word = memory.word(at).load(Ordering::Relaxed).to_ne_bytes();
    }
    if !rest.is_empty() {
        let last = memory.word(after).load(Ordering::Relaxed).to_ne_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}
