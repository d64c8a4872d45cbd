//! An exporter that gives up what importers look at, with the fences left out as the negative control.

use loom::thread;
use peerlane_loom::lease::{Segment, leave_fences_out};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One exporter that clears twice, and `importers` that look at the first tensor.
fn race(importers: usize) {
    let segment = Arc::new(Segment::new(11));
    let lookers: Vec<_> = (0..importers)
        .map(|_| {
            let segment = segment.clone();
            thread::spawn(move || segment.import(0))
        })
        .collect();
    for value in [12, 13] {
        segment.clear_and_export(value);
    }
    for looker in lookers {
        let seen = looker.join().unwrap();
        assert!(seen.is_none_or(|seen| seen == [11, 11]), "{seen:?}");
    }
    // Nobody looks any more.
    assert!(segment.clear_and_export(14));
    assert_eq!(segment.import(segment.generation()), Some([14, 14]));
}

fn model(importers: usize, fences: bool) {
    leave_fences_out(!fences);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = (importers > 1).then_some(3);
    builder.check(move || race(importers));
}

#[test]
fn nobody_sees_payload_change() {
    model(1, true);
    model(2, true);
}

#[test]
fn without_the_fences_somebody_does() {
    let seen = catch_unwind(AssertUnwindSafe(|| model(1, false)));
    seen.expect_err("what was left out must show");
}
