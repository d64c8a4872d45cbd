//! Who sends to whom: a tensor in parts, and for each part a tree over the ranks.
//!
//! Pure. Invariant: every tree reaches every rank once, and every rank that builds a forest from the
//! same inputs gets the same one. An all-reduce sums each part towards its tree's root and sends the
//! result from there along the same tree (on a ring: on round it); a broadcast sends each part from
//! the root on.
//!
//! | forest | parts | depth of the trees | sends out of a rank, tensors |
//! |---|---|---|---|
//! | star | n | 1 | 2(n-1)/n: the two shots of a two-shot all-reduce |
//! | binomial | 1 | log2 n | up to log2 n + 1 |
//! | double binary | 2 | log2 n | about 2: each rank is a leaf in one of the trees |
//! | ring | n | n-1 | 2(n-1)/n, all to one neighbour |
//! | islands | ranks of an island | 2 | inside and between islands, each byte crosses once |

use peerlane_device::abi::MAX_RANKS;

/// A tree over all ranks. The root is its own parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tree {
    world: u32,
    parents: [u8; MAX_RANKS],
}

impl Tree {
    /// The tree in which `parent(rank)` says where each rank of `world` sends.
    fn new(world: u32, parent: impl Fn(u32) -> u32) -> Tree {
        let mut parents = [0; MAX_RANKS];
        for rank in 0..world {
            parents[rank as usize] = parent(rank) as u8;
        }
        Tree { world, parents }
    }

    /// Every rank sends to `root`.
    pub fn star(world: u32, root: u32) -> Tree {
        Tree::new(world, |_| root)
    }

    /// The ranks in a row: the root above its successor, that one above its own, and so on.
    pub fn chain(world: u32, root: u32) -> Tree {
        Tree::new(world, |rank| if rank == root { root } else { (rank + world - 1) % world })
    }

    /// A binomial tree: counted from the root, a rank's parent lacks the rank's lowest set bit.
    pub fn binomial(world: u32, root: u32) -> Tree {
        Tree::new(world, |rank| {
            let place = (rank + world - root) % world;
            let above = if place == 0 { 0 } else { place & (place - 1) };
            (above + root) % world
        })
    }

    /// A binary tree in which rank r stands at the place `place(r)`, from 1 on, of the in-order walk.
    /// Places of odd number are leaves.
    fn in_order(world: u32, place: impl Fn(u32) -> u32) -> Tree {
        let at = |wanted: u32| (0..world).find(|rank| place(*rank) == wanted).unwrap_or(0);
        Tree::new(world, |rank| at(in_order_parent(world, place(rank))))
    }

    /// `root` before the ranks of a tree over all others, whose places are the others in order.
    fn below(world: u32, root: u32, others: Tree) -> Tree {
        let outer = |inner: u32| (root + 1 + inner) % world;
        Tree::new(world, |rank| {
            if rank == root {
                return root;
            }
            let inner = (rank + world - root - 1) % world;
            let parent = others.parents[inner as usize] as u32;
            if parent == inner { root } else { outer(parent) }
        })
    }

    /// The same tree, except that `root` is its own parent.
    fn rooted(mut self, root: u32) -> Tree {
        self.parents[root as usize] = root as u8;
        self
    }

    /// Where `rank` sends; `None` for the root.
    pub fn parent(&self, rank: u32) -> Option<u32> {
        let parent = self.parents[rank as usize] as u32;
        (parent != rank).then_some(parent)
    }

    /// The ranks that send to `rank`, in ascending order.
    pub fn children(&self, rank: u32) -> impl Iterator<Item = u32> + use<'_> {
        (0..self.world).filter(move |child| self.parent(*child) == Some(rank))
    }

    /// The rank that all others lead to.
    pub fn root(&self) -> u32 {
        (0..self.world).find(|rank| self.parent(*rank).is_none()).unwrap_or(0)
    }

    /// Steps from `rank` to the root.
    pub fn depth(&self, rank: u32) -> u32 {
        self.parent(rank).map_or(0, |parent| 1 + self.depth(parent))
    }

    /// Steps from the root to the rank furthest from it.
    pub fn height(&self) -> u32 {
        (0..self.world).map(|rank| self.depth(rank)).max().unwrap_or(0)
    }
}

/// The place above `place` in the in-order walk of a binary tree over 1 to `world`: one level up is the
/// next multiple of twice the lowest set bit, left or right; places beyond the end are skipped.
fn in_order_parent(world: u32, place: u32) -> u32 {
    let top = 1 << (u32::BITS - 1 - world.leading_zeros());
    let mut above = place;
    while above != top {
        let bit = above & above.wrapping_neg();
        above = (above & !bit & !(bit << 1)) | bit << 1;
        if above <= world {
            return above;
        }
    }
    place
}

/// Trees for each part of the tensor: one that sums take, one that results take. Both have one root.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Forest {
    sums: Vec<Tree>,
    results: Vec<Tree>,
}

impl Forest {
    /// Results go back the way that sums came.
    fn both_ways(trees: impl Into<Vec<Tree>>) -> Forest {
        let sums = trees.into();
        Forest { results: sums.clone(), sums }
    }

    /// Part r is reduced by rank r, to which all others send: what two-shot does.
    pub fn star(world: u32) -> Forest {
        Forest::both_ways((0..world).map(|rank| Tree::star(world, rank)).collect::<Vec<_>>())
    }

    /// One binomial tree.
    pub fn binomial(world: u32, root: u32) -> Forest {
        Forest::both_ways([Tree::binomial(world, root)])
    }

    /// Two binary trees, each on half the tensor, in which nearly every leaf of one is an inner
    /// rank of the other, so that together they use every link in both directions (Sanders, Speck,
    /// Träff: Two-tree algorithms for full bandwidth broadcast, reduction and scan, 2009).
    pub fn double_binary(world: u32) -> Forest {
        Forest::both_ways(two_trees(world))
    }

    /// Part r goes round the ring from rank to next rank, its sum until it is complete at rank r, then
    /// the result.
    pub fn ring(world: u32) -> Forest {
        let towards =
            |root| Tree::new(world, |rank| if rank == root { root } else { (rank + 1) % world });
        Forest {
            sums: (0..world).map(towards).collect(),
            results: (0..world).map(|root| Tree::chain(world, root)).collect(),
        }
    }

    /// Ranks with the same entry in `islands` are near each other. Part s is summed inside each island
    /// by its s-th rank; these then meet at one of them, in turn another one for each part. There are
    /// as many parts as the smallest island has ranks.
    pub fn islands(islands: &[u8]) -> Forest {
        let world = islands.len() as u32;
        let mut groups: Vec<(u8, Vec<u32>)> = Vec::new();
        for (rank, island) in (0..).zip(islands) {
            match groups.iter_mut().find(|(name, _)| name == island) {
                Some((_, members)) => members.push(rank),
                None => groups.push((*island, vec![rank])),
            }
        }
        let parts = groups.iter().map(|(_, members)| members.len()).min().unwrap_or(1);
        let tree = |part: usize| {
            let leader = |group: usize| groups[group].1[part];
            let top = leader(part % groups.len());
            Tree::new(world, |rank| {
                let home = groups.iter().position(|(name, _)| *name == islands[rank as usize]);
                let own = leader(home.unwrap_or(0));
                if rank == own { top } else { own }
            })
        };
        Forest::both_ways((0..parts).map(tree).collect::<Vec<_>>())
    }

    /// For broadcasts: every rank receives from `root` itself.
    pub fn flat(world: u32, root: u32) -> Forest {
        Forest::both_ways([Tree::star(world, root)])
    }

    /// For broadcasts: the ranks in a row, `root` first.
    pub fn chain(world: u32, root: u32) -> Forest {
        Forest::both_ways([Tree::chain(world, root)])
    }

    /// For broadcasts: `root` sends to `hub` alone, which sends to all others.
    pub fn hub(world: u32, root: u32, hub: u32) -> Forest {
        let below = Tree::new(world, |rank| if rank == hub { root } else { hub });
        Forest::both_ways([below.rooted(root)])
    }

    /// For broadcasts: `root` sends half of the tensor to the top of each of two binary trees over the
    /// other ranks.
    pub fn double_binary_from(world: u32, root: u32) -> Forest {
        if world < 3 {
            return Forest::flat(world, root);
        }
        Forest::both_ways(two_trees(world - 1).map(|tree| Tree::below(world, root, tree)))
    }

    /// Number of parts.
    pub fn parts(&self) -> u32 {
        self.sums.len() as u32
    }

    /// The trees that sums take to their root, part by part.
    pub fn sums(&self) -> &[Tree] {
        &self.sums
    }

    /// The trees that results take from their root, part by part.
    pub fn results(&self) -> &[Tree] {
        &self.results
    }

    /// Most steps from any rank to a root.
    pub fn height(&self) -> u32 {
        self.sums.iter().map(Tree::height).max().unwrap_or(0)
    }
}

/// A binary tree and its mirror image. Where the mirror would put leaves on leaves, for an odd
/// number of ranks, the second is shifted by one place instead.
fn two_trees(world: u32) -> [Tree; 2] {
    let first = Tree::in_order(world, |rank| rank + 1);
    let second = if world.is_multiple_of(2) {
        Tree::in_order(world, |rank| world - rank)
    } else {
        Tree::in_order(world, |rank| (rank + 1) % world + 1)
    };
    [first, second]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log2_up(n: u32) -> u32 {
        n.next_power_of_two().trailing_zeros()
    }

    /// Every forest over `world` ranks, with its name.
    fn all(world: u32) -> Vec<(&'static str, Forest)> {
        let islands: Vec<u8> = (0..world as u8).map(|rank| rank / 3).collect();
        let mut forests = vec![
            ("star", Forest::star(world)),
            ("double_binary", Forest::double_binary(world)),
            ("ring", Forest::ring(world)),
            ("islands", Forest::islands(&islands)),
        ];
        for root in 0..world {
            forests.push(("binomial", Forest::binomial(world, root)));
            forests.push(("flat", Forest::flat(world, root)));
            forests.push(("chain", Forest::chain(world, root)));
            forests.push(("double_binary_from", Forest::double_binary_from(world, root)));
            forests.push(("hub", Forest::hub(world, root, (root + 1) % world)));
            forests.push(("hub", Forest::hub(world, root, root)));
        }
        forests
    }

    #[test]
    fn every_tree_leads_every_rank_to_one_root() {
        for world in 1..=MAX_RANKS as u32 {
            for (name, forest) in all(world) {
                for (sums, results) in forest.sums().iter().zip(forest.results()) {
                    assert_eq!(sums.root(), results.root(), "{name} over {world}");
                }
                for tree in forest.sums().iter().chain(forest.results()) {
                    let roots = (0..world).filter(|rank| tree.parent(*rank).is_none()).count();
                    assert_eq!(roots, 1, "{name} over {world}: {tree:?}");
                    // Would not return if a rank's way led in a circle.
                    assert!(tree.height() < world, "{name} over {world}: {tree:?}");
                    let children: usize = (0..world).map(|rank| tree.children(rank).count()).sum();
                    assert_eq!(children as u32, world - 1, "{name} over {world}");
                }
            }
        }
    }

    #[test]
    fn trees_grow_as_the_logarithm_and_rings_as_the_number_of_ranks() {
        for world in 2..=MAX_RANKS as u32 {
            assert_eq!(Forest::binomial(world, 1).height(), world.ilog2(), "{world}");
            let double = Forest::double_binary(world).height();
            assert!(double <= log2_up(world + 1), "{world}: {double}");
            assert!(Forest::double_binary_from(world, 0).height() <= 1 + log2_up(world), "{world}");
            assert_eq!(Forest::ring(world).height(), world - 1);
            assert_eq!(Forest::star(world).height(), 1);
        }
    }

    #[test]
    fn broadcasts_begin_at_their_root() {
        for world in 1..=MAX_RANKS as u32 {
            for root in 0..world {
                let forests = [
                    Forest::binomial(world, root),
                    Forest::flat(world, root),
                    Forest::chain(world, root),
                    Forest::hub(world, root, world - 1),
                    Forest::double_binary_from(world, root),
                ];
                for forest in forests {
                    assert!(forest.sums().iter().all(|tree| tree.root() == root), "{forest:?}");
                }
            }
        }
    }

    #[test]
    fn a_leaf_of_one_binary_tree_works_in_the_other() {
        for world in 2..=MAX_RANKS as u32 {
            let forest = Forest::double_binary(world);
            let idle = (0..world).filter(|rank| {
                forest.sums().iter().all(|tree| tree.children(*rank).next().is_none())
            });
            // With an odd number of ranks one place is a leaf twice.
            assert!(idle.count() as u32 <= world % 2, "{world}");
            let most = forest
                .sums()
                .iter()
                .flat_map(|tree| (0..world).map(move |rank| tree.children(rank).count()));
            assert!(most.max() <= Some(2), "{world}");
        }
    }

    #[test]
    fn two_ranks_make_every_forest_of_two_parts_the_same() {
        assert_eq!(Forest::star(2), Forest::ring(2));
        let roots = |forest: &Forest| forest.sums().iter().map(Tree::root).collect::<Vec<_>>();
        assert_eq!(roots(&Forest::double_binary(2)), [1, 0]);
        assert_eq!(roots(&Forest::star(2)), [0, 1]);
    }

    #[test]
    fn a_pair_of_ranks_has_at_most_one_edge_each_way_and_phase() {
        // Except in the ring, whose links carry every part.
        for world in 2..=MAX_RANKS as u32 {
            for (name, forest) in all(world) {
                if name == "ring" || name == "double_binary_from" {
                    continue;
                }
                for rank in 0..world {
                    for parent in 0..world {
                        let edges = forest.sums().iter().filter(|t| t.parent(rank) == Some(parent));
                        assert!(edges.count() <= 1, "{name} over {world}: {rank} to {parent}");
                    }
                }
            }
        }
    }

    #[test]
    fn islands_send_each_part_between_them_once() {
        let forest = Forest::islands(&[0, 0, 1, 1, 1]);
        assert_eq!(forest.parts(), 2);
        assert_eq!(forest.sums()[0].root(), 0);
        assert_eq!(forest.sums()[1].root(), 3);
        for tree in forest.sums() {
            let crossing = (0..5).filter(|rank| {
                tree.parent(*rank).is_some_and(|parent| (parent < 2) != (*rank < 2))
            });
            assert_eq!(crossing.count(), 1, "{tree:?}");
        }
    }
}
