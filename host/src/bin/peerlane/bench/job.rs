//! What a measurement asks of the ranks: a collective of a size.
//!
//! Invariant: sizes, counts and factors are nccl-tests' (doc/PERFORMANCE.md there): the size of a
//! collective is its larger side, and `busbw` compares with what a link can carry.

use peerlane::cases::{Rng, Values, elements};
use peerlane::plan;
use peerlane::reference::{Order, Reduction, first_difference, value};
use peerlane::{Algorithm, DType, Operation, ReduceOp, Route, Wire};

/// A collective of a size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Job {
    pub(crate) op: Operation,
    pub(crate) dtype: DType,
    pub(crate) wire: Wire,
    pub(crate) reduce: ReduceOp,
    pub(crate) algorithm: Option<Algorithm>,
    pub(crate) route: Option<Route>,
    pub(crate) root: u32,
    pub(crate) world: u32,
    /// Elements: of the tensor, or of one rank's part where the tensor is divided among the ranks.
    pub(crate) count: usize,
}

impl Job {
    /// The same job at a size of `bytes`, rounded as nccl-tests does: parts begin at multiples of
    /// 16 bytes.
    pub(crate) fn sized(mut self, bytes: usize) -> Job {
        let element = self.dtype.bytes();
        self.count = match self.op {
            Operation::Barrier => 0,
            _ if self.is_divided() => {
                let part = bytes / self.world as usize;
                (part - part % 16).max(element) / element
            }
            _ => (bytes / element).max(1),
        };
        self
    }

    /// Whether each rank has its own part of the larger side.
    const fn is_divided(&self) -> bool {
        matches!(self.op, Operation::ReduceScatter | Operation::AllGather | Operation::Gather)
    }

    /// Whether values are combined.
    pub(crate) const fn reduces(&self) -> bool {
        matches!(self.op, Operation::AllReduce | Operation::ReduceScatter)
    }

    /// Bytes of `count` elements.
    pub(crate) const fn part_bytes(&self) -> usize {
        self.count * self.dtype.bytes()
    }

    /// The size that is reported.
    pub(crate) const fn bytes(&self) -> usize {
        self.part_bytes() * if self.is_divided() { self.world as usize } else { 1 }
    }

    /// Bytes that a rank brings.
    pub(crate) const fn src_bytes(&self) -> usize {
        match self.op {
            Operation::ReduceScatter => self.bytes(),
            _ => self.part_bytes(),
        }
    }

    /// Bytes that a rank receives.
    pub(crate) const fn dst_bytes(&self) -> usize {
        match self.op {
            Operation::ReduceScatter => self.part_bytes(),
            _ => self.bytes(),
        }
    }

    /// `busbw / algbw`.
    pub(crate) fn bus_factor(&self) -> f64 {
        let others = f64::from(self.world - 1) / f64::from(self.world);
        match self.op {
            Operation::AllReduce => 2.0 * others,
            Operation::ReduceScatter | Operation::AllGather | Operation::Gather => others,
            _ => 1.0,
        }
    }

    /// What each rank brings.
    pub(crate) fn inputs(&self, seed: u64) -> Vec<Vec<u8>> {
        let count = self.src_bytes() / self.dtype.bytes();
        let input = |rank: u32| {
            let mut rng = Rng::new(seed, &format!("bench/{}/{rank}", self.op.name()));
            elements(self.dtype, count, Values::Ordinary, &mut rng)
        };
        (0..self.world).map(input).collect()
    }

    /// What all ranks together end with; [`Job::expected`] cuts a rank's part out of it.
    pub(crate) fn outcome(&self, inputs: &[Vec<u8>]) -> Vec<u8> {
        match self.op {
            Operation::AllReduce | Operation::ReduceScatter => {
                let inputs: Vec<_> = inputs.iter().map(|input| Some(input.as_slice())).collect();
                let Job { dtype, reduce: op, wire, .. } = *self;
                let elements = self.src_bytes() / dtype.bytes();
                let islands = &plan::halves(self.world)[..self.world as usize];
                let tensor = (elements, dtype, wire);
                let trees = match self.op {
                    Operation::AllReduce => {
                        self.algorithm.and_then(|a| plan::trees(islands, a, tensor))
                    }
                    _ => None,
                };
                let order = Order::along(&trees);
                Reduction { inputs: &inputs, dtype, op, wire, order }.exact(elements)
            }
            Operation::AllGather | Operation::Gather => inputs.concat(),
            Operation::Broadcast => inputs[self.root as usize].clone(),
            _ => Vec::new(),
        }
    }

    /// What `rank` ends with; nothing where it receives nothing.
    pub(crate) fn expected<'a>(&self, rank: u32, outcome: &'a [u8]) -> &'a [u8] {
        let part = self.part_bytes();
        match self.op {
            Operation::ReduceScatter => &outcome[rank as usize * part..(rank as usize + 1) * part],
            Operation::Gather if rank != self.root => &[],
            _ => outcome,
        }
    }

    /// The first element of `found` that is wrong, as a message. Peerlane is held to every bit, wherever an
    /// algorithm rounds; a contender whose order of additions is not documented, only to what the type can
    /// hold.
    pub(crate) fn compare(
        &self,
        found: &[u8],
        expected: &[u8],
        to_the_bit: bool,
    ) -> Result<(), String> {
        let (dtype, size) = (self.dtype, self.dtype.bytes());
        let wrong = if to_the_bit || !self.reduces() {
            first_difference(dtype, self.reduce, expected, found)
        } else {
            let tolerance = self.loose_tolerance();
            let far = |(a, b): (&[u8], &[u8])| {
                let distance = value(dtype, a) - value(dtype, b);
                distance.is_nan() || distance.abs() > tolerance
            };
            expected.chunks_exact(size).zip(found.chunks_exact(size)).position(far)
        };
        let Some(index) = wrong else { return Ok(()) };
        let at = |bytes: &[u8]| value(dtype, &bytes[index * size..(index + 1) * size]);
        Err(format!("element {index}: expected {:e}, got {:e}", at(expected), at(found)))
    }

    /// Room for a rounding to the element type after every one of `world` additions of values that
    /// are at most 4.
    fn loose_tolerance(&self) -> f32 {
        let world = self.world as f32;
        let unit = match (self.dtype, self.wire) {
            (DType::F32, Wire::Native) => 2f32.powi(-23),
            (DType::F16, _) => 2f32.powi(-10),
            (DType::Bf16, _) | (DType::F32, Wire::Bf16) => 2f32.powi(-7),
        };
        4.0 * world * world * unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(op: Operation, world: u32, bytes: usize) -> Job {
        let (dtype, wire, reduce) = (DType::Bf16, Wire::Native, ReduceOp::Sum);
        Job { op, dtype, wire, reduce, algorithm: None, route: None, root: 0, world, count: 0 }
            .sized(bytes)
    }

    #[test]
    fn sizes_are_those_of_nccl_tests() {
        let all_reduce = job(Operation::AllReduce, 4, 1024);
        assert_eq!((all_reduce.count, all_reduce.bytes()), (512, 1024));
        assert_eq!(all_reduce.bus_factor(), 1.5);
        // 1000 / 3 = 333, rounded down to 320 bytes a rank.
        let gather = job(Operation::AllGather, 3, 1000);
        assert_eq!((gather.count, gather.src_bytes(), gather.dst_bytes()), (160, 320, 960));
        let scatter = job(Operation::ReduceScatter, 2, 64);
        assert_eq!((scatter.src_bytes(), scatter.dst_bytes(), scatter.bytes()), (64, 32, 64));
        assert_eq!(job(Operation::Broadcast, 8, 64).bus_factor(), 1.0);
        assert_eq!(job(Operation::Gather, 8, 1).count, 1);
    }

    #[test]
    fn results_are_cut_by_rank() {
        let scatter = job(Operation::ReduceScatter, 2, 64);
        let outcome = scatter.outcome(&scatter.inputs(1));
        let halves = [scatter.expected(0, &outcome), scatter.expected(1, &outcome)].concat();
        assert_eq!(halves, outcome);
        assert!(scatter.compare(&outcome, &outcome, true).is_ok());
        let mut wrong = outcome.clone();
        wrong[1] ^= 0x40;
        assert!(scatter.compare(&wrong, &outcome, false).unwrap_err().starts_with("element 0:"));
        let ring = Job { algorithm: Some(Algorithm::Ring), ..scatter };
        assert!(ring.compare(&wrong, &outcome, false).unwrap_err().starts_with("element 0:"));
        wrong = outcome.clone();
        wrong[0] ^= 1;
        assert!(scatter.compare(&wrong, &outcome, true).is_err());
        assert!(ring.compare(&wrong, &outcome, true).is_err());
        assert!(ring.compare(&wrong, &outcome, false).is_ok());
        assert!(job(Operation::Gather, 2, 64).expected(1, &outcome).is_empty());
    }
}
