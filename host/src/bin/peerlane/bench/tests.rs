//! Measuring simulated GPUs: what is checked, predicted, refused.

use super::*;
use clap::Parser;
use peerlane::{Algorithm, Route};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn options(line: &str) -> Result<Options, clap::Error> {
    Line::try_parse_from(std::iter::once("bench").chain(line.split(' '))).map(|line| line.options)
}

#[test]
fn all_algorithms_are_checked_and_predicted_on_simulated_gpus() {
    let line = "all-reduce --devices sim:3 --algorithm all --max 4M --factor 64 --fabric pcie";
    let results = results("all", line);
    assert_eq!(results.series.len(), Algorithm::ALL.len());
    for series in &results.series {
        let sizes: Vec<_> = series.rows.iter().map(|row| (row.bytes, row.checked)).collect();
        assert_eq!(sizes, [(1 << 10, true), (64 << 10, true), (4 << 20, false)]);
        assert!(series.rows.iter().all(|row| row.failure.is_none() && row.predicted.is_some()));
        assert_eq!(series.fabric.as_deref(), Some("pcie"));
    }
}

/// The results of a run.
fn results(name: &str, line: &str) -> Results {
    let process = std::process::id();
    let file = std::env::temp_dir().join(format!("peerlane-bench-{name}-{process}.json"));
    let json = format!("{line} --json {}", file.display());
    assert!(run(&options(&json).unwrap()).unwrap());
    let results = report::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    results
}

#[test]
fn all_routes_are_checked_and_compared() {
    let line = "broadcast --devices sim:3 --route all --root 1 --min 4K --max 64K";
    let results = results("routes", line);
    let names: Vec<_> = results.series.iter().map(|s| s.algorithm.as_str()).collect();
    assert_eq!(names, Route::ALL.map(Route::name));
    let rows = || results.series.iter().flat_map(|series| &series.rows);
    assert!(rows().all(|row| row.checked && row.predicted.is_some()));
    let table = report::comparison(&results.series);
    assert!(table.contains("| size | direct | hub | chain | tree | double-tree | copy-direct |"));
}

#[test]
fn what_a_communicator_refuses_does_not_stop_the_others() {
    let line = "all-reduce --devices sim:2 --algorithm all --dtype f32 --wire bf16 --max 4K";
    let series = results("wire", line).series.len();
    assert_eq!(series, Algorithm::FUSED.len());
    let line = "broadcast --devices sim:2 --transport host --route all --max 1K";
    assert_eq!(results("host", line).series.len(), Route::FUSED.len());
    // Asked for alone, it is an error.
    let line = "broadcast --devices sim:2 --transport host --route copy-hub --max 1K";
    let error = run(&options(line).unwrap()).unwrap_err().to_string();
    assert!(error.starts_with("broadcast: route: expected one that is one kernel"), "{error}");
}

#[test]
fn predictions_are_of_what_the_communicator_takes() {
    let sent = |line: &str| {
        let line = format!("{line} --devices sim:4 --min 1K --max 1K");
        let results = results("fixed", &line);
        results.series[0].rows[0].predicted.clone().unwrap()
    };
    let fixed = sent("all-reduce --fixed");
    assert_eq!(fixed, sent("all-reduce --algorithm two-shot"));
    assert_ne!(fixed, sent("all-reduce --tuning off"));
}

#[test]
fn sizes_go_up_to_what_the_help_says() {
    let devices = Devices::open(Some(&"sim:2".parse().unwrap()), 1).unwrap();
    let sizes = |line: &str| {
        let options = options(line).unwrap();
        let plan = Plan::new(&options, &devices).map_err(|error| error.to_string())?;
        plan.sizes(&plan.jobs()[0])
    };
    assert_eq!(sizes("all-reduce --min 8M"), Ok(vec![8 << 20, 32 << 20]));
    let error = sizes("all-gather --min 128K");
    assert_eq!(error, Err("--min: expected 1 to 64K, got 128K".into()));
    assert!(sizes("all-reduce --min 0").is_err());
    assert_eq!(sizes("barrier --min 1M"), Ok(vec![0]));
}

#[test]
fn registered_tensors_are_checked() {
    let line = "all-reduce --devices sim:3 --registered --max 20K --factor 16";
    assert!(run(&options(line).unwrap()).unwrap());
    let other = run(&options("broadcast --devices sim:2 --registered").unwrap());
    let error = other.unwrap_err().to_string();
    assert_eq!(error, "--registered: expected all_reduce, got broadcast");
    assert!(options("all-reduce --registered --algorithm ring").is_err());
}

#[test]
fn names_that_nothing_has_are_answered_with_those_that_exist() {
    for (line, expected) in [
        ("all-reduce --algorithm fast", "expected one of auto, all, packet, "),
        ("all-reduce --fabric star", "expected one of nvswitch, nvlink-pairs, "),
        ("all-reduced", "expected one of all_reduce, "),
    ] {
        let error = options(line).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
