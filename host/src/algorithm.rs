//! The ways to carry out an all-reduce or a broadcast, and their names.
//!
//! Invariant: `ALL` holds every one, and what `name` says, `from_str` understands.

use peerlane_device::abi::Format;
use std::fmt;
use std::str::FromStr;

/// How an all-reduce is carried out. `n` ranks, tensors of `S` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Every rank sends its whole tensor to every other and reduces all of it: one step,
    /// (n-1) x S bytes out of each GPU.
    OneShot(Format),
    /// Reduce-scatter and all-gather in one kernel: two steps, 2(n-1)/n x S bytes out of each GPU.
    TwoShot,
    /// Two-shot in which each rank sends to one other at a time: 2(n-1) steps. For PCIe root
    /// complexes that many-to-many writes slow down.
    Staged,
    /// Round the ring: 2(n-1) steps, 2(n-1)/n x S bytes to one neighbour. Sums are rounded at each
    /// step.
    Ring,
    /// Up and down one binomial tree: 2 log2 n steps. Sums are rounded at each inner rank.
    Tree,
    /// Up and down two binary trees with half the tensor each. Sums are rounded at each inner rank.
    DoubleTree,
    /// Inside islands, between them, inside them: four steps. Sums are rounded once per island.
    Hierarchical,
    /// The steps of a pattern as copies by the copy engines and local reductions, on streams of their own:
    /// no multiprocessor is busy while data travel.
    Scheduled(Pattern),
}

/// Which steps a scheduled all-reduce takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Those of [`Algorithm::TwoShot`].
    TwoShot,
    /// Those of [`Algorithm::Ring`].
    Ring,
    /// Those of [`Algorithm::Tree`].
    Tree,
    /// Those of [`Algorithm::DoubleTree`].
    DoubleTree,
    /// Those of [`Algorithm::Hierarchical`].
    Hierarchical,
    /// Those of [`Algorithm::OneShot`].
    OneShot,
}

impl Pattern {
    /// Every pattern.
    pub const ALL: [Pattern; 6] = [
        Pattern::TwoShot,
        Pattern::Ring,
        Pattern::Tree,
        Pattern::DoubleTree,
        Pattern::Hierarchical,
        Pattern::OneShot,
    ];

    /// The algorithm that is one kernel and adds in the same order.
    pub const fn fused(self) -> Algorithm {
        match self {
            Pattern::TwoShot => Algorithm::TwoShot,
            Pattern::Ring => Algorithm::Ring,
            Pattern::Tree => Algorithm::Tree,
            Pattern::DoubleTree => Algorithm::DoubleTree,
            Pattern::Hierarchical => Algorithm::Hierarchical,
            Pattern::OneShot => Algorithm::OneShot(Format::Full),
        }
    }
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Algorithm; 14] = [
        Algorithm::OneShot(Format::Packet),
        Algorithm::OneShot(Format::Full),
        Algorithm::TwoShot,
        Algorithm::Staged,
        Algorithm::Ring,
        Algorithm::Tree,
        Algorithm::DoubleTree,
        Algorithm::Hierarchical,
        Algorithm::Scheduled(Pattern::TwoShot),
        Algorithm::Scheduled(Pattern::Ring),
        Algorithm::Scheduled(Pattern::Tree),
        Algorithm::Scheduled(Pattern::DoubleTree),
        Algorithm::Scheduled(Pattern::Hierarchical),
        Algorithm::Scheduled(Pattern::OneShot),
    ];
    /// Those that are one kernel.
    pub const FUSED: [Algorithm; 8] = [
        Algorithm::OneShot(Format::Packet),
        Algorithm::OneShot(Format::Full),
        Algorithm::TwoShot,
        Algorithm::Staged,
        Algorithm::Ring,
        Algorithm::Tree,
        Algorithm::DoubleTree,
        Algorithm::Hierarchical,
    ];

    /// The name used on the command line, in tables and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::OneShot(format) => format.name(),
            Algorithm::TwoShot => "two-shot",
            Algorithm::Staged => "staged",
            Algorithm::Ring => "ring",
            Algorithm::Tree => "tree",
            Algorithm::DoubleTree => "double-tree",
            Algorithm::Hierarchical => "hierarchical",
            Algorithm::Scheduled(Pattern::TwoShot) => "copy-two-shot",
            Algorithm::Scheduled(Pattern::Ring) => "copy-ring",
            Algorithm::Scheduled(Pattern::Tree) => "copy-tree",
            Algorithm::Scheduled(Pattern::DoubleTree) => "copy-double-tree",
            Algorithm::Scheduled(Pattern::Hierarchical) => "copy-hierarchical",
            Algorithm::Scheduled(Pattern::OneShot) => "copy-one-shot",
        }
    }

    /// The steps it takes.
    pub const fn pattern(self) -> Pattern {
        match self {
            Algorithm::OneShot(_) => Pattern::OneShot,
            Algorithm::TwoShot | Algorithm::Staged => Pattern::TwoShot,
            Algorithm::Ring => Pattern::Ring,
            Algorithm::Tree => Pattern::Tree,
            Algorithm::DoubleTree => Pattern::DoubleTree,
            Algorithm::Hierarchical => Pattern::Hierarchical,
            Algorithm::Scheduled(pattern) => pattern,
        }
    }

    /// Whether it is copies and local reductions on streams of their own.
    pub const fn is_scheduled(self) -> bool {
        matches!(self, Algorithm::Scheduled(_))
    }

    /// Its place in [`Algorithm::ALL`].
    pub fn index(self) -> usize {
        Algorithm::ALL.iter().position(|other| *other == self).unwrap_or_default()
    }
}

/// How a broadcast is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// The root sends to every other rank: one step, (n-1) x S bytes out of the root.
    Direct,
    /// The root sends to one rank, the hub, which sends to all others: two steps.
    Hub,
    /// Rank by rank: n-1 steps, S bytes out of every rank but the last.
    Chain,
    /// A binomial tree: log2 n steps.
    Tree,
    /// Two binary trees with half the tensor each.
    DoubleTree,
    /// Copies by the copy engines, on streams of their own: no multiprocessor is busy.
    Scheduled(Spread),
}

/// Who sends to whom in a broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spread {
    /// As in [`Route::Direct`].
    Direct,
    /// As in [`Route::Hub`].
    Hub,
    /// As in [`Route::Chain`].
    Chain,
    /// As in [`Route::Tree`].
    Tree,
    /// As in [`Route::DoubleTree`].
    DoubleTree,
}

impl Spread {
    /// Every one.
    pub const ALL: [Spread; 5] =
        [Spread::Direct, Spread::Hub, Spread::Chain, Spread::Tree, Spread::DoubleTree];
}

impl Route {
    /// Every route.
    pub const ALL: [Route; 10] = [
        Route::Direct,
        Route::Hub,
        Route::Chain,
        Route::Tree,
        Route::DoubleTree,
        Route::Scheduled(Spread::Direct),
        Route::Scheduled(Spread::Hub),
        Route::Scheduled(Spread::Chain),
        Route::Scheduled(Spread::Tree),
        Route::Scheduled(Spread::DoubleTree),
    ];
    /// Those that are one kernel.
    pub const FUSED: [Route; 5] =
        [Route::Direct, Route::Hub, Route::Chain, Route::Tree, Route::DoubleTree];

    /// The name used on the command line, in tables and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Route::Direct => "direct",
            Route::Hub => "hub",
            Route::Chain => "chain",
            Route::Tree => "tree",
            Route::DoubleTree => "double-tree",
            Route::Scheduled(Spread::Direct) => "copy-direct",
            Route::Scheduled(Spread::Hub) => "copy-hub",
            Route::Scheduled(Spread::Chain) => "copy-chain",
            Route::Scheduled(Spread::Tree) => "copy-tree",
            Route::Scheduled(Spread::DoubleTree) => "copy-double-tree",
        }
    }

    /// Who sends to whom.
    pub const fn spread(self) -> Spread {
        match self {
            Route::Direct => Spread::Direct,
            Route::Hub => Spread::Hub,
            Route::Chain => Spread::Chain,
            Route::Tree => Spread::Tree,
            Route::DoubleTree => Spread::DoubleTree,
            Route::Scheduled(spread) => spread,
        }
    }

    /// The route that is one kernel and sends from the same ranks to the same.
    pub const fn fused(self) -> Route {
        match self.spread() {
            Spread::Direct => Route::Direct,
            Spread::Hub => Route::Hub,
            Spread::Chain => Route::Chain,
            Spread::Tree => Route::Tree,
            Spread::DoubleTree => Route::DoubleTree,
        }
    }

    /// Its place in [`Route::ALL`].
    pub fn index(self) -> usize {
        Route::ALL.iter().position(|other| *other == self).unwrap_or_default()
    }

    /// Whether it is copies on streams of their own.
    pub const fn is_scheduled(self) -> bool {
        matches!(self, Route::Scheduled(_))
    }
}

// A call log entry has four bits for either, one value of which says neither.
const _: () = assert!(Algorithm::ALL.len() < 16 && Route::ALL.len() < 16);

/// A name that stands for nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected one of {expected}, got {got}")]
pub struct UnknownName {
    expected: String,
    got: String,
}

impl UnknownName {
    /// What was expected, and what came.
    pub(crate) fn new(expected: &str, got: &str) -> UnknownName {
        UnknownName { expected: expected.into(), got: got.into() }
    }

    /// The names that are known, and the one that came.
    pub(crate) fn into_parts(self) -> (String, String) {
        (self.expected, self.got)
    }
}

/// The one of `choices` that is called `text`.
pub(crate) fn named<T: Copy>(
    text: &str,
    choices: &[T],
    name: impl Fn(T) -> &'static str,
) -> Result<T, UnknownName> {
    let found = choices.iter().copied().find(|choice| name(*choice) == text);
    found.ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|choice| name(*choice)).collect();
        UnknownName { expected: names.join(", "), got: text.to_owned() }
    })
}

impl FromStr for Algorithm {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Algorithm, UnknownName> {
        named(text, &Algorithm::ALL, Algorithm::name)
    }
}

impl FromStr for Route {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Route, UnknownName> {
        named(text, &Route::ALL, Route::name)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_understood_and_stands_for_one_thing() {
        for (index, algorithm) in Algorithm::ALL.into_iter().enumerate() {
            assert_eq!(algorithm.name().parse(), Ok(algorithm));
            assert_eq!(algorithm.index(), index);
        }
        for (index, route) in Route::ALL.into_iter().enumerate() {
            assert_eq!(route.name().parse(), Ok(route));
            assert_eq!(route.index(), index);
        }
        for pattern in Pattern::ALL {
            assert!(Algorithm::ALL.contains(&Algorithm::Scheduled(pattern)));
        }
        for spread in Spread::ALL {
            assert!(Route::ALL.contains(&Route::Scheduled(spread)));
        }
        assert_eq!(
            Algorithm::ALL.iter().filter(|a| !a.is_scheduled()).count(),
            Algorithm::FUSED.len()
        );
        assert!(Route::ALL.iter().filter(|r| !r.is_scheduled()).eq(&Route::FUSED));
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = "two_shot".parse::<Algorithm>().unwrap_err().to_string();
        assert!(error.starts_with("expected one of packet, full, two-shot, "), "{error}");
        assert!(error.ends_with("got two_shot"), "{error}");
        assert!("".parse::<Route>().is_err());
    }
}
