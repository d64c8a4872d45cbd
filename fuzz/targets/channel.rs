//! The memory of a channel.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::channel(data));
