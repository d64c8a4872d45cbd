//! All cases, and which of them a run takes.
//!
//! Invariant: a run takes every plain case that it can afford, and of the others a share that its
//! seed picks; a case named on the command line is taken whatever it costs.

use super::case::{Call, Case, Style, Widths};
use peerlane::cases::{Rng, Values};
use peerlane::{Algorithm, DType, Operation, ReduceOp, Route, Wire};

/// Which cases a run takes.
pub(crate) struct Filter<'a> {
    pub(crate) operations: &'a [Operation],
    pub(crate) dtypes: &'a [DType],
    pub(crate) sizes: &'a [usize],
    /// Only the case of this name, or those whose names begin so.
    pub(crate) name: Option<&'a str>,
    /// One in this many cases that are not plain.
    pub(crate) one_in: u64,
    /// One in this many cases that are.
    pub(crate) plain_one_in: u64,
    /// A case that costs n times as much is taken n times less often.
    pub(crate) affordable: u64,
    pub(crate) seed: u64,
}

/// Every one of `all`, and the plan's choice.
fn ways<T>(all: impl IntoIterator<Item = T>) -> impl Iterator<Item = Option<T>> {
    all.into_iter().map(Some).chain([None])
}

impl Filter<'_> {
    fn takes(&self, case: &Case) -> bool {
        let name = case.name();
        match self.name {
            Some(start) => name.starts_with(start),
            None => {
                let one_in = if case.is_plain() { self.plain_one_in } else { self.one_in };
                let one_in = one_in * case.cost().div_ceil(self.affordable).max(1);
                one_in <= 1 || Rng::new(self.seed, &name).below(one_in) == 0
            }
        }
    }

    /// The cases for `world` ranks, those of a family one after the other.
    pub(crate) fn cases(&self, world: u32) -> Vec<Case> {
        let mut cases = Vec::new();
        for operation in self.operations {
            for family in self.families(*operation) {
                for count in sizes(*operation, self.sizes) {
                    for call in family.calls(world) {
                        variants(world, *count, call, |case| {
                            if self.takes(&case) {
                                cases.push(case);
                            }
                        });
                    }
                }
            }
        }
        cases
    }

    fn families(&self, operation: Operation) -> Vec<Family> {
        let all = match operation {
            Operation::AllReduce => true,
            Operation::ReduceScatter => false,
            Operation::Broadcast => return ways(Route::ALL).map(Family::Broadcasts).collect(),
            other => return vec![Family::Moves(other)],
        };
        let mut families = Vec::new();
        for dtype in self.dtypes {
            let wires: &[Wire] = match dtype {
                DType::F32 => &[Wire::Native, Wire::Bf16],
                _ => &[Wire::Native],
            };
            for wire in wires {
                let algorithms =
                    ways(Algorithm::ALL).filter(|algorithm| all || algorithm.is_none());
                families.extend(algorithms.map(|a| Family::Reduces(all, *dtype, *wire, a)));
                if all {
                    families.push(Family::Registered(*dtype, *wire));
                }
            }
        }
        families
    }
}

/// A barrier has no size: it is checked once.
fn sizes(operation: Operation, sizes: &[usize]) -> &[usize] {
    if operation == Operation::Barrier { &[0] } else { sizes }
}

/// Cases that are reported together.
enum Family {
    Reduces(bool, DType, Wire, Option<Algorithm>),
    Registered(DType, Wire),
    Broadcasts(Option<Route>),
    Moves(Operation),
}

impl Family {
    fn calls(&self, world: u32) -> Vec<Call> {
        let places = [false, true];
        match *self {
            Family::Reduces(all, dtype, wire, algorithm) => {
                let mut calls = Vec::new();
                for op in ReduceOp::ALL {
                    for in_place in places {
                        for absent in [None, Some(world / 2)] {
                            calls.push(Call::Reduce {
                                all,
                                dtype,
                                wire,
                                algorithm,
                                op,
                                in_place,
                                absent,
                            });
                        }
                    }
                }
                calls
            }
            Family::Registered(dtype, wire) => {
                // Not the only one: the reference has no bound for a maximum of nothing.
                let absent = (world > 1).then_some(Some(world / 2));
                let of_op = |op| {
                    let ranks = [None].into_iter().chain(absent);
                    ranks.map(move |absent| Call::Registered { dtype, wire, op, absent })
                };
                ReduceOp::ALL.into_iter().flat_map(of_op).collect()
            }
            Family::Moves(Operation::AllGather) => {
                places.map(|in_place| Call::AllGather { in_place }).into()
            }
            Family::Broadcasts(route) => {
                (0..world).map(|root| Call::Broadcast { root, route }).collect()
            }
            Family::Moves(Operation::Gather) => {
                let mut roots = vec![0, world / 2, world - 1];
                roots.dedup();
                let of_root = |root| Widths::ALL.map(|widths| Call::Gather { root, widths });
                roots.into_iter().flat_map(of_root).collect()
            }
            Family::Moves(_) => vec![Call::Barrier],
        }
    }
}

/// Everything that varies besides the call.
fn variants(world: u32, count: usize, call: Call, mut take: impl FnMut(Case)) {
    let only_plain = call == Call::Barrier;
    for style in Style::ALL {
        for values in Values::ALL {
            for misaligned in [false, true] {
                // Registered tensors begin aligned.
                if misaligned && matches!(call, Call::Registered { .. }) {
                    continue;
                }
                let case = Case { world, count, call, values, misaligned, style };
                if !only_plain || case.is_plain() {
                    take(case);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::OPERATIONS;
    use std::collections::HashSet;

    fn filter(name: Option<&str>, one_in: u64) -> Filter<'_> {
        Filter {
            operations: &OPERATIONS,
            dtypes: &DType::ALL,
            sizes: &[0, 7],
            name,
            one_in,
            plain_one_in: 1,
            affordable: u64::MAX,
            seed: 1,
        }
    }

    #[test]
    fn every_algorithm_and_every_route_is_taken() {
        let families: HashSet<_> = filter(None, 1).cases(3).iter().map(Case::family).collect();
        for algorithm in ways(Algorithm::ALL) {
            for types in ["f32/native", "f32/bf16", "f16/native", "bf16/native"] {
                let name = crate::parse::algorithm_name(algorithm);
                assert!(families.contains(&format!("all_reduce/{types}/{name}/w3")), "{name}");
            }
        }
        for route in ways(Route::ALL) {
            let name = crate::parse::route_name(route);
            assert!(families.contains(&format!("broadcast/bytes/{name}/w3")), "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_find_their_case() {
        let cases = filter(None, 1).cases(3);
        let names: HashSet<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        for case in cases.iter().step_by(97) {
            let name = case.name();
            assert_eq!(filter(Some(&name), 1000).cases(3), [*case]);
        }
    }

    #[test]
    fn a_share_keeps_every_plain_case() {
        let all = filter(None, 1).cases(2);
        let share = filter(None, 20).cases(2);
        let plain = |cases: &[Case]| cases.iter().filter(|case| case.is_plain()).count();
        assert_eq!(plain(&all), plain(&share));
        assert!(share.len() < all.len() / 5);
    }
}
