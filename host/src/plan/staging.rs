//! How a staging area is laid out, and how a tensor is cut to go through it.
//!
//! Pure. Flags come first, then slots: for each edge into a rank a region, which has [`SLOTS`] of them.
//! Invariant: all staging areas of a group are laid out alike, and a tensor is cut alike on all ranks.

use super::steps::Steps;
use crate::error::{Error, Result};
use peerlane_device::abi::{MAX_RANKS, UNIT};

/// Chunks of one edge that its receiver has room for: one is copied while the other is reduced.
pub const SLOTS: u32 = 2;
/// Most edges from one rank to another: two for each part of a ring but one.
pub(super) const PAIR_EDGES: u32 = 32;
/// Bytes of flags at the start of a staging area.
pub const FLAG_BYTES: usize = AREA_FLAGS + ALIGNMENT;
/// Bytes of the flags of slots: half of them say that a chunk is there, the others that there is room.
const SLOT_FLAG_BYTES: usize = 2 * 4 * (SLOTS * PAIR_EDGES) as usize * MAX_RANKS;
/// Offset of the flags, one for each peer, by which it says that its whole staging area is free. They are up
/// between calls, all others down.
pub const AREA_FLAGS: usize = SLOT_FLAG_BYTES;
/// Bytes of these flags. As many follow them, by which each peer says that it has begun the call.
pub const AREA_FLAG_BYTES: usize = 4 * MAX_RANKS;
/// A flag that is up. All its bytes are alike, so that memory can be filled with it.
pub const UP: u32 = u32::from_ne_bytes([UP_BYTE; 4]);
/// Each byte of a flag that is up.
pub const UP_BYTE: u8 = 1;
/// Staging areas cannot be smaller.
pub const LEAST_STAGING_BYTES: usize = FLAG_BYTES + (SLOTS * PAIR_EDGES) as usize * ALIGNMENT;
/// Slots begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Chunks that a part is cut in if they are large enough: the first is on its way alone, so more of
/// them hide more; each costs flags, events and launches. Two H200s, the steps of a two-shot, 64 MiB: 258 us in one
/// chunk a part, 236 in two, 290 in four, 360 in eight.
const CHUNKS: usize = 2;
/// Smaller chunks are not worth their cost.
const LEAST_CHUNK_BYTES: usize = 4 << 20;

/// Most units of a chunk in a staging area of `staging_bytes` bytes with `regions` regions.
pub fn slot_units(regions: u32, staging_bytes: usize) -> usize {
    let slots = (SLOTS * regions.max(1)) as usize;
    let bytes = staging_bytes.saturating_sub(FLAG_BYTES) / slots;
    (bytes - bytes % ALIGNMENT) / UNIT
}

/// Bytes of the staging area in which a tensor of `units` units is cut as is best for it.
pub fn staging_bytes(steps: &Steps, units: usize, chunk_bytes: Option<usize>) -> usize {
    let part_units = super::part_units(steps.parts, units);
    let wanted = chunk_bytes.unwrap_or_else(|| chunk_units(part_units, usize::MAX) * UNIT);
    let slots = (SLOTS * steps.regions.max(1)) as usize;
    FLAG_BYTES + slots * wanted.next_multiple_of(ALIGNMENT)
}

/// Units of a chunk of a part of `part_units` units, unless a caller wants others.
pub fn chunk_units(part_units: usize, slot_units: usize) -> usize {
    let most = part_units.div_ceil(CHUNKS).max(LEAST_CHUNK_BYTES / UNIT).min(slot_units).max(1);
    // All alike: a short last one would cost as much as the others.
    let even = part_units.div_ceil(part_units.div_ceil(most).max(1));
    even.next_multiple_of(ALIGNMENT / UNIT).min(slot_units)
}

/// How a tensor is cut in parts and chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    units: usize,
    tail: u32,
    part_units: usize,
    chunk_units: usize,
    slot_bytes: usize,
}

/// A chunk of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the tensor before it.
    pub offset: usize,
    /// Units in it.
    pub units: usize,
    /// Bytes of the last one.
    pub tail: u32,
}

impl Span {
    /// Bytes in it.
    pub fn bytes(&self) -> usize {
        (self.units - 1) * UNIT + self.tail as usize
    }
}

impl Cut {
    /// How a tensor of `units` units, the last of `tail` bytes, is cut in `steps.parts` parts and in chunks for a
    /// staging area of `staging_bytes` bytes; `chunk_bytes` as in
    /// [`Config::chunk_bytes`](crate::Config::chunk_bytes).
    ///
    /// # Errors
    /// If a chunk has no room; `op` is who asked.
    pub fn new(
        op: &'static str,
        steps: &Steps,
        (units, tail): (usize, u32),
        staging_bytes: usize,
        chunk_bytes: Option<usize>,
    ) -> Result<Cut> {
        let part_units = super::part_units(steps.parts, units);
        let slot_units = slot_units(steps.regions, staging_bytes);
        let slot_bytes = slot_units * UNIT;
        let chunk_units = match chunk_bytes {
            Some(got) if got > slot_bytes => {
                let expected = format!(
                    "at most {slot_bytes} bytes, a slot of the {staging_bytes} bytes of staging_bytes"
                );
                let (argument, got) = ("chunk_bytes", got.to_string());
                return Err(Error::InvalidArgument { op, argument, expected, got });
            }
            Some(bytes) => bytes / UNIT,
            None => chunk_units(part_units, slot_units),
        };
        Ok(Cut { units, tail, part_units, chunk_units, slot_bytes })
    }

    /// Units of the tensor.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Units of a part: fewer or none where the tensor ends.
    fn part(&self, part: u32) -> usize {
        self.units.saturating_sub(part as usize * self.part_units).min(self.part_units)
    }

    /// Chunks of a part.
    pub fn chunks(&self, part: u32) -> u32 {
        self.part(part).div_ceil(self.chunk_units) as u32
    }

    /// A chunk of a part; `None` beyond its end.
    pub fn chunk(&self, part: u32, chunk: u32) -> Option<Span> {
        let first = chunk as usize * self.chunk_units;
        let left = self.part(part).checked_sub(first).filter(|left| *left > 0)?;
        let (first, units) = (part as usize * self.part_units + first, left.min(self.chunk_units));
        let tail = if first + units == self.units { self.tail } else { UNIT as u32 };
        Some(Span { offset: first * UNIT, units, tail })
    }

    /// Offset of the slot of a region for a chunk in its receiver's staging area.
    pub fn slot(&self, region: u32, chunk: u32) -> usize {
        FLAG_BYTES + (region * SLOTS + chunk % SLOTS) as usize * self.slot_bytes
    }
}

/// Offset, in the staging area of a chunk's receiver, of the flag by which `sender` says that the chunk
/// is there.
pub fn full_flag(sender: u32, pair: u32, chunk: u32) -> usize {
    flag(sender, pair, chunk)
}

/// Offset, in the staging area of a chunk's sender, of the flag by which `receiver` says that there is
/// room for it.
pub fn free_flag(receiver: u32, pair: u32, chunk: u32) -> usize {
    SLOT_FLAG_BYTES / 2 + flag(receiver, pair, chunk)
}

/// Offset, in a rank's staging area, of the flag by which `peer` says that its own is free.
pub fn area_flag(peer: u32) -> usize {
    AREA_FLAGS + 4 * peer as usize
}

/// Offset, in a rank's staging area, of the flag by which `peer` says that it has begun the call, and taken
/// down the flag of this rank's area.
pub fn begun_flag(peer: u32) -> usize {
    AREA_FLAGS + AREA_FLAG_BYTES + 4 * peer as usize
}

const _: () = assert!(2 * AREA_FLAG_BYTES <= ALIGNMENT);

fn flag(peer: u32, pair: u32, chunk: u32) -> usize {
    4 * ((peer * PAIR_EDGES + pair) * SLOTS + chunk % SLOTS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::forest::Forest;

    #[test]
    fn a_cut_covers_the_tensor_once() {
        let steps = &Steps::of(&Forest::star(5), 5, 0, false);
        for units in [1, 2, 5, 1000, 70_001, 1 << 20] {
            let cut = Cut::new("all_reduce", steps, (units, 6), 1 << 20, None).unwrap();
            let (mut bytes, mut end) = (0, 0);
            for part in 0..steps.parts {
                for chunk in 0..cut.chunks(part) {
                    let span = cut.chunk(part, chunk).unwrap();
                    assert_eq!(span.offset, end);
                    assert!(span.bytes() <= cut.slot_bytes);
                    bytes += span.bytes();
                    end = span.offset + span.bytes();
                }
                assert_eq!(cut.chunk(part, cut.chunks(part)), None);
            }
            assert_eq!(bytes, (units - 1) * UNIT + 6, "{units} units");
        }
    }

    #[test]
    fn chunks_are_few_and_fit_their_slots() {
        let steps = &Steps::of(&Forest::star(2), 2, 0, false);
        let cut = |units, staging: usize, chunk| {
            Cut::new("all_reduce", steps, (units, 16), staging, chunk)
        };
        let chunks = |units, staging| cut(units, staging, None).unwrap().chunks(0);
        // Half of 64 MiB in two chunks where there is room, else in more that are alike.
        assert_eq!(chunks(4 << 20, FLAG_BYTES + (64 << 20)), 2);
        assert_eq!(chunks(4 << 20, 64 << 20), 3);
        let last = cut(4 << 20, 64 << 20, None).unwrap().chunk(0, 2).unwrap();
        assert!(last.bytes() > 10 << 20);
        assert_eq!(chunks(4 << 20, 32 << 20), 5);
        assert_eq!(chunks(1 << 10, 32 << 20), 1);
        let error = cut(64, 1 << 20, Some(1 << 20)).unwrap_err().to_string();
        assert!(error.starts_with("all_reduce: chunk_bytes: expected at most 259840"), "{error}");
        let cut = cut(64, 1 << 20, Some(256)).unwrap();
        assert_eq!((cut.chunks(0), cut.chunks(1)), (2, 2));
    }
}
