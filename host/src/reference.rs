//! What a reduction must give, computed on the CPU.
//!
//! Invariant: pure and independent of the kernels. [`Reduction::exact`] takes the documented steps
//! (each value as it travels, f32, rank order, one rounding; along trees, one more at each rank that
//! passes a sum on), so a right result equals it bit for bit. [`Reduction::bounds`] takes the sum in f64 and says how far those steps may stray from it,
//! so a mistake in the steps themselves does not pass either.

use crate::plan::forest::{Forest, Tree};
use crate::{DType, ReduceOp, Wire};
use half::{bf16, f16};
use std::ops::Range;

/// A reduction of all ranks' tensors. `None` stands for a rank that contributes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Reduction<'a> {
    /// Each rank's tensor, in rank order, as it lies in memory; all of one size.
    pub inputs: &'a [Option<&'a [u8]>],
    /// Element type of the tensors.
    pub dtype: DType,
    /// How values are combined.
    pub op: ReduceOp,
    /// How f32 elements travel, results included.
    pub wire: Wire,
    /// In which order values are added and rounded.
    pub order: Order<'a>,
}

/// In which order values are added and rounded.
#[derive(Clone, Copy, Debug)]
pub enum Order<'a> {
    /// Rank 0 first, rounded once.
    Ranks,
    /// Each part, this many elements of the tensor, along its tree: a rank adds what its children sent and its own
    /// values in rank order, and rounds.
    Trees(&'a Forest, usize),
}

/// Where a result must lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The reduction, taken in f64.
    pub value: f64,
    /// How far from it a result may be; infinite where a value is not finite or may overflow.
    pub tolerance: f64,
}

impl<'a> Order<'a> {
    /// Along the trees that [`plan::trees`](crate::plan::trees) found, or by rank if it found none.
    pub fn along(trees: &'a Option<(Forest, usize)>) -> Order<'a> {
        trees.as_ref().map_or(Order::Ranks, |(forest, part)| Order::Trees(forest, *part))
    }
}

impl Reduction<'_> {
    /// The result, bit for bit, except that a NaN may be any NaN and that a maximum or minimum
    /// of two zeros may be either (see [`same`]).
    pub fn exact(&self, elements: usize) -> Vec<u8> {
        let size = self.dtype.bytes();
        for input in self.inputs.iter().flatten() {
            assert_eq!(input.len(), elements * size, "bytes of a rank's tensor");
        }
        let totals = match self.order {
            Order::Ranks => self.sum(0..elements, |_| true, None),
            Order::Trees(forest, part) => {
                let parts = forest.sums().iter().enumerate();
                let totals = parts.map(|(index, tree)| {
                    let range = (index * part).min(elements)..((index + 1) * part).min(elements);
                    self.subtotal(tree, tree.root(), range)
                });
                totals.collect::<Vec<_>>().concat()
            }
        };
        let scale = if self.op == ReduceOp::Avg { 1.0 / self.inputs.len() as f32 } else { 1.0 };
        let mut result = Vec::with_capacity(elements * self.dtype.bytes());
        for total in totals {
            let value = travelled(self.dtype, self.wire, total * scale);
            push(self.dtype, value, &mut result);
        }
        result
    }

    /// What the ranks that `takes` picks add up to, in rank order; `partial` has what another than
    /// `rank` has summed up so far.
    fn sum(
        &self,
        range: Range<usize>,
        takes: impl Fn(usize) -> bool,
        partial: Option<Partial<'_>>,
    ) -> Vec<f32> {
        let adds = matches!(self.op, ReduceOp::Sum | ReduceOp::Avg);
        // -0.0 and NaN change nothing, where 0.0 would turn -0.0 into 0.0.
        let mut totals = vec![if adds { -0.0 } else { f32::NAN }; range.len()];
        for rank in (0..self.inputs.len()).filter(|rank| takes(*rank)) {
            let values = match partial {
                Some((own, sums)) if own != rank => sums(rank),
                _ => self.values(rank, range.clone()),
            };
            for (total, value) in totals.iter_mut().zip(values) {
                *total = combine(self.op, *total, value);
            }
        }
        totals
    }

    /// The values of `rank` as they travel; none if it contributes nothing.
    fn values(&self, rank: usize, range: Range<usize>) -> Vec<f32> {
        let size = self.dtype.bytes();
        let bytes = self.inputs[rank].map(|input| &input[range.start * size..range.end * size]);
        bytes.unwrap_or_default().chunks_exact(size).map(|bytes| self.received(bytes)).collect()
    }

    /// What `rank` and the ranks below it add up to, before it is rounded.
    fn subtotal(&self, tree: &Tree, rank: u32, range: Range<usize>) -> Vec<f32> {
        let below = |child: usize| {
            let sums = self.subtotal(tree, child as u32, range.clone());
            sums.into_iter().map(|value| self.rounded(value)).collect()
        };
        let takes = |other: usize| other as u32 == rank || tree.parent(other as u32) == Some(rank);
        self.sum(range.clone(), takes, Some((rank as usize, &below)))
    }

    /// `value` as a rank sends it on.
    fn rounded(&self, sum: f32) -> f32 {
        let mut bytes = Vec::new();
        push(self.dtype, travelled(self.dtype, self.wire, sum), &mut bytes);
        value(self.dtype, &bytes)
    }

    /// The result in f64, and how far f32 sums and one rounding may stray from it.
    pub fn bounds(&self, elements: usize) -> Vec<Bound> {
        let size = self.dtype.bytes();
        let element = |index: usize| {
            let values = self.inputs.iter().flatten().map(move |input| {
                f64::from(self.received(&input[index * size..(index + 1) * size]))
            });
            self.bound(values)
        };
        (0..elements).map(element).collect()
    }

    /// The bound of one element.
    fn bound(&self, values: impl Iterator<Item = f64>) -> Bound {
        let world = self.inputs.len() as f64;
        let (mut sum, mut magnitude, mut best) = (0.0, 0.0, f64::NAN);
        for value in values {
            sum += value;
            magnitude += value.abs();
            best = match self.op {
                ReduceOp::Max => best.max(value),
                _ => best.min(value),
            };
        }
        let (value, error) = match self.op {
            ReduceOp::Max | ReduceOp::Min => (best, 0.0),
            ReduceOp::Sum => (sum, world * EPSILON * magnitude),
            // Two more roundings: of 1/world, and of the product, which may also be subnormal.
            ReduceOp::Avg => {
                (sum / world, (world + 2.0) * EPSILON * magnitude / world + f64::from_bits(1))
            }
        };
        let (bits, smallest, largest) = self.output();
        // Along trees every rank above the leaves rounds, at most this often one after the other.
        let hops = match self.order {
            Order::Trees(forest, _) if error != 0.0 => f64::from(forest.height().saturating_sub(1)),
            _ => 0.0,
        };
        let error = error + hops * (1.1 * magnitude * 2f64.powi(-bits)).max(smallest / 2.0);
        let reach = value.abs() + error;
        let tolerance = error + (reach * 2f64.powi(-bits)).max(smallest / 2.0);
        // What a rank passes on has not been divided yet.
        let passed_on = if hops == 0.0 { 0.0 } else { magnitude * 1.1 };
        // NaN, the most or least of nothing, has no bound, so nothing may swallow it.
        let fits =
            magnitude < f64::from(f32::MAX) && reach + tolerance < largest && passed_on < largest;
        Bound { value, tolerance: if fits { tolerance } else { f64::INFINITY } }
    }

    /// Significant bits, smallest positive and largest finite value of what a result is rounded to.
    fn output(&self) -> (i32, f64, f64) {
        match (self.dtype, self.wire) {
            (DType::F32, Wire::Native) => (24, f64::from(f32::from_bits(1)), f64::from(f32::MAX)),
            (DType::F16, _) => (11, 2f64.powi(-24), f64::from(f16::MAX)),
            (DType::Bf16, _) | (DType::F32, Wire::Bf16) => {
                (8, 2f64.powi(-133), f64::from(bf16::MAX))
            }
        }
    }

    /// An element as every rank, its owner included, takes it into the reduction.
    fn received(&self, bytes: &[u8]) -> f32 {
        travelled(self.dtype, self.wire, value(self.dtype, bytes))
    }
}

/// A rank, and what any other has summed up so far.
type Partial<'a> = (usize, &'a dyn Fn(usize) -> Vec<f32>);

/// Half a unit in the last place of 1.0f32.
const EPSILON: f64 = 1.0 / (1u32 << 24) as f64;

/// One step of a reduction, as the kernels take it: a NaN loses against a number.
fn combine(op: ReduceOp, a: f32, b: f32) -> f32 {
    match op {
        ReduceOp::Sum | ReduceOp::Avg => a + b,
        ReduceOp::Max => a.max(b),
        ReduceOp::Min => a.min(b),
    }
}

/// `value` after a trip over the wire.
fn travelled(dtype: DType, wire: Wire, value: f32) -> f32 {
    match (dtype, wire) {
        (DType::F32, Wire::Bf16) => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The element that starts at `bytes`.
///
/// # Panics
/// If `bytes` is shorter than an element.
pub fn value(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}

/// Appends `value`, rounded to nearest even.
pub fn push(dtype: DType, value: f32, bytes: &mut Vec<u8>) {
    match dtype {
        DType::F32 => bytes.extend(value.to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        DType::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
    }
}

/// Whether two elements are the same result of `op`: the same bits, or both NaN, or, for a maximum
/// or minimum, both zero (IEEE 754 leaves the sign to the machine).
pub fn same(dtype: DType, op: ReduceOp, a: &[u8], b: &[u8]) -> bool {
    if a == b {
        return true;
    }
    let (a, b) = (value(dtype, a), value(dtype, b));
    let picks = matches!(op, ReduceOp::Max | ReduceOp::Min);
    a.is_nan() && b.is_nan() || picks && a == 0.0 && b == 0.0
}

/// The first element in which two results of `op` are not the [`same`].
pub fn first_difference(dtype: DType, op: ReduceOp, a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    let size = dtype.bytes();
    let mut pairs = a.chunks_exact(size).zip(b.chunks_exact(size));
    pairs.position(|(a, b)| !same(dtype, op, a, b))
}

/// The largest error of `result`, or the first element that lies outside its bound.
pub fn largest_error(dtype: DType, result: &[u8], bounds: &[Bound]) -> Result<f64, usize> {
    let mut largest = 0.0f64;
    for (index, (bytes, bound)) in result.chunks_exact(dtype.bytes()).zip(bounds).enumerate() {
        if bound.tolerance.is_finite() {
            let error = (f64::from(value(dtype, bytes)) - bound.value).abs();
            if error.is_nan() || error > bound.tolerance {
                return Err(index);
            }
            largest = largest.max(error);
        }
    }
    Ok(largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{Rng, Values, elements};

    #[test]
    fn the_most_of_nothing_has_no_bound() {
        for op in [ReduceOp::Max, ReduceOp::Min] {
            let (dtype, wire, order) = (DType::F32, Wire::Native, Order::along(&None));
            let reduction = Reduction { inputs: &[None], dtype, op, wire, order };
            assert!(reduction.bounds(1)[0].tolerance.is_infinite());
        }
    }

    fn reduce(dtype: DType, op: ReduceOp, wire: Wire, ranks: &[&[f32]]) -> Vec<f32> {
        let pack = |values: &&[f32]| {
            let mut bytes = Vec::new();
            values.iter().for_each(|v| push(dtype, *v, &mut bytes));
            bytes
        };
        let tensors: Vec<_> = ranks.iter().map(pack).collect();
        let inputs: Vec<_> = tensors.iter().map(|t| Some(t.as_slice())).collect();
        let order = Order::Ranks;
        let result = Reduction { inputs: &inputs, dtype, op, wire, order }.exact(ranks[0].len());
        result.chunks_exact(dtype.bytes()).map(|b| value(dtype, b)).collect()
    }

    #[test]
    fn sums_in_rank_order() {
        // (1e8 + 1) - 1e8 is 0 in f32, 1e8 - 1e8 + 1 is 1: the order shows.
        let sum = |order: [f32; 3]| {
            let [a, b, c] = order;
            reduce(DType::F32, ReduceOp::Sum, Wire::Native, &[&[a], &[b], &[c]])[0]
        };
        assert_eq!(sum([1e8, 1.0, -1e8]), 0.0);
        assert_eq!(sum([1e8, -1e8, 1.0]), 1.0);
    }

    #[test]
    fn rounds_once() {
        // In f16 2048 + 1 rounds back to 2048; in f32 the two ones add up first.
        let ranks: [&[f32]; 3] = [&[2048.0], &[1.0], &[1.0]];
        assert_eq!(reduce(DType::F16, ReduceOp::Sum, Wire::Native, &ranks), [2050.0]);
    }

    #[test]
    fn trees_round_at_every_rank_that_passes_a_sum_on() {
        // Rank 3 sends to 2, and 2 to 0: 2048 + 1 becomes 2048 on the way. A star adds in f32.
        let halves = |value: f32| f16::from_f32(value).to_le_bytes();
        let inputs = [halves(0.0), halves(1.0), halves(2048.0), halves(1.0)];
        let inputs: Vec<Option<&[u8]>> = inputs.iter().map(|bytes| Some(&bytes[..])).collect();
        let sum = |forest: &Forest| {
            let (dtype, op, wire) = (DType::F16, ReduceOp::Sum, Wire::Native);
            let order = Order::Trees(forest, 1);
            value(dtype, &Reduction { inputs: &inputs, dtype, op, wire, order }.exact(1))
        };
        assert_eq!(sum(&Forest::binomial(4, 0)), 2048.0);
        assert_eq!(sum(&Forest::star(4)), 2050.0);
    }

    #[test]
    fn an_average_divides_before_the_rounding() {
        let ranks: [&[f32]; 2] = [&[65504.0], &[65504.0]];
        assert_eq!(reduce(DType::F16, ReduceOp::Avg, Wire::Native, &ranks), [65504.0]);
    }

    #[test]
    fn a_bf16_wire_rounds_values_and_result() {
        let ranks: [&[f32]; 2] = [&[1.0 + 1.0 / 512.0], &[1.0]];
        assert_eq!(reduce(DType::F32, ReduceOp::Sum, Wire::Bf16, &ranks), [2.0]);
        let ranks: [&[f32]; 2] = [&[256.0], &[1.0]];
        assert_eq!(reduce(DType::F32, ReduceOp::Sum, Wire::Bf16, &ranks), [256.0]);
    }

    #[test]
    fn signs_of_zero_survive_and_nan_loses() {
        let zeros = reduce(DType::F32, ReduceOp::Sum, Wire::Native, &[&[-0.0], &[-0.0]]);
        assert!(zeros[0].is_sign_negative());
        let ranks: [&[f32]; 2] = [&[f32::NAN, 1.0], &[2.0, f32::NAN]];
        assert_eq!(reduce(DType::F32, ReduceOp::Max, Wire::Native, &ranks), [2.0, 1.0]);
        assert_eq!(reduce(DType::Bf16, ReduceOp::Min, Wire::Native, &ranks), [2.0, 1.0]);
    }

    #[test]
    fn nobody_contributes() {
        let none = Reduction {
            inputs: &[None, None],
            dtype: DType::F16,
            op: ReduceOp::Sum,
            wire: Wire::Native,
            order: Order::Ranks,
        };
        assert_eq!(none.exact(1), [0, 0x80]);
        assert!(value(DType::F16, &Reduction { op: ReduceOp::Max, ..none }.exact(1)).is_nan());
    }

    #[test]
    fn every_exact_result_lies_in_its_bounds() {
        let mut rng = Rng::new(1, "bounds");
        for dtype in DType::ALL {
            for op in ReduceOp::ALL {
                for values in [Values::Ordinary, Values::Special] {
                    for wire in [Wire::Native, Wire::Bf16] {
                        let tensors: Vec<_> =
                            (0..5).map(|_| elements(dtype, 999, values, &mut rng)).collect();
                        let inputs: Vec<_> = tensors.iter().map(|t| Some(t.as_slice())).collect();
                        let trees = [Forest::binomial(5, 0), Forest::ring(5)];
                        let along =
                            trees.iter().map(|f| Order::Trees(f, 1000 / f.parts() as usize));
                        for order in along.chain([Order::Ranks]) {
                            let reduction = Reduction { inputs: &inputs, dtype, op, wire, order };
                            let (exact, bounds) = (reduction.exact(999), reduction.bounds(999));
                            let error = largest_error(dtype, &exact, &bounds);
                            assert!(
                                error.is_ok(),
                                "{dtype:?} {op:?} {values:?} {wire:?}: {error:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_wrong_bit_is_seen() {
        let mut rng = Rng::new(2, "wrong");
        let right = elements(DType::F32, 100, Values::Ordinary, &mut rng);
        let mut wrong = right.clone();
        wrong[4 * 37] ^= 1;
        assert_eq!(first_difference(DType::F32, ReduceOp::Sum, &right, &wrong), Some(37));
        assert!(same(DType::F32, ReduceOp::Max, &0f32.to_le_bytes(), &(-0f32).to_le_bytes()));
        assert!(!same(DType::F32, ReduceOp::Sum, &0f32.to_le_bytes(), &(-0f32).to_le_bytes()));
    }
}
