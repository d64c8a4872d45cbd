//! What is chosen when a call does not say: that a choice changes no bit it must not change, and that
//! a batch changes nothing for its rows.

use peerlane::cases::{Rng, Values, elements};
use peerlane::{Algorithm, AllReduce, Config, DType, Format, Wire};
use peerlane_tests::{Group, Machine, Memory, small};

/// The types that travel differently.
const KINDS: [(DType, Wire); 3] =
    [(DType::Bf16, Wire::Native), (DType::F32, Wire::Native), (DType::F32, Wire::Bf16)];

/// Every rank's result of an all-reduce of the first `count` elements of what each rank brings.
fn reduce(
    group: &mut Group,
    inputs: &[Vec<u8>],
    count: usize,
    (dtype, wire): (DType, Wire),
    algorithm: Option<Algorithm>,
) -> Vec<Vec<u8>> {
    let bytes = count * dtype.bytes();
    let mut memories = Vec::new();
    for (rank, input) in group.ranks.iter().zip(inputs) {
        memories.push(Memory::with_image(&rank.gpu, rank.stream, &input[..bytes]).unwrap());
    }
    for (rank, memory) in group.ranks.iter_mut().zip(&memories) {
        let call = AllReduce { wire, algorithm, ..AllReduce::in_place(memory.base, count, dtype) };
        // SAFETY: the memory holds `count` elements and lives until all ranks have finished.
        unsafe { rank.communicator.all_reduce(&call, rank.stream).unwrap() };
    }
    group.ranks.iter().for_each(|rank| rank.finish().unwrap());
    memories.iter().map(|memory| memory.read(bytes).unwrap()).collect()
}

fn inputs(world: u32, count: usize, dtype: DType, seed: u64) -> Vec<Vec<u8>> {
    let input = |rank| {
        let mut rng = Rng::new(seed, &format!("choice/{rank}"));
        elements(dtype, count, Values::Ordinary, &mut rng)
    };
    (0..world).map(input).collect()
}

#[test]
fn rows_alone_and_in_a_batch_have_the_same_bits_in_fixed_mode() {
    const ROW: usize = 300;
    for world in [2, 3, 5] {
        let machine = Machine::sim(world, 7);
        for algorithm in [None, Some(Algorithm::Tree), Some(Algorithm::Staged)] {
            let config = Config { fixed: true, algorithm, ..small(world) };
            let mut group = Group::connect(&machine, world, &config);
            for kind in KINDS {
                let inputs = inputs(world, 40 * ROW, kind.0, 3);
                let batch = reduce(&mut group, &inputs, 40 * ROW, kind, None);
                for rows in [1, 3, 17] {
                    let alone = reduce(&mut group, &inputs, rows * ROW, kind, None);
                    for (alone, batch) in alone.iter().zip(&batch) {
                        assert!(
                            batch.starts_with(alone),
                            "{world} ranks, {algorithm:?}, {rows} rows, {kind:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_ring_would_not_pass_that_test() {
    const ROW: usize = 300;
    let kind = (DType::Bf16, Wire::Native);
    let mut group = Group::connect(&Machine::sim(5, 7), 5, &small(5));
    let inputs = inputs(5, 40 * ROW, kind.0, 3);
    let ring = Some(Algorithm::Ring);
    let batch = reduce(&mut group, &inputs, 40 * ROW, kind, ring);
    let alone = reduce(&mut group, &inputs, 17 * ROW, kind, ring);
    assert!(!batch[0].starts_with(&alone[0]), "rings add in an order that depends on size");
}

#[test]
fn what_is_chosen_from_by_default_gives_the_same_bits() {
    let one_shot = [Format::Packet, Format::Full].map(Algorithm::OneShot);
    for world in [2, 3, 5] {
        let mut group = Group::connect(&Machine::sim(world, 9), world, &small(world));
        for kind in KINDS {
            let inputs = inputs(world, 2000, kind.0, 5);
            let mut reduced = |algorithm| reduce(&mut group, &inputs, 2000, kind, algorithm);
            let expected = reduced(None);
            let mut same = vec![one_shot[0], one_shot[1], Algorithm::TwoShot, Algorithm::Staged];
            if world == 2 {
                let others = [Algorithm::Ring, Algorithm::Tree, Algorithm::DoubleTree];
                same.extend(others.into_iter().chain([Algorithm::Hierarchical]));
            }
            for algorithm in same {
                assert!(
                    reduced(Some(algorithm)) == expected,
                    "{world} ranks: {algorithm}, {kind:?}"
                );
            }
        }
    }
}
