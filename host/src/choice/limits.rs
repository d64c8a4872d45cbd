//! A choice by size: ascending limits, and what is chosen up to each.
//!
//! Invariant: limits rise strictly and the last is the largest size there is, so every size has
//! an answer. Looking one up allocates nothing and locks nothing.

/// Up to each limit, in bytes, one choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits<T> {
    entries: Vec<(usize, T)>,
}

impl<T: Copy + PartialEq> Limits<T> {
    /// One choice for every size.
    pub fn always(choice: T) -> Limits<T> {
        Limits { entries: vec![(usize::MAX, choice)] }
    }

    /// From ascending limits; sizes beyond the last one get `rest`. Neighbours that agree become one.
    pub fn new(entries: impl IntoIterator<Item = (usize, T)>, rest: T) -> Limits<T> {
        let mut merged: Vec<(usize, T)> = Vec::new();
        for (limit, choice) in entries.into_iter().chain([(usize::MAX, rest)]) {
            match merged.last_mut() {
                Some(last) if last.1 == choice || last.0 >= limit => last.0 = last.0.max(limit),
                _ => merged.push((limit, choice)),
            }
        }
        Limits { entries: merged }
    }

    /// What `choose` says, found by asking it at a few sizes per octave up to `largest` and
    /// halving between those that differ.
    pub fn found(choose: impl Fn(usize) -> T, largest: usize) -> Limits<T> {
        let mut entries = Vec::new();
        let (mut below, mut choice) = (1, choose(1));
        while below < largest {
            let above = (below + below.div_ceil(4)).min(largest);
            while choose(above) != choice {
                let (mut low, mut high) = (below, above);
                while low + 1 < high {
                    let middle = low + (high - low) / 2;
                    if choose(middle) == choice { low = middle } else { high = middle }
                }
                entries.push((low, choice));
                (below, choice) = (high, choose(high));
            }
            below = above;
        }
        Limits::new(entries, choice)
    }

    /// The choice for a call of `bytes` bytes.
    #[inline]
    pub fn at(&self, bytes: usize) -> T {
        let last = self.entries.len() - 1;
        // A few entries: looking at each is as fast as halving.
        let place = self.entries[..last].iter().position(|(limit, _)| bytes <= *limit);
        self.entries[place.unwrap_or(last)].1
    }

    /// The limits, inclusive, with what is chosen up to each.
    pub fn entries(&self) -> &[(usize, T)] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_are_inclusive_and_the_rest_is_everything_larger() {
        let limits = Limits::new([(10, 'a'), (20, 'a'), (30, 'b')], 'c');
        assert_eq!(limits.entries(), [(20, 'a'), (30, 'b'), (usize::MAX, 'c')]);
        assert_eq!(
            [0, 20, 21, 30, 31, usize::MAX].map(|n| limits.at(n)),
            ['a', 'a', 'b', 'b', 'c', 'c']
        );
        assert_eq!(Limits::new([(5, 'x')], 'x'), Limits::always('x'));
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_was_asked(mut at in prop::collection::vec(1usize..1 << 20, 0..4)) {
            at.sort_unstable();
            let choose = |bytes: usize| at.iter().filter(|limit| bytes > **limit).count();
            let limits = Limits::found(choose, 1 << 21);
            for bytes in at.iter().flat_map(|n| [*n, *n + 1]).chain([0, 1, 1 << 30]) {
                // Choices that hold for less than a quarter of a size may be missed.
                let close = at.windows(2).any(|pair| pair[1] < pair[0] + pair[0].div_ceil(4) + 2);
                prop_assert!(close || limits.at(bytes) == choose(bytes), "{bytes}: {limits:?}");
            }
        }
    }
}
