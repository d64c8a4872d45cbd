//! What ranks bring when they register a tensor.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::tensor_cards(data));
