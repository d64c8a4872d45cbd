//! What a guest of such a meeting hears from its host.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::guest_hears(data));
