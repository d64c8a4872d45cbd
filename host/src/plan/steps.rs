//! The steps of a scheduled all-reduce: what each rank copies, waits for and reduces, and when.
//!
//! Pure, and the same on every rank that builds them from the same forest. Invariant: a step waits only
//! for steps that come before it in one order that all ranks share: by turn, in a turn the work (waits
//! for data, reductions, what is kept) before the sends. So the ranks cannot wait for each other in a
//! circle, however few streams carry the steps, as long as each carries its own in that order
//! (docs/protocol.md).
//!
//! Chunk c of a part is dealt with `delay` turns after turn c. A rank's reduction is delayed by the
//! height of its tree below it; what is sent goes out in the turn before the receiver works on it, not
//! earlier. Then the slot of chunk c - [`SLOTS`], which chunk c reuses, was emptied a turn before.

use super::forest::{Forest, Tree};
use crate::error::{Error, Result};
use peerlane_device::abi::{MAX_RANKS, UNIT};

/// Chunks of one edge that its receiver has room for: one is copied while the other is reduced.
pub const SLOTS: u32 = 2;
/// Hardware queues that a rank needs: for its steps, its caller's stream, the communicator's own and the
/// monitor's, which must not wait behind what it is to release.
pub const LEAST_QUEUES: usize = 4;
/// Most edges from one rank to another: two for each part of a ring but one.
const PAIR_EDGES: u32 = 32;
/// Bytes of flags at the start of a staging area.
pub const FLAG_BYTES: usize = 2 * 4 * (SLOTS * PAIR_EDGES) as usize * MAX_RANKS;
/// Staging areas cannot be smaller.
pub const LEAST_STAGING_BYTES: usize = FLAG_BYTES + (SLOTS * PAIR_EDGES) as usize * ALIGNMENT;
/// Slots begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Chunks that a part is cut in if they are large enough: the first is on its way alone, so more of
/// them hide more; each costs some 25 us of flags, events and launches, in which a copy engine moves 9 MB.
/// Two H200s, two-shot, 64 MiB, eager: 590 us in chunks of 2 MiB, 409 of 4 MiB, 325 of 8 MiB.
const CHUNKS: usize = 4;
/// Smaller chunks are not worth their cost.
const LEAST_CHUNK_BYTES: usize = 4 << 20;

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
    /// The edges by which data come, with their parts.
    pub incoming: Vec<(u32, Edge)>,
    /// Whether any result that has come is sent on.
    pub passes: bool,
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

/// Every edge of a forest over `world` ranks, numbered.
fn ways(forest: &Forest, world: u32) -> Vec<Way> {
    let mut ways: Vec<Way> = Vec::new();
    for (results, trees) in [(false, forest.sums()), (true, forest.results())] {
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
        let ways = ways(forest, world);
        let into = |rank| ways.iter().filter(move |way| way.to == rank).count() as u32;
        let mut steps = Steps {
            parts: forest.parts(),
            regions: (0..world).map(into).max().unwrap_or(0),
            longest_delay: 0,
            work: Vec::new(),
            sends: Vec::new(),
            incoming: Vec::new(),
            passes: false,
        };
        for way in ways.iter().filter(|way| way.to == rank) {
            steps.incoming.push((way.part, way.seen_from(way.from)));
        }
        for (part, (sums, results)) in (0..).zip(forest.sums().iter().zip(forest.results())) {
            let of_part = |way: &&Way| way.part == part;
            let ways: Vec<Way> = ways.iter().filter(of_part).copied().collect();
            let top = height(sums, sums.root());
            steps.longest_delay = steps.longest_delay.max(top + results.height());
            steps.add_sums(part, sums, &ways, (rank, partial_first));
            steps.add_results(part, (results, top), &ways, rank);
        }
        steps.passes = steps.sends.iter().any(|step| matches!(step.task, Task::Pass(_)));
        steps
    }

    fn add_sums(
        &mut self,
        part: u32,
        tree: &Tree,
        ways: &[Way],
        (rank, partial_first): (u32, bool),
    ) {
        let is_leaf = tree.children(rank).next().is_none();
        let out = ways.iter().find(|way| !way.results && way.from == rank);
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
        let came = ways.iter().filter(|way| !way.results && way.to == rank);
        let mut sources: Vec<(u32, Source)> =
            came.map(|way| (way.from, Source::Slot(way.seen_from(way.from)))).collect();
        sources.push((if partial_first { u32::MAX } else { rank }, Source::Own));
        sources.sort_by_key(|(from, _)| *from);
        let sources = sources.into_iter().map(|(_, source)| source).collect();
        let task = Task::Reduce { sources, complete: out.is_none() };
        self.work.push(Step { part, delay: height(tree, rank), task });
    }

    fn add_results(&mut self, part: u32, (tree, top): (&Tree, u32), ways: &[Way], rank: u32) {
        for way in ways.iter().filter(|way| way.results) {
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

    /// Units in a slot of a staging area of `staging_bytes` bytes.
    pub fn slot_units(&self, staging_bytes: usize) -> usize {
        let slots = (SLOTS * self.regions.max(1)) as usize;
        let bytes = staging_bytes.saturating_sub(FLAG_BYTES) / slots;
        (bytes - bytes % ALIGNMENT) / UNIT
    }

    /// Bytes of the staging area in which a tensor of `units` units is cut as is best for it.
    pub fn staging_bytes(&self, units: usize, chunk_bytes: Option<usize>) -> usize {
        let part = super::part_units(self.parts, units);
        let wanted = chunk_bytes.unwrap_or_else(|| self.wanted_units(units).min(part) * UNIT);
        let slots = (SLOTS * self.regions.max(1)) as usize;
        FLAG_BYTES + slots * wanted.next_multiple_of(ALIGNMENT)
    }

    /// Units in a chunk of a tensor of `units` units, where there is room.
    fn wanted_units(&self, units: usize) -> usize {
        let part_units = super::part_units(self.parts, units);
        let wanted = part_units.div_ceil(CHUNKS).next_multiple_of(ALIGNMENT / UNIT);
        wanted.max(LEAST_CHUNK_BYTES / UNIT)
    }

    /// How a tensor of `units` units, the last of `tail` bytes, is cut; `chunk_bytes` as in
    /// [`Config::chunk_bytes`](crate::Config::chunk_bytes).
    pub fn cut(
        &self,
        (units, tail): (usize, u32),
        staging_bytes: usize,
        chunk_bytes: Option<usize>,
    ) -> Result<Cut> {
        let part_units = super::part_units(self.parts, units);
        let slot_units = self.slot_units(staging_bytes);
        let chunk_units = match chunk_bytes {
            Some(bytes) if bytes > slot_units * UNIT => {
                return Err(Error::InvalidArgument {
                    op: "all_reduce",
                    argument: "chunk_bytes",
                    expected: format!(
                        "at most {} bytes, a slot of the {staging_bytes} bytes of staging_bytes",
                        slot_units * UNIT
                    ),
                    got: bytes.to_string(),
                });
            }
            Some(bytes) => bytes / UNIT,
            None => self.wanted_units(units).min(slot_units),
        };
        Ok(Cut { units, tail, part_units, chunk_units, slot_bytes: slot_units * UNIT })
    }
}

/// How a tensor is cut in parts and chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    units: usize,
    tail: u32,
    part_units: usize,
    chunk_units: usize,
    slot_bytes: usize,
}

/// A chunk of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the tensor before it.
    pub offset: usize,
    /// Units in it.
    pub units: usize,
    /// Bytes of the last one.
    pub tail: u32,
}

impl Span {
    /// Bytes in it.
    pub fn bytes(&self) -> usize {
        (self.units - 1) * UNIT + self.tail as usize
    }
}

impl Cut {
    /// Units of a part: fewer or none where the tensor ends.
    fn part(&self, part: u32) -> usize {
        self.units.saturating_sub(part as usize * self.part_units).min(self.part_units)
    }

    /// Chunks of a part.
    pub fn chunks(&self, part: u32) -> u32 {
        self.part(part).div_ceil(self.chunk_units) as u32
    }

    /// A chunk of a part; `None` beyond its end.
    pub fn chunk(&self, part: u32, chunk: u32) -> Option<Span> {
        let first = chunk as usize * self.chunk_units;
        let left = self.part(part).checked_sub(first).filter(|left| *left > 0)?;
        let (first, units) = (part as usize * self.part_units + first, left.min(self.chunk_units));
        let tail = if first + units == self.units { self.tail } else { UNIT as u32 };
        Some(Span { offset: first * UNIT, units, tail })
    }

    /// Offset of the slot of a region for a chunk in its receiver's staging area.
    pub fn slot(&self, region: u32, chunk: u32) -> usize {
        FLAG_BYTES + (region * SLOTS + chunk % SLOTS) as usize * self.slot_bytes
    }
}

/// Offset, in the staging area of a chunk's receiver, of the flag by which `sender` says that the chunk
/// is there.
pub fn full_flag(sender: u32, pair: u32, chunk: u32) -> usize {
    flag(sender, pair, chunk)
}

/// Offset, in the staging area of a chunk's sender, of the flag by which `receiver` says that there is
/// room for it.
pub fn free_flag(receiver: u32, pair: u32, chunk: u32) -> usize {
    FLAG_BYTES / 2 + flag(receiver, pair, chunk)
}

fn flag(peer: u32, pair: u32, chunk: u32) -> usize {
    4 * ((peer * PAIR_EDGES + pair) * SLOTS + chunk % SLOTS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::Pattern;
    use crate::layout;
    use crate::plan::{Shape, roles};
    use std::collections::{HashMap, HashSet};

    fn all(world: u32) -> Vec<(Pattern, Vec<Steps>)> {
        let mut shape = Shape::new(world, layout::choose(world, 32 << 20).unwrap(), 8);
        for (rank, island) in (0..world).zip(&mut shape.islands) {
            *island = (rank / 3) as u8;
        }
        let of = |pattern| {
            let forest = roles::forest(&shape.islands[..world as usize], pattern);
            let steps = |rank| Steps::of(&forest, world, rank, pattern == Pattern::Ring);
            (pattern, (0..world).map(steps).collect())
        };
        Pattern::ALL.into_iter().map(of).collect()
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
    fn flags_and_slots_are_enough_and_belong_to_one_edge() {
        for world in 2..=MAX_RANKS as u32 {
            for (pattern, ranks) in all(world) {
                let mut flags = HashSet::new();
                for (rank, steps) in (0u32..).zip(&ranks) {
                    assert_eq!(steps.regions, ranks[0].regions);
                    assert!(steps.regions <= PAIR_EDGES, "{pattern:?} of {world}");
                    assert!(steps.slot_units(LEAST_STAGING_BYTES) >= ALIGNMENT / UNIT);
                    let regions: HashSet<u32> =
                        steps.incoming.iter().map(|(_, e)| e.region).collect();
                    assert_eq!(regions.len(), steps.incoming.len());
                    for (_, edge) in &steps.incoming {
                        assert!(edge.pair < PAIR_EDGES);
                        for chunk in 0..SLOTS {
                            assert!(flags.insert((rank, full_flag(edge.peer, edge.pair, chunk))));
                            assert!(flags.insert((edge.peer, free_flag(rank, edge.pair, chunk))));
                        }
                    }
                }
                assert!(flags.iter().all(|(_, flag)| *flag < FLAG_BYTES));
            }
        }
    }

    #[test]
    fn a_cut_covers_the_tensor_once() {
        let steps = &all(5)[0].1[0];
        for units in [1, 2, 5, 1000, 70_001, 1 << 20] {
            let cut = steps.cut((units, 6), 1 << 20, None).unwrap();
            let (mut bytes, mut end) = (0, 0);
            for part in 0..steps.parts {
                for chunk in 0..cut.chunks(part) {
                    let span = cut.chunk(part, chunk).unwrap();
                    assert_eq!(span.offset, end);
                    assert!(span.bytes() <= cut.slot_bytes);
                    bytes += span.bytes();
                    end = span.offset + span.bytes();
                }
                assert_eq!(cut.chunk(part, cut.chunks(part)), None);
            }
            assert_eq!(bytes, (units - 1) * UNIT + 6, "{units} units");
        }
    }

    #[test]
    fn chunks_are_few_and_fit_their_slots() {
        let steps = &all(2)[0].1[0];
        // Half of 64 MiB in chunks of nearly 8 MiB, what the staging area has room for.
        assert_eq!(steps.cut((4 << 20, 16), 32 << 20, None).unwrap().chunks(0), 5);
        assert_eq!(steps.cut((4 << 20, 16), 64 << 20, None).unwrap().chunks(0), 4);
        assert_eq!(steps.cut((1 << 10, 16), 32 << 20, None).unwrap().chunks(0), 1);
        let error = steps.cut((64, 16), 1 << 20, Some(1 << 20)).unwrap_err().to_string();
        assert!(error.starts_with("all_reduce: chunk_bytes: expected at most 260096"), "{error}");
        let cut = steps.cut((64, 16), 1 << 20, Some(256)).unwrap();
        assert_eq!((cut.chunks(0), cut.chunks(1)), (2, 2));
    }
}
