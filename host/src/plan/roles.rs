//! One rank's places in the trees of every forest that a communicator may use, ready to launch with.
//!
//! Invariant: made once, when the ranks have met, so that no call allocates.

use super::Shape;
use super::forest::Forest;
use crate::algorithm::{Pattern, Spread};
use peerlane_device::abi::{MAX_RANKS, Role};

/// One rank's places in the trees of one forest, as kernels read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles {
    /// Parts of the tensor, each with a tree.
    pub parts: u32,
    /// [`Role`]s, part by part.
    pub table: [u64; MAX_RANKS],
}

impl Roles {
    /// The places of `rank` in `forest`.
    pub fn of(forest: &Forest, rank: u32) -> Roles {
        let mut table = [0; MAX_RANKS];
        for (entry, tree) in table.iter_mut().zip(forest.results()) {
            let children = tree.children(rank).fold(0, |mask, child| mask | 1 << child);
            *entry = Role::new(tree.parent(rank), children).bits();
        }
        Roles { parts: forest.parts(), table }
    }
}

/// The forest of a pattern, over as many ranks as there are entries in `islands`; `None` where every rank adds
/// up everything for itself.
pub fn forest(islands: &[u8], pattern: Pattern) -> Option<Forest> {
    let world = islands.len() as u32;
    Some(match pattern {
        Pattern::OneShot => return None,
        Pattern::TwoShot => Forest::star(world),
        Pattern::Ring => Forest::ring(world),
        Pattern::Tree => Forest::binomial(world, 0),
        Pattern::DoubleTree => Forest::double_binary(world),
        Pattern::Hierarchical => Forest::islands(islands),
    })
}

/// The forest of a broadcast from `root`.
pub fn spread(shape: &Shape, spread: Spread, root: u32) -> Forest {
    match spread {
        Spread::Direct => Forest::flat(shape.world, root),
        Spread::Hub => Forest::hub(shape.world, root, shape.hub),
        Spread::Chain => Forest::chain(shape.world, root),
        Spread::Tree => Forest::binomial(shape.world, root),
        Spread::DoubleTree => Forest::double_binary_from(shape.world, root),
    }
}

/// One rank's places in all of them.
#[derive(Clone, Debug)]
pub struct Places {
    /// By pattern.
    patterns: Vec<Option<Roles>>,
    routes: Vec<Roles>,
}

impl Places {
    /// The places of `rank`.
    pub fn of(shape: &Shape, rank: u32) -> Places {
        let in_pattern = |pattern: &Pattern| {
            forest(shape.by_island(), *pattern).map(|forest| Roles::of(&forest, rank))
        };
        let from =
            |s: Spread| (0..shape.world).map(move |root| Roles::of(&spread(shape, s, root), rank));
        let patterns = Pattern::ALL.iter().map(in_pattern).collect();
        Places { patterns, routes: Spread::ALL.into_iter().flat_map(from).collect() }
    }

    /// The places in an all-reduce, if its sums take trees.
    pub fn pattern(&self, pattern: Pattern) -> Option<&Roles> {
        self.patterns[pattern as usize].as_ref()
    }

    /// The places in a broadcast from `root`.
    pub fn spread(&self, spread: Spread, root: u32) -> &Roles {
        let world = self.routes.len() / Spread::ALL.len();
        &self.routes[spread as usize * world + root as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    #[test]
    fn what_one_rank_sends_another_receives() {
        for world in 2..=MAX_RANKS as u32 {
            let mut islands = [0; MAX_RANKS];
            islands.iter_mut().enumerate().for_each(|(rank, island)| *island = (rank / 3) as u8);
            let layout = layout::choose(world, 32 << 20).unwrap();
            let shape = Shape { islands, hub: world - 1, ..Shape::new(world, layout, 8) };
            let places: Vec<Places> = (0..world).map(|rank| Places::of(&shape, rank)).collect();
            let check = |of: &dyn Fn(&Places) -> Roles| {
                for (rank, place) in (0..).zip(&places) {
                    let roles = of(place);
                    for part in 0..roles.parts as usize {
                        let Some(parent) = Role::from_bits(roles.table[part]).parent() else {
                            continue;
                        };
                        let above = Role::from_bits(of(&places[parent as usize]).table[part]);
                        assert!(above.children() >> rank & 1 == 1, "{world}: {rank} to {parent}");
                    }
                }
            };
            for pattern in Pattern::ALL.into_iter().filter(|p| *p != Pattern::OneShot) {
                check(&|place| *place.pattern(pattern).unwrap());
            }
            for spread in Spread::ALL {
                (0..world).for_each(|root| check(&|place| *place.spread(spread, root)));
            }
        }
    }
}
