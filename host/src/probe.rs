//! Before the first call: does what one GPU stores arrive in the other's memory?
//!
//! Drivers have been seen that offer peer access and copy zeros. So every pair of ranks exchanges
//! patterns both ways, with the instructions and fences that the collectives use, and compares them
//! bit by bit, over what carries the pair's data. Pairs take turns, because a mailbox has one probe
//! area. A rank that receives nothing, or something else, tells its partner, so each direction of a
//! pair gets a verdict of its own.

use crate::error::{Error, Result};
use crate::gpu::GpuRef;
use crate::group::Mailboxes;
use crate::mailbox::OwnStream;
use crate::plan::Shape;
use crate::selftest::{Symptom, explained};
use peerlane_device::abi::{Args, Kernel, Operation, Status, probe, state, ticks};
use std::time::Duration;

/// Patterns that each pair exchanges.
const ROUNDS: u32 = 64;
/// How long a pattern may take. Ranks start a step together.
const DEADLINE: Duration = Duration::from_secs(5);

/// One rank's part in probing all pairs.
pub(crate) struct Probe<'a> {
    pub(crate) gpu: &'a GpuRef,
    pub(crate) rank: u32,
    pub(crate) shape: Shape,
    pub(crate) mailboxes: &'a Mailboxes,
}

/// Steps in which `world` ranks meet in all pairs.
fn steps(world: u32) -> u32 {
    if world < 2 { 0 } else { world.next_multiple_of(2) - 1 }
}

/// Who meets `rank` in `step`, as in a tournament where one stays and the others go round; `None`
/// if it pauses.
fn partner(world: u32, rank: u32, step: u32) -> Option<u32> {
    let circle = steps(world);
    let fixed = circle;
    let partner = if rank == fixed {
        // The one whose place is opposite its own.
        (0..circle).find(|other| (2 * other) % circle == step % circle)?
    } else {
        let opposite = (step + circle - rank % circle) % circle;
        if opposite == rank { fixed } else { opposite }
    };
    (partner < world).then_some(partner)
}

impl Probe<'_> {
    /// Steps in which every pair meets once.
    pub(crate) fn steps(&self) -> u32 {
        steps(self.shape.world)
    }

    /// Meets this step's partner, if there is one. Returns the partner and what is wrong with what
    /// comes from it, if anything is.
    pub(crate) fn run(&self, pass: u32, step: u32) -> Result<Option<(u32, Error)>> {
        let Some(peer) = partner(self.shape.world, self.rank, step) else { return Ok(None) };
        let mut args = Args {
            operation: Operation::Probe as u32,
            peer,
            deadline: ticks(DEADLINE),
            mode: probe::PING_PONG,
            rounds: ROUNDS,
            rows: u64::from(1 + (pass * self.steps() + step) * ROUNDS),
            ..Args::new(self.rank, self.shape.world, self.shape.layout)
        };
        self.mailboxes.address(&mut args);
        let stream = OwnStream::new(self.gpu)?;
        // SAFETY: what the pair uses is mapped, and both ranks pass the same rounds, above all earlier.
        unsafe { self.gpu.launch(Kernel::Probe, 1, 32, &args, stream.stream)? };
        self.gpu.stream_synchronize(stream.stream)?;
        Ok(self.verdict(peer).map(|error| (peer, error)))
    }

    /// What the kernel recorded.
    fn verdict(&self, peer: u32) -> Option<Error> {
        let members = &self.mailboxes.members;
        let own = &members[self.rank as usize];
        let page = own.status.host.cast::<Status>();
        // SAFETY: the page is alive as long as the member, and the kernel is over.
        let found = unsafe { (&raw const (*page).state).read_volatile() };
        let (from, to) = (members[peer as usize].ordinal, own.ordinal);
        let reason = match found {
            state::CORRUPT => "what arrives is not what was stored".to_owned(),
            state::TIMED_OUT => format!("what it stores does not arrive within {DEADLINE:?}"),
            // Nothing, or the partner has failed and says so itself.
            _ => return None,
        };
        let by_host = self.mailboxes.pairs.by_host(peer, self.rank);
        let way = if by_host { "through host memory" } else { "the driver offers access, but" };
        let error = Error::Unreachable { from, to, reason: format!("{way} {reason}") };
        Some(if by_host { error } else { explained(error, self.gpu.backend(), Symptom::Wrong) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_meets_once_and_both_know() {
        for world in 2..=16 {
            let mut met = vec![vec![0; world as usize]; world as usize];
            for step in 0..steps(world) {
                for rank in 0..world {
                    let Some(peer) = partner(world, rank, step) else { continue };
                    assert_ne!(peer, rank, "{world} ranks, step {step}");
                    assert_eq!(
                        partner(world, peer, step),
                        Some(rank),
                        "{world} ranks, step {step}"
                    );
                    met[rank as usize][peer as usize] += 1;
                }
            }
            for (rank, row) in met.iter().enumerate() {
                for (peer, times) in row.iter().enumerate() {
                    assert_eq!(*times, u32::from(rank != peer), "{world}: {rank} and {peer}");
                }
            }
        }
    }
}
