//! How ranks meet: as threads of one process, or as processes of one machine.

mod assembly;
#[cfg(test)]
mod deaths;
mod host;
#[cfg(test)]
mod hostile;
mod life;
mod processes;
#[cfg(any(fuzzing, test))]
pub(crate) mod raw;
mod segment;
mod socket;
#[cfg(test)]
mod tests;
mod threads;

pub(crate) use assembly::{Assembly, Table, Topic, meeting_of};
pub use processes::Processes;
pub(crate) use processes::{Membership, Seat, Terms, lost_among};
pub(crate) use segment::{ABORTED, LOST, PAGE, Presence, Segment, lost_rank};
pub use threads::Meeting;

/// The version of what processes say to each other while they meet, and of the memory they share.
pub(crate) const PROTOCOL: u32 = 5;

/// Names the ranks that have a bit in `which`.
fn ranks_in(which: u32) -> String {
    ranks((0..u32::BITS).filter(|rank| which >> rank & 1 != 0))
}

/// Names ranks: "rank 1" or "ranks 1, 2".
fn ranks(which: impl Iterator<Item = u32>) -> String {
    let list: Vec<_> = which.map(|rank| rank.to_string()).collect();
    format!("rank{} {}", if list.len() == 1 { "" } else { "s" }, list.join(", "))
}
