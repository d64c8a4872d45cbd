//! Properties of what the other tests are measured by, the reference, and of where a gather puts
//! things.

use peerlane::cases::{Rng, Values, elements};
use peerlane::reference::{Order, Reduction, first_difference, push, value};
use peerlane::{DType, ReduceOp, Wire};
use peerlane_tests::job::ELEMENTS;
use peerlane_tests::{Call, Group, Job, Machine, Script, random_jobs, script::join_rows, small};
use proptest::prelude::*;

/// Tensors of `world` ranks and how they are reduced.
#[derive(Clone, Debug)]
struct Scene {
    tensors: Vec<Vec<u8>>,
    dtype: DType,
    wire: Wire,
    op: ReduceOp,
    count: usize,
}

impl Scene {
    fn reduce(&self, tensors: &[Option<&[u8]>], count: usize) -> Vec<u8> {
        let (dtype, op, wire) = (self.dtype, self.op, self.wire);
        Reduction { inputs: tensors, dtype, op, wire, order: Order::Ranks }.exact(count)
    }

    fn inputs(&self) -> Vec<Option<&[u8]>> {
        self.tensors.iter().map(|tensor| Some(tensor.as_slice())).collect()
    }

    fn whole(&self) -> Vec<u8> {
        self.reduce(&self.inputs(), self.count)
    }

    fn differs(&self, a: &[u8], b: &[u8]) -> Option<usize> {
        first_difference(self.dtype, self.op, a, b)
    }
}

fn scenes() -> impl Strategy<Value = Scene> {
    let kinds = (0usize..4, 0usize..4, any::<bool>());
    (1usize..=16, 0usize..50, any::<u64>(), kinds).prop_map(|(world, count, seed, kinds)| {
        let (dtype, wire) = ELEMENTS[kinds.0];
        let values = if kinds.2 { Values::Special } else { Values::Ordinary };
        let mut rng = Rng::new(seed, "scene");
        let tensors = (0..world).map(|_| elements(dtype, count, values, &mut rng)).collect();
        Scene { tensors, dtype, wire, op: ReduceOp::ALL[kinds.1], count }
    })
}

proptest! {
    #[test]
    fn an_element_depends_on_nothing_but_its_column(scene in scenes(), at in 0usize..50) {
        let at = at.min(scene.count);
        let cut = at * scene.dtype.bytes();
        let left: Vec<_> = scene.tensors.iter().map(|t| Some(&t[..cut])).collect();
        let right: Vec<_> = scene.tensors.iter().map(|t| Some(&t[cut..])).collect();
        let mut joined = scene.reduce(&left, at);
        joined.extend(scene.reduce(&right, scene.count - at));
        prop_assert_eq!(joined, scene.whole());
    }

    #[test]
    fn a_rank_without_contribution_changes_no_sum_and_no_extreme(scene in scenes(), at in 0usize..17) {
        prop_assume!(scene.op != ReduceOp::Avg);
        let mut inputs = scene.inputs();
        inputs.insert(at.min(inputs.len()), None);
        let with = scene.reduce(&inputs, scene.count);
        prop_assert_eq!(scene.differs(&with, &scene.whole()), None);
    }

    #[test]
    fn the_order_of_ranks_matters_to_no_extreme(scene in scenes(), turn in 0usize..16) {
        prop_assume!(matches!(scene.op, ReduceOp::Max | ReduceOp::Min));
        let mut inputs = scene.inputs();
        let world = inputs.len();
        inputs.rotate_left(turn % world);
        let turned = scene.reduce(&inputs, scene.count);
        prop_assert_eq!(scene.differs(&turned, &scene.whole()), None);
    }

    #[test]
    fn one_rank_alone_keeps_its_values_rounded_to_the_wire(scene in scenes()) {
        let alone = scene.reduce(&scene.inputs()[..1], scene.count);
        let mut rounded = Vec::new();
        for element in scene.tensors[0].chunks_exact(scene.dtype.bytes()) {
            let mut wire = Vec::new();
            let wire_type = if scene.wire == Wire::Bf16 { DType::Bf16 } else { scene.dtype };
            push(wire_type, value(scene.dtype, element), &mut wire);
            push(scene.dtype, value(wire_type, &wire), &mut rounded);
        }
        prop_assert_eq!(scene.differs(&alone, &rounded), None);
    }

    #[test]
    fn an_average_of_equal_tensors_is_the_tensor(scene in scenes(), shift in 0u32..=4) {
        // Sixteen equal values of at most 11 bits add up exactly, and the division is exact too.
        prop_assume!((scene.dtype, scene.wire) != (DType::F32, Wire::Native));
        let tensor = scene.tensors[0].clone();
        let finite = |e: &[u8]| value(scene.dtype, e).abs() < 1e4;
        prop_assume!(tensor.chunks_exact(scene.dtype.bytes()).all(finite));
        let equal = Scene { tensors: vec![tensor; 1 << shift], op: ReduceOp::Avg, ..scene };
        let alone = equal.reduce(&equal.inputs()[..1], equal.count);
        prop_assert_eq!(equal.differs(&equal.whole(), &alone), None);
    }

    #[test]
    fn joined_rows_hold_every_byte_at_its_row_and_column(
        widths in prop::collection::vec(0usize..40, 1..=16), rows in 0usize..6,
    ) {
        let number = |rank: usize, byte: usize| (31 * rank + byte) as u8;
        let source = |(rank, width): (usize, &usize)| (0..rows * width).map(|b| number(rank, b)).collect();
        let sources: Vec<Vec<u8>> = widths.iter().enumerate().map(source).collect();
        let joined = join_rows(&sources, &widths, rows);
        let pitch: usize = widths.iter().sum();
        prop_assert_eq!(joined.len(), rows * pitch);
        let mut column = 0;
        for (rank, width) in widths.iter().enumerate() {
            for row in 0..rows {
                for byte in 0..*width {
                    prop_assert_eq!(joined[row * pitch + column + byte], number(rank, row * width + byte));
                }
            }
            column += width;
        }
    }

    #[test]
    fn a_script_notices_any_changed_byte(seed: u64, rank in 0usize..3, at: prop::sample::Index) {
        let script = Script::new(3, &random_jobs(3, 4, 200, &mut Rng::new(seed, "notice")), seed);
        let mut after = script.expected();
        prop_assert!(script.verify(&after).is_ok());
        let image = &mut after[rank];
        prop_assume!(!image.is_empty());
        let at = at.index(image.len());
        image[at] ^= 0x10;
        // NaN may be any NaN, on all ranks alike; a reduction's results are compared elsewhere.
        if !script.is_computed(rank, at) {
            prop_assert!(script.verify(&after).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_gather_puts_any_widths_in_their_places(
        widths in prop::collection::vec(0usize..300, 1..=6), rows in 0usize..9, root: prop::sample::Index,
        outsiders_call: bool, shift in 0usize..16, seed: u64,
    ) {
        let world = widths.len() as u32;
        let root = root.index(widths.len()) as u32;
        let call = Call::Gather { rows, widths, root, outsiders_call };
        let job = Job { call, values: Values::Special, shift };
        let mut group = Group::connect(&Machine::sim(world, seed), world, &small(world));
        let script = Script::new(world, &[job.clone(), job], seed);
        let outcome = group.run(&script);
        prop_assert!(outcome.is_ok(), "{:?}", outcome.err());
    }
}
