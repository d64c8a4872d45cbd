//! A file of measured links in the user's cache.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::cached_measurement(data));
