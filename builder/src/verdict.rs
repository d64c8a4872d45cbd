//! Remembers PTX that has passed, so that an unchanged build compiles and checks nothing.
//!
//! Invariant: a remembered verdict is used only where everything that went into it is the same:
//! the sources, the flags, the toolchain, the assembler, the expected kernels and the builder.

use crate::{Arch, Expected, Flavor, Ptxas};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The builder itself: a check that was added yesterday must see the PTX that passed the day
/// before.
const BUILDER: [&str; 6] = [
    include_str!("builder.rs"),
    include_str!("compile.rs"),
    include_str!("ptx.rs"),
    include_str!("ptxas.rs"),
    include_str!("text.rs"),
    include_str!("verify.rs"),
];

/// Separates the registers from the PTX in a remembered file.
const SEPARATOR: &str = "// --\n";

/// A file of the cache that holds one verdict, or will.
pub(crate) struct Verdict(PathBuf);

/// What went into a verdict.
pub(crate) struct Inputs<'a> {
    pub(crate) arch: Arch,
    pub(crate) sources: &'a str,
    /// All that the toolchain says of itself.
    pub(crate) toolchain: &'a str,
    pub(crate) ptxas: Option<&'a Ptxas>,
    pub(crate) expected: &'a [Expected],
    pub(crate) flavor: Flavor,
}

/// PTX that has passed, with each entry's registers.
pub(crate) struct Passed {
    pub(crate) ptx: String,
    pub(crate) registers: BTreeMap<String, u32>,
}

impl Verdict {
    /// The verdict on these inputs.
    pub(crate) fn on(inputs: &Inputs, cache: &Path) -> Verdict {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        BUILDER.into_iter().for_each(&mut add);
        add(inputs.sources);
        add(inputs.toolchain);
        add(&format!("{:?} {:?} {:?}", inputs.ptxas, inputs.expected, inputs.flavor));
        let key: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Verdict(cache.join(format!("passed-{}-{key}.ptx", inputs.arch)))
    }

    /// What passed; none where these inputs have not been seen, or the file is damaged.
    pub(crate) fn recall(&self) -> Option<Passed> {
        let text = fs::read_to_string(&self.0).ok()?;
        let (head, ptx) = text.split_once(SEPARATOR)?;
        let register = |line: &str| {
            let (symbol, count) = line.split_once(' ')?;
            Some((symbol.to_owned(), count.parse().ok()?))
        };
        let registers = head.lines().map(register).collect::<Option<_>>()?;
        Some(Passed { ptx: ptx.to_owned(), registers })
    }

    /// Remembers what passed. A cache that cannot be written costs time on the next build only.
    pub(crate) fn remember(&self, passed: &Passed) {
        let lines = passed.registers.iter().map(|(symbol, count)| format!("{symbol} {count}\n"));
        let text = lines.collect::<String>() + SEPARATOR + &passed.ptx;
        // Written beside and moved, so that nobody reads half a file.
        let beside = self.0.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_recalled_for_the_same_inputs_only() {
        let cache = std::env::temp_dir().join(format!("peerlane-verdict-{}", std::process::id()));
        fs::create_dir_all(&cache).expect("the temporary folder is writable");
        let inputs = |sources| Inputs {
            arch: Arch::Sm80,
            sources,
            toolchain: "rustc",
            ptxas: None,
            expected: &[],
            flavor: Flavor::Plain,
        };
        let registers = BTreeMap::from([("k".to_owned(), 14)]);
        let ptx = ".version 7.0\n// --\n".to_owned();
        Verdict::on(&inputs("a"), &cache).remember(&Passed { ptx: ptx.clone(), registers });
        let recalled = Verdict::on(&inputs("a"), &cache).recall().expect("it was remembered");
        assert_eq!((recalled.ptx, recalled.registers.get("k")), (ptx, Some(&14)));
        assert!(Verdict::on(&inputs("b"), &cache).recall().is_none());
        fs::remove_dir_all(&cache).expect("it is this test's own");
    }
}
