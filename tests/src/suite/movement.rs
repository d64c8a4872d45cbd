//! All-gather, broadcast and gather: every byte where it belongs.
#![allow(missing_docs, reason = "each function is a test, and its name says what must hold")]

use super::reductions::borders;
use crate::job::moves;
use crate::{Call, Group, Job, Machine, small};
use peerlane::cases::Values;

/// More bytes than travel in packets.
const FULL_BYTES: usize = (32 << 10) + 100;

fn plain(calls: Vec<Call>) -> Vec<Job> {
    calls.into_iter().map(Job::plain).collect()
}

pub fn every_rank_can_be_the_root(machine: &Machine) {
    for world in super::WORLDS {
        let mut jobs = Vec::new();
        for root in 0..world {
            for bytes in [1, 77, 4096] {
                jobs.push(Job::plain(Call::Broadcast { bytes, root, route: None }));
                let widths = vec![bytes; world as usize];
                let (rows, outsiders_call) = (2, true);
                jobs.push(Job::plain(Call::Gather { rows, widths, root, outsiders_call }));
            }
        }
        Group::connect(machine, world, &small(world)).check(&jobs, 1);
    }
}

pub fn movements_are_exact_around_every_border(machine: &Machine) {
    for world in [2, 3, 5] {
        let mut group = Group::connect(machine, world, &small(world));
        let mut sizes = borders(group.ranks[0].communicator.layout());
        sizes.extend([0, 1, 3, FULL_BYTES]);
        for bytes in sizes {
            let mut calls = moves(world, bytes);
            calls.push(Call::AllGather { bytes, in_place: true });
            group.check(&plain(calls), bytes as u64);
        }
    }
    for world in super::WORLDS {
        Group::connect(machine, world, &small(world)).check(&plain(moves(world, 1000)), 2);
    }
}

pub fn movements_take_any_alignment(machine: &Machine) {
    for world in [1, 2, 3] {
        let mut group = Group::connect(machine, world, &small(world));
        for shift in 1..=16 {
            for bytes in [5, 130 + shift] {
                let mut calls = moves(world, bytes);
                calls.push(Call::AllGather { bytes, in_place: true });
                let job = |call| Job { call, values: Values::Ordinary, shift };
                group.check(&calls.into_iter().map(job).collect::<Vec<_>>(), shift as u64);
            }
        }
    }
}

/// Widths of a gather that are easy to get wrong.
fn widths(world: u32) -> Vec<Vec<usize>> {
    let world = world as usize;
    let of = |width: fn(usize) -> usize| (0..world).map(width).collect::<Vec<usize>>();
    let mut one = vec![0; world];
    one[world - 1] = 19;
    vec![
        of(|_| 1),
        of(|_| 16),
        of(|rank| 3 + 7 * rank),
        of(|rank| 130 - 8 * rank),
        of(|rank| if rank % 2 == 0 { 24 } else { 0 }),
        of(|rank| if rank == 0 { 0 } else { 5 }),
        of(|rank| if rank == 1 { 2000 } else { 1 }),
        of(|_| 0),
        one,
    ]
}

fn gathers(world: u32, outsiders_call: bool) -> Vec<Job> {
    let mut jobs = Vec::new();
    for root in [0, world / 2, world - 1] {
        for widths in widths(world) {
            for rows in [0, 1, 2, 17] {
                let widths = widths.clone();
                jobs.push(Job::plain(Call::Gather { rows, widths, root, outsiders_call }));
            }
        }
    }
    jobs
}

pub fn gathers_join_any_widths(machine: &Machine) {
    for world in [1, 2, 3, 8] {
        Group::connect(machine, world, &small(world)).check(&gathers(world, true), 3);
    }
}

pub fn ranks_outside_a_gather_need_not_call(machine: &Machine) {
    for world in [2, 3, 5] {
        let mut jobs = gathers(world, false);
        // All ranks' pipes must still be in step.
        jobs.extend(plain(moves(world, 100)));
        Group::connect(machine, world, &small(world)).check(&jobs, 4);
    }
}

pub fn payload_that_looks_free_arrives(machine: &Machine) {
    for world in [2, 3] {
        let mut group = Group::connect(machine, world, &small(world));
        for values in [Values::Special, Values::Free] {
            let mut calls = Vec::new();
            for bytes in [1, 16, 1000, FULL_BYTES, 2 * FULL_BYTES + 5] {
                calls.extend(moves(world, bytes));
            }
            let job = |call| Job { call, values, shift: 0 };
            group.check(&calls.into_iter().map(job).collect::<Vec<_>>(), 5);
        }
    }
}
