//! All-reduce and reduce-scatter against the reference.
#![allow(missing_docs, reason = "each function is a test, and its name says what must hold")]

use super::WORLDS;
use crate::job::{ELEMENTS, algorithms, reductions};
use crate::{Call, Group, Job, Machine, small};
use peerlane::cases::Values;
use peerlane::{Config, DType, ReduceOp, Wire};
use peerlane_device::abi::{Layout, UNIT};

/// Sizes that are taken in turn where every size with every variant would be too many.
const SIZES: [usize; 9] = [1, 7, 0, 33, 515, 2, 1023, 8, 130];

pub fn all_reduce_is_exact_for_every_type_operator_and_algorithm(machine: &Machine) {
    for world in WORLDS {
        let mut jobs = Vec::new();
        for (dtype, wire) in ELEMENTS {
            for op in ReduceOp::ALL {
                for algorithm in algorithms() {
                    let count = SIZES[jobs.len() % SIZES.len()];
                    let (in_place, absent) = (false, 0);
                    jobs.push(Job::plain(Call::AllReduce {
                        count,
                        dtype,
                        wire,
                        op,
                        algorithm,
                        in_place,
                        absent,
                    }));
                }
            }
        }
        Group::connect(machine, world, &small(world)).check(&jobs, 1);
        Group::connect(machine, world, &few_blocks()).check(&jobs, 2);
    }
}

pub fn reduce_scatter_is_exact_for_every_type_and_operator(machine: &Machine) {
    for world in WORLDS {
        let mut jobs = Vec::new();
        for (dtype, wire) in ELEMENTS {
            for op in ReduceOp::ALL {
                for count in [SIZES[jobs.len() % SIZES.len()], 70] {
                    let (in_place, absent) = (false, 0);
                    jobs.push(Job::plain(Call::ReduceScatter {
                        count,
                        dtype,
                        wire,
                        op,
                        in_place,
                        absent,
                    }));
                }
            }
        }
        Group::connect(machine, world, &small(world)).check(&jobs, 3);
    }
}

/// A mailbox of the usual size, few blocks: chunks of many units and long slots.
fn few_blocks() -> Config {
    Config { max_blocks: Some(2), ..Config::default() }
}

/// Bytes around the ends of a unit, of a slot, of a round of all blocks, and of a lane.
pub(super) fn borders(layout: Layout) -> Vec<usize> {
    let slot = layout.slot_units as usize * UNIT;
    let row = slot * layout.lanes as usize;
    let lane = row * layout.slots as usize;
    let middles = [UNIT, slot / 2, slot, row / 2, row, 2 * row, lane / 2, lane];
    middles.into_iter().flat_map(|middle| [middle - 4, middle, middle + 4]).collect()
}

pub fn reductions_are_exact_around_every_border(machine: &Machine) {
    for world in [2, 3, 5] {
        let mut group = Group::connect(machine, world, &small(world));
        let layout = group.ranks[0].communicator.layout();
        assert_eq!((layout.lanes, layout.slot_units), (2, 64), "the configuration is small");
        for bytes in borders(layout) {
            let mut calls = reductions(bytes / 4);
            // A two-shot's part is as large as the border.
            calls.extend(reductions(bytes / 4 * world as usize).into_iter().skip(3).take(1));
            let jobs: Vec<Job> = calls.into_iter().map(Job::plain).collect();
            group.check(&jobs, bytes as u64);
        }
    }
}

/// All kinds of reductions of every type.
fn every_kind(count: usize, in_place: bool, absent: u32) -> Vec<Call> {
    let mut calls = Vec::new();
    for (dtype, wire) in ELEMENTS {
        let op = ReduceOp::Sum;
        for algorithm in algorithms() {
            calls.push(Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent });
        }
        calls.push(Call::ReduceScatter { count, dtype, wire, op, in_place, absent });
    }
    calls
}

pub fn reductions_take_any_alignment(machine: &Machine) {
    for world in [1, 2, 3] {
        let mut group = Group::connect(machine, world, &small(world));
        for shift in 1..=8 {
            let job = |call| Job { call, values: Values::Ordinary, shift };
            let calls = every_kind(40 + shift, shift % 2 == 0, 0);
            group.check(&calls.into_iter().map(job).collect::<Vec<_>>(), shift as u64);
        }
    }
}

pub fn reductions_may_happen_in_place(machine: &Machine) {
    for world in WORLDS {
        let mut group = Group::connect(machine, world, &small(world));
        for count in [1, 1021] {
            let jobs: Vec<Job> = every_kind(count, true, 0).into_iter().map(Job::plain).collect();
            group.check(&jobs, 4);
        }
    }
}

pub fn ranks_without_contribution_receive_and_do_not_count(machine: &Machine) {
    for world in [1, 2, 3, 5] {
        let mut group = Group::connect(machine, world, &small(world));
        let everyone = (1 << world) - 1;
        for absent in [1, 1 << (world - 1), 1 << (world / 2), everyone & !1, everyone] {
            let mut jobs = Vec::new();
            for in_place in [false, true] {
                jobs.extend(every_kind(300, in_place, absent).into_iter().map(Job::plain));
            }
            for op in ReduceOp::ALL {
                let (dtype, wire, count) = (DType::Bf16, Wire::Native, 9);
                let (algorithm, in_place) = (None, false);
                let call = Call::AllReduce { count, dtype, wire, op, algorithm, in_place, absent };
                jobs.push(Job { call, values: Values::Special, shift: 0 });
            }
            group.check(&jobs, absent.into());
        }
    }
}

pub fn payload_that_looks_free_is_reduced(machine: &Machine) {
    for world in [2, 3, 8] {
        let mut group = Group::connect(machine, world, &small(world));
        for values in [Values::Special, Values::Free] {
            for op in ReduceOp::ALL {
                let with_op = |mut call| {
                    if let Call::AllReduce { op: of_call, .. }
                    | Call::ReduceScatter { op: of_call, .. } = &mut call
                    {
                        *of_call = op;
                    }
                    Job { call, values, shift: 0 }
                };
                let mut calls = every_kind(5, false, 0);
                calls.extend(every_kind(700, false, 0));
                group.check(&calls.into_iter().map(with_op).collect::<Vec<_>>(), 5);
            }
        }
    }
}
