//! The protocol of `device/src/pipe.rs`, the shipping code, under loom. See docs/protocol.md, "Model checking".
//!
//! What loom cannot see, so that nobody takes a pass for more than it is:
//! - It does not show a store ahead of an earlier load of its thread (load buffering). So [`LoomLane`] loads
//!   polled words with acquire, in place of a GPU's order between a load and a store that depends on it.
//! - After a yield a load never returns what it has returned before if there is something newer. Scenes in
//!   which data are late although they were looked for have turns of waits without a yield (`patience`).
//! - It has no fairness: of three threads, two could wait in turns while the third never goes on. After `turns` turns
//!   of one wait loom tries no more alternatives in that execution.
//! - It has five threads, and remembers seven stores to a location. The kernels keep the books of rank p in thread p,
//!   so most scenes have only the threads that matter, and those of three ranks have all threads of a block in one.
//! - Executions with more preemptions than the scene's bound are not tried. Switches where a thread waits are free.
//! - A kernel's end is a fence for everything, also for what went to other GPUs; `no_boundary` is the other extreme.
//!
//! Invariant: nothing of the protocol is written a second time here. [`LoomLane`] is what a GPU thread can do,
//! [`World`] is memory, [`Scene`] runs the kernels, or programs in the verbs that kernels are made of.

mod block;
pub mod channel;
mod lane;
pub mod lease;
mod scene;
mod world;

pub use lane::LoomLane;
pub use scene::{Faults, Host, Scene, Seat, Threads};
pub use world::{Start, World, dst, host_mailbox, mailbox, src, status};
