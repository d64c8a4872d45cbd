//! What the suites in `tests/` are made of: machines, calls with what they must leave in memory,
//! groups of ranks that one thread drives, and the conformance suite itself.
//!
//! Invariant: nothing in here knows how a collective works. What must come out is computed with
//! [`peerlane::reference`], and every byte that a call may not touch is compared too.

pub mod ends;
pub mod faults;
pub mod group;
pub mod job;
pub mod machine;
pub mod processes;
pub mod registered;
pub mod replay;
pub mod runner;
pub mod script;
pub mod suite;
pub mod threads;

pub use group::{Group, Memory, Rank};
pub use job::{Call, Job, moves, random_jobs, reductions};
pub use machine::{Links, Machine, small};
pub use script::Script;
pub use threads::{run, threads};

/// The number in an environment variable, or `default`.
///
/// # Panics
/// If the variable holds something else.
pub fn number_from_environment(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Err(_) => default,
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}: not a number: {text}")),
    }
}
