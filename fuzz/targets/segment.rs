//! The memory that processes share.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::segment(data));
