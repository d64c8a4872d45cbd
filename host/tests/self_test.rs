//! Self-tests in a child process: what it finds, how it may end, and what ranks make of it.
//!
//! The child is the `peerlane` program on simulated GPUs, told by the test to go wrong where it should.

use peerlane::gpu::{GpuRef, sim};
use peerlane::selftest::{
    Check, Deed, Identity, Pair, Program, Report, Request, Sabotage, Settings, Subject, Verdict,
    in_child, set_program,
};
use peerlane::{Communicator, Config, Error, Meeting, SelfTest, Transport};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_peerlane");

fn gpus(config: sim::Config) -> Vec<GpuRef> {
    sim::devices(&config)
}

fn machine(devices: u32) -> sim::Config {
    sim::Config { devices, multiprocessors: 4, ..sim::Config::default() }
}

fn settings(deed: Option<(Option<Check>, Deed)>) -> Settings {
    let sabotage = deed.map(|(before, deed)| Sabotage { before, deed });
    Settings { sabotage, ..Settings::of(peerlane::gpu::Backend::Sim) }
}

fn test(config: sim::Config, settings: &Settings) -> Result<Report, Error> {
    let subject = Subject::of(&gpus(config)).expect("there are pairs");
    in_child(&Program::at(PROGRAM), &subject, settings)
}

fn pair(report: &Report, from: u32, to: u32) -> &Pair {
    report.pairs.iter().find(|pair| (pair.from, pair.to) == (from, to)).expect("it is there")
}

#[test]
fn a_good_machine_passes_in_a_child() {
    let gpus = gpus(machine(3));
    let report = test(machine(3), &settings(None)).unwrap();
    assert!(report.gpus.iter().eq(&gpus.iter().map(Identity::of).collect::<Vec<_>>()));
    assert!(report.passed() && report.cut_short.is_none() && report.pairs.len() == 6);
}

#[test]
fn a_child_finds_what_is_wrong() {
    // Also if the caller's machine moves by itself.
    let config = sim::Config { lossy: vec![(1, 0)], autonomous: true, ..machine(2) };
    let report = test(config, &settings(None)).unwrap();
    assert_eq!(pair(&report, 1, 0).failure().unwrap().0, Check::Stores);
    assert!(pair(&report, 0, 1).failure().is_none());
}

#[test]
fn a_crash_is_a_verdict_on_what_was_being_done() {
    let deed = Some((Some(Check::Packets), Deed::Signal(11)));
    let report = test(machine(3), &settings(deed)).unwrap();
    let expected = "the self-test ended by signal 11 (SIGSEGV) during \"packets\" of 0000:18:00.0 to 0000:20:00.0";
    assert_eq!(pair(&report, 0, 1).failure(), Some((Check::Packets, expected)));
    assert!(pair(&report, 1, 0).failure().is_some(), "both directions were in use");
    assert_eq!(pair(&report, 0, 1).verdict(Check::Loads), Some(&Verdict::Passed));
    let reason = "the self-test ended by signal 11 (SIGSEGV)".to_owned();
    assert_eq!(report.cut_short, Some(reason.clone()));
    assert_eq!(pair(&report, 0, 2).verdict(Check::Stores), Some(&Verdict::NotRun { reason }));
    assert_eq!(report.failures().count(), 2);
}

#[test]
fn an_abort_and_an_exit_are_verdicts_too() {
    for (deed, what) in
        [(Deed::Signal(6), "ended by signal 6 (SIGABRT)"), (Deed::Exit, "ended with status 0")]
    {
        let report = test(machine(2), &settings(Some((Some(Check::Loads), deed)))).unwrap();
        let (check, reason) = pair(&report, 0, 1).failure().unwrap();
        assert_eq!(check, Check::Loads);
        assert!(reason.contains(what), "{reason}");
    }
}

#[test]
fn a_child_that_hangs_is_stopped_and_its_check_named() {
    let deed = Some((Some(Check::CopyEngine), Deed::Hang));
    let settings = Settings { check_limit: Duration::from_millis(700), ..settings(deed) };
    let begin = Instant::now();
    let report = test(machine(2), &settings).unwrap();
    let (check, reason) = pair(&report, 0, 1).failure().unwrap();
    assert_eq!(check, Check::CopyEngine);
    assert!(reason.contains("did not get on within 700ms, and was stopped during"), "{reason}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

#[test]
fn what_was_not_tested_in_time_has_no_verdict() {
    let deed = Some((Some(Check::Replay), Deed::Hang));
    let settings = Settings { limit: Duration::from_secs(4), ..settings(deed) };
    let report = test(machine(2), &settings).unwrap();
    assert!(report.passed() && report.cut_short.is_some(), "{report:?}");
    assert_eq!(pair(&report, 0, 1).verdict(Check::Packets), Some(&Verdict::Passed));
    assert!(matches!(pair(&report, 0, 1).verdict(Check::Replay), Some(Verdict::NotRun { .. })));
}

#[test]
fn a_child_that_tests_nothing_is_an_error() {
    let refused = |settings: &Settings| match test(machine(2), settings) {
        Err(Error::Unsupported { op: "self_test", reason }) => reason,
        other => panic!("{other:?}"),
    };
    let babble = refused(&settings(Some((Some(Check::Stores), Deed::Babble))));
    assert!(babble.contains("said what means nothing: "), "{babble}");
    let crash = refused(&settings(Some((None, Deed::Signal(11)))));
    assert!(crash.ends_with("ended by signal 11 (SIGSEGV) before its first check"), "{crash}");
    let stopped = refused(&settings(Some((Some(Check::Stores), Deed::Signal(15)))));
    assert!(stopped.ends_with("was stopped by signal 15"), "{stopped}");
    let late = Settings { limit: Duration::from_millis(500), ..settings(Some((None, Deed::Hang))) };
    let late = refused(&late);
    assert!(late.ends_with("made no check within 500ms"), "{late}");
}

#[test]
fn programs_that_are_none_are_errors() {
    let subject = Subject::of(&gpus(machine(2))).unwrap();
    let settings = Settings { limit: Duration::from_millis(800), ..settings(None) };
    let shell = |script: &str| Program {
        arguments: ["-c", script].map(Into::into).to_vec(),
        ..Program::at("/bin/sh")
    };
    for (program, expected) in [
        (Program::at("/no/such/program"), "/no/such/program does not start: "),
        (Program::at("/bin/true"), "/bin/true ended with status 0 before its first check"),
        (shell("echo oh no >&2; exit 7"), "ended with status 7 (oh no) before its first check"),
        (shell("echo hello; exec sleep 60"), "/bin/sh made no check within 800ms"),
    ] {
        let error = in_child(&program, &subject, &settings).unwrap_err().to_string();
        assert!(error.starts_with("self_test: ") && error.contains(expected), "{error}");
    }
}

/// The child on its own; returns its exit status and what it said.
fn child(input: &str) -> (Option<i32>, String) {
    let mut child = Command::new(PROGRAM)
        .args(["self-test", "--child"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Dropped at once: the parent is gone.
    writeln!(child.stdin.take().unwrap(), "{input}").unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_child_ends_with_its_parent() {
    let subject = Subject::of(&gpus(machine(2))).unwrap();
    let hang = settings(Some((Some(Check::Stores), Deed::Hang)));
    let request = serde_json::to_string(&Request::new(&subject, &hang)).unwrap();
    assert_eq!(child(&request).0, Some(3));
}

#[test]
fn a_child_refuses_what_it_does_not_understand() {
    let (status, said) = child("{}");
    assert_eq!(status, Some(1));
    assert!(said.contains("expected a request for a self-test, got "), "{said}");
    let subject = Subject::of(&gpus(machine(2))).unwrap();
    let request = serde_json::to_string(&Request::new(&subject, &settings(None))).unwrap();
    let (status, said) = child(&request.replace(env!("CARGO_PKG_VERSION"), "0.0.9"));
    assert_eq!(status, Some(1));
    assert!(said.contains("expected Peerlane 0.0.9"), "{said}");
}

fn config(self_test: SelfTest, transport: Transport) -> Config {
    set_program(Program::at(PROGRAM));
    Config { self_test, transport, mailbox_bytes: 1 << 20, ..Config::default() }
}

#[test]
fn ranks_leave_a_link_that_failed_alone() {
    let lossy = sim::Config { lossy: vec![(1, 0)], ..machine(3) };
    let gpus = gpus(lossy);
    let hosts = |self_test| {
        let ranks = Communicator::connect(&gpus, &config(self_test, Transport::Auto)).unwrap();
        let ways = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)];
        let by_host =
            ways.map(|(from, to)| ranks[2].transport(from, to).unwrap() == Transport::Host);
        (by_host, ranks[0].choice().notes().concat())
    };
    let (by_host, notes) = hosts(SelfTest::Always);
    assert_eq!(by_host, [false, true, false, false, false, false]);
    let expected =
        "rank 1 reaches rank 0 through host memory: the self-test found that \"SM stores\" fails: ";
    assert!(notes.starts_with(expected), "{notes}");
    // Nobody asks for simulated GPUs unless told to.
    assert_eq!(hosts(SelfTest::Auto), ([false; 6], String::new()));
}

#[test]
fn ranks_that_must_use_a_failed_link_all_refuse_alike() {
    let lossy = sim::Config { lossy: vec![(1, 0)], ..machine(3) };
    let gpus = gpus(lossy);
    let config = config(SelfTest::Always, Transport::P2p);
    let expected = |error: Option<Error>| {
        let error = error.expect("it cannot work");
        let text = error.to_string();
        assert!(matches!(error, Error::Unreachable { from: 1, to: 0, .. }), "{text}");
        assert!(text.contains("the self-test found that \"SM stores\" fails: "), "{text}");
    };
    expected(Communicator::connect(&gpus, &config).err());
    let meeting = Meeting::new(3, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let join = |rank: u32| {
            let (meeting, gpus, config) = (meeting.clone(), &gpus, &config);
            scope.spawn(move || {
                Communicator::join(&meeting, rank, &gpus[rank as usize], config).err()
            })
        };
        for thread in [0, 1, 2].map(join) {
            expected(thread.join().unwrap());
        }
    });
}

#[test]
fn a_child_that_cannot_test_is_a_note_and_stops_nobody() {
    // Less memory than a test takes.
    let config = Config { mailbox_bytes: 256 << 10, ..config(SelfTest::Always, Transport::P2p) };
    let gpus = gpus(sim::Config { memory_bytes: 400 << 10, ..machine(2) });
    let ranks = Communicator::connect(&gpus, &config);
    let notes = ranks.unwrap()[0].choice().notes().concat();
    assert!(notes.starts_with("self-test: "), "{notes}");
}

#[test]
fn the_command_says_how_it_went() {
    let output = Command::new(PROGRAM).args(["self-test", "--devices", "sim:2"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("Self-test (made just now in "), "{text}");
    assert!(text.contains("s, simulated GPUs): passed\n"), "{text}");
}
