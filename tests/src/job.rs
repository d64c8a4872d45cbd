//! Calls, with everything that is varied about them, and lists of them.

use peerlane::cases::{Rng, Values};
use peerlane::{Algorithm, DType, ReduceOp, Route, Wire};

/// A collective, as all ranks call it. `absent` has a bit for each rank that contributes nothing.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the fields of the requests in `peerlane::request`")]
pub enum Call {
    AllReduce {
        count: usize,
        dtype: DType,
        wire: Wire,
        op: ReduceOp,
        algorithm: Option<Algorithm>,
        in_place: bool,
        absent: u32,
    },
    ReduceScatter {
        count: usize,
        dtype: DType,
        wire: Wire,
        op: ReduceOp,
        in_place: bool,
        absent: u32,
    },
    AllGather {
        bytes: usize,
        in_place: bool,
    },
    Broadcast {
        bytes: usize,
        root: u32,
        route: Option<Route>,
    },
    /// Ranks of width 0 other than the root call if `outsiders_call`.
    Gather {
        rows: usize,
        widths: Vec<usize>,
        root: u32,
        outsiders_call: bool,
    },
    Barrier,
}

/// A call, its inputs and where its tensors begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The call.
    pub call: Call,
    /// What its inputs hold.
    pub values: Values,
    /// Elements (reductions) or bytes (the rest) between an aligned address and a tensor; each
    /// rank and tensor adds its own.
    pub shift: usize,
}

impl Job {
    /// A call on aligned tensors of ordinary values.
    pub const fn plain(call: Call) -> Job {
        Job { call, values: Values::Ordinary, shift: 0 }
    }
}

/// By choice, and every way in which an all-reduce can be one kernel.
pub fn algorithms() -> impl Iterator<Item = Option<Algorithm>> + Clone {
    std::iter::once(None).chain(Algorithm::FUSED.map(Some))
}

/// By choice, and every way in which a broadcast can be one kernel.
pub fn routes() -> impl Iterator<Item = Option<Route>> + Clone {
    std::iter::once(None).chain(Route::FUSED.map(Some))
}

/// One of `all`.
fn one_of<T: Copy>(all: &[T], rng: &mut Rng) -> T {
    all[rng.below(all.len() as u64) as usize]
}

/// Every element type and the types that it travels as.
pub const ELEMENTS: [(DType, Wire); 4] = [
    (DType::F32, Wire::Native),
    (DType::F32, Wire::Bf16),
    (DType::F16, Wire::Native),
    (DType::Bf16, Wire::Native),
];

/// The reductions of `count` elements of f32 that take different kernels: all-reduce in every
/// algorithm, reduce-scatter.
pub fn reductions(count: usize) -> Vec<Call> {
    let (dtype, wire, op) = (DType::F32, Wire::Native, ReduceOp::Sum);
    let (in_place, absent) = (false, 0);
    let all = |algorithm| Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent };
    let mut calls: Vec<Call> = algorithms().map(all).collect();
    calls.push(Call::ReduceScatter { count, dtype, wire, op, in_place, absent });
    calls
}

/// The other collectives on `bytes` bytes, the gather in one row and in five.
pub fn moves(world: u32, bytes: usize) -> Vec<Call> {
    let root = world / 2;
    let gather = |rows: usize| {
        let widths = vec![bytes / rows; world as usize];
        Call::Gather { rows, widths, root, outsiders_call: true }
    };
    let mut calls = vec![Call::AllGather { bytes, in_place: false }];
    calls.extend(routes().map(|route| Call::Broadcast { bytes, root, route }));
    calls.extend([gather(1), gather(5), Call::Barrier]);
    calls
}

/// `count` calls of all kinds; sizes up to `most` bytes, most of them small.
pub fn random_jobs(world: u32, count: usize, most: usize, rng: &mut Rng) -> Vec<Job> {
    (0..count).map(|_| random_job(world, most, rng)).collect()
}

fn random_job(world: u32, most: usize, rng: &mut Rng) -> Job {
    let size = random_size(most, rng);
    let call = match rng.below(10) {
        0..4 => random_reduction(world, size, true, rng),
        4..6 => random_reduction(world, size, false, rng),
        6 => Call::AllGather { bytes: size, in_place: rng.below(2) == 0 },
        7 => {
            let route = one_of(&routes().collect::<Vec<_>>(), rng);
            Call::Broadcast { bytes: size, root: rng.below(world.into()) as u32, route }
        }
        8 => random_gather(world, size, rng),
        _ => Call::Barrier,
    };
    let values = Values::ALL[rng.below(3) as usize];
    let shift = if rng.below(2) == 0 { 0 } else { rng.below(16) as usize };
    Job { call, values, shift }
}

fn random_size(most: usize, rng: &mut Rng) -> usize {
    let limit = match rng.below(4) {
        0 => 40,
        1 | 2 => most / 8,
        _ => most,
    };
    rng.below(limit as u64 + 1) as usize
}

fn random_reduction(world: u32, bytes: usize, all: bool, rng: &mut Rng) -> Call {
    let (dtype, wire) = ELEMENTS[rng.below(4) as usize];
    let op = ReduceOp::ALL[rng.below(4) as usize];
    let algorithm = one_of(&algorithms().collect::<Vec<_>>(), rng);
    let in_place = rng.below(2) == 0;
    let absent = if rng.below(3) == 0 { 1 << rng.below(world.into()) } else { 0 };
    let count = bytes / dtype.bytes();
    if all {
        Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent }
    } else {
        let count = count.div_ceil(world as usize);
        Call::ReduceScatter { count, dtype, wire, op, in_place, absent }
    }
}

fn random_gather(world: u32, bytes: usize, rng: &mut Rng) -> Call {
    let rows = 1 + rng.below(4) as usize;
    let width = |rng: &mut Rng| match rng.below(3) {
        0 => 0,
        _ => rng.below((bytes / rows) as u64 + 1) as usize,
    };
    let widths = (0..world).map(|_| width(rng)).collect();
    let root = rng.below(world.into()) as u32;
    Call::Gather { rows, widths, root, outsiders_call: rng.below(2) == 0 }
}
