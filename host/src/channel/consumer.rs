//! A reader's end of the ring: what it reads next.
//!
//! Invariant: it reads only between its own tail and what the writer has published for it, and believes no number that it
//! finds there before it has compared it with those bounds.

use super::primitive::{Ordering, fence};
use super::ring::{self, Damage, LINE, Memory, Record, sound};

/// What a reader knows.
pub(super) struct Consumer {
    reader: u32,
    /// Where the next record is; everything before it was read or is for others.
    position: u64,
    /// Where the last message known of ends.
    due: u64,
    /// The number of the last message.
    sequence: u64,
    /// The message at `position`.
    found: Option<Record>,
}

impl Consumer {
    pub(super) fn new(reader: u32) -> Consumer {
        Consumer { reader, position: 0, due: 0, sequence: 0, found: None }
    }

    /// The next message, if there is one. It stays the next until it is accepted.
    pub(super) fn next(&mut self, memory: &impl Memory) -> Result<Option<Record>, Damage> {
        if self.found.is_some() {
            return Ok(self.found);
        }
        if self.position == self.due && !self.look(memory)? {
            return Ok(None);
        }
        while self.position < self.due {
            let record = Record::load(memory, self.position, self.due)?;
            if !record.is_padding() && record.readers >> self.reader & 1 == 1 {
                let (last, number) = (self.sequence, record.sequence);
                let expected = || format!("more than {last}");
                sound(number > last, "a sequence number", expected, number)?;
                self.sequence = number;
                self.found = Some(record);
                return Ok(self.found);
            }
            self.position += Record::bytes(record.length);
        }
        // What is published for a reader ends with a message to it.
        let expected = || format!("a message to reader {}", self.reader);
        sound(false, "the end of what was published", expected, self.due)?;
        Ok(None)
    }

    /// Learns whether the writer has published more.
    fn look(&mut self, memory: &impl Memory) -> Result<bool, Damage> {
        let lane = memory.lane(self.reader);
        // Acquire: the records before it, and `skip`, are there.
        let due = lane.due.load(Ordering::Acquire);
        if due == self.due {
            return Ok(false);
        }
        let skip = lane.skip.load(Ordering::Relaxed);
        let lines = skip.is_multiple_of(LINE) && due.is_multiple_of(LINE);
        sound(lines && skip < due, "where messages begin", || format!("before {due}"), skip)?;
        let position = self.position.max(skip);
        let good = due > position && due - position <= memory.capacity();
        let expected = || format!("{position} to {} more", memory.capacity());
        sound(good, "where messages end", expected, due)?;
        (self.position, self.due) = (position, due);
        Ok(true)
    }

    /// Copies the payload of the next message, which has as many bytes as `bytes`.
    pub(super) fn copy(&self, memory: &impl Memory, bytes: &mut [u8]) {
        ring::read(memory, self.position + ring::HEADER, bytes);
    }

    /// Where the payload of the next message is.
    pub(super) fn payload(&self) -> u64 {
        self.position + ring::HEADER
    }

    /// Whether the writer goes on without it. Asked after data were loaded: if it does not, they are what was written.
    pub(super) fn is_forgotten(&self, memory: &impl Memory) -> bool {
        // Orders the loads of data before this one: the other half of the fence in `Producer::forget`.
        fence(Ordering::Acquire);
        memory.lane(self.reader).forgotten.load(Ordering::Relaxed) != 0
    }

    /// Is done with the next message: the writer may use its space.
    pub(super) fn accept(&mut self, memory: &impl Memory) {
        if let Some(record) = self.found.take() {
            self.position += Record::bytes(record.length);
            // Release: all loads of the message come before it.
            memory.lane(self.reader).tail.store(self.position, Ordering::Release);
        }
    }
}
