//! `peerlane trace`: what it writes, what it makes of programs that fail, and what it refuses.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_peerlane");

fn trace(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).arg("trace").args(arguments).output().unwrap()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A directory of its own, gone at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir()
            .join(format!("peerlane-trace-program-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn spans(timeline: &Value, name: &str) -> usize {
    let events = timeline["traceEvents"].as_array().unwrap();
    events.iter().filter(|event| event["ph"] == "X" && event["name"] == name).count()
}

#[test]
fn passes_of_its_own_make_a_timeline_and_a_table() {
    let directory = Directory::new("own");
    let (out, table) = (directory.path("t.json"), directory.path("s.json"));
    let sizes = ["--passes", "2", "--calls", "3", "--count", "64"];
    let run =
        trace(&[&["--devices", "sim:3", "--out", &out, "--json", &table], &sizes[..]].concat());
    let text = said(&run.stdout);
    assert!(run.status.success(), "{text}{}", said(&run.stderr));
    assert!(
        text.starts_with("# 3 ranks on 3 simulated GPUs (sim)\n# decode: 6 passes, all ranks'\n"),
        "{text}"
    );
    // On the host and on the GPU, by each of three ranks.
    assert_eq!(spans(&json(&out), "all_reduce"), 2 * 3 * 2 * 3);
    let table = json(&table);
    assert_eq!((&table["trace"]["passes"]["decode"], &table["lost"]), (&6.into(), &0.into()));
    assert_eq!(table["backend"], "sim");
}

#[test]
fn a_program_that_fails_is_shown_and_reported() {
    let directory = Directory::new("fails");
    let (out, inner) = (directory.path("t.json"), directory.path("inner.json"));
    // Records, and ends with 1, for its second output cannot be written.
    let words = format!(
        "{PROGRAM} trace --devices sim:2 --passes 1 --out {inner}; \
         PEERLANE_TRACE= {PROGRAM} trace --devices sim:1 --passes 1 --calls 1 --out /nonexistent/x"
    );
    let script = ["--out", &out, "--", "sh", "-c", &words];
    let run = trace(&script);
    // `peerlane trace` records where it says itself, so the outer one has found nothing.
    assert!(!run.status.success());
    let errors = said(&run.stderr);
    let kept = errors.split_once("--out: cannot write /nonexistent/x").unwrap().1;
    let kept = kept.split_once("--from ").unwrap().1.lines().next().unwrap();
    let again = trace(&["--from", kept, "--out", &directory.path("again.json")]);
    assert!(again.status.success(), "{}", said(&again.stderr));
    fs::remove_dir_all(kept).unwrap();
    assert!(errors.contains("sh ended with exit status: 1"), "{errors}");
    assert!(errors.contains("got no records"), "{errors}");
    assert!(Path::new(&inner).exists() && !Path::new(&out).exists());
}

#[test]
fn a_program_with_peerlane_in_it_is_recorded_by_the_variable() {
    let directory = Directory::new("variable");
    let (out, kept) = (directory.path("t.json"), directory.path("kept"));
    let bench = ["bench", "barrier", "--devices", "sim:2"];
    let run = trace(&[&["--out", &out, "--keep", &kept, "--", PROGRAM], &bench[..]].concat());
    assert!(run.status.success(), "{}{}", said(&run.stdout), said(&run.stderr));
    let count = spans(&json(&out), "barrier");
    assert!(count > 0, "{}", said(&run.stdout));
    let again = directory.path("again.json");
    let run = trace(&["--from", &kept, "--out", &again]);
    assert!(run.status.success(), "{}", said(&run.stderr));
    assert_eq!(spans(&json(&again), "barrier"), count);
    // It has files by now.
    let run = trace(&["--keep", &kept, "--", "true"]);
    assert!(!run.status.success() && said(&run.stderr).contains("an empty directory"));
}

#[test]
fn what_is_wrong_is_said() {
    let directory = Directory::new("wrong");
    let out = directory.path("t.json");
    for (arguments, expected) in [
        (&["--out", &out, "--", "true"][..], "got no records"),
        (&["--out", &out, "--", "/nonexistent/program"][..], "/nonexistent/program: "),
        (&["--from", "/nonexistent/kept"][..], "/nonexistent/kept"),
        (&["--devices", "sim:2", "--passes", "0"][..], "0 is not in 1..=1000000"),
        (&["--from", "x", "--", "true"][..], "cannot be used with"),
    ] {
        let run = trace(arguments);
        assert!(!run.status.success(), "{arguments:?}");
        let errors = said(&run.stderr);
        assert!(errors.starts_with("peerlane: ") && errors.contains(expected), "{errors}");
    }
    assert!(!Path::new(&out).exists());
}
