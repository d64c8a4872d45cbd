//! The rules that PTX must keep, each learned from a compiler that broke it.
//!
//! Invariant: [`verify`] names every kernel that breaks a rule, and what it found there. A rule
//! holds for a kernel together with all functions that it reaches. docs/building.md says what to
//! do about each defect.

use crate::Flavor;
use crate::ptx::{Function, Module, opcode, words};
use peerlane_device::abi::Kernel;
use std::collections::BTreeSet;
use std::fmt;

/// A kernel that the PTX must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its symbol.
    pub symbol: String,
    /// Block-wide barriers in its source.
    pub barriers: usize,
}

impl Expected {
    /// Peerlane's own kernels, compiled to do this.
    pub fn peerlane(flavor: Flavor) -> Vec<Expected> {
        // One before a checked call uses data, one before it compares checksums, one after.
        let more = if flavor == Flavor::Checked { 3 } else { 0 };
        let expected = |kernel: &Kernel| Expected {
            symbol: kernel.symbol().to_owned(),
            barriers: kernel.barriers() + more * kernel.calls(),
        };
        Kernel::ALL.iter().map(expected).collect()
    }
}

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// The kernel table has it, the PTX has not.
    #[error("it is in the kernel table but the PTX has no such entry")]
    Missing,
    /// The PTX has it, the kernel table has not.
    #[error("the PTX exports it but the kernel table does not have it")]
    Unexpected,
    /// A barrier was duplicated, removed, or miscounted in the kernel table.
    #[error("{found} block-wide barriers in the PTX, {expected} in the kernel table")]
    Barriers {
        /// What the kernel table says.
        expected: usize,
        /// What the PTX holds.
        found: usize,
    },
    /// A load that may return what a peer has overwritten long ago.
    #[error("a non-coherent load, `{0}`: device memory was read through a reference")]
    NonCoherentLoad(String),
    /// A copy of an aggregate that became a byte loop.
    #[error("a byte-wise access, `{0}`: LLVM copies an aggregate byte by byte")]
    ByteCopy(String),
    /// An atomic whose scope was lost.
    #[error("an atomic without scope, `{0}`: say .cta, .gpu or .sys in asm!")]
    UnscopedAtomic(String),
    /// A symbol that nothing defines.
    #[error("it needs `{0}`, which nothing defines")]
    Unresolved(String),
    /// Local memory: an array that is indexed at run time, or copied whole.
    #[error("local memory, `{0}`: an array is indexed at run time or a struct copied whole")]
    LocalMemory(String),
    /// ptxas gave the kernel a stack frame.
    #[error("ptxas gives it a stack frame of {0} bytes")]
    StackFrame(u32),
    /// ptxas ran out of registers.
    #[error("ptxas spills {0} bytes of registers to memory")]
    Spills(u32),
}

/// One kernel with one broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The kernel's symbol.
    pub kernel: String,
    /// What is wrong with it.
    pub defect: Defect,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kernel, self.defect)
    }
}

/// Checks the text of a PTX file against the kernels it must hold.
///
/// ptxas's verdict is not part of this; [`crate::CudaBuilder`] adds it where ptxas is found.
pub fn verify(ptx: &str, expected: &[Expected]) -> Vec<Finding> {
    let module = Module::parse(ptx);
    let mut findings = entries(&module, expected);
    for entry in module.entries() {
        let mut add = |defect| findings.push(Finding { kernel: entry.name.clone(), defect });
        if let Some(kernel) = expected.iter().find(|kernel| kernel.symbol == entry.name) {
            let found = barriers(&module, entry);
            if found != kernel.barriers {
                add(Defect::Barriers { expected: kernel.barriers, found });
            }
        }
        instructions(&module, entry).into_iter().for_each(add);
    }
    findings.extend(unresolved(&module));
    findings
}

/// Counts for reports.
pub(crate) struct Tally {
    pub(crate) symbol: String,
    pub(crate) barriers: usize,
    pub(crate) traps: usize,
}

/// The counts of every entry.
pub(crate) fn tally(ptx: &str) -> Vec<Tally> {
    let module = Module::parse(ptx);
    let count = |entry: &Function| Tally {
        symbol: entry.name.clone(),
        barriers: barriers(&module, entry),
        traps: count(&module, entry, |opcode| opcode == "trap"),
    };
    module.entries().map(count).collect()
}

/// Entries that are missing or too many.
fn entries(module: &Module, expected: &[Expected]) -> Vec<Finding> {
    let found: BTreeSet<&str> = module.entries().map(|entry| entry.name.as_str()).collect();
    let wanted: BTreeSet<&str> = expected.iter().map(|kernel| kernel.symbol.as_str()).collect();
    let finding = |kernel: &&str, defect| Finding { kernel: (*kernel).to_owned(), defect };
    let missing = wanted.difference(&found).map(|kernel| finding(kernel, Defect::Missing));
    let unexpected = found.difference(&wanted).map(|kernel| finding(kernel, Defect::Unexpected));
    missing.chain(unexpected).collect()
}

/// Block-wide barriers that the entry holds.
fn barriers(module: &Module, entry: &Function) -> usize {
    count(module, entry, is_barrier)
}

/// Instructions of a kind in the entry, and once per mention in each function that it reaches.
fn count(module: &Module, entry: &Function, is: fn(&str) -> bool) -> usize {
    let own =
        |function: &Function| function.statements.iter().filter(|line| is(opcode(line))).count();
    let reached = module.reachable(entry);
    let mentions = |callee: &Function| {
        let lines = reached.iter().flat_map(|caller| &caller.statements);
        lines.filter(|line| words(line).any(|word| word == callee.name)).count()
    };
    let called = reached.iter().skip(1).map(|callee| match own(callee) {
        0 => 0,
        own => own * mentions(callee),
    });
    own(entry) + called.sum::<usize>()
}

/// `bar.sync`, `bar.red`, `bar.arrive`, `barrier.sync`, `barrier.cta.sync` ..., but not the
/// barrier among the threads of a warp.
fn is_barrier(opcode: &str) -> bool {
    (opcode.starts_with("bar.") || opcode.starts_with("barrier."))
        && !opcode.starts_with("bar.warp")
}

/// What is wrong with the instructions that the entry reaches; the first of each kind.
fn instructions(module: &Module, entry: &Function) -> Vec<Defect> {
    let reached = module.reachable(entry);
    let first = |breaks: fn(&str) -> bool| {
        let mut lines = reached.iter().flat_map(|function| &function.statements);
        lines.find(|line| breaks(opcode(line))).cloned()
    };
    let broken = [
        first(is_non_coherent).map(Defect::NonCoherentLoad),
        first(is_byte_access).map(Defect::ByteCopy),
        first(is_unscoped_atomic).map(Defect::UnscopedAtomic),
        first(is_local).map(Defect::LocalMemory),
    ];
    broken.into_iter().flatten().collect()
}

/// `ld.global.nc`, with whatever stands between and behind.
fn is_non_coherent(opcode: &str) -> bool {
    opcode.starts_with("ld.") && opcode.split('.').any(|part| part == "nc")
}

/// LLVM writes bytes as `.b8`; our own byte accesses are asm! and write `.u8`. Parameters of type
/// bool are read as `.b8` and are no copy; local memory has a rule of its own.
fn is_byte_access(opcode: &str) -> bool {
    let access = opcode.starts_with("ld.") || opcode.starts_with("st.");
    let elsewhere = opcode.split('.').any(|part| matches!(part, "param" | "local"));
    access && opcode.ends_with(".b8") && !elsewhere
}

/// LLVM 22 drops the scope of atomic read-modify-writes along with their ordering.
fn is_unscoped_atomic(opcode: &str) -> bool {
    let atomic = opcode.starts_with("atom.") || opcode.starts_with("red.");
    atomic && !opcode.split('.').any(|part| matches!(part, "cta" | "cluster" | "gpu" | "sys"))
}

/// The declaration of a local depot, or an access to one.
fn is_local(opcode: &str) -> bool {
    opcode == ".local" || opcode.starts_with("ld.local") || opcode.starts_with("st.local")
}

/// Undefined symbols, under the name of each kernel that needs them.
fn unresolved(module: &Module) -> Vec<Finding> {
    let mut findings = Vec::new();
    for symbol in &module.unresolved {
        let needs = |entry: &&Function| {
            module.reachable(entry).iter().any(|function| function.mentions(symbol))
        };
        let mut kernels: Vec<&str> =
            module.entries().filter(needs).map(|entry| entry.name.as_str()).collect();
        if kernels.is_empty() {
            kernels.push("the module");
        }
        findings.extend(kernels.into_iter().map(|kernel| Finding {
            kernel: kernel.to_owned(),
            defect: Defect::Unresolved(symbol.clone()),
        }));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The defects of an entry `k` with this body, which should have one barrier.
    fn defects(body: &str) -> Vec<Defect> {
        let ptx = format!(".visible .entry k()\n{{\n{body}\nret;\n}}\n");
        let expected = [Expected { symbol: "k".to_owned(), barriers: 1 }];
        verify(&ptx, &expected).into_iter().map(|finding| finding.defect).collect()
    }

    #[test]
    fn a_good_kernel_passes() {
        let body = "bar.sync 0; bar.warp.sync -1; ld.global.u8 %r1, [%rd1]; ld.param.b8 %rs1, [k];
                    atom.acq_rel.gpu.global.cas.b32 %r1, [%rd1], 0, 1; redux.sync.add.s32 %r1, %r2, -1;";
        assert_eq!(defects(body), []);
    }

    #[test]
    fn barriers_are_counted_in_every_spelling() {
        for barrier in ["bar.sync 0;", "barrier.sync 0;", "bar.red.or.pred %p1, 0, %p2;"] {
            assert_eq!(defects(barrier), []);
            let twice = [Defect::Barriers { expected: 1, found: 2 }];
            assert_eq!(defects(&format!("@%p1 {barrier} $L_1: {barrier}")), twice);
        }
        assert_eq!(defects(""), [Defect::Barriers { expected: 1, found: 0 }]);
    }

    #[test]
    fn each_forbidden_instruction_is_found() {
        let one = |line: &str| match defects(&format!("bar.sync 0; {line};")).as_slice() {
            [defect] => defect.clone(),
            other => panic!("{line}: {other:?}"),
        };
        assert!(matches!(one("ld.global.nc.b32 %r1, [%rd1]"), Defect::NonCoherentLoad(_)));
        assert!(matches!(one("ld.global.b8 %rs1, [%rd1]"), Defect::ByteCopy(_)));
        assert!(matches!(one("st.b8 [%rd1], %rs1"), Defect::ByteCopy(_)));
        assert!(matches!(one("atom.global.add.u32 %r1, [%rd1], 1"), Defect::UnscopedAtomic(_)));
        assert!(matches!(one("red.add.u32 [%rd1], 1"), Defect::UnscopedAtomic(_)));
        assert!(matches!(one(".local .align 8 .b8 __local_depot0[64]"), Defect::LocalMemory(_)));
        assert_eq!(one("call.uni gone, ()"), Defect::Unresolved("gone".to_owned()));
    }

    #[test]
    fn what_a_called_function_does_counts_for_the_kernel() {
        let ptx = ".func f()\n{ bar.sync 0; ld.global.nc.b32 %r1, [%rd1]; ret; }
                   .visible .entry k()\n{ call.uni f, (); call.uni f, (); ret; }";
        let expected = [Expected { symbol: "k".to_owned(), barriers: 1 }];
        let findings = verify(ptx, &expected);
        assert!(findings.iter().all(|finding| finding.kernel == "k"));
        assert_eq!(findings[0].defect, Defect::Barriers { expected: 1, found: 2 });
        assert!(matches!(findings[1].defect, Defect::NonCoherentLoad(_)));
    }

    #[test]
    fn entries_must_match_the_table() {
        let ptx = ".visible .entry stranger()\n{ ret; }";
        let expected = [Expected { symbol: "k".to_owned(), barriers: 0 }];
        let lines: Vec<_> = verify(ptx, &expected).iter().map(Finding::to_string).collect();
        assert!(lines[0].starts_with("k: it is in the kernel table"), "{lines:?}");
        assert!(lines[1].starts_with("stranger: the PTX exports it"), "{lines:?}");
    }
}
