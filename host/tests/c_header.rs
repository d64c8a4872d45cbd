//! `host/include/peerlane.h` is what `host/src/ffi/` says.
//!
//! Invariant: the header is never written by a build. This test makes it anew and compares; with
//! `PEERLANE_UPDATE_HEADER=1` it writes it instead.

use std::fs;
use std::path::{Path, PathBuf};

const UPDATE: &str = "PEERLANE_UPDATE_HEADER";

/// The files with something for C to see, in the header's order.
const SOURCES: [&str; 10] = [
    "status",
    "types",
    "gpu",
    "comm",
    "recovery",
    "sizing",
    "collectives",
    "work",
    "registration",
    "channel",
];

fn host() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn source(name: &str) -> PathBuf {
    host().join("src/ffi").join(name).with_extension("rs")
}

fn header() -> String {
    let config = cbindgen::Config::from_file(host().join("cbindgen.toml")).expect("it is valid");
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = SOURCES.iter().fold(builder, |builder, name| builder.with_src(source(name)));
    let mut text = Vec::new();
    builder.generate().expect("cbindgen understands the sources").write(&mut text);
    String::from_utf8(text).expect("it is text")
}

#[test]
fn the_header_is_what_the_sources_say() {
    let (path, wanted) = (host().join("include/peerlane.h"), header());
    if std::env::var_os(UPDATE).is_some_and(|value| value == "1") {
        fs::write(&path, &wanted).expect("the header can be written");
    }
    let found = fs::read_to_string(&path).expect("the header is there");
    assert!(
        found == wanted,
        "{} is not what host/src/ffi/ says. Update it with\n    {UPDATE}=1 cargo test -p peerlane \
         --test c_header",
        path.display()
    );
}

/// cbindgen leaves out what it does not understand, and files that it is not given.
#[test]
fn every_exported_function_is_declared() {
    let header = header();
    let mut exported = 0;
    for entry in fs::read_dir(host().join("src/ffi")).expect("the folder is there") {
        let source = fs::read_to_string(entry.expect("it is readable").path()).expect("it is text");
        for function in source.split("#[unsafe(no_mangle)]").skip(1) {
            let name = function.split("fn ").nth(1).and_then(|rest| rest.split('(').next());
            let name = name.expect("the attribute is on a function");
            assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
            exported += 1;
        }
    }
    assert!(exported > 0, "no function is exported");
}
