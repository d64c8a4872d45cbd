//! The verdict on some GPUs: from this process, from the user's cache, or from a self-test made now.
//!
//! Invariant: a verdict that says "failed", or that a self-test did not finish, is believed only while the machine
//! has not been started again; one that is not finished and says nothing is not kept at all. What the cache cannot
//! give or take is a note.

use super::child::Machine;
use super::{Identity, Program, Report, Settings, in_child};
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef, sim};
use crate::links::{Cache, Key};
use crate::topology;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What self-tests are called in the cache.
const KIND: &str = "self-test";

/// GPUs to test: two or more different ones, in the order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    machine: Machine,
}

impl Subject {
    /// The different GPUs among `gpus`; none if there are fewer than two.
    pub fn of(gpus: &[GpuRef]) -> Option<Subject> {
        let simulation = gpus.first().and_then(|gpu| gpu.simulation());
        Subject::new(gpus.iter().map(Identity::of), simulation)
    }

    /// As [`Subject::of`], by what is known of the GPUs; `simulation`: their machine, if it is a simulated one.
    pub(super) fn new(
        gpus: impl Iterator<Item = Identity>,
        simulation: Option<sim::Config>,
    ) -> Option<Subject> {
        let mut gpus: Vec<Identity> = gpus.collect();
        gpus.sort();
        gpus.dedup();
        if gpus.len() < 2 {
            return None;
        }
        Some(Subject { machine: Machine { gpus, simulation } })
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The GPUs, by position.
    pub fn gpus(&self) -> &[Identity] {
        &self.machine.gpus
    }

    /// Whether they are real.
    pub fn backend(&self) -> Backend {
        if self.machine.simulation.is_some() { Backend::Sim } else { Backend::Cuda }
    }

    /// Under what the cache keeps its verdict; none for simulated GPUs.
    fn key(&self) -> Option<Key> {
        if self.backend() == Backend::Sim {
            return None;
        }
        let name = |gpu: &Identity| (gpu.uuid.clone(), gpu.pci_bus_id.clone());
        Some(Key::new(self.gpus().iter().map(name).collect(), &topology::driver_version()?))
    }
}

/// A verdict, and where it came from.
#[derive(Clone, Debug)]
pub struct Found {
    /// The verdict.
    pub report: Report,
    /// How long ago it was made, if it was in the cache; else it was made just now.
    pub age: Option<Duration>,
    /// What did not go as it should, in words.
    pub notes: Vec<String>,
}

/// What the cache holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    report: Report,
    /// Since when the machine has been running, in a way that is its own each time.
    boot: Option<String>,
    /// Seconds since 1970.
    at: u64,
}

/// Where verdicts are kept.
pub(super) struct Shelf {
    pub(super) place: Option<(Cache, Key)>,
    pub(super) boot: Option<String>,
    /// Why there is no place.
    pub(super) trouble: Option<String>,
}

impl Shelf {
    fn of(subject: &Subject) -> Shelf {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let boot = boot.ok().map(|text| text.trim().to_owned());
        let (cache, trouble) = match Cache::of_user() {
            Ok(cache) => (Some(cache), None),
            Err(note) => (None, Some(note)),
        };
        let key = subject.key();
        // Simulated GPUs are never in the cache, so they do not miss it.
        let trouble = trouble.filter(|_| key.is_some());
        Shelf { place: cache.zip(key), boot, trouble }
    }

    /// What is kept and still holds.
    pub(super) fn load(&self, subject: &Subject) -> (Option<Found>, Vec<String>) {
        let Some((cache, key)) = &self.place else {
            return (None, self.trouble.iter().cloned().collect());
        };
        let expected = ("a self-test", "an outcome of every check of every pair of GPUs");
        let sound = |kept: &Kept| kept.report.is_sound(subject.gpus());
        match cache.load_kind::<Kept>(KIND, key, expected, sound) {
            Ok(Some(kept)) if self.holds(&kept) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let age = Some(now.saturating_sub(Duration::from_secs(kept.at)));
                (Some(Found { report: kept.report, age, notes: Vec::new() }), Vec::new())
            }
            Ok(_) => (None, Vec::new()),
            Err(note) => (None, vec![note]),
        }
    }

    fn holds(&self, kept: &Kept) -> bool {
        let final_verdict = kept.report.passed() && kept.report.cut_short.is_none();
        final_verdict || (kept.boot.is_some() && kept.boot == self.boot)
    }

    /// Keeps a verdict; what stood in the way.
    pub(super) fn store(&self, report: &Report) -> Option<String> {
        let (cache, key) = self.place.as_ref()?;
        if report.passed() && report.cut_short.is_some() {
            return None;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let kept = Kept { report: report.clone(), boot: self.boot.clone(), at: now.as_secs() };
        cache.store_kind(KIND, key, &kept).err()
    }
}

/// The verdict that the cache holds, if it still holds true, and what is wrong with the cache.
pub fn cached(subject: &Subject) -> (Option<Found>, Vec<String>) {
    Shelf::of(subject).load(subject)
}

/// The verdict on `subject`: from the cache, unless `refresh` is asked for, else made now in a child
/// process and kept.
///
/// # Errors
/// [`Error::Unsupported`] if nothing could be tested: there is no program to run it, or as [`in_child`].
pub fn find(subject: &Subject, settings: &Settings, refresh: bool) -> Result<Found> {
    let test = || {
        let program = Program::find();
        let program = program.map_err(|reason| Error::Unsupported { op: "self_test", reason })?;
        in_child(&program, subject, settings)
    };
    find_on(&Shelf::of(subject), subject, refresh, test)
}

/// As [`find`], with what it needs.
pub(super) fn find_on(
    shelf: &Shelf,
    subject: &Subject,
    refresh: bool,
    test: impl FnOnce() -> Result<Report>,
) -> Result<Found> {
    let (found, mut notes) =
        if refresh { (None, shelf.trouble.iter().cloned().collect()) } else { shelf.load(subject) };
    if let Some(found) = found {
        return Ok(found);
    }
    let report = test()?;
    notes.extend(shelf.store(&report));
    Ok(Found { report, age: None, notes })
}
