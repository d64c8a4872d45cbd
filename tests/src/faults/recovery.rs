//! How ranks go on after an error.

use crate::group::{Group, Rank};
use crate::job::random_jobs;
use crate::script::Script;
use peerlane::cases::Rng;
use peerlane::{Communicator, Error};

/// How they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// There was no error.
    Unneeded,
    /// The same ranks went on.
    Recovered,
    /// Those that were left went on without the others.
    Shrunk,
    /// Nobody was left.
    Closed,
}

/// Times that ranks recover again.
const PATIENCE: u32 = 8;

/// Lets the ranks of a group that failed go on, without those whose GPU has stopped or whose process is lost, and makes
/// calls.
///
/// # Errors
/// They do not.
pub(super) fn recovers(mut group: Group, stopped: Option<u32>, seed: u64) -> Result<After, String> {
    let on_stopped = |rank: &Rank| Some(rank.gpu.properties().ordinal) == stopped;
    let mut without: Vec<u32> =
        (0..).zip(&group.ranks).filter(|(_, rank)| on_stopped(rank)).map(|(r, _)| r).collect();
    if without.is_empty() {
        match Communicator::recover_all(&mut communicators(&mut group.ranks)) {
            Ok(()) => return goes_on(group, seed),
            Err(Error::PeerLost { peer, .. }) => without.push(peer),
            Err(error) => return Err(format!("recovering: {error}")),
        }
    }
    let numbered = (0u32..).zip(group.ranks);
    let (mut left, gone): (Vec<_>, Vec<_>) = numbered.partition(|(r, _)| !without.contains(r));
    drop(gone);
    let mut ranks: Vec<Rank> = left.drain(..).map(|(_, rank)| rank).collect();
    if ranks.is_empty() {
        return Ok(After::Closed);
    }
    let shrunk = Communicator::shrink_all(&mut communicators(&mut ranks), &without);
    shrunk.map_err(|error| format!("shrinking: {error}"))?;
    goes_on(Group { ranks }, seed).map(|_| After::Shrunk)
}

fn communicators(ranks: &mut [Rank]) -> Vec<&mut Communicator> {
    ranks.iter_mut().map(|rank| &mut rank.communicator).collect()
}

fn goes_on(mut group: Group, seed: u64) -> Result<After, String> {
    let world = group.ranks.len() as u32;
    let jobs = random_jobs(world, 3, 2000, &mut Rng::new(seed, "recovery"));
    let script = Script::new(world, &jobs, seed);
    let mut outcome = group.run(&script);
    // A GPU that crawls may do so for a few deadlines more.
    for _ in 0..PATIENCE {
        let is_wrong = |reason: &String| reason.contains("expected");
        if outcome.is_ok() || outcome.as_ref().is_err_and(is_wrong) {
            break;
        }
        let again = Communicator::recover_all(&mut communicators(&mut group.ranks));
        again.map_err(|error| format!("recovering again: {error}"))?;
        outcome = group.run(&script);
    }
    outcome.map(|_| After::Recovered).map_err(|error| format!("afterwards: {error}"))
}
