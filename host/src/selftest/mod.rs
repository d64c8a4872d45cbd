//! The start-up self-test: does every way in which the kernels use the link between two GPUs work, bit by
//! bit, for every ordered pair? (docs/self-test.md)
//!
//! Invariant: a check that has not been made is never called passed: it says why not. [`run`] makes the checks in
//! this process; everything else makes them in a child process, so that a driver that crashes or hangs takes nobody
//! along. A verdict that says "failed" holds until the machine is started again, one that says "passed" for as
//! long as GPUs, driver and Peerlane stay the same.

mod cause;
mod child;
mod crew;
mod direct;
mod facts;
mod find;
mod groups;
mod known;
mod lab;
mod mode;
mod parent;
mod program;
#[cfg(test)]
mod tests;

pub use cause::{Cause, Symptom, likely};
pub use child::{Request, serve};
pub use facts::{Facts, Iommu};
pub use find::{Found, Subject, cached, find};
pub(crate) use known::{Consult, Verdicts, explained};
pub use lab::{Event, run, run_with};
pub use mode::SelfTest;
pub use parent::in_child;
pub use program::{PROGRAM_VARIABLE, Program, set_program};

use crate::gpu::{Backend, GpuRef};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// What is checked of an ordered pair: the first GPU acts on the second's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Stores of a kernel, read back by the memory's owner.
    Stores,
    /// Loads of a kernel.
    Loads,
    /// The copy engine, writing; several sizes and odd addresses.
    CopyEngine,
    /// Data, then a flag: whoever sees the flag finds the data, while other work loads the link.
    Ordering,
    /// All-reduces of packets, whose data carry their flags.
    Packets,
    /// Units of 16 bytes without flags, all ones included, which only a seal announces.
    FullWidth,
    /// A captured all-reduce, replayed with changing inputs.
    Replay,
    /// All pairs at once.
    Together,
}

impl Check {
    /// All of them, in the order in which they are made.
    pub const ALL: [Check; 8] = [
        Check::Stores,
        Check::Loads,
        Check::CopyEngine,
        Check::Ordering,
        Check::Packets,
        Check::FullWidth,
        Check::Replay,
        Check::Together,
    ];

    /// The name used in reports and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Check::Stores => "SM stores",
            Check::Loads => "SM loads",
            Check::CopyEngine => "copy engine",
            Check::Ordering => "flag ordering under load",
            Check::Packets => "packets",
            Check::FullWidth => "full-width units",
            Check::Replay => "graph replay",
            Check::Together => "all pairs at once",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Every bit was right, in time.
    Passed,
    /// Something was not.
    Failed {
        /// What.
        reason: String,
    },
    /// It was not made.
    NotRun {
        /// Why not.
        reason: String,
    },
}

/// One check of one ordered pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What was checked.
    pub check: Check,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it took; of a check of several pairs at once, all of it.
    pub ms: f64,
}

/// Which GPU it was, wherever it appears in a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// As in [`Properties`](crate::gpu::Properties).
    pub pci_bus_id: String,
    /// As in [`Properties`](crate::gpu::Properties).
    pub uuid: String,
}

impl Identity {
    /// Which GPU `gpu` is.
    pub fn of(gpu: &GpuRef) -> Identity {
        let properties = gpu.properties();
        Identity { pci_bus_id: properties.pci_bus_id.clone(), uuid: properties.uuid.clone() }
    }
}

/// One ordered pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Position of the GPU that acts.
    pub from: u32,
    /// Position of the GPU whose memory it uses.
    pub to: u32,
    /// Every check, in the order of [`Check::ALL`].
    pub checks: Vec<Outcome>,
}

impl Pair {
    /// The first check that failed, and how.
    pub fn failure(&self) -> Option<(Check, &str)> {
        self.checks.iter().find_map(|outcome| match &outcome.verdict {
            Verdict::Failed { reason } => Some((outcome.check, reason.as_str())),
            _ => None,
        })
    }

    /// What came of one check.
    pub fn verdict(&self, check: Check) -> Option<&Verdict> {
        self.checks.iter().find(|outcome| outcome.check == check).map(|outcome| &outcome.verdict)
    }
}

/// Every ordered pair of some GPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether the GPUs are real.
    pub backend: Backend,
    /// The GPUs, by position.
    pub gpus: Vec<Identity>,
    /// Every ordered pair of two different positions, by `from`, then by `to`.
    pub pairs: Vec<Pair>,
    /// Why some checks were not made that could have been: time ran out, a GPU failed, the child died.
    pub cut_short: Option<String>,
    /// How long all of it took.
    pub seconds: f64,
}

impl Report {
    /// The pair of two GPUs, if both were tested.
    pub fn pair(&self, from: &str, to: &str) -> Option<&Pair> {
        let position = |uuid: &str| self.gpus.iter().position(|gpu| gpu.uuid == uuid);
        let (from, to) = (position(from)? as u32, position(to)? as u32);
        self.pairs.iter().find(|pair| (pair.from, pair.to) == (from, to))
    }

    /// The pairs that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter().filter(|pair| pair.failure().is_some())
    }

    /// Whether no check failed. Those that were not made say nothing.
    pub fn passed(&self) -> bool {
        self.failures().next().is_none()
    }

    /// Whether it is what [`run`] makes of `gpus`: nothing that another process wrote is believed before.
    pub(crate) fn is_sound(&self, gpus: &[Identity]) -> bool {
        let count = gpus.len() as u32;
        let order = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
        let order = order.filter(|(from, to)| from != to);
        let complete = |pair: &Pair| pair.checks.iter().map(|one| one.check).eq(Check::ALL);
        self.gpus == gpus
            && self.pairs.iter().map(|pair| (pair.from, pair.to)).eq(order)
            && self.pairs.iter().all(complete)
    }
}

/// How much is tested, and how long it may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Bytes of memory on each GPU for plain transfers, half of them for one.
    pub bytes: usize,
    /// Bytes that a rank brings to the largest collectives.
    pub most_bytes: usize,
    /// Rounds of data and flag between a pair.
    pub rounds: u32,
    /// Messages each way that load the link meanwhile.
    pub load: u32,
    /// Replays of a captured call.
    pub replays: u32,
    /// How long a wait on a GPU may last.
    pub deadline: Duration,
    /// How long one check may take in a child before it is stopped. Longer than any deadline.
    pub check_limit: Duration,
    /// How long all of it may take; what is left then is not run.
    pub limit: Duration,
    /// Seed of all data.
    pub seed: u64,
    /// Test only: what a child does wrong.
    #[doc(hidden)]
    #[serde(default)]
    pub sabotage: Option<Sabotage>,
}

impl Settings {
    /// What suits GPUs of this kind.
    pub fn of(backend: Backend) -> Settings {
        let real = Settings {
            bytes: 8 << 20,
            most_bytes: 512 << 10,
            rounds: 256,
            load: 32,
            replays: 200,
            // As for the probe when ranks join: a busy host may be late with one side of a wait.
            deadline: Duration::from_secs(5),
            check_limit: Duration::from_secs(20),
            limit: Duration::from_secs(60),
            seed: 1,
            sabotage: None,
        };
        match backend {
            Backend::Cuda => real,
            Backend::Sim => Settings {
                bytes: 32 << 10,
                most_bytes: 3000,
                rounds: 16,
                load: 2,
                replays: 5,
                ..real
            },
        }
    }
}

/// Test only: what a child does wrong, before which check.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sabotage {
    /// Before which check of whichever pair comes first; `None`: before the GPUs are opened.
    pub before: Option<Check>,
    /// What it does.
    pub deed: Deed,
}

/// Test only: what a child does wrong.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Deed {
    /// Ends by a signal.
    Signal(i32),
    /// Does nothing more.
    Hang,
    /// Says what means nothing.
    Babble,
    /// Ends without a report.
    Exit,
}

/// A check that begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What is checked.
    pub check: Check,
    /// Between which positions: the directions that get a verdict.
    pub directions: Vec<(u32, u32)>,
}
