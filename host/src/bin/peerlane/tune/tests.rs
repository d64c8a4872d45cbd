//! Tuning simulated GPUs.

use super::*;
use crate::devices::Selection;
use peerlane::Operation;
use peerlane::choice::Source;
use std::path::Path;

fn options(name: &str) -> (Options, PathBuf, PathBuf) {
    let at = |kind: &str| {
        std::env::temp_dir().join(format!("peerlane-tune-{}-{name}.{kind}", std::process::id()))
    };
    let (table, json) = (at("table.json"), at("json"));
    let devices = Some(Selection::Sim(2));
    let options = Options {
        common: Common { devices, json: Some(json.clone()), seed: 1 },
        ranks: None,
        budget: Duration::from_secs(20),
        min: 1 << 10,
        max: Some(16 << 10),
        output: Some(table.clone()),
        force: false,
        dry_run: false,
    };
    (options, table, json)
}

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_sweep_writes_a_table_that_communicators_follow() {
    let (options, path, json) = options("follow");
    assert!(run(&options).unwrap());
    let table = TuningTable::read(&path).unwrap();
    assert!(table.simulated);
    assert_eq!([table.all_reduce.len(), table.all_reduce_any.len(), table.broadcast.len()], [3; 3]);
    assert_eq!(table.all_reduce[0].up_to, Some(2048));
    let gpus = Devices::open(Some(&Selection::Sim(2)), 1).unwrap().gpus;
    let config = Config { tuning: Tuning::File(path.clone()), ..Config::default() };
    let ranks = Communicator::connect(&gpus, &config).unwrap();
    let choice = ranks[1].choice();
    assert_eq!(choice.source(), Source::Table);
    assert_eq!(choice.all_reduce(1 << 10).name(), table.all_reduce[0].choice);
    assert_eq!(choice.broadcast(1 << 20).name(), table.broadcast[2].choice);
    let results = read(&json);
    assert_eq!(results["backend"], "sim");
    assert_eq!(results["transport"]["used"], "p2p");
    assert!(results["tuning"]["no_table"].is_null());
    assert_eq!(results["tuning"]["table"], path.display().to_string());
    for operation in results["tuning"]["operations"].as_array().unwrap() {
        for row in operation["rows"].as_array().unwrap() {
            let chosen = row["auto"].as_str().unwrap();
            assert!(row["first_us"][chosen].is_number(), "{row}");
            assert!(row["second_us"][chosen].is_number(), "{row}");
            assert!(row["auto_over_best"].as_f64().unwrap() >= 1.0, "{row}");
        }
    }
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(json).unwrap();
}

#[test]
fn a_budget_that_is_spent_at_once_still_gives_a_table() {
    let (mut options, path, json) = options("spent");
    options.budget = Duration::from_millis(1);
    assert!(run(&options).unwrap());
    let table = TuningTable::read(&path).unwrap();
    // One row each, and the model from there on.
    assert!(table.all_reduce[0].us.is_some() && table.all_reduce[0].up_to == Some(2048));
    assert!(table.all_reduce[1].us.is_none() && table.all_reduce[1].choice == "full");
    assert_eq!(table.broadcast[1].choice, "direct");
    let notes = read(&json)["tuning"]["operations"][0]["notes"].to_string();
    assert!(notes.contains("4K: the budget is spent"), "{notes}");
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(json).unwrap();
}

#[test]
fn simulated_gpus_have_no_table_unless_they_are_told_where() {
    let (mut options, path, _) = options("nowhere");
    options.output = None;
    let devices = Devices::open(Some(&Selection::Sim(2)), 1).unwrap();
    let plan = Plan::new(&options, &devices).unwrap();
    assert!(plan.place.is_none() && plan.nowhere.unwrap().contains("simulated"));
    options.dry_run = true;
    options.output = Some(path.clone());
    assert!(run(&options).unwrap());
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_tuned_is_refused() {
    let (mut options, ..) = options("refused");
    let error = |options: &Options| run(options).unwrap_err().to_string();
    options.min = 0;
    for (min, got) in [(0, "0"), (1, "1"), (32 << 10, "32K")] {
        options.min = min;
        assert_eq!(error(&options), format!("--min: expected 2 to 16K, got {got}"));
    }
    options.min = 1 << 10;
    options.common.devices = Some(Selection::Sim(1));
    assert!(error(&options).starts_with("--ranks: expected 2 or more"));
}

#[test]
fn the_smallest_sizes_give_a_table_that_is_read() {
    for (min, max) in [(2, 2), (2, 9), (3, 3)] {
        let (mut options, path, json) = options("least");
        (options.min, options.max) = (min, Some(max));
        assert!(run(&options).unwrap());
        assert!(TuningTable::read(&path).is_ok());
        std::fs::remove_file(path).unwrap();
        std::fs::remove_file(json).unwrap();
    }
}

#[test]
fn results_are_kept_where_the_table_cannot_be_written() {
    let (mut options, _, json) = options("lost");
    (options.max, options.budget) = (Some(1 << 10), Duration::from_millis(1));
    // A directory cannot be made below a file.
    options.output = Some(PathBuf::from("/dev/null/table.json"));
    let error = run(&options).unwrap_err().to_string();
    assert!(error.starts_with("tuning: cannot write /dev/null/table.json"), "{error}");
    let results = read(&json);
    assert!(results["tuning"]["table"].is_null());
    assert_eq!(results["tuning"]["no_table"], error);
    std::fs::remove_file(json).unwrap();
}

#[test]
fn every_way_has_a_number_and_an_operation() {
    let ways = Way::all();
    let reductions = ways.iter().filter(|way| way.operation() == Operation::AllReduce).count();
    assert_eq!((reductions, ways.len()), (8, 13));
}
