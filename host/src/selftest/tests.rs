//! Self-tests of simulated GPUs, in this process, and what is kept of them.

use super::find::{Shelf, Subject, find_on};
use super::*;
use crate::gpu::sim;
use crate::links::{Cache, Key};
use std::cell::Cell;
use std::path::PathBuf;

/// Two GPUs that do not exist.
pub(super) fn two() -> [Identity; 2] {
    ["a", "b"].map(|name| Identity {
        pci_bus_id: format!("0000:0{name}:00.0"),
        uuid: format!("GPU-{name}"),
    })
}

/// A report of which everything passed.
pub(super) fn passing_report(gpus: &[Identity]) -> Report {
    let outcome = |check| Outcome { check, verdict: Verdict::Passed, ms: 1.0 };
    let count = gpus.len() as u32;
    let ways = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
    let pairs = ways.filter(|(from, to)| from != to);
    let pairs = pairs.map(|(from, to)| Pair { from, to, checks: Check::ALL.map(outcome).to_vec() });
    let pairs = pairs.collect();
    Report { backend: Backend::Cuda, gpus: gpus.to_vec(), pairs, cut_short: None, seconds: 1.0 }
}

/// A report of which one pair failed its first check.
pub(super) fn failing_report(gpus: &[Identity], way: (u32, u32), reason: &str) -> Report {
    let mut report = passing_report(gpus);
    let pair = report.pairs.iter_mut().find(|pair| (pair.from, pair.to) == way).unwrap();
    pair.checks[0].verdict = Verdict::Failed { reason: reason.into() };
    report
}

fn machine(devices: u32, seed: u64) -> sim::Config {
    sim::Config { devices, seed, multiprocessors: 4, ..sim::Config::default() }
}

fn test(config: &sim::Config) -> Report {
    let gpus = sim::devices(config);
    let report = run(&gpus, &Settings::of(Backend::Sim)).unwrap();
    assert!(report.is_sound(&gpus.iter().map(Identity::of).collect::<Vec<_>>()));
    assert_eq!(report.cut_short, None);
    report
}

fn pair(report: &Report, from: u32, to: u32) -> &Pair {
    report.pairs.iter().find(|pair| (pair.from, pair.to) == (from, to)).unwrap()
}

#[test]
fn a_good_machine_passes() {
    for (devices, seed) in [(2, 1), (2, 2), (3, 3), (4, 4), (8, 5)] {
        let report = test(&machine(devices, seed));
        assert_eq!(report.pairs.len() as u32, devices * (devices - 1));
        for pair in &report.pairs {
            let passed = |outcome: &Outcome| outcome.verdict == Verdict::Passed;
            assert!(pair.checks.iter().all(passed), "{devices} GPUs: {pair:?}");
        }
        assert!(report.passed());
    }
}

#[test]
fn fewer_than_two_gpus_have_no_pairs() {
    assert_eq!(test(&machine(1, 1)).pairs, []);
    assert!(run(&[], &Settings::of(Backend::Sim)).unwrap().passed());
    let one = sim::devices(&machine(1, 1));
    let twice = [one[0].clone(), one[0].clone()];
    let report = run(&twice, &Settings::of(Backend::Sim)).unwrap();
    let not_run = Verdict::NotRun { reason: "both are one GPU".into() };
    assert!(report.pairs.iter().flat_map(|p| &p.checks).all(|one| one.verdict == not_run));
    assert_eq!(Subject::of(&twice), None);
}

#[test]
fn lost_stores_are_found_and_named() {
    let report = test(&sim::Config { lossy: vec![(1, 0)], ..machine(3, 1) });
    let lost = pair(&report, 1, 0);
    let (check, reason) = lost.failure().unwrap();
    assert_eq!(check, Check::Stores);
    assert!(reason.starts_with("what is stored does not arrive: 19"), "{reason}");
    // What does not go through the kernels' stores works, and what waits is not even tried.
    assert_eq!(lost.verdict(Check::Loads), Some(&Verdict::Passed));
    assert_eq!(lost.verdict(Check::CopyEngine), Some(&Verdict::Passed));
    let skipped = Verdict::NotRun { reason: "a link that it needs has failed before".into() };
    for check in [Check::Ordering, Check::Packets, Check::FullWidth, Check::Replay, Check::Together]
    {
        assert_eq!(lost.verdict(check), Some(&skipped), "{check}");
        assert_eq!(pair(&report, 0, 1).verdict(check), Some(&skipped), "{check}");
    }
    let failing: Vec<_> = report.failures().map(|pair| (pair.from, pair.to)).collect();
    assert_eq!(failing, [(1, 0)]);
    assert_eq!(pair(&report, 1, 2).verdict(Check::Replay), Some(&Verdict::Passed));
}

#[test]
fn checks_that_wait_find_lost_stores_by_themselves() {
    let gpus = sim::devices(&sim::Config { lossy: vec![(1, 0)], ..machine(2, 1) });
    for check in [Check::Ordering, Check::Packets, Check::FullWidth, Check::Replay, Check::Together]
    {
        let faults = lab::only(&gpus, &Settings::of(Backend::Sim), check).unwrap();
        let ways: Vec<_> = faults.iter().map(|fault| fault.direction).collect();
        assert_eq!(ways.first(), Some(&(1, 0)), "{check}: {faults:?}");
        assert!(ways.iter().all(|way| *way == (1, 0)), "{check}: {faults:?}");
    }
}

#[test]
fn pairs_without_access_are_not_run_and_the_others_are() {
    let report = test(&sim::Config { unreachable: vec![(0, 2)], ..machine(3, 1) });
    let closed = Verdict::NotRun { reason: "the driver offers no peer access".into() };
    for pair in &report.pairs {
        let expected = if pair.from + pair.to == 2 { &closed } else { &Verdict::Passed };
        assert!(pair.checks.iter().all(|one| one.verdict == *expected), "{pair:?}");
    }
    assert!(report.passed());
}

#[test]
fn a_pair_that_works_one_way_is_tested_that_way() {
    let report = test(&sim::Config { one_way: vec![(1, 0)], ..machine(2, 1) });
    let (open, closed) = (pair(&report, 0, 1), pair(&report, 1, 0));
    for check in [Check::Stores, Check::Loads, Check::CopyEngine, Check::Packets, Check::Replay] {
        assert_eq!(open.verdict(check), Some(&Verdict::Passed), "{check}");
    }
    let reason = "data cannot go back, which the check needs".to_owned();
    assert_eq!(open.verdict(Check::Ordering), Some(&Verdict::NotRun { reason }));
    assert!(closed.checks.iter().all(|one| matches!(one.verdict, Verdict::NotRun { .. })));
}

#[test]
fn time_that_is_over_is_said_and_not_called_passed() {
    let gpus = sim::devices(&machine(2, 1));
    let settings = Settings { limit: Duration::ZERO, ..Settings::of(Backend::Sim) };
    let report = run(&gpus, &settings).unwrap();
    assert_eq!(report.cut_short.as_deref(), Some("0ns are over"));
    let not_run = |one: &Outcome| matches!(&one.verdict, Verdict::NotRun { reason } if reason == "0ns are over");
    assert!(report.pairs.iter().flat_map(|pair| &pair.checks).all(not_run));
}

#[test]
fn differences_say_what_came() {
    let expected = [1, 2, 3, 4];
    assert_eq!(direct::difference(&expected, &[1, 2, 3, 4]), None);
    let text = |found: &[u8]| direct::difference(&expected, found).unwrap();
    assert_eq!(text(&[1, 0xee, 0xee, 4]), "does not arrive: 2 of 4 bytes, the first at 1");
    assert_eq!(text(&[0, 0, 0, 0]), "arrives as zeros: 4 of 4 bytes, the first at 0");
    assert_eq!(text(&[1, 2, 4, 3]), "arrives changed: 2 of 4 bytes, the first at 2");
}

/// A directory that goes when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("peerlane-{}-{name}", std::process::id())))
    }

    fn shelf(&self, boot: &str) -> Shelf {
        let gpus = two().map(|gpu| (gpu.uuid, gpu.pci_bus_id)).to_vec();
        let place = Some((Cache::at(&self.0), Key::new(gpus, "580.1")));
        Shelf { place, boot: Some(boot.into()), trouble: None }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn verdicts_are_kept_for_as_long_as_they_hold() {
    let scratch = Scratch::new("verdicts");
    let subject = Subject::new(two().into_iter(), None).unwrap();
    let tests = Cell::new(0);
    let find = |boot: &str, report: Report, refresh| {
        let test = || {
            tests.set(tests.get() + 1);
            Ok(report)
        };
        let found = find_on(&scratch.shelf(boot), &subject, refresh, test).unwrap();
        assert_eq!(found.notes, [""; 0]);
        found
    };
    let (good, bad) = (passing_report(&two()), failing_report(&two(), (0, 1), "no"));
    // What failed holds until the machine starts again.
    assert!(!find("monday", bad.clone(), false).report.passed());
    let again = find("monday", good.clone(), false);
    assert!(again.age.is_some() && again.report == bad && tests.get() == 1);
    assert!(find("tuesday", good.clone(), false).report.passed() && tests.get() == 2);
    // What passed holds on.
    assert!(find("wednesday", bad.clone(), false).report.passed() && tests.get() == 2);
    // Unless somebody asks.
    assert!(!find("wednesday", bad, true).report.passed() && tests.get() == 3);
    // What was not finished is kept only if it found something.
    let unfinished = Report { cut_short: Some("late".into()), ..good.clone() };
    find("thursday", unfinished, false);
    assert!(find("thursday", good, false).age.is_none() && tests.get() == 5);
}

#[test]
fn a_cache_that_cannot_be_believed_is_a_note() {
    let scratch = Scratch::new("verdict-cache");
    let subject = Subject::new(two().into_iter(), None).unwrap();
    let shelf = scratch.shelf("monday");
    let report = passing_report(&two());
    find_on(&shelf, &subject, false, || Ok(report.clone())).unwrap();
    let file = std::fs::read_dir(&scratch.0).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read_to_string(&file).unwrap();
    let spoiled = [
        whole[..whole.len() / 2].to_owned(),
        whole.replace("\"loads\"", "\"stores\""),
        whole.replace("\"to\": 1", "\"to\": 0"),
        whole.replace("GPU-b", "GPU-c"),
        whole.replace("580.1", "580.2"),
    ];
    for text in spoiled {
        assert_ne!(text, whole);
        std::fs::write(&file, &text).unwrap();
        let found = find_on(&shelf, &subject, false, || Ok(report.clone())).unwrap();
        assert!(found.age.is_none() && found.notes.len() == 1, "{text}: {:?}", found.notes);
        assert!(found.notes[0].contains("is ignored: "), "{:?}", found.notes);
    }
    let nowhere = Shelf { place: None, boot: None, trouble: Some("no cache".into()) };
    let found = find_on(&nowhere, &subject, false, || Ok(report)).unwrap();
    assert_eq!(found.notes, ["no cache"]);
}

#[test]
fn a_failing_verdict_without_a_boot_is_never_believed() {
    let scratch = Scratch::new("verdict-boot");
    let subject = Subject::new(two().into_iter(), None).unwrap();
    let shelf = Shelf { boot: None, ..scratch.shelf("") };
    for _ in 0..2 {
        let test = || Ok(failing_report(&two(), (1, 0), "no"));
        assert!(find_on(&shelf, &subject, false, test).unwrap().age.is_none());
    }
}

#[test]
fn modes_read_as_they_are_written() {
    for mode in SelfTest::ALL {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    assert!("".parse::<SelfTest>().is_err() && "Always".parse::<SelfTest>().is_err());
}
