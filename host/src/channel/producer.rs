//! The writer's end of the ring: where the next record goes, and when readers learn of it.
//!
//! Invariant: a record is stored only where no reader that is addressed has anything left to read. What the readers say
//! of themselves is checked against what this end knows.

use super::primitive::{Ordering, fence};
use super::ring::{self, Damage, LINE, Lane, Memory, Record, sound};

/// What the writer knows.
pub(super) struct Producer {
    /// Where the next record goes.
    position: u64,
    /// Everything from here on is kept for readers; as far as is known, for it is looked up only when space is short.
    floor: u64,
    sequence: u64,
    readers: Vec<Known>,
    /// Readers that it goes on with, a bit each.
    pub(super) active: u32,
    /// Readers of what was not published yet, a bit each.
    staged: u32,
}

/// What it knows of a reader.
#[derive(Clone, Copy, Default)]
struct Known {
    skip: u64,
    due: u64,
    published: u64,
    tail: u64,
}

/// The readers of `mask`.
pub(super) fn each(mask: u32) -> impl Iterator<Item = u32> {
    (0..u32::BITS).filter(move |reader| mask >> reader & 1 == 1)
}

impl Producer {
    pub(super) fn new(readers: u32) -> Producer {
        let active = u32::MAX >> (u32::BITS - readers);
        let readers = vec![Known::default(); readers as usize];
        Producer { position: 0, floor: 0, sequence: 0, readers, active, staged: 0 }
    }

    /// Where a record with `length` bytes of payload may go, or the reader that it would have to wait for.
    pub(super) fn place(
        &mut self,
        memory: &impl Memory,
        length: u64,
    ) -> Result<Result<u64, u32>, Damage> {
        let (capacity, bytes) = (memory.capacity(), Record::bytes(length));
        let left = capacity - self.position % capacity;
        let start = if bytes <= left { self.position } else { self.position + left };
        if (start + bytes).saturating_sub(self.floor) <= capacity {
            return Ok(Ok(start));
        }
        self.look(memory)?;
        let slowest = each(self.active).map(|reader| (self.kept(reader), reader)).min();
        match slowest {
            Some((floor, reader)) if floor < u64::MAX && start + bytes - floor > capacity => {
                Ok(Err(reader))
            }
            slowest => {
                self.floor = slowest.map_or(start, |(floor, _)| floor.min(start));
                Ok(Ok(start))
            }
        }
    }

    /// From where on `reader` keeps the ring, `u64::MAX` if it has read everything.
    fn kept(&self, reader: u32) -> u64 {
        let known = self.readers[reader as usize];
        if known.tail == known.due { u64::MAX } else { known.tail.max(known.skip) }
    }

    /// Learns how far the readers are.
    fn look(&mut self, memory: &impl Memory) -> Result<(), Damage> {
        for reader in each(self.active) {
            let known = &mut self.readers[reader as usize];
            // Acquire: what the reader has loaded before it stored this, it has before it is overwritten.
            let tail = memory.lane(reader).tail.load(Ordering::Acquire);
            let good = (known.tail..=known.published).contains(&tail) && tail.is_multiple_of(LINE);
            let expected = || format!("{} to {} for reader {reader}", known.tail, known.published);
            sound(good, "a reader's tail", expected, tail)?;
            known.tail = tail;
        }
        Ok(())
    }

    /// Stores a record at `start`, which came from [`place`](Producer::place). Readers do not see it yet.
    pub(super) fn stage(
        &mut self,
        memory: &impl Memory,
        start: u64,
        (kind, flags): (u16, u16),
        readers: u32,
        payload: &[u8],
    ) {
        if start != self.position {
            Record::padding(start - self.position).store(memory, self.position);
        }
        let length = payload.len() as u64;
        self.sequence += 1;
        Record::new((kind, flags), length, self.sequence, readers).store(memory, start);
        ring::write(memory, start + ring::HEADER, payload);
        self.position = start + Record::bytes(length);
        for reader in each(readers & self.active) {
            let known = &mut self.readers[reader as usize];
            if known.tail == known.due {
                // It has read all, so it does not look at this before it sees a new `due`.
                known.skip = start;
                memory.lane(reader).skip.store(start, Ordering::Relaxed);
            }
            known.due = self.position;
        }
        self.staged |= readers & self.active;
    }

    /// Lets the readers see what was staged; returns them, a bit each.
    pub(super) fn publish(&mut self, memory: &impl Memory) -> u32 {
        let readers = std::mem::take(&mut self.staged) & self.active;
        for reader in each(readers) {
            let known = &mut self.readers[reader as usize];
            known.published = known.due;
            // Release: who sees this sees the records before it, and `skip`.
            memory.lane(reader).due.store(known.due, Ordering::Release);
        }
        readers
    }

    /// Goes on without `reader`.
    pub(super) fn forget(&mut self, lane: &Lane<'_>, reader: u32) {
        self.active &= !(1 << reader);
        lane.forgotten.store(1, Ordering::Relaxed);
        // A reader that loads anything stored after this sees that it was forgotten: its half is in `Consumer::is_forgotten`.
        fence(Ordering::Release);
    }

    /// The number of the last message.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }
}
