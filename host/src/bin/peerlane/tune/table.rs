//! From what was measured to the table that communicators use.
//!
//! Invariant: between two sizes the limit lies at their geometric mean. Sizes above what was measured
//! follow the last row if the sweep is complete, else the model.

use super::Plan;
use super::candidate::Way;
use super::sweep::{Row, Series};
use peerlane::Operation;
use peerlane::choice::{Choice, Entry, TuningTable, VERSION};

/// The table of a sweep.
pub(super) fn of(
    series: &[Series],
    ways: &[Way],
    default: &Choice,
    plan: &Plan,
    (simulated, host): (bool, bool),
) -> TuningTable {
    let entries = |operation, chosen: &dyn Fn(&Row) -> usize| {
        let rows = series.iter().find(|series| series.operation == operation);
        let rows = rows.map_or(&[][..], |series| &series.rows);
        entries(rows, &plan.sizes, ways, chosen, &model(default, operation))
    };
    TuningTable {
        version: VERSION,
        world: plan.world,
        simulated,
        host,
        key: plan.key.clone(),
        all_reduce: entries(Operation::AllReduce, &|row| row.chosen),
        all_reduce_any: entries(Operation::AllReduce, &|row| row.chosen_any),
        broadcast: entries(Operation::Broadcast, &|row| row.chosen),
    }
}

/// The model's limits, by name.
fn model(default: &Choice, operation: Operation) -> Vec<(usize, &'static str)> {
    match operation {
        Operation::Broadcast => {
            default.broadcasts().entries().iter().map(|(limit, way)| (*limit, way.name())).collect()
        }
        _ => {
            let entries = default.all_reduces().entries().iter();
            entries.map(|(limit, way)| (*limit, way.name())).collect()
        }
    }
}

fn entries(
    rows: &[Row],
    sizes: &[usize],
    ways: &[Way],
    chosen: &dyn Fn(&Row) -> usize,
    model: &[(usize, &'static str)],
) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut covered = 0;
    for (index, row) in rows.iter().enumerate() {
        let candidate = chosen(row);
        let us = row.second.get(&candidate).or(row.first.get(&candidate)).copied();
        let next = sizes.get(index + 1);
        let limit = next.map(|next| (row.bytes as f64 * *next as f64).sqrt() as u64);
        covered = limit.unwrap_or(u64::MAX);
        entries.push(Entry { up_to: limit, choice: ways[candidate].name().into(), us });
    }
    let rest = model.iter().filter(|(limit, _)| *limit as u64 > covered);
    entries.extend(rest.map(|(limit, name)| Entry {
        up_to: Some(*limit as u64).filter(|limit| *limit != usize::MAX as u64),
        choice: (*name).into(),
        us: None,
    }));
    entries
}
