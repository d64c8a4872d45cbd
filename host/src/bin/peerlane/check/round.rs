//! What one call finds in memory and must leave there.
//!
//! Invariant: every byte of every tensor has an expected content after the call, those that the
//! call must leave alone included.

use super::case::{Call, Case};
use peerlane::cases::{Rng, Values, bytes, elements};
use peerlane::plan;
use peerlane::reference::{Order, Reduction, first_difference, largest_error, same, value};
use peerlane::{DType, ReduceOp};
use std::ops::Range;

/// Fills what a call is to overwrite. Neither 0 nor the protocol's mark of a free slot.
pub(crate) const POISON: u8 = 0xa5;

/// Rows of a gather.
pub(crate) const ROWS: usize = 3;

/// A tensor in one rank's memory.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Its bytes before the call.
    pub(crate) before: Vec<u8>,
    /// Its bytes after the call.
    after: Vec<u8>,
    /// The bytes that a reduction computes, where NaN and zeros have some freedom.
    computed: Option<(Range<usize>, DType, ReduceOp)>,
    /// Bytes between an aligned address and the tensor.
    pub(crate) shift: usize,
}

impl Tensor {
    /// What is wrong with `found`, if anything.
    pub(crate) fn verify(&self, found: &[u8]) -> Result<(), String> {
        let (range, dtype, op) = self.computed.clone().unwrap_or((0..0, DType::F32, ReduceOp::Sum));
        if let Some(index) =
            first_difference(dtype, op, &self.after[range.clone()], &found[range.clone()])
        {
            let size = dtype.bytes();
            let at = range.start + index * size..range.start + (index + 1) * size;
            let (wanted, got) = (&self.after[at.clone()], &found[at]);
            debug_assert!(!same(dtype, op, wanted, got));
            return Err(format!(
                "element {index}: expected {:e} ({}), got {:e} ({})",
                value(dtype, wanted),
                hex(wanted),
                value(dtype, got),
                hex(got)
            ));
        }
        let outside = (0..found.len()).filter(|at| !range.contains(at));
        for at in outside {
            if found[at] != self.after[at] {
                return Err(format!(
                    "byte {at} of {}: expected {:02x}, got {:02x}",
                    found.len(),
                    self.after[at],
                    found[at]
                ));
            }
        }
        Ok(())
    }

    /// The bytes of `found` that a reduction computed, which all ranks must share.
    pub(crate) fn computed<'a>(&self, found: &'a [u8]) -> Option<&'a [u8]> {
        self.computed.as_ref().map(|(range, ..)| &found[range.clone()])
    }
}

fn hex(little_endian: &[u8]) -> String {
    let digits: String = little_endian.iter().rev().map(|byte| format!("{byte:02x}")).collect();
    format!("0x{digits}")
}

/// A place in one of a rank's tensors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) tensor: usize,
    pub(crate) offset: usize,
}

/// One rank's end of a call.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) src: Place,
    pub(crate) dst: Place,
}

/// A call: each rank's part, `None` for a rank that does not call.
pub(crate) struct Round {
    pub(crate) parts: Vec<Option<Part>>,
    /// The largest distance between the exact result and the sum taken in f64.
    pub(crate) error: f64,
}

impl Round {
    /// The `index`-th call of a case.
    pub(crate) fn new(case: &Case, seed: u64, index: usize) -> Result<Round, String> {
        let draw = Draw { case, rng: Rng::new(seed, &format!("{}#{index}", case.name())) };
        match case.call {
            Call::Reduce { .. } | Call::Registered { .. } => draw.reduction(),
            Call::AllGather { in_place } => Ok(draw.all_gather(in_place)),
            Call::Broadcast { root, .. } => Ok(draw.broadcast(root)),
            Call::Gather { .. } => Ok(draw.gather()),
            Call::Barrier => Ok(Round { parts: Vec::new(), error: 0.0 }),
        }
    }
}

/// Makes the tensors of one call.
struct Draw<'a> {
    case: &'a Case,
    rng: Rng,
}

impl Draw<'_> {
    fn ranks(&self) -> Range<usize> {
        0..self.case.world as usize
    }

    /// Distance from alignment: one element, or an odd number of bytes that differs by rank.
    /// Outputs of odd ranks lie otherwise than their inputs.
    fn shift(&self, rank: usize, unit: Option<DType>, output: bool) -> usize {
        match (self.case.misaligned, unit) {
            (false, _) => 0,
            (true, Some(dtype)) if output && rank % 2 == 1 => 3 * dtype.bytes(),
            (true, Some(dtype)) => dtype.bytes(),
            (true, None) => (rank * 6 + if output { 9 } else { 1 }) % 16,
        }
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        bytes(count, self.case.values, &mut self.rng)
    }

    fn moved(&self, rank: usize, before: Vec<u8>, after: Vec<u8>, output: bool) -> Tensor {
        Tensor { before, after, computed: None, shift: self.shift(rank, None, output) }
    }

    fn reduction(mut self) -> Result<Round, String> {
        let (all, dtype, wire, op, in_place, absent, algorithm) = match self.case.call {
            Call::Reduce { all, dtype, wire, op, in_place, absent, algorithm } => {
                (all, dtype, wire, op, in_place, absent, algorithm)
            }
            Call::Registered { dtype, wire, op, absent } => {
                (true, dtype, wire, op, true, absent, None)
            }
            _ => return Err("not a reduction".into()),
        };
        let count = if all { self.case.count } else { self.case.count * self.case.world as usize };
        let values = self.case.values;
        let sources: Vec<_> =
            self.ranks().map(|_| elements(dtype, count, values, &mut self.rng)).collect();
        let present = |rank| absent != Some(rank as u32);
        let inputs: Vec<_> =
            self.ranks().map(|rank| present(rank).then_some(sources[rank].as_slice())).collect();
        let world = self.case.world;
        let islands = &plan::halves(world)[..world as usize];
        let trees = algorithm.and_then(|a| plan::trees(islands, a, (count, dtype, wire)));
        let order = Order::along(&trees);
        let reduction = Reduction { inputs: &inputs, dtype, op, wire, order };
        let result = reduction.exact(count);
        let error = largest_error(dtype, &result, &reduction.bounds(count))
            .map_err(|at| format!("the reference itself is off its bound at element {at}"))?;
        let part = |rank: usize| {
            let length = self.case.count * dtype.bytes();
            let start = if all { 0 } else { rank * length };
            let (source, result) = (&sources[rank], &result[start..start + length]);
            let shift = self.shift(rank, Some(dtype), false);
            let unchanged =
                Tensor { before: source.clone(), after: source.clone(), computed: None, shift };
            if in_place {
                let range = start..start + length;
                let mut tensor = unchanged;
                tensor.after[range.clone()].copy_from_slice(result);
                tensor.computed = Some((range, dtype, op));
                let dst = Place { tensor: 0, offset: start };
                return Part { tensors: vec![tensor], src: Place::default(), dst };
            }
            let output = Tensor {
                before: vec![POISON; length],
                after: result.to_vec(),
                computed: Some((0..length, dtype, op)),
                shift: self.shift(rank, Some(dtype), true),
            };
            let dst = Place { tensor: 1, offset: 0 };
            Part { tensors: vec![unchanged, output], src: Place::default(), dst }
        };
        Ok(Round { parts: self.ranks().map(|rank| Some(part(rank))).collect(), error })
    }

    fn all_gather(mut self, in_place: bool) -> Round {
        let count = self.case.count;
        let sources: Vec<_> = self.ranks().map(|_| self.bytes(count)).collect();
        let joined = sources.concat();
        let part = |rank: usize| {
            let mut before = vec![POISON; joined.len()];
            if in_place {
                let offset = rank * count;
                before[offset..offset + count].copy_from_slice(&sources[rank]);
                let tensors = vec![self.moved(rank, before, joined.clone(), true)];
                return Part { tensors, src: Place { tensor: 0, offset }, dst: Place::default() };
            }
            let source = sources[rank].clone();
            let tensors = vec![
                self.moved(rank, source.clone(), source, false),
                self.moved(rank, before, joined.clone(), true),
            ];
            Part { tensors, src: Place::default(), dst: Place { tensor: 1, offset: 0 } }
        };
        Round { parts: self.ranks().map(|rank| Some(part(rank))).collect(), error: 0.0 }
    }

    fn broadcast(mut self, root: u32) -> Round {
        let data = self.bytes(self.case.count);
        let part = |rank: usize| {
            let is_root = rank == root as usize;
            let before = if is_root { data.clone() } else { vec![POISON; data.len()] };
            let tensors = vec![self.moved(rank, before, data.clone(), !is_root)];
            Part { tensors, src: Place::default(), dst: Place::default() }
        };
        Round { parts: self.ranks().map(|rank| Some(part(rank))).collect(), error: 0.0 }
    }

    fn gather(mut self) -> Round {
        let widths = widths(self.case);
        let sources: Vec<_> = widths.iter().map(|width| self.bytes(width * ROWS)).collect();
        let row = |row: usize| {
            let cut = |rank: usize| &sources[rank][row * widths[rank]..(row + 1) * widths[rank]];
            (0..widths.len()).map(cut).collect::<Vec<_>>().concat()
        };
        let joined: Vec<u8> = (0..ROWS).flat_map(row).collect();
        let Call::Gather { root, widths: kind } = self.case.call else {
            return Round { parts: Vec::new(), error: 0.0 };
        };
        let part = |rank: usize| {
            if !kind.calls(rank as u32, root) {
                return None;
            }
            let source = sources[rank].clone();
            let mut tensors = vec![self.moved(rank, source.clone(), source, false)];
            if rank == root as usize {
                let before = vec![POISON; joined.len()];
                tensors.push(self.moved(rank, before, joined.clone(), true));
            }
            let dst = Place { tensor: tensors.len() - 1, offset: 0 };
            Some(Part { tensors, src: Place::default(), dst })
        };
        Round { parts: self.ranks().map(part).collect(), error: 0.0 }
    }
}

/// Bytes per row that each rank brings to a gather.
pub(crate) fn widths(case: &Case) -> Vec<usize> {
    match case.call {
        Call::Gather { root, widths } => {
            (0..case.world).map(|rank| widths.of(rank, root, case.count)).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether the ranks' results must be the same bits.
pub(crate) const fn is_shared(call: &Call) -> bool {
    matches!(call, Call::Reduce { all: true, .. } | Call::Registered { .. })
}

/// Whether the values of a case say something about the error of a result.
pub(crate) fn is_measurable(case: &Case) -> bool {
    case.values == Values::Ordinary
}
