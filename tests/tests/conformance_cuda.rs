//! The conformance suite on the real GPUs of this machine; without one, it says that it was skipped.

use peerlane_tests::runner::{Test, run_on_cuda};
use peerlane_tests::suite;
use std::process::ExitCode;

macro_rules! table {
    ($($module:ident :: $test:ident;)*) => {
        const TESTS: &[Test] = &[$((stringify!($test), suite::$module::$test)),*];
    };
}
peerlane_tests::for_each_test!(table);

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { peerlane::gpu::cuda::prepare_environment() };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    run_on_cuda(TESTS, &arguments)
}
