//! A tuning table, as a file has it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| peerlane::fuzzing::tuning_table(data));
