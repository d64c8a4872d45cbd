//! Checks of a link by itself: stores, loads, copies, and whether data come before their flag.
//!
//! Invariant: what is to be written over holds something else first, and the memory's owner reads it back,
//! so data that were there already pass for nothing.

use super::lab::{Direction, Fault, Lab};
use crate::error::Result;
use crate::gpu::{DevicePtr, Stream};
use peerlane_device::abi::{
    Args, CONTROL_BYTES, Kernel, MAX_THREADS, Operation, UNIT, UNROLL, probe, state, ticks,
};

/// Bytes of the probe's pattern.
const PATTERN: usize = 120 * UNIT;
/// What memory holds before it is written.
const STALE: u8 = 0xee;
/// Patterns that the probe stores.
const PATTERNS: u32 = 4;
/// Copies: bytes, and how far source and target are from where alignment ends.
const COPIES: [(usize, usize, usize); 8] = [
    (1, 1, 3),
    (3, 0, 1),
    (16, 0, 0),
    (17, 5, 0),
    (250, 7, 2),
    (4096, 0, 0),
    (4099, 1, 15),
    (9000, 13, 6),
];
/// Copies leave room for their offsets.
const MARGIN: usize = 32;

impl Lab<'_> {
    /// Kernels of `from` store into the memory of `to`, which reads it back.
    pub(super) fn stores(&mut self, (from, to): Direction) -> Result<Vec<Fault>> {
        for _ in 0..PATTERNS {
            let (expected, found) = self.store_pattern((from, to))?;
            if let Some(reason) = difference(&expected, &found) {
                return Ok(vec![Fault::new((from, to), format!("what is stored {reason}"))]);
            }
        }
        let (src, dst) = (self.rig.halves(from).0, self.rig.halves(to).1);
        self.stream_kernel((from, to), (src, from), (dst, to), "stored")
    }

    /// The pattern as a kernel of `to` stores it into its own memory, and as it is found where the same
    /// kernel of `from` has stored it.
    fn store_pattern(&mut self, (from, to): Direction) -> Result<(Vec<u8>, Vec<u8>)> {
        let (own, others) = (self.rig.area(to, to), self.rig.area(to, from));
        let targets = [own, others].map(|area| area.offset(CONTROL_BYTES));
        for target in targets {
            self.fill(to, target, PATTERN)?;
        }
        let (_, base) = self.rig.probe(from, to);
        let args = Args {
            operation: Operation::Probe as u32,
            mode: probe::STORE,
            rows: u64::from(self.round),
            ..base
        };
        self.round += 1;
        for (gpu, area) in [(to, own), (from, others)] {
            let mut args = args;
            args.peers[args.peer as usize] = area.0;
            let stream = self.rig.own_stream(gpu);
            // SAFETY: the area has room for the pattern and is mapped into that GPU.
            unsafe { self.gpus[gpu].launch(Kernel::Probe, 1, 32, &args, stream)? };
            self.gpus[gpu].stream_synchronize(stream)?;
        }
        Ok((self.read(to, targets[0], PATTERN)?, self.read(to, targets[1], PATTERN)?))
    }

    /// Kernels of `from` load from the memory of `to`.
    pub(super) fn loads(&mut self, (from, to): Direction) -> Result<Vec<Fault>> {
        let (area, dst) = (self.rig.area(to, from), self.rig.halves(from).1);
        let expected = self.payload(PATTERN);
        self.write(to, area.offset(CONTROL_BYTES), &expected)?;
        self.fill(from, dst, PATTERN)?;
        let (stream, base) = self.rig.probe(from, to);
        let args =
            Args { operation: Operation::Probe as u32, mode: probe::LOAD, dst: dst.0, ..base };
        // SAFETY: the area is mapped, and `dst` has room for the pattern.
        unsafe { self.gpus[from].launch(Kernel::Probe, 1, 32, &args, stream)? };
        self.gpus[from].stream_synchronize(stream)?;
        if let Some(reason) = difference(&expected, &self.read(from, dst, PATTERN)?) {
            return Ok(vec![Fault::new((from, to), format!("what is loaded {reason}"))]);
        }
        let src = self.rig.halves(to).0;
        self.stream_kernel((from, to), (src, to), (dst, from), "loaded")
    }

    /// Random data through the streaming kernel of `from`, from memory of one GPU to memory of another.
    fn stream_kernel(
        &mut self,
        (from, to): Direction,
        (src, reader): (DevicePtr, usize),
        (dst, writer): (DevicePtr, usize),
        what: &str,
    ) -> Result<Vec<Fault>> {
        let bytes = self.rig.message.min(1 << 20);
        let expected = self.payload(bytes);
        self.write(reader, src, &expected)?;
        self.fill(writer, dst, bytes)?;
        let stream = self.rig.own_stream(from);
        self.queue_stream_kernel((from, to), (src, dst), bytes, stream)?;
        self.gpus[from].stream_synchronize(stream)?;
        let wrong = difference(&expected, &self.read(writer, dst, bytes)?);
        let fault = |reason| Fault::new((from, to), format!("what is {what} in bulk {reason}"));
        Ok(wrong.map(fault).into_iter().collect())
    }

    fn queue_stream_kernel(
        &self,
        (from, to): Direction,
        (src, dst): (DevicePtr, DevicePtr),
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let (gpu, units) = (&self.gpus[from], (bytes / UNIT) as u32);
        let filled = units.div_ceil(MAX_THREADS * UNROLL as u32);
        // Half of the multiprocessors at most: a probe finds room beside it.
        let blocks = (gpu.properties().multiprocessors / 2).min(filled).max(1);
        let args = Args { units, src: src.0, dst: dst.0, ..self.rig.probe(from, to).1 };
        // SAFETY: both have room for `bytes` bytes and are mapped; who else writes there means nothing.
        unsafe { gpu.launch(Kernel::Stream, blocks, MAX_THREADS, &args, stream) }
    }

    /// The copy engine of `from` writes into the memory of `to`: what it should, and nothing beside it.
    pub(super) fn copies(&mut self, (from, to): Direction) -> Result<Vec<Fault>> {
        let whole = (self.rig.message - MARGIN, 0, 0);
        let (src, dst) = (self.rig.halves(from).0, self.rig.halves(to).1);
        let stream = self.rig.own_stream(from);
        for (bytes, skip, shift) in COPIES.into_iter().chain([whole]) {
            let bytes = bytes.min(self.rig.message - MARGIN);
            let data = self.payload(bytes + MARGIN);
            self.write(from, src, &data)?;
            self.fill(to, dst, bytes + MARGIN)?;
            // SAFETY: both halves have room for the offsets, and the peer is mapped.
            unsafe { self.gpus[from].copy(dst.offset(shift), src.offset(skip), bytes, stream)? };
            self.gpus[from].stream_synchronize(stream)?;
            let mut expected = vec![STALE; bytes + MARGIN];
            expected[shift..shift + bytes].copy_from_slice(&data[skip..skip + bytes]);
            if let Some(reason) = difference(&expected, &self.read(to, dst, bytes + MARGIN)?) {
                let reason = format!("a copy of {bytes} bytes {reason}");
                return Ok(vec![Fault::new((from, to), reason)]);
            }
        }
        Ok(Vec::new())
    }

    /// Data and flags go both ways while kernels and copies load the link.
    pub(super) fn ordering(&mut self, (a, b): Direction) -> Result<Vec<Fault>> {
        if !(self.is_open((a, b)) && self.is_open((b, a))) {
            return one_way();
        }
        for way in [(a, b), (b, a)] {
            self.load_link(way)?;
        }
        let round = self.next_rounds();
        let streams = [(a, b), (b, a)].map(|way| (way, self.rig.probe(way.0, way.1).0));
        for (way, stream) in streams {
            self.queue_rounds(way, round, stream)?;
        }
        for (way, stream) in streams {
            self.gpus[way.0].stream_synchronize(stream)?;
            self.gpus[way.0].stream_synchronize(self.rig.stream(way)?)?;
        }
        self.round_faults((a, b))
    }

    /// Queues stores and copies in turns in one direction.
    fn load_link(&self, (from, to): Direction) -> Result<()> {
        let stream = self.rig.stream((from, to))?;
        let (src, dst) = (self.rig.halves(from).0, self.rig.halves(to).1);
        let bytes = self.rig.message;
        for turn in 0..self.settings.load {
            if turn % 2 == 0 {
                self.queue_stream_kernel((from, to), (src, dst), bytes, stream)?;
            } else {
                // SAFETY: both halves have that size and the peer is mapped.
                unsafe { self.gpus[from].copy(dst, src, bytes, stream)? };
            }
        }
        Ok(())
    }

    /// The number of the first of the next rounds.
    pub(super) fn next_rounds(&mut self) -> u32 {
        let round = self.round;
        self.round += self.settings.rounds;
        round
    }

    /// Queues one side's rounds of data and flag. The other side's must be queued too.
    pub(super) fn queue_rounds(
        &self,
        (mine, other): Direction,
        round: u32,
        stream: Stream,
    ) -> Result<()> {
        let (_, base) = self.rig.probe(mine, other);
        let args = Args {
            operation: Operation::Probe as u32,
            deadline: ticks(self.settings.deadline),
            mode: probe::PING_PONG,
            rounds: self.settings.rounds,
            rows: u64::from(round),
            ..base
        };
        // SAFETY: both areas are mapped both ways, and both sides pass the same rounds, above all earlier.
        unsafe { self.gpus[mine].launch(Kernel::Probe, 1, 32, &args, stream) }
    }

    /// What both sides' rounds recorded, now that they are over.
    pub(super) fn round_faults(&self, (a, b): Direction) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        for (mine, other) in [(a, b), (b, a)] {
            let page = self.rig.status(mine, other);
            // SAFETY: the page lives as long as the rig, and the kernels are over.
            let reason = match unsafe { (&raw const (*page).state).read_volatile() } {
                state::OK => continue,
                state::CORRUPT => "arrives after its flag, or changed".to_owned(),
                state::TIMED_OUT => {
                    format!("does not arrive within {:?}", self.settings.deadline)
                }
                // The other side gave up and says why.
                _ => continue,
            };
            faults.push(Fault::new((other, mine), format!("what is stored {reason}")));
        }
        if !faults.is_empty() {
            self.rig.forget_failures((a, b))?;
        }
        Ok(faults)
    }

    /// Random bytes with runs of ones and of zeros, which protocols and broken links like.
    pub(super) fn payload(&mut self, bytes: usize) -> Vec<u8> {
        let mut data: Vec<u8> = Vec::with_capacity(bytes + 8);
        while data.len() < bytes {
            match self.rng.below(16) {
                0 => data.extend([0xff; 48]),
                1 => data.extend([0; 32]),
                _ => data.extend(self.rng.next_u64().to_le_bytes()),
            }
        }
        data.truncate(bytes);
        data
    }

    /// Lets the owner make memory stale.
    fn fill(&self, gpu: usize, at: DevicePtr, bytes: usize) -> Result<()> {
        let stream = self.rig.own_stream(gpu);
        // SAFETY: the callers' ranges lie in this GPU's memory.
        unsafe { self.gpus[gpu].fill(at, STALE, bytes, stream)? };
        self.gpus[gpu].stream_synchronize(stream)
    }

    fn write(&self, gpu: usize, at: DevicePtr, data: &[u8]) -> Result<()> {
        let stream = self.rig.own_stream(gpu);
        // SAFETY: as in `fill`.
        unsafe { self.gpus[gpu].upload(at, data, stream)? };
        self.gpus[gpu].stream_synchronize(stream)
    }

    fn read(&self, gpu: usize, at: DevicePtr, bytes: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; bytes];
        // SAFETY: as in `fill`.
        unsafe { self.gpus[gpu].download(&mut data, at, self.rig.own_stream(gpu))? };
        Ok(data)
    }
}

/// Why a pair cannot be checked that can be used in one direction only.
fn one_way() -> Result<Vec<Fault>> {
    Err(crate::Error::Unsupported {
        op: "self_test",
        reason: "data cannot go back, which the check needs".into(),
    })
}

/// What is wrong with `found`, if anything is: whether nothing came, zeros did, or something else.
pub(super) fn difference(expected: &[u8], found: &[u8]) -> Option<String> {
    let wrong: Vec<usize> =
        (0..expected.len()).filter(|at| found.get(*at) != Some(&expected[*at])).collect();
    let first = *wrong.first()?;
    let all = |byte| wrong.iter().all(|at| found.get(*at) == Some(&byte));
    let kind = match (all(STALE), all(0)) {
        (true, _) => "does not arrive",
        (_, true) => "arrives as zeros",
        _ => "arrives changed",
    };
    Some(format!("{kind}: {} of {} bytes, the first at {first}", wrong.len(), expected.len()))
}
