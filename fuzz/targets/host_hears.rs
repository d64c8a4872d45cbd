//! What the host of a meeting of processes hears.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::host_hears(data));
