//! The child's side: what it is told on its standard input, and what it says on its standard output.
//!
//! Invariant: every check is announced before it begins, so the parent knows what a child was doing when it
//! ended. A child ends when its parent does: its standard input ends then.

use super::find::Subject;
use super::lab::{Event, run_with};
use super::{Check, Deed, Identity, Outcome, Report, Sabotage, Settings, Step};
use crate::error::{Error, Result};
use crate::gpu::{GpuRef, cuda, sim};
use peerlane_device::abi::ABI_VERSION;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read, Write};
use std::time::Duration;

/// What a line begins with that is for the parent. Libraries say other things.
pub(super) const MARK: &str = "peerlane-self-test ";
/// A child that its parent has forgotten ends all the same, so long after its limit.
const OVERTIME: Duration = Duration::from_secs(30);

/// Whose GPUs are tested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// Which, in the order of their addresses.
    pub(super) gpus: Vec<Identity>,
    /// The simulated machine that they belong to; none if they are real.
    pub(super) simulation: Option<sim::Config>,
}

/// What a child is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    version: String,
    abi: u32,
    pub(super) machine: Machine,
    pub(super) settings: Settings,
}

impl Request {
    /// To test `subject`.
    pub fn new(subject: &Subject, settings: &Settings) -> Request {
        let (machine, settings) = (subject.machine().clone(), settings.clone());
        Request { version: env!("CARGO_PKG_VERSION").into(), abi: ABI_VERSION, machine, settings }
    }

    /// That this is the child for it.
    fn check(&self) -> std::result::Result<(), String> {
        let own = (env!("CARGO_PKG_VERSION"), ABI_VERSION);
        if (self.version.as_str(), self.abi) == own {
            return Ok(());
        }
        Err(format!(
            "expected Peerlane {} (interface {}), got {} (interface {}) as the self-test's program",
            self.version, self.abi, own.0, own.1
        ))
    }

    fn open(&self) -> Result<Vec<GpuRef>> {
        let Machine { gpus, simulation } = &self.machine;
        let all = match simulation {
            // One thread drives all of it, and time may jump.
            Some(config) => sim::devices(&sim::Config { autonomous: false, ..config.clone() }),
            None => cuda::devices()?,
        };
        let pick = |wanted: &Identity| {
            let found = all.iter().find(|gpu| Identity::of(gpu) == *wanted);
            found.cloned().ok_or_else(|| Error::InvalidArgument {
                op: "self_test",
                argument: "gpus",
                expected: format!("GPUs that its process sees, {} of them", all.len()),
                got: format!("{} at {}", wanted.uuid, wanted.pci_bus_id),
            })
        };
        gpus.iter().map(pick).collect()
    }
}

/// What a child says, a line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// A check begins.
    Begin(Step),
    /// A check of an ordered pair is over.
    Outcome((u32, u32), Outcome),
    /// All of it.
    Report(Report),
    /// Nothing could be tested.
    Refused(String),
}

impl Message {
    fn say(&self) {
        let Ok(text) = serde_json::to_string(self) else { return };
        let mut out = std::io::stdout().lock();
        // A parent that has gone needs no report.
        let _ = writeln!(out, "{MARK}{text}").and_then(|()| out.flush());
    }
}

/// Is the child: reads a [`Request`] from the standard input, tests, reports. For programs that
/// [`Program::find`](super::Program::find) may find; returns whether a report was made.
pub fn serve() -> bool {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    let request = read.map_err(|error| error.to_string()).and_then(|_| {
        serde_json::from_str::<Request>(&line)
            .map_err(|error| format!("expected a request for a self-test, got {error}"))
    });
    match request.and_then(|request| {
        request.check()?;
        watch(request.settings.limit + OVERTIME);
        test(&request).map_err(|error| error.to_string())
    }) {
        Ok(report) => {
            Message::Report(report).say();
            true
        }
        Err(reason) => {
            Message::Refused(reason).say();
            false
        }
    }
}

fn test(request: &Request) -> Result<Report> {
    let settings = &request.settings;
    let sabotage = |before: Option<Check>| match settings.sabotage {
        Some(Sabotage { before: when, deed }) if when == before => commit(deed),
        _ => {}
    };
    sabotage(None);
    let gpus = request.open()?;
    run_with(&gpus, settings, &mut |event| match event {
        Event::Begin(step) => {
            Message::Begin(step.clone()).say();
            sabotage(Some(step.check));
        }
        Event::Outcome(way, outcome) => Message::Outcome(way, outcome.clone()).say(),
    })
}

/// Ends this process when the parent ends, or after `limit`.
fn watch(limit: Duration) {
    let end = |status| {
        // SAFETY: it ends the process at once and runs no code of ours; a hung driver cannot hold it up.
        unsafe { libc::_exit(status) }
    };
    std::thread::spawn(move || {
        // The parent says nothing more; an end or an error means that it is gone.
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        end(3)
    });
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        end(4)
    });
}

/// Test only: does what a bad driver does.
fn commit(deed: Deed) {
    match deed {
        Deed::Signal(number) => {
            // SAFETY: it takes a handler away and sends this process a signal, which ends it.
            unsafe {
                libc::signal(number, libc::SIG_DFL);
                libc::raise(number);
            }
        }
        Deed::Hang => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        Deed::Babble => {
            println!("a library says this");
            println!("{MARK}{{\"Report\": 7}}");
            std::process::exit(0)
        }
        Deed::Exit => std::process::exit(0),
    }
}
