//! Deterministic simulation testing: machines in which something goes wrong, and what must come of it.
//!
//! A seed draws a [`Scene`]: a world, a configuration, a list of calls and a class of fault. The scene is played
//! twice: once without the fault, to count the places where it may strike, and once with it, at one of them. Then
//! every rank must hold the right result or have a typed error, within the bound, and the ranks must go on from there.
//!
//! Invariant: what a seed does follows from the seed alone, but for scheduled calls, whose deadlines are real time.

mod class;
mod play;
mod recovery;
mod scene;
mod table;
mod tensors;

pub use class::Class;
pub use play::{Ending, Verdict, judge, try_fault};
pub use recovery::After;
pub use scene::{Kind, Place, Scene};
pub use table::{Tally, rewrite};
