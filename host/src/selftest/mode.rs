//! Whether ranks that meet ask for a self-test.
//!
//! Invariant: what `name` says, `from_str` understands.

use crate::algorithm::{UnknownName, named};
use std::fmt;
use std::str::FromStr;

/// Whether the ranks want a self-test of their GPUs before they use links between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SelfTest {
    /// Real GPUs: the verdict in the user's cache, else a new one, made in a child process. Simulated ones: none.
    #[default]
    Auto,
    /// None. The probe of every pair when processes join stays.
    Off,
    /// A new one, whatever the cache holds, for simulated GPUs too. Once a process: what comes of it holds for
    /// all groups of the same GPUs that this process leads.
    Always,
}

impl SelfTest {
    /// All of them.
    pub const ALL: [SelfTest; 3] = [SelfTest::Auto, SelfTest::Off, SelfTest::Always];

    /// The name used in the environment and by callers.
    pub const fn name(self) -> &'static str {
        match self {
            SelfTest::Auto => "auto",
            SelfTest::Off => "off",
            SelfTest::Always => "always",
        }
    }
}

impl FromStr for SelfTest {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<SelfTest, UnknownName> {
        named(text, &SelfTest::ALL, SelfTest::name)
    }
}

impl fmt::Display for SelfTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
