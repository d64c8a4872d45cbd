//! The steps of a scheduled call: what each rank copies, waits for and reduces, and when.
//!
//! Pure, and the same on every rank that builds them from the same inputs. Invariant: a step waits only
//! for steps that come before it in one order that all ranks share: by turn, in a turn the work (waits
//! for data, reductions, what is kept) before the sends. So the ranks cannot wait for each other in a
//! circle, however few streams carry the steps, as long as each carries its own in that order
//! (docs/protocol.md). Among the sends of a turn those that wait for nothing of this rank come first.
//!
//! Chunk c of a part is dealt with `delay` turns after turn c. A rank's reduction is delayed by the
//! height of its tree below it; what is sent goes out in the turn before the receiver works on it, not
//! earlier. Then the slot of chunk c - `SLOTS`, which chunk c reuses, was emptied a turn before.

use super::forest::{Forest, Tree};

/// Hardware queues that a rank needs: for its steps, its caller's stream, the communicator's own and the
/// monitor's, which must not wait behind what it is to release.
pub const LEAST_QUEUES: usize = 4;

/// A way from a rank to a peer, or back, for one part and one direction of flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// The rank at the other end.
    pub peer: u32,
    /// Its number among the edges of the ordered pair: which flags it has.
    pub pair: u32,
    /// Its number among the edges into the receiver: which slots it has.
    pub region: u32,
    /// Whether results flow, not sums.
    pub results: bool,
}

/// What a reduction adds up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This rank's own tensor.
    Own,
    /// What has come.
    Slot(Edge),
}

/// What a rank does with a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// A rank that contributes nothing keeps neutral elements, to send them.
    Neutral,
    /// Adds up and keeps the sum; `complete` if it is everybody's.
    Reduce {
        /// In the order of the additions.
        sources: Vec<Source>,
        /// No rank is above.
        complete: bool,
    },
    /// Keeps the result that has come.
    Take(Edge),
    /// Sends this rank's own tensor.
    SendOwn(Edge),
    /// Sends what this rank has added up.
    SendSum(Edge),
    /// Sends the result that has come.
    Pass(Edge),
}

/// A task for every chunk of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The part.
    pub part: u32,
    /// Turns between a chunk's number and its turn.
    pub delay: u32,
    /// What is done.
    pub task: Task,
}

/// All steps of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Parts of the tensor.
    pub parts: u32,
    /// Most edges into any rank: all staging areas are cut alike.
    pub regions: u32,
    /// The longest delay of any rank's step.
    pub longest_delay: u32,
    /// What comes first in a turn.
    pub work: Vec<Step>,
    /// What is sent then.
    pub sends: Vec<Step>,
    /// Whether any result that has come is sent on.
    pub passes: bool,
    /// Whether a reduction writes over what this rank sends, and so has to wait for the sends.
    pub overwrites: bool,
}

/// An edge as everybody sees it.
#[derive(Clone, Copy)]
struct Way {
    part: u32,
    from: u32,
    to: u32,
    pair: u32,
    region: u32,
    results: bool,
}

impl Way {
    fn seen_from(&self, peer: u32) -> Edge {
        Edge { peer, pair: self.pair, region: self.region, results: self.results }
    }
}

/// Every edge of some trees over `world` ranks, numbered; with each set of trees, whether it is results that
/// they carry.
fn ways(world: u32, sets: &[(bool, &[Tree])]) -> Vec<Way> {
    let mut ways: Vec<Way> = Vec::new();
    for &(results, trees) in sets {
        for (part, tree) in (0..).zip(trees) {
            for rank in 0..world {
                let Some(parent) = tree.parent(rank) else { continue };
                let (from, to) = if results { (parent, rank) } else { (rank, parent) };
                let pair = ways.iter().filter(|way| (way.from, way.to) == (from, to)).count();
                let region = ways.iter().filter(|way| way.to == to).count();
                let (pair, region) = (pair as u32, region as u32);
                ways.push(Way { part, from, to, pair, region, results });
            }
        }
    }
    ways
}

/// Steps from the lowest leaf below `rank` up to it.
fn height(tree: &Tree, rank: u32) -> u32 {
    tree.children(rank).map(|child| 1 + height(tree, child)).max().unwrap_or(0)
}

impl Steps {
    /// The steps of `rank` among `world` ranks. Sums take what came first before a rank's own tensor
    /// if `partial_first`, as on a ring, and else go by rank.
    pub fn of(forest: &Forest, world: u32, rank: u32, partial_first: bool) -> Steps {
        let ways = ways(world, &[(false, forest.sums()), (true, forest.results())]);
        let mut steps = Steps::empty(forest.parts(), world, &ways);
        for (part, (sums, results)) in (0..).zip(forest.sums().iter().zip(forest.results())) {
            let top = height(sums, sums.root());
            steps.longest_delay = steps.longest_delay.max(top + results.height());
            steps.add_sums(part, sums, &ways, (rank, partial_first));
            steps.add_results(part, (results, top), &ways, rank);
        }
        steps.ordered()
    }

    /// The steps of `rank` among `world` ranks that all send everything to everybody and add up for
    /// themselves.
    pub fn one_shot(world: u32, rank: u32) -> Steps {
        let others = || (0..world).filter(|peer| *peer != rank);
        // Into each receiver the senders are numbered by rank.
        let into = |sender: u32, receiver: u32| sender - (sender > receiver) as u32;
        let edge = |peer, region| Edge { peer, pair: 0, region, results: false };
        let came = |peer| {
            if peer == rank { Source::Own } else { Source::Slot(edge(peer, into(peer, rank))) }
        };
        let sources = (0..world).map(came).collect();
        let send = |peer| Task::SendOwn(edge(peer, into(rank, peer)));
        let step = |delay, task| Step { part: 0, delay, task };
        Steps {
            parts: 1,
            regions: world - 1,
            longest_delay: 1,
            work: vec![step(0, Task::Neutral), step(1, Task::Reduce { sources, complete: true })],
            sends: others().map(|peer| step(0, send(peer))).collect(),
            passes: false,
            overwrites: true,
        }
    }

    /// The steps of `rank` in a broadcast among `world` ranks along the result trees of `forest`.
    pub fn broadcast(forest: &Forest, world: u32, rank: u32) -> Steps {
        let ways = ways(world, &[(true, forest.results())]);
        let mut steps = Steps::empty(forest.parts(), world, &ways);
        for (part, tree) in (0..).zip(forest.results()) {
            steps.longest_delay = steps.longest_delay.max(tree.height());
            steps.add_results(part, (tree, 0), &ways, rank);
        }
        // What the root sends is its own; no sum comes before it.
        for step in &mut steps.sends {
            if let Task::SendSum(edge) = step.task {
                step.task = Task::SendOwn(edge);
            }
        }
        steps.ordered()
    }

    fn empty(parts: u32, world: u32, ways: &[Way]) -> Steps {
        let into = |rank| ways.iter().filter(move |way| way.to == rank).count() as u32;
        Steps {
            parts,
            regions: (0..world).map(into).max().unwrap_or(0),
            longest_delay: 0,
            work: Vec::new(),
            sends: Vec::new(),
            passes: false,
            overwrites: false,
        }
    }

    /// Puts first what waits for nothing of this rank.
    fn ordered(mut self) -> Steps {
        self.sends.sort_by_key(|step| !matches!(step.task, Task::SendOwn(_)));
        self.passes = self.sends.iter().any(|step| matches!(step.task, Task::Pass(_)));
        self
    }

    fn add_sums(
        &mut self,
        part: u32,
        tree: &Tree,
        ways: &[Way],
        (rank, partial_first): (u32, bool),
    ) {
        let is_leaf = tree.children(rank).next().is_none();
        let mut ways = ways.iter().filter(|way| way.part == part && !way.results);
        let out = ways.clone().find(|way| way.from == rank);
        if let Some(way) = out {
            let delay = height(tree, way.to) - 1;
            let edge = way.seen_from(way.to);
            if is_leaf {
                self.work.push(Step { part, delay, task: Task::Neutral });
            }
            let task = if is_leaf { Task::SendOwn(edge) } else { Task::SendSum(edge) };
            self.sends.push(Step { part, delay, task });
        }
        if is_leaf {
            return;
        }
        let came = ways.by_ref().filter(|way| way.to == rank);
        let mut sources: Vec<(u32, Source)> =
            came.map(|way| (way.from, Source::Slot(way.seen_from(way.from)))).collect();
        sources.push((if partial_first { u32::MAX } else { rank }, Source::Own));
        sources.sort_by_key(|(from, _)| *from);
        let sources = sources.into_iter().map(|(_, source)| source).collect();
        let task = Task::Reduce { sources, complete: out.is_none() };
        self.work.push(Step { part, delay: height(tree, rank), task });
    }

    fn add_results(&mut self, part: u32, (tree, top): (&Tree, u32), ways: &[Way], rank: u32) {
        for way in ways.iter().filter(|way| way.part == part && way.results) {
            let delay = top + tree.depth(way.to);
            if way.to == rank {
                self.work.push(Step { part, delay, task: Task::Take(way.seen_from(way.from)) });
            } else if way.from == rank {
                let (edge, is_root) = (way.seen_from(way.to), rank == tree.root());
                let task = if is_root { Task::SendSum(edge) } else { Task::Pass(edge) };
                self.sends.push(Step { part, delay: delay - 1, task });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::{Pattern, Spread};
    use crate::layout;
    use crate::plan::staging::{
        FLAG_BYTES, LEAST_STAGING_BYTES, PAIR_EDGES, SLOTS, area_flag, begun_flag, free_flag,
        full_flag, slot_units,
    };
    use crate::plan::{Shape, roles};
    use peerlane_device::abi::MAX_RANKS;
    use std::collections::{HashMap, HashSet};

    fn all(world: u32) -> Vec<(Pattern, Vec<Steps>)> {
        let mut shape = Shape::new(world, layout::choose(world, 32 << 20).unwrap(), 8);
        for (rank, island) in (0..world).zip(&mut shape.islands) {
            *island = (rank / 3) as u8;
        }
        let of = |pattern| {
            let forest = roles::forest(shape.by_island(), pattern);
            let steps = |rank| match &forest {
                Some(forest) => Steps::of(forest, world, rank, pattern == Pattern::Ring),
                None => Steps::one_shot(world, rank),
            };
            (pattern, (0..world).map(steps).collect())
        };
        Pattern::ALL.into_iter().map(of).collect()
    }

    /// The steps of all ranks in broadcasts, and the root.
    fn broadcasts(world: u32) -> Vec<(u32, Vec<Steps>)> {
        let shape = Shape::new(world, layout::choose(world, 32 << 20).unwrap(), 8);
        let each = |spread| {
            (0..world).map(move |root| {
                let forest = roles::spread(&shape, spread, root);
                let steps = (0..world).map(|rank| Steps::broadcast(&forest, world, rank));
                (root, steps.collect())
            })
        };
        Spread::ALL.into_iter().flat_map(each).collect()
    }

    /// Runs all ranks' steps on `chunks` chunks, one after the other in the shared order, and checks that
    /// nothing has to wait. Returns which ranks' tensors each rank's result holds.
    fn walk(ranks: &[Steps], chunks: u32) -> Vec<HashMap<(u32, u32), u32>> {
        let mut full: HashSet<(u32, u32, u32, u32)> = HashSet::new();
        let mut slots: HashMap<(u32, u32, u32), u32> = HashMap::new();
        let mut kept = vec![HashMap::new(); ranks.len()];
        for turn in 0..chunks + ranks[0].longest_delay {
            for phase in [true, false] {
                for (rank, steps) in (0u32..).zip(ranks) {
                    for step in if phase { &steps.work } else { &steps.sends } {
                        let Some(chunk) = turn.checked_sub(step.delay) else { continue };
                        if chunk >= chunks {
                            continue;
                        }
                        let mut take = |edge: &Edge| {
                            let flag = (edge.peer, rank, edge.pair, chunk % SLOTS);
                            assert!(full.remove(&flag), "rank {rank} would wait for data");
                            slots[&(rank, edge.region, chunk % SLOTS)]
                        };
                        let key = (step.part, chunk);
                        match &step.task {
                            Task::Neutral => {}
                            Task::Reduce { sources, .. } => {
                                let sum = sources.iter().fold(0, |sum, source| match source {
                                    Source::Own => sum | 1 << rank,
                                    Source::Slot(edge) => sum | take(edge),
                                });
                                kept[rank as usize].insert(key, sum);
                            }
                            Task::Take(edge) => {
                                let value = take(edge);
                                kept[rank as usize].insert(key, value);
                            }
                            Task::SendOwn(edge) | Task::SendSum(edge) | Task::Pass(edge) => {
                                let own = matches!(step.task, Task::SendOwn(_));
                                let value = if own { 1 << rank } else { kept[rank as usize][&key] };
                                let flag = (rank, edge.peer, edge.pair, chunk % SLOTS);
                                assert!(full.insert(flag), "rank {rank} would wait for room");
                                slots.insert((edge.peer, edge.region, chunk % SLOTS), value);
                            }
                        }
                    }
                }
            }
        }
        assert!(full.is_empty(), "something that was sent was never taken");
        kept
    }

    #[test]
    fn in_the_shared_order_no_step_waits_and_every_rank_gets_everything() {
        for world in 2..=MAX_RANKS as u32 {
            for (pattern, ranks) in all(world) {
                for chunks in [1, 2, 7] {
                    let kept = walk(&ranks, chunks);
                    for (rank, kept) in kept.iter().enumerate() {
                        assert_eq!(kept.len() as u32, chunks * ranks[0].parts);
                        let everyone = (1u32 << world) - 1;
                        let all = kept.values().all(|sum| *sum == everyone);
                        assert!(all, "{pattern:?} of {world}: rank {rank}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_broadcast_brings_the_root_s_tensor_to_everybody_in_the_shared_order() {
        for world in 2..=MAX_RANKS as u32 {
            for (root, ranks) in broadcasts(world) {
                let kept = walk(&ranks, 5);
                for (rank, kept) in (0..).zip(&kept) {
                    let chunks = if rank == root { 0 } else { 5 * ranks[0].parts };
                    assert_eq!(kept.len() as u32, chunks, "rank {rank} from {root} of {world}");
                    assert!(kept.values().all(|value| *value == 1 << root));
                }
            }
        }
    }

    #[test]
    fn what_waits_for_nothing_of_its_rank_is_sent_first() {
        for (pattern, ranks) in all(7) {
            for steps in ranks {
                let own = |step: &Step| matches!(step.task, Task::SendOwn(_));
                let first = steps.sends.iter().take_while(|step| own(step)).count();
                assert!(!steps.sends[first..].iter().any(own), "{pattern:?}");
            }
        }
    }

    #[test]
    fn flags_and_slots_are_enough_and_belong_to_one_edge() {
        for world in 2..=MAX_RANKS as u32 {
            let reductions = all(world).into_iter().map(|(_, ranks)| ranks);
            let broadcasts = broadcasts(world).into_iter().map(|(_, ranks)| ranks);
            for ranks in reductions.chain(broadcasts) {
                let mut flags = HashSet::new();
                for (rank, steps) in (0u32..).zip(&ranks) {
                    assert_eq!(steps.regions, ranks[0].regions);
                    assert!(steps.regions <= PAIR_EDGES);
                    assert!(slot_units(steps.regions, LEAST_STAGING_BYTES) > 0);
                    let (mut regions, incoming) = (HashSet::new(), incoming(steps));
                    for edge in incoming {
                        assert!(edge.pair < PAIR_EDGES && edge.region < steps.regions);
                        assert!(regions.insert(edge.region));
                        for chunk in 0..SLOTS {
                            assert!(flags.insert((rank, full_flag(edge.peer, edge.pair, chunk))));
                            assert!(flags.insert((edge.peer, free_flag(rank, edge.pair, chunk))));
                        }
                    }
                    for peer in 0..world {
                        assert!(flags.insert((rank, area_flag(peer))));
                        assert!(flags.insert((rank, begun_flag(peer))));
                    }
                }
                assert!(flags.iter().all(|(_, flag)| *flag < FLAG_BYTES));
            }
        }
    }

    /// The edges by which data come.
    fn incoming(steps: &Steps) -> Vec<Edge> {
        let came = |step: &Step| match &step.task {
            Task::Take(edge) => vec![*edge],
            Task::Reduce { sources, .. } => {
                let slot = |source: &Source| match source {
                    Source::Slot(edge) => Some(*edge),
                    Source::Own => None,
                };
                sources.iter().filter_map(slot).collect()
            }
            _ => Vec::new(),
        };
        steps.work.iter().flat_map(came).collect()
    }
}
