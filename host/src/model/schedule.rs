//! What each algorithm does, as transfers and the work that must come before each.
//!
//! Made of the same [`Forest`]s that the kernels run, cut in the same parts and chunks. The blocks of a
//! kernel do not wait for each other, so a chunk is cut again, into pieces for a few groups of blocks.
//! A group begins a chunk only when it is done with an earlier one, as the turns of its kernel say;
//! credits hold it back no earlier than that and are left out.
//!
//! Invariant: a step comes after all that it waits for, so the list is in a possible order, and every
//! byte that is sent is taken by the rank that it is sent to.

use super::fabric::Engine;
use crate::algorithm::{Algorithm, Route};
use crate::plan::forest::{Forest, Tree};
use crate::plan::staging;
use crate::plan::{self, Shape, roles};
use peerlane_device::abi::{Format, UNIT};

/// One thing that a rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Bytes travel. Done when the receiver can use them.
    Send {
        /// Who sends.
        from: u32,
        /// Who receives.
        to: u32,
        /// How much, as it travels.
        bytes: u64,
    },
    /// A rank adds up what it has received, or stores it. One thing at a time on each rank.
    Take {
        /// Who.
        rank: u32,
        /// How much of what was received.
        bytes: u64,
    },
}

/// Work, and what it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub work: Work,
    /// The piece of the tensor that it is done with: chunk x groups + group.
    pub piece: u32,
    /// Places in [`Schedule::steps`] of what must be done before.
    pub after: Vec<u32>,
}

/// All that the ranks do in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    world: u32,
    engine: Engine,
    groups: u32,
    steps: Vec<Step>,
}

/// How each part of a tensor is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes of a part that travel in one turn.
    pub chunk: u64,
    /// Groups of blocks, each with a share of every chunk, that do not wait for each other.
    pub groups: u32,
}

impl Cut {
    /// All at once.
    pub const WHOLE: Cut = Cut { chunk: u64::MAX, groups: 1 };
}

/// Groups of blocks. More would change predictions by less than what they are off.
const GROUPS: u32 = 4;

impl Cut {
    /// How `algorithm` cuts `bytes` bytes.
    pub fn of(algorithm: Algorithm, shape: &Shape, bytes: u64) -> Cut {
        let forest = roles::forest(shape.by_island(), algorithm.pattern());
        let parts = forest.map_or(1, |forest| forest.parts());
        let format = match algorithm {
            Algorithm::OneShot(format) => format,
            _ => Format::Full,
        };
        let units = units(format, bytes);
        if algorithm.is_scheduled() {
            return Cut::of_copies(parts, units);
        }
        Cut::of_grid(shape, parts, units)
    }

    /// As copies are cut where the staging area leaves room for any chunk.
    fn of_copies(parts: u32, units: u64) -> Cut {
        let chunk = staging::chunk_units(plan::part_units(parts, units as usize), usize::MAX);
        Cut { chunk: (chunk * UNIT) as u64, groups: 1 }
    }

    fn of_grid(shape: &Shape, parts: u32, units: u64) -> Cut {
        let grid = plan::grid(shape, plan::part_units(parts, units as usize));
        let chunk = u64::from(grid.blocks) * u64::from(grid.chunk_units) * UNIT as u64;
        Cut { chunk, groups: grid.blocks.min(GROUPS) }
    }
}

/// Units that a message of `bytes` bytes travels in.
fn units(format: Format, bytes: u64) -> u64 {
    bytes.div_ceil(format.payload() as u64)
}

impl Schedule {
    /// An all-reduce of `bytes` bytes.
    pub fn all_reduce(algorithm: Algorithm, shape: &Shape, bytes: u64, cut: Cut) -> Schedule {
        let world = shape.world;
        let engine = if algorithm.is_scheduled() { Engine::Copies } else { Engine::Stores };
        // Two ranks and more; one has nobody to send to.
        let (format, turns) = match algorithm {
            Algorithm::OneShot(format) => (format, 2),
            Algorithm::TwoShot | Algorithm::Scheduled(_) => (Format::Full, 3),
            Algorithm::Staged | Algorithm::Ring => (Format::Full, 1),
            // The root's lag behind the leaves (device/src/kernels/tree.rs), and one.
            Algorithm::Tree => (Format::Full, shape.layout.slots as usize / 2 + 2),
            Algorithm::DoubleTree | Algorithm::Hierarchical => {
                (Format::Full, shape.layout.slots as usize / 4 + 2)
            }
        };
        let mut builder = Builder::new(world, engine, cut, turns);
        let wire = UNIT as u64 * units(format, bytes);
        match roles::forest(shape.by_island(), algorithm.pattern()) {
            None => builder.one_shot(&pieces(wire, 1, cut)),
            Some(_) if algorithm == Algorithm::Staged => {
                builder.staged(&pieces(wire, world, cut));
            }
            Some(forest) => builder.all_reduce(&forest, wire, cut),
        }
        builder.schedule
    }

    /// A broadcast of `bytes` bytes from `root`, in the chunks of its kernel.
    pub fn broadcast(route: Route, shape: &Shape, root: u32, bytes: u64) -> Schedule {
        let forest = roles::spread(shape, route.spread(), root);
        let format = match route {
            Route::Direct => plan::format(bytes as usize),
            _ => Format::Full,
        };
        let units = units(format, bytes);
        let (engine, cut) = if route.is_scheduled() {
            (Engine::Copies, Cut::of_copies(forest.parts(), units))
        } else {
            (Engine::Stores, Cut::of_grid(shape, forest.parts(), units))
        };
        let mut builder = Builder::new(shape.world, engine, cut, usize::MAX);
        builder.broadcast(&forest, UNIT as u64 * units, cut);
        builder.schedule
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// What moves the bytes.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Groups of blocks that every chunk is divided among.
    pub fn groups(&self) -> u32 {
        self.groups
    }

    /// Everything, in a possible order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Transfers of the longest chain in which each waits for the one before.
    pub fn depth(&self) -> u32 {
        let mut depths: Vec<u32> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let before = step.after.iter().map(|at| depths[*at as usize]).max().unwrap_or(0);
            depths.push(before + matches!(step.work, Work::Send { .. }) as u32);
        }
        depths.into_iter().max().unwrap_or(0)
    }

    /// Bytes that each rank sends.
    pub fn sent(&self) -> Vec<u64> {
        self.total(|from, _| from)
    }

    /// Bytes that each rank is sent.
    pub fn received(&self) -> Vec<u64> {
        self.total(|_, to| to)
    }

    fn total(&self, whose: impl Fn(u32, u32) -> u32) -> Vec<u64> {
        let mut totals = vec![0; self.world as usize];
        for step in &self.steps {
            if let Work::Send { from, to, bytes } = step.work {
                totals[whose(from, to) as usize] += bytes;
            }
        }
        totals
    }
}

/// `wire` bytes in `parts` parts, each in pieces: `[piece][part]`, in whole units.
fn pieces(wire: u64, parts: u32, cut: Cut) -> Vec<Vec<u64>> {
    let unit = UNIT as u64;
    let part = wire.div_ceil(unit).div_ceil(u64::from(parts)) * unit;
    let piece =
        (cut.chunk / u64::from(cut.groups)).clamp(unit, part.max(unit)).next_multiple_of(unit);
    let bytes_of = |number: u64, index: u64| {
        let length = part.min(wire.saturating_sub(index * part));
        piece.min(length.saturating_sub(number * piece))
    };
    (0..part.div_ceil(piece))
        .map(|number| (0..u64::from(parts)).map(|index| bytes_of(number, index)).collect())
        .collect()
}

/// A schedule in the making.
struct Builder {
    schedule: Schedule,
    /// How many pieces later a rank begins, at the earliest, when it is done with one.
    ahead: usize,
    /// `[piece][rank]`: the steps with which the rank is done.
    done: Vec<Vec<Vec<u32>>>,
}

impl Builder {
    fn new(world: u32, engine: Engine, cut: Cut, turns: usize) -> Builder {
        let groups = cut.groups;
        let schedule = Schedule { world, engine, groups, steps: Vec::new() };
        Builder { schedule, ahead: turns.saturating_mul(groups as usize), done: Vec::new() }
    }

    fn push(&mut self, work: Work, after: Vec<u32>) -> u32 {
        let piece = self.done.len().saturating_sub(1) as u32;
        self.schedule.steps.push(Step { work, piece, after });
        self.schedule.steps.len() as u32 - 1
    }

    fn send(&mut self, from: u32, to: u32, bytes: u64, after: Vec<u32>) -> u32 {
        self.push(Work::Send { from, to, bytes }, after)
    }

    /// The last thing that `rank` does with these bytes of the newest piece.
    fn finish(&mut self, rank: u32, bytes: u64, after: Vec<u32>) -> u32 {
        let step = self.push(Work::Take { rank, bytes }, after);
        if let Some(piece) = self.done.last_mut() {
            piece[rank as usize].push(step);
        }
        step
    }

    /// Begins another piece; what each rank waits for before it sends of its own.
    fn begin_piece(&mut self) -> Vec<Vec<u32>> {
        let nothing = vec![Vec::new(); self.schedule.world as usize];
        let before = self.done.len().checked_sub(self.ahead).map(|piece| self.done[piece].clone());
        self.done.push(nothing.clone());
        before.unwrap_or(nothing)
    }

    fn one_shot(&mut self, pieces: &[Vec<u64>]) {
        let world = self.schedule.world;
        for bytes in pieces.iter().map(|parts| parts[0]) {
            let before = self.begin_piece();
            let mut arrived = vec![Vec::new(); world as usize];
            for from in 0..world {
                for to in (1..world).map(|further| (from + further) % world) {
                    let step = self.send(from, to, bytes, before[from as usize].clone());
                    arrived[to as usize].push(step);
                }
            }
            for (rank, arrived) in (0..world).zip(arrived).filter(|_| world > 1) {
                self.finish(rank, u64::from(world - 1) * bytes, arrived);
            }
        }
    }

    /// Each rank sends to the d-th after it in stage d, when it has sent and received in stage d - 1.
    fn staged(&mut self, pieces: &[Vec<u64>]) {
        let world = self.schedule.world;
        for parts in pieces {
            let mut before = self.begin_piece();
            let mut arrived = vec![Vec::new(); world as usize];
            self.stages(
                &mut before,
                |_, to| parts[to as usize],
                |to, step| {
                    arrived[to as usize].push(step);
                },
            );
            for (rank, arrived) in (0..world).zip(arrived).filter(|_| world > 1) {
                let bytes = u64::from(world - 1) * parts[rank as usize];
                let sum = self.push(Work::Take { rank, bytes }, arrived);
                before[rank as usize] = vec![sum];
            }
            let mut results = Vec::new();
            self.stages(
                &mut before,
                |from, _| parts[from as usize],
                |to, step| {
                    results.push((to, step));
                },
            );
            for (to, step) in results {
                let Work::Send { bytes, .. } = self.schedule.steps[step as usize].work else {
                    continue;
                };
                self.finish(to, bytes, vec![step]);
            }
        }
    }

    fn stages(
        &mut self,
        before: &mut Vec<Vec<u32>>,
        bytes: impl Fn(u32, u32) -> u64,
        mut arrived: impl FnMut(u32, u32),
    ) {
        let world = self.schedule.world;
        for stage in 1..world {
            let mut next = vec![Vec::new(); world as usize];
            for from in 0..world {
                let to = (from + stage) % world;
                let after = std::mem::take(&mut before[from as usize]);
                let step = self.send(from, to, bytes(from, to), after);
                next[from as usize].push(step);
                next[to as usize].push(step);
                arrived(to, step);
            }
            *before = next;
        }
    }

    fn all_reduce(&mut self, forest: &Forest, wire: u64, cut: Cut) {
        for parts in pieces(wire, forest.parts(), cut) {
            let before = self.begin_piece();
            let trees = forest.sums().iter().zip(forest.results());
            for ((sums, results), bytes) in trees.zip(parts).filter(|(_, bytes)| *bytes > 0) {
                let total = self.sum(sums, bytes, &before);
                self.spread(results, bytes, total.into_iter().collect());
            }
        }
    }

    fn broadcast(&mut self, forest: &Forest, wire: u64, cut: Cut) {
        for parts in pieces(wire, forest.parts(), cut) {
            self.begin_piece();
            for (tree, bytes) in forest.results().iter().zip(parts).filter(|(_, bytes)| *bytes > 0)
            {
                self.spread(tree, bytes, Vec::new());
            }
        }
    }

    /// Partial sums flow to the root of `tree`; the step that completes the sum there.
    fn sum(&mut self, tree: &Tree, bytes: u64, before: &[Vec<u32>]) -> Option<u32> {
        let mut arrived = vec![Vec::new(); self.schedule.world as usize];
        for rank in by_depth(tree, self.schedule.world).into_iter().rev() {
            let parts = std::mem::take(&mut arrived[rank as usize]);
            let ready = match parts.len() as u64 {
                0 => before[rank as usize].clone(),
                children => {
                    let work = Work::Take { rank, bytes: children * bytes };
                    vec![self.push(work, parts)]
                }
            };
            match tree.parent(rank) {
                Some(parent) => {
                    let step = self.send(rank, parent, bytes, ready);
                    arrived[parent as usize].push(step);
                }
                None => {
                    let total = ready.first().copied();
                    if let Some(piece) = self.done.last_mut() {
                        piece[rank as usize].extend(total);
                    }
                    return total;
                }
            }
        }
        None
    }

    /// The root's bytes flow along `tree`. A rank passes them on as they come, and keeps them.
    fn spread(&mut self, tree: &Tree, bytes: u64, ready: Vec<u32>) {
        let mut source = vec![Vec::new(); self.schedule.world as usize];
        source[tree.root() as usize] = ready;
        for rank in by_depth(tree, self.schedule.world) {
            for child in tree.children(rank) {
                let step = self.send(rank, child, bytes, source[rank as usize].clone());
                source[child as usize] = vec![step];
                self.finish(child, bytes, vec![step]);
            }
        }
    }
}

/// The ranks, the root first, each after its parent.
fn by_depth(tree: &Tree, world: u32) -> Vec<u32> {
    let mut ranks: Vec<u32> = (0..world).collect();
    ranks.sort_by_key(|rank| tree.depth(*rank));
    ranks
}
