//! Checks that are collectives: packets, full-width units, replays, and everything at once.
//!
//! Invariant: results are compared with what the CPU makes of the same inputs, every bit on every rank.

use super::crew::{Crew, summed};
use super::lab::{Direction, Fault, Lab};
use crate::algorithm::Algorithm;
use crate::error::Result;
use peerlane_device::abi::Format;

const PACKET: Algorithm = Algorithm::OneShot(Format::Packet);
const FULL: Algorithm = Algorithm::OneShot(Format::Full);
/// Elements of a call that is captured.
const CAPTURED: usize = 250;
/// Times that all pairs do everything at once.
const TOGETHER: usize = 4;

impl Lab<'_> {
    /// From one element to the largest call.
    fn counts(&self) -> [usize; 4] {
        let most = self.settings.most_bytes / 4;
        [1, 7, (most / 3).min(1000), most]
    }

    /// All-reduces between two GPUs whose data carry their flags.
    pub(super) fn packets(&mut self, (a, b): Direction) -> Result<Vec<Fault>> {
        let mut crew = Crew::new(self, &[a, b])?;
        for count in self.counts() {
            let faults = self.reduce(&mut crew, 2, count, PACKET)?;
            if !faults.is_empty() {
                return Ok(faults);
            }
        }
        Ok(Vec::new())
    }

    fn reduce(
        &mut self,
        crew: &mut Crew<'_>,
        world: usize,
        count: usize,
        algorithm: Algorithm,
    ) -> Result<Vec<Fault>> {
        let (inputs, sum) = summed(self, world, count);
        crew.bring(&inputs)?;
        crew.all_reduce(count, algorithm)?;
        let faults = crew.settle()?;
        if !faults.is_empty() {
            return Ok(faults);
        }
        crew.compare(&[sum], &format!("the sum of {count} numbers ({})", algorithm.name()))
    }

    /// Data without flags: any bits, those of a free slot above all.
    pub(super) fn full_width(&mut self, (a, b): Direction) -> Result<Vec<Fault>> {
        let mut crew = Crew::new(self, &[a, b])?;
        let most = self.settings.most_bytes;
        for bytes in [16, most.min(1000) - 3, most] {
            let ones = vec![0xff; bytes];
            let mixed = [self.payload(bytes), self.payload(bytes)];
            // All ones both ways, and beside other data.
            let second = mixed[0].clone();
            for inputs in [[ones.clone(), ones.clone()], [ones, second], mixed] {
                let faults = gather(&mut crew, &inputs)?;
                if !faults.is_empty() {
                    return Ok(faults);
                }
            }
        }
        self.reduce(&mut crew, 2, most / 4, FULL)
    }

    /// A captured call: its inputs change, the graph does not.
    pub(super) fn replay(&mut self, (a, b): Direction) -> Result<Vec<Fault>> {
        let mut crew = Crew::new(self, &[a, b])?;
        let count = CAPTURED.min(self.settings.most_bytes / 4);
        let graphs = crew.capture(count, PACKET)?;
        for replay in 0..self.settings.replays {
            let (inputs, sum) = summed(self, 2, count);
            crew.bring(&inputs)?;
            crew.replay(&graphs)?;
            let mut faults = crew.settle()?;
            if faults.is_empty() {
                faults = crew.compare(&[sum], &format!("the sum of replay {replay}"))?;
            }
            if !faults.is_empty() {
                return Ok(faults);
            }
        }
        Ok(Vec::new())
    }

    /// World-wide collectives while every pair exchanges data and flags.
    pub(super) fn together(&mut self) -> Result<Vec<Fault>> {
        let world = self.gpus.len();
        let everyone: Vec<usize> = (0..world).collect();
        let mut crew = Crew::new(self, &everyone)?;
        let sound = |lab: &Self, (a, b): &Direction| a < b && lab.is_sound_pair((*a, *b));
        let pairs: Vec<Direction> = self.directions().filter(|pair| sound(self, pair)).collect();
        let bytes = self.settings.most_bytes;
        for _ in 0..TOGETHER {
            let (inputs, sum) = summed(self, world, bytes / 4);
            crew.bring(&inputs)?;
            // Every GPU gets its work in one order, so no kernel waits for one that is queued behind it.
            crew.all_gather(bytes / 4 * 4)?;
            let round = self.next_rounds();
            for (a, b) in &pairs {
                for way in [(*a, *b), (*b, *a)] {
                    self.queue_rounds(way, round, self.rig.stream(way)?)?;
                }
            }
            let mut faults = crew.settle()?;
            for pair in &pairs {
                for way in [*pair, (pair.1, pair.0)] {
                    self.gpus[way.0].stream_synchronize(self.rig.stream(way)?)?;
                }
                faults.extend(self.round_faults(*pair)?);
            }
            if faults.is_empty() {
                faults = crew.compare(&inputs, "what was gathered")?;
            }
            if faults.is_empty() {
                crew.all_reduce(bytes / 4, Algorithm::TwoShot)?;
                faults = crew.settle()?;
            }
            if faults.is_empty() {
                faults = crew.compare(&[sum], "the sum of all")?;
            }
            if !faults.is_empty() {
                return Ok(faults);
            }
        }
        Ok(Vec::new())
    }
}

/// Every rank gets every rank's bytes.
fn gather(crew: &mut Crew<'_>, inputs: &[Vec<u8>]) -> Result<Vec<Fault>> {
    crew.bring(inputs)?;
    crew.all_gather(inputs[0].len())?;
    let faults = crew.settle()?;
    if !faults.is_empty() {
        return Ok(faults);
    }
    crew.compare(inputs, &format!("{} bytes gathered", inputs[0].len()))
}
