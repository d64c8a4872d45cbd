//! The side that exports.
//!
//! Invariant: between two clears payloads lie one behind the other in the last segment. A segment is written again after a clear only if
//! nobody borrows from it; else it is retired, and unmapped here once nobody does.

use super::descriptor::{ALIGNMENT, Descriptor, Element, Shape};
use super::segment::{Owner, Segment};
use super::{Fault, lease};
use crate::channel::Process;
use crate::collectives::invalid;
use crate::error::Result;
use crate::trace;
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::atomic::Ordering;

/// Clears whose use is remembered: for as many the arena keeps what the largest of them needed.
const MEMORY: usize = 64;
/// Tensors kept by name, each of which has a file open.
const MOST_NAMED: usize = 256;
/// How much larger than that the arena may be before it shrinks.
const SLACK: u64 = 4;

/// How large an arena may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that it has from the beginning, and each time that it gets memory, at least.
    pub least: u64,
    /// Bytes that it may have, with what was given up and is borrowed still.
    pub most: u64,
    /// Bytes of tensors that are kept by name ([`Exporter::export_named`]), beside the others.
    pub named: u64,
    /// Whether a checksum is made of every payload, and compared by every import.
    pub checksums: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { least: 1 << 20, most: 16 << 30, named: 4 << 30, checksums: false }
    }
}

/// What an arena has and has had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of shared memory, those included that wait for views to end.
    pub reserved: u64,
    /// Bytes exported since the last clear, with what alignment takes.
    pub used: u64,
    /// The most that was exported between two clears.
    pub peak: u64,
    /// Bytes of tensors kept by name.
    pub named: u64,
    /// Segments made, ever.
    pub segments: u64,
}

/// Exports tensors to other processes, or to threads of this one.
pub struct Exporter {
    owner: Owner,
    limits: Limits,
    /// Those of this round, largest last. Exports go to the last.
    segments: Vec<Segment>,
    /// Bytes taken of the last segment.
    next: u64,
    retired: Vec<Segment>,
    named: VecDeque<Named>,
    /// Bytes of the last rounds, the current one last.
    rounds: VecDeque<u64>,
    usage: Usage,
}

struct Named {
    name: u64,
    descriptor: Descriptor,
    segment: Segment,
}

impl Exporter {
    /// Makes an arena.
    pub fn create(limits: Limits) -> Result<Exporter> {
        const OP: &str = "transfer create";
        trace::start_from_environment();
        if limits.least == 0 || limits.least > limits.most {
            let expected = format!("1 to `most`, which is {}", limits.most);
            return Err(invalid(OP, "least", expected, limits.least));
        }
        let process = Process::this().map_err(Fault::NoMemory)?;
        let token = std::hash::RandomState::new().hash_one(process.pid());
        let mut exporter = Exporter {
            owner: Owner { process, token },
            limits,
            segments: Vec::new(),
            next: 0,
            retired: Vec::new(),
            named: VecDeque::new(),
            rounds: VecDeque::from([0]),
            usage: Usage::default(),
        };
        exporter.grow(limits.least)?;
        Ok(exporter)
    }

    /// The text by which importers open it, in any process of this user, while this process lives and this exporter is there.
    pub fn handle(&self) -> String {
        self.owner.to_string()
    }

    /// What it has.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Copies a contiguous tensor into the arena.
    pub fn export(&mut self, payload: &[u8], element: Element, shape: Shape) -> Result<Descriptor> {
        let bytes = size(payload, element, shape)?;
        let _span = trace::span!("export", bytes = bytes);
        let room = bytes.next_multiple_of(ALIGNMENT);
        if self.last().is_none_or(|last| last.capacity() - self.next < room) {
            self.grow(room)?;
        }
        let (offset, checksum) = (self.next, self.checksum(payload));
        let segment = self.last().ok_or_else(|| Fault::NoMemory("no segment".into()))?;
        let descriptor = place(segment, offset, payload, (element, shape), checksum);
        self.next += room;
        let used = self.rounds.back_mut().map(|round| {
            *round += room;
            *round
        });
        self.usage.used = used.unwrap_or_default();
        self.usage.peak = self.usage.peak.max(self.usage.used);
        Ok(descriptor)
    }

    /// As [`export`](Exporter::export) of a tensor that stays through clears and is copied only the first time. The tensor of a
    /// name is always the same one. When all together exceed their limit, or 256, those go that were exported longest ago.
    pub fn export_named(
        &mut self,
        name: u64,
        payload: &[u8],
        element: Element,
        shape: Shape,
    ) -> Result<Descriptor> {
        let bytes = size(payload, element, shape)?;
        if let Some(at) = self.named.iter().position(|named| named.name == name) {
            let found = self.named[at].descriptor;
            if (found.element, found.shape) == (element, shape) {
                return Ok(found);
            }
            self.forget_named(at);
        }
        if bytes > self.limits.named {
            return self.export(payload, element, shape);
        }
        while !self.named.is_empty()
            && (self.usage.named + bytes > self.limits.named || self.named.len() >= MOST_NAMED)
        {
            self.forget_named(0);
        }
        self.reclaim();
        let checksum = self.checksum(payload);
        let segment = self.make(bytes.max(1))?;
        let descriptor = place(&segment, 0, payload, (element, shape), checksum);
        self.usage.named += bytes;
        self.named.push_back(Named { name, descriptor, segment });
        Ok(descriptor)
    }

    /// The tensor that is kept under this name.
    pub fn named(&self, name: u64) -> Option<Descriptor> {
        self.named.iter().find(|named| named.name == name).map(|named| named.descriptor)
    }

    /// Gives up everything exported so far but what has a name. Views of it stay as they are.
    pub fn clear(&mut self) {
        // Before anybody's borrows are looked at.
        self.segments.iter().for_each(|segment| lease::give_up(segment.generation()));
        let needed = self.rounds.iter().copied().max().unwrap_or_default().max(self.limits.least);
        self.rounds.push_back(0);
        if self.rounds.len() > MEMORY {
            self.rounds.pop_front();
        }
        // One segment for what several held, or none of it is in one piece next time either.
        let keeps = |segment: &Segment| {
            let capacity = segment.capacity();
            segment.borrower().is_none()
                && capacity >= needed
                && capacity <= needed.saturating_mul(SLACK)
        };
        let kept = self.segments.iter().position(keeps);
        for (at, segment) in std::mem::take(&mut self.segments).into_iter().enumerate() {
            if Some(at) == kept { self.segments.push(segment) } else { self.retire(segment) }
        }
        self.next = 0;
        self.usage.used = 0;
        self.reclaim();
    }

    fn last(&self) -> Option<&Segment> {
        self.segments.last()
    }

    fn checksum(&self, payload: &[u8]) -> Option<u32> {
        self.limits.checksums.then(|| crc32fast::hash(payload))
    }

    /// Another segment, of at least `room` bytes and of what the last rounds needed.
    fn grow(&mut self, room: u64) -> Result<()> {
        self.reclaim();
        let usual = self.rounds.iter().copied().max().unwrap_or_default().max(self.limits.least);
        let doubled = self.last().map_or(0, |last| 2 * last.capacity());
        let left = self.limits.most.saturating_sub(self.usage.reserved - self.usage.named);
        if room > left {
            let borrower = self.retired.iter().find_map(Segment::borrower);
            return Err(Fault::Full { bytes: room, limit: self.limits.most, borrower }.into());
        }
        let wanted = room.max(usual).max(doubled).min(left).max(1);
        // Where there is no memory for more there may be for this.
        let segment = self.make(wanted).or_else(|_| self.make(room.max(1)))?;
        self.segments.push(segment);
        self.next = 0;
        Ok(())
    }

    fn make(&mut self, bytes: u64) -> Result<Segment> {
        let number = self.usage.segments as u32;
        let segment = Segment::create(self.owner, number, bytes).map_err(Fault::NoMemory)?;
        self.usage.segments += 1;
        self.usage.reserved += segment.capacity();
        Ok(segment)
    }

    /// Nothing more is exported in it.
    fn retire(&mut self, segment: Segment) {
        segment.retired().store(1, Ordering::Release);
        self.retired.push(segment);
    }

    /// Lets go of what nobody looks at any more.
    fn reclaim(&mut self) {
        let Exporter { retired, usage, .. } = self;
        retired.retain(|segment| {
            let borrowed = segment.borrower().is_some();
            usage.reserved -= if borrowed { 0 } else { segment.capacity() };
            borrowed
        });
    }

    fn forget_named(&mut self, at: usize) {
        if let Some(Named { descriptor, segment, .. }) = self.named.remove(at) {
            lease::give_up(segment.generation());
            self.usage.named -= descriptor.bytes;
            self.retire(segment);
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if self.owner.process.pid() != std::process::id() {
            return; // A forked child's: it is its parent's still.
        }
        // What importers have mapped stays theirs; what they have not they can open no more.
        let named = self.named.drain(..).map(|named| named.segment);
        for segment in self.segments.drain(..).chain(named) {
            lease::give_up(segment.generation());
            segment.retired().store(1, Ordering::Release);
        }
    }
}

fn size(payload: &[u8], element: Element, shape: Shape) -> Result<u64> {
    const OP: &str = "transfer export";
    if !(1..=16).contains(&element.bytes) {
        return Err(invalid(OP, "element", "1 to 16 bytes".into(), element.bytes));
    }
    let bytes = shape.count().and_then(|count| count.checked_mul(element.bytes.into()));
    if bytes == Some(payload.len() as u64) {
        return Ok(payload.len() as u64);
    }
    let expected = match bytes {
        Some(bytes) => format!("{bytes} bytes, as its shape says"),
        None => "a shape whose size is a number".into(),
    };
    Err(invalid(OP, "payload", expected, format_args!("{} bytes", payload.len())))
}

fn place(
    segment: &Segment,
    offset: u64,
    payload: &[u8],
    (element, shape): (Element, Shape),
    checksum: Option<u32>,
) -> Descriptor {
    let bytes = payload.len() as u64;
    assert!(offset + bytes <= segment.capacity(), "room for the payload");
    // SAFETY: that many bytes of the segment, which nobody borrows yet and nobody else writes.
    unsafe {
        std::ptr::copy_nonoverlapping(payload.as_ptr(), segment.payload(offset), payload.len());
    }
    let generation = segment.generation().load(Ordering::Relaxed);
    let (number, file) = (segment.number, segment.file());
    Descriptor { element, shape, segment: number, file, generation, offset, bytes, checksum }
}
