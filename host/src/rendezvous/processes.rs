//! How ranks meet when each is a process of its own.

use std::time::Duration;

/// Where the processes of a group meet: all of them give the same name and world size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processes {
    /// Any text up to 90 bytes that no other group of this machine uses at the same time.
    pub name: String,
    /// Number of ranks.
    pub world: u32,
    /// How long the ranks wait for each other.
    pub patience: Duration,
}
