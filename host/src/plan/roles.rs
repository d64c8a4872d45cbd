//! One rank's places in the trees of every forest that a communicator may use, ready to launch with.
//!
//! Invariant: made once, when the ranks have met, so that no call allocates.

use super::Shape;
use super::forest::Forest;
use crate::algorithm::{Pattern, Route};
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

    /// The ranks that this one receives from or sends to, a bit each.
    pub fn neighbours(&self) -> u32 {
        let roles = self.table.iter().take(self.parts as usize);
        roles.fold(0, |mask, bits| mask | Role::from_bits(*bits).neighbours())
    }
}

/// The forest of a pattern, over as many ranks as there are entries in `islands`.
pub fn forest(islands: &[u8], pattern: Pattern) -> Forest {
    let world = islands.len() as u32;
    match pattern {
        Pattern::TwoShot => Forest::star(world),
        Pattern::Ring => Forest::ring(world),
        Pattern::Tree => Forest::binomial(world, 0),
        Pattern::DoubleTree => Forest::double_binary(world),
        Pattern::Hierarchical => Forest::islands(islands),
    }
}

/// The forest of a broadcast from `root`.
pub fn route(shape: &Shape, route: Route, root: u32) -> Forest {
    match route {
        Route::Direct => Forest::flat(shape.world, root),
        Route::Hub => Forest::hub(shape.world, root, shape.hub),
        Route::Chain => Forest::chain(shape.world, root),
        Route::Tree => Forest::binomial(shape.world, root),
        Route::DoubleTree => Forest::double_binary_from(shape.world, root),
    }
}

/// One rank's places in all of them.
#[derive(Clone, Debug)]
pub struct Places {
    patterns: Vec<Roles>,
    routes: Vec<Roles>,
}

impl Places {
    /// The places of `rank`.
    pub fn of(shape: &Shape, rank: u32) -> Places {
        let islands = shape.by_island();
        let patterns = Pattern::ALL.iter().map(|p| Roles::of(&forest(islands, *p), rank)).collect();
        let each =
            |r: Route| (0..shape.world).map(move |root| Roles::of(&route(shape, r, root), rank));
        Places { patterns, routes: Route::ALL.into_iter().flat_map(each).collect() }
    }

    /// The places in an all-reduce.
    pub fn pattern(&self, pattern: Pattern) -> &Roles {
        &self.patterns[pattern as usize]
    }

    /// The places in a broadcast from `root`.
    pub fn route(&self, route: Route, root: u32) -> &Roles {
        let world = self.routes.len() / Route::ALL.len();
        &self.routes[route as usize * world + root as usize]
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
            Pattern::ALL.iter().for_each(|pattern| check(&|place| *place.pattern(*pattern)));
            for route in Route::ALL {
                (0..world).for_each(|root| check(&|place| *place.route(route, root)));
            }
        }
    }
}
