//! A sweep as a table on the terminal and as JSON.
//!
//! Invariant: the ratios come from the second look, in which all that they compare took turns.

use super::candidate::Way;
use super::sweep::{Row, Series};
use crate::parse::bytes_name;
use serde_json::{Value, json};
use std::fmt::Write;

/// How many times the fastest time `candidate` took, if it was measured. The fastest of all, or of those
/// whose sums are exact.
fn ratio(series: &Series, row: &Row, candidate: usize, exact: bool) -> Option<f64> {
    let allowed = row.second.iter().filter(|(number, _)| !exact || series.exact[**number]);
    let best = allowed.map(|(_, us)| *us).fold(f64::INFINITY, f64::min);
    row.second.get(&candidate).map(|us| us / best).filter(|ratio| ratio.is_finite())
}

/// The table of one operation: size by candidate, the chosen one marked.
pub(super) fn text(series: &Series, ways: &[Way]) -> String {
    let of_operation = |number: &usize| ways[*number].operation() == series.operation;
    let measured = |number: &usize| series.rows.iter().any(|row| row.first.contains_key(number));
    let columns: Vec<usize> = (0..ways.len()).filter(of_operation).filter(measured).collect();
    let width = |number: usize| ways[number].name().len().max(9) + 1;
    let mut text = format!("#\n# {}: us; * is chosen\n", series.operation.name());
    let _ = write!(text, "#{:>7}", "size");
    for number in &columns {
        let _ = write!(text, " {:>w$}", ways[*number].name(), w = width(*number));
    }
    text += "  auto/best default/best\n";
    for row in &series.rows {
        let _ = write!(text, "{:>8}", bytes_name(row.bytes));
        for number in &columns {
            let us = row.second.get(number).or(row.first.get(number));
            let mark = if row.chosen == *number { "*" } else { " " };
            let cell = us.map_or("-".into(), |us| format!("{us:.2}"));
            let _ = write!(text, " {:>w$}{mark}", cell, w = width(*number) - 1);
        }
        let show = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.3}"));
        let (auto, default) =
            (ratio(series, row, row.chosen, true), ratio(series, row, row.default, true));
        let _ = writeln!(text, "  {:>9} {:>12}", show(auto), show(default));
    }
    for failure in &series.failures {
        let _ = writeln!(text, "# FAILED: {failure}");
    }
    for note in &series.notes {
        let _ = writeln!(text, "# {note}");
    }
    if let Some(worst) = worst(series) {
        let _ = writeln!(text, "# auto / best at worst: {worst:.3}");
    }
    text
}

/// The largest ratio of what is chosen to the best.
fn worst(series: &Series) -> Option<f64> {
    series.rows.iter().filter_map(|row| ratio(series, row, row.chosen, true)).reduce(f64::max)
}

/// All of it.
pub(super) fn json(series: &[Series], ways: &[Way]) -> Value {
    let one = |series: &Series| {
        let name = |number: usize| ways[number].name();
        let times = |of: &std::collections::BTreeMap<usize, f64>| -> Value {
            of.iter()
                .map(|(number, us)| (name(*number).to_owned(), json!(us)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let row = |row: &Row| {
            json!({
                "bytes": row.bytes,
                "first_us": times(&row.first),
                "second_us": times(&row.second),
                "auto": name(row.chosen),
                "auto_any": name(row.chosen_any),
                "default": name(row.default),
                "auto_over_best": ratio(series, row, row.chosen, true),
                "auto_any_over_best": ratio(series, row, row.chosen_any, false),
                "default_over_best": ratio(series, row, row.default, true),
            })
        };
        json!({
            "operation": series.operation.name(),
            "rows": series.rows.iter().map(row).collect::<Vec<_>>(),
            "auto_over_best_at_worst": worst(series),
            "notes": series.notes,
            "failures": series.failures,
        })
    };
    json!({ "operations": series.iter().map(one).collect::<Vec<_>>() })
}
