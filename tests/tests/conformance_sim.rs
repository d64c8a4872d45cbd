//! The conformance suite on simulated GPUs: one machine per test, with `PEERLANE_SEED` or 1 for
//! its seed. Once where every GPU reaches every other, once where none does and all data pass through
//! host memory, and once where some do.

use peerlane_tests::{Links, Machine, number_from_environment, suite};

macro_rules! tests {
    ($($module:ident :: $test:ident;)*) => {$(
        #[test]
        fn $test() {
            let seed = number_from_environment("PEERLANE_SEED", 1);
            suite::$module::$test(&Machine::linked(16, seed, LINKS));
        }
    )*};
}

mod p2p {
    use super::*;
    const LINKS: Links = Links::All;
    peerlane_tests::for_each_test!(tests);
}

mod host {
    use super::*;
    const LINKS: Links = Links::None;
    peerlane_tests::for_each_test!(tests);
}

mod mixed {
    use super::*;
    const LINKS: Links = Links::Pairs;
    peerlane_tests::for_each_test!(tests);
}
