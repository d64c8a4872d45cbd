//! Where the packages come from that `Cargo.lock` names: crates.io, with a checksum, or this repository.

use std::path::Path;

const REGISTRY: &str = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";

/// What is wrong with the packages of a lock file.
fn strange(lock: &str) -> Vec<String> {
    let packages = lock.split("[[package]]").skip(1);
    let wrong = packages.filter(|package| {
        let has = |start: &str| package.lines().any(|line| line.starts_with(start));
        let own = has("name = \"peerlane") && !has("source = ");
        let registered = package.lines().any(|line| line == REGISTRY) && has("checksum = ");
        !own && !registered
    });
    wrong.map(str::to_owned).collect()
}

#[test]
fn every_package_is_of_crates_io_or_of_this_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let lock = std::fs::read_to_string(root.join(file)).unwrap();
        assert!(lock.contains("name = \"peerlane\""), "{file}");
        assert_eq!(strange(&lock), Vec::<String>::new(), "{file}");
    }
}

#[test]
fn other_sources_are_noticed() {
    let good = format!("[[package]]\nname = \"a\"\n{REGISTRY}\nchecksum = \"1\"\n");
    assert!(strange(&good).is_empty());
    let others = [
        good.replace("checksum", "cheksum"),
        good.replace("registry+https://github.com/rust-lang", "git+https://github.com/other"),
        good.replace(REGISTRY, ""),
        good.replace("crates.io-index", "crates.io-index2"),
    ];
    assert!(others.iter().all(|lock| strange(lock).len() == 1));
}
