//! The fuzz targets for a few seconds, on any bytes and on the seeds of `fuzz/seeds`, cut, spliced and changed.

use crate::rendezvous::PROTOCOL;
use proptest::prelude::*;
use std::path::Path;

type Target = fn(&[u8]);

/// The targets, by the names that they have in `fuzz/`.
const TARGETS: [(&str, Target); 9] = [
    ("tuning_table", super::tuning_table),
    ("cached_measurement", super::cached_measurement),
    ("host_hears", super::host_hears),
    ("guest_hears", super::guest_hears),
    ("segment", super::segment),
    ("channel", super::channel),
    ("offers", super::offers),
    ("tensor_cards", super::tensor_cards),
    ("tensor_descriptor", super::tensor_descriptor),
];

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no seeds");
    files.into_iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// A change of a seed: where, what goes, what comes in its place.
type Change = (prop::sample::Index, usize, Vec<u8>);

fn change() -> impl Strategy<Value = Change> {
    let values = prop_oneof![
        Just(b"-1".to_vec()),
        Just(b"18446744073709551615".to_vec()),
        Just(b"1e308".to_vec()),
        Just(b"null".to_vec()),
        Just(b"[]".to_vec()),
        Just(b"\"\"".to_vec()),
        prop::collection::vec(any::<u8>(), 0..8),
    ];
    (any::<prop::sample::Index>(), 0usize..12, values)
}

fn changed(mut seed: Vec<u8>, changes: Vec<Change>) -> Vec<u8> {
    for (at, gone, new) in changes {
        let from = at.index(seed.len() + 1);
        let to = seed.len().min(from + gone);
        seed.splice(from..to, new);
    }
    seed
}

/// Seeds of other versions are refused at once and lead nowhere. After a change of either version: change the seeds.
#[test]
fn the_seeds_are_of_this_version() {
    let hello = format!("\"protocol\":{PROTOCOL},\"version\":\"{}\"", env!("CARGO_PKG_VERSION"));
    let meeting = seeds("host_hears").concat();
    assert!(String::from_utf8_lossy(&meeting).contains(&hello), "no seed says {hello}");
}

#[test]
fn every_seed_is_read() {
    for (name, target) in TARGETS {
        seeds(name).iter().for_each(|seed| target(seed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read(which in 0..TARGETS.len(), data in prop::collection::vec(any::<u8>(), 0..300)) {
        TARGETS[which].1(&data);
    }

    #[test]
    fn changed_seeds_are_read(
        which in 0..TARGETS.len(),
        seed in any::<prop::sample::Index>(),
        changes in prop::collection::vec(change(), 1..6),
    ) {
        let (name, target) = TARGETS[which];
        let seeds = seeds(name);
        target(&changed(seed.get(&seeds).clone(), changes));
    }
}
