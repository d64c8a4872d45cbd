//! What ranks show, tell and offer each other when they join.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::offers(data));
