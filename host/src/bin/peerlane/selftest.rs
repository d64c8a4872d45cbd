//! `peerlane self-test`: does every way work in which kernels use the links between the GPUs?
//!
//! Invariant: the test runs in a process of its own, which is this program with `--child`; that one says nothing
//! but what its parent expects. A cached verdict says how old it is.

use crate::devices::Devices;
use crate::{Common, Outcome, output};
use peerlane::selftest::{
    self, Facts, Found, Identity, Pair, Settings, Subject, Symptom, Verdict, likely,
};
use peerlane::topology::Topology;
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// Options of `peerlane self-test`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Test anew, whatever the cache holds.
    #[arg(long)]
    refresh: bool,
    /// Be the process that tests.
    #[arg(long, hide = true)]
    child: bool,
}

/// Tests, and shows what came of it.
pub(crate) fn run(options: &Options) -> Outcome {
    if options.child {
        return Ok(selftest::serve());
    }
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let topology = devices.topology()?;
    println!("{devices}");
    let tested = Tested::find(&devices, &topology, Wish::of(options.refresh, false));
    println!("{}", tested.text());
    if let Some(path) = &options.common.json {
        let mut value = output::provenance(&devices);
        value["self_test"] = tested.json();
        output::write_json(path, &value)?;
    }
    Ok(tested.is_good())
}

/// How much a command wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// What the cache holds and nothing else.
    Cached,
    /// That, or a new test.
    Any,
    /// A new test.
    New,
}

impl Wish {
    /// By what the command line says.
    pub(crate) fn of(refresh: bool, only_cached: bool) -> Wish {
        match (refresh, only_cached) {
            (true, _) => Wish::New,
            (_, true) => Wish::Cached,
            _ => Wish::Any,
        }
    }
}

/// A verdict on the devices of a command, or why there is none.
pub(crate) struct Tested<'a> {
    devices: &'a Devices,
    topology: &'a Topology,
    found: Result<Found, String>,
}

impl<'a> Tested<'a> {
    /// Looks the verdict up, or tests.
    pub(crate) fn find(devices: &'a Devices, topology: &'a Topology, wish: Wish) -> Tested<'a> {
        let found = match Subject::of(&devices.gpus) {
            None => Err("there is no pair of different GPUs".into()),
            Some(subject) if wish == Wish::Cached => {
                let (found, notes) = selftest::cached(&subject);
                found.ok_or_else(|| match notes.first() {
                    Some(note) => note.clone(),
                    None if devices.simulated_only() => {
                        "simulated GPUs have none until asked".into()
                    }
                    None => "none in the cache".into(),
                })
            }
            Some(subject) => {
                let settings = Settings::of(subject.backend());
                selftest::find(&subject, &settings, wish == Wish::New)
                    .map_err(|error| error.to_string())
            }
        };
        Tested { devices, topology, found }
    }

    /// Whether all of it was tested and nothing failed, or there is nothing to test.
    fn is_good(&self) -> bool {
        match &self.found {
            Ok(found) => found.report.passed() && found.report.cut_short.is_none(),
            Err(_) => Subject::of(&self.devices.gpus).is_none(),
        }
    }

    /// What did not go as it should.
    fn notes(&self) -> &[String] {
        self.found.as_ref().map_or(&[], |found| &found.notes)
    }

    /// What came of two positions of the devices; none for one GPU twice.
    fn pair(&self, from: u32, to: u32) -> Option<&Pair> {
        let uuid = |at: u32| Identity::of(&self.devices.gpus[at as usize]).uuid;
        self.found.as_ref().ok()?.report.pair(&uuid(from), &uuid(to))
    }

    /// Ordered pairs that failed or were not tested: the state in a word, why, and what is likely behind it.
    fn troubles(&self) -> Vec<Trouble> {
        let links = self.topology.links.iter().filter(|link| !link.same_gpu);
        let troubles = links.filter_map(|link| {
            let pair = self.pair(link.from, link.to)?;
            let (state, reason, symptom) = match (pair.failure(), &pair.checks.first()?.verdict) {
                (Some((check, reason)), _) => {
                    ("failed", format!("{check}: {reason}"), Some(Symptom::Wrong))
                }
                (None, Verdict::NotRun { reason }) => {
                    let symptom = (!link.access.access).then_some(Symptom::NoAccess);
                    ("not run", reason.clone(), symptom)
                }
                (None, _) => return None,
            };
            let gpu = |at: u32| &self.devices.gpus[at as usize];
            let causes = symptom.map(|symptom| {
                let facts = Facts::gather(gpu(link.from), gpu(link.to));
                likely(&facts, symptom).iter().map(ToString::to_string).collect()
            });
            let causes = causes.unwrap_or_default();
            Some(Trouble { from: link.from, to: link.to, state, reason, causes })
        });
        troubles.collect()
    }

    /// A section for the terminal.
    pub(crate) fn text(&self) -> String {
        let found = match &self.found {
            Ok(found) => found,
            Err(reason) => return format!("Self-test: no verdict: {reason}\n"),
        };
        let count = found.report.pairs.len();
        let failed = found.report.failures().count();
        let verdict = match (failed, &found.report.cut_short) {
            (0, None) => "passed".to_owned(),
            (0, Some(reason)) => format!("not finished: {reason}"),
            (failed, _) => format!("FAILED for {failed} of {count} ordered pairs"),
        };
        let mut text = format!("Self-test {}: {verdict}\n", self.when(found));
        for trouble in self.troubles() {
            let Trouble { from, to, state, reason, causes } = trouble;
            let _ = writeln!(text, "  GPU{from} to GPU{to} {state}: {reason}");
            causes.iter().for_each(|cause| text += &format!("    likely cause: {cause}\n"));
        }
        self.notes().iter().for_each(|note| text += &format!("note: {note}\n"));
        text
    }

    fn when(&self, found: &Found) -> String {
        let simulated = if self.devices.simulated_only() { ", simulated GPUs" } else { "" };
        match found.age {
            None => format!("(made just now in {:.1} s{simulated})", found.report.seconds),
            Some(age) => {
                format!("(made {} ago, from the cache; --refresh repeats it)", rounded(age))
            }
        }
    }

    /// All of it, for `--json`.
    pub(crate) fn json(&self) -> Value {
        match &self.found {
            Err(reason) => json!({"verdict": null, "reason": reason}),
            Ok(found) => {
                let troubles = self.troubles();
                json!({
                    "verdict": if found.report.passed() { "passed" } else { "failed" },
                    "age_s": found.age.map(|age| age.as_secs()),
                    "notes": found.notes,
                    "troubles": troubles.iter().map(Trouble::json).collect::<Vec<_>>(),
                    "report": found.report,
                })
            }
        }
    }
}

/// An ordered pair of positions that failed or was not tested.
struct Trouble {
    from: u32,
    to: u32,
    state: &'static str,
    reason: String,
    causes: Vec<String>,
}

impl Trouble {
    fn json(&self) -> Value {
        let Trouble { from, to, state, reason, causes } = self;
        json!({"from": from, "to": to, "state": state, "reason": reason, "likely_causes": causes})
    }
}

/// A time in the unit that suits it.
fn rounded(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Selection;
    use peerlane::gpu::sim;

    fn tested(config: &sim::Config, check: impl Fn(&Tested<'_>)) {
        let gpus = sim::devices(config);
        let devices = Devices { gpus, selection: Selection::Sim(config.devices) };
        let topology = devices.topology().unwrap();
        let report = selftest::run(&devices.gpus, &Settings::of(devices.backend())).unwrap();
        let found = Ok(Found { report, age: None, notes: Vec::new() });
        check(&Tested { devices: &devices, topology: &topology, found });
    }

    #[test]
    fn troubles_have_their_reasons() {
        let config = sim::Config {
            devices: 3,
            lossy: vec![(2, 1)],
            unreachable: vec![(0, 1)],
            ..sim::Config::default()
        };
        tested(&config, |tested| {
            let text = tested.text();
            assert!(text.contains("simulated GPUs): FAILED for 1 of 6 ordered pairs"), "{text}");
            assert!(text.contains("  GPU2 to GPU1 failed: SM stores: what is stored"), "{text}");
            let closed = "  GPU1 to GPU0 not run: the driver offers no peer access\n";
            assert!(text.contains(closed), "{text}");
            assert!(!tested.is_good());
            let json = tested.json();
            assert_eq!(json["verdict"], "failed");
            assert_eq!(json["troubles"].as_array().unwrap().len(), 3);
            assert_eq!(json["report"]["pairs"][0]["checks"][0]["verdict"], "not_run");
        });
    }

    #[test]
    fn a_good_machine_is_one_line() {
        tested(&sim::Config { devices: 2, ..sim::Config::default() }, |tested| {
            let text = tested.text();
            assert!(text.ends_with("simulated GPUs): passed\n"), "{text}");
            assert!(tested.is_good() && tested.troubles().is_empty());
        });
    }

    #[test]
    fn one_gpu_needs_no_test() {
        let devices = Devices::open(Some(&Selection::Sim(1)), 1).unwrap();
        let topology = devices.topology().unwrap();
        let tested = Tested::find(&devices, &topology, Wish::Any);
        assert_eq!(tested.text(), "Self-test: no verdict: there is no pair of different GPUs\n");
        assert!(tested.is_good() && tested.json()["verdict"].is_null());
    }

    #[test]
    fn ages_are_rounded() {
        let text = |seconds| rounded(Duration::from_secs(seconds));
        assert_eq!([5, 300, 9000, 400_000].map(text), ["5 s", "5 min", "2 h", "4 days"]);
    }
}
