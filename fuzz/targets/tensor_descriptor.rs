//! The descriptor of an exported tensor, and what an importer makes of it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::tensor_descriptor(data));
