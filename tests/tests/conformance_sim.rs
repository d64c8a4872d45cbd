//! The conformance suite on simulated GPUs: one machine per test, with `PEERLANE_SEED` or 1 for
//! its seed.

use peerlane_tests::{Machine, number_from_environment, suite};

macro_rules! tests {
    ($($module:ident :: $test:ident;)*) => {$(
        #[test]
        fn $test() {
            let seed = number_from_environment("PEERLANE_SEED", 1);
            suite::$module::$test(&Machine::sim(16, seed));
        }
    )*};
}
peerlane_tests::for_each_test!(tests);
