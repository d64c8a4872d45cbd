//! One case of `peerlane check`: a collective with everything that is varied about it.
//!
//! Invariant: a case's name says all of it. Its inputs follow from the name and the seed alone, so
//! the name replays the case.

use crate::parse::{algorithm_name, route_name, wire_name};
use peerlane::cases::Values;
use peerlane::{Algorithm, DType, Operation, ReduceOp, Route, Wire};

/// What the ranks are asked to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Call {
    /// An all-reduce or a reduce-scatter.
    Reduce {
        /// `false`: a reduce-scatter.
        all: bool,
        dtype: DType,
        wire: Wire,
        algorithm: Option<Algorithm>,
        op: ReduceOp,
        /// Source and destination are the same memory.
        in_place: bool,
        /// A rank that contributes nothing.
        absent: Option<u32>,
    },
    /// An all-reduce of registered tensors, in place.
    Registered {
        dtype: DType,
        wire: Wire,
        op: ReduceOp,
        /// A rank that contributes nothing.
        absent: Option<u32>,
    },
    /// An all-gather; in place, each rank's bytes already lie in its destination.
    AllGather { in_place: bool },
    /// A broadcast.
    Broadcast { root: u32, route: Option<Route> },
    /// A gather.
    Gather { root: u32, widths: Widths },
    /// A barrier.
    Barrier,
}

/// What the ranks bring to a gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Widths {
    /// All the same.
    Even,
    /// Each rank something else.
    Uneven,
    /// Every other rank calls, but brings nothing.
    Zeros,
    /// Every other rank does not call.
    Subset,
    /// All but the root.
    RootEmpty,
}

impl Widths {
    pub(crate) const ALL: [Widths; 5] =
        [Widths::Even, Widths::Uneven, Widths::Zeros, Widths::Subset, Widths::RootEmpty];

    const fn name(self) -> &'static str {
        match self {
            Widths::Even => "even",
            Widths::Uneven => "uneven",
            Widths::Zeros => "zeros",
            Widths::Subset => "subset",
            Widths::RootEmpty => "root-empty",
        }
    }

    /// Bytes per row that `rank` brings, `base` being the usual number.
    pub(crate) const fn of(self, rank: u32, root: u32, base: usize) -> usize {
        let odd = rank % 2 == 1;
        match self {
            Widths::Even => base,
            Widths::Uneven => base + 5 * rank as usize,
            Widths::Zeros | Widths::Subset if odd && rank != root => 0,
            Widths::RootEmpty if rank == root => 0,
            _ => base,
        }
    }

    /// Whether `rank` takes part in the call.
    pub(crate) fn calls(self, rank: u32, root: u32) -> bool {
        self != Widths::Subset || rank == root || rank.is_multiple_of(2)
    }
}

/// How a case's calls are issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// One call, then the same again, which must give the same bits.
    Once,
    /// Several calls with different inputs, one behind the other without waiting.
    Queued,
    /// Two calls captured in a graph, replayed with different inputs.
    Graph,
}

impl Style {
    pub(crate) const ALL: [Style; 3] = [Style::Once, Style::Queued, Style::Graph];

    const fn name(self) -> &'static str {
        match self {
            Style::Once => "once",
            Style::Queued => "queued",
            Style::Graph => "graph",
        }
    }

    /// Calls issued before anything is looked at.
    pub(crate) const fn calls(self) -> usize {
        match self {
            Style::Once => 1,
            Style::Queued => 5,
            Style::Graph => 2,
        }
    }

    /// How often that happens.
    pub(crate) const fn replays(self) -> usize {
        match self {
            Style::Once => 2,
            Style::Queued => 1,
            Style::Graph => 3,
        }
    }
}

/// One case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Case {
    /// Number of ranks.
    pub(crate) world: u32,
    /// Elements of a reduction (per rank's part of a reduce-scatter); bytes of everything else
    /// (per rank of an all-gather, per row and rank of a gather).
    pub(crate) count: usize,
    pub(crate) call: Call,
    pub(crate) values: Values,
    /// Tensors start one element, or an odd number of bytes, after an aligned address.
    pub(crate) misaligned: bool,
    pub(crate) style: Style,
}

impl Case {
    /// What is reported in one line: operation, types, algorithm, ranks.
    pub(crate) fn family(&self) -> String {
        let world = self.world;
        let name = self.operation().name();
        match self.call {
            Call::Reduce { all, dtype, wire, algorithm, .. } => {
                let algorithm =
                    if all { format!("/{}", algorithm_name(algorithm)) } else { String::new() };
                format!("{name}/{}/{}{algorithm}/w{world}", dtype.name(), wire_name(wire))
            }
            Call::Registered { dtype, wire, .. } => {
                format!("{name}/{}/{}/registered/w{world}", dtype.name(), wire_name(wire))
            }
            Call::Broadcast { route, .. } => {
                format!("{name}/bytes/{}/w{world}", route_name(route))
            }
            _ => format!("{name}/bytes/w{world}"),
        }
    }

    /// The whole case.
    pub(crate) fn name(&self) -> String {
        let what = match self.call {
            Call::Reduce { op, in_place, absent, .. } => {
                format!("{}/{}/{}", op.name(), place_name(in_place), absent_name(absent))
            }
            Call::Registered { op, absent, .. } => {
                format!("{}/{}/{}", op.name(), place_name(true), absent_name(absent))
            }
            Call::AllGather { in_place } => place_name(in_place).into(),
            Call::Broadcast { root, .. } => format!("root{root}"),
            Call::Gather { root, widths } => format!("root{root}/{}", widths.name()),
            Call::Barrier => "barrier".into(),
        };
        let start = if self.misaligned { "odd" } else { "aligned" };
        let (family, values, style) = (self.family(), self.values.name(), self.style.name());
        format!("{family}/n{}/{what}/{start}/{values}/{style}", self.count)
    }

    /// The collective.
    pub(crate) fn operation(&self) -> Operation {
        match self.call {
            Call::Reduce { all: true, .. } | Call::Registered { .. } => Operation::AllReduce,
            Call::Reduce { all: false, .. } => Operation::ReduceScatter,
            Call::AllGather { .. } => Operation::AllGather,
            Call::Broadcast { .. } => Operation::Broadcast,
            Call::Gather { .. } => Operation::Gather,
            Call::Barrier => Operation::Barrier,
        }
    }

    /// Whether the ranks may say that they do not do this, even where peers reach each other and queues are
    /// plenty.
    pub(crate) fn is_impossible(&self) -> bool {
        let Call::Reduce { wire, algorithm, .. } = self.call else { return false };
        wire != Wire::Native && algorithm.is_some_and(Algorithm::is_scheduled)
    }

    /// Whether there are ranks that do not do this: copies and registered tensors ask more of a machine.
    pub(crate) fn is_demanding(&self) -> bool {
        match self.call {
            Call::Reduce { algorithm, .. } => algorithm.is_some_and(Algorithm::is_scheduled),
            Call::Broadcast { route, .. } => route.is_some_and(Route::is_scheduled),
            Call::Registered { .. } => true,
            _ => false,
        }
    }

    /// Elements that the case sends from rank to rank.
    pub(crate) fn cost(&self) -> u64 {
        let pairs = u64::from(self.world) * u64::from(self.world - 1).max(1);
        (self.count * self.style.calls() * self.style.replays()) as u64 * pairs
    }

    /// The case without anything unusual.
    pub(crate) fn is_plain(&self) -> bool {
        let plain_call = match self.call {
            Call::Reduce { in_place, absent, .. } => !in_place && absent.is_none(),
            Call::Registered { absent, .. } => absent.is_none(),
            Call::AllGather { in_place } => !in_place,
            Call::Broadcast { .. } | Call::Barrier => true,
            Call::Gather { widths, .. } => widths == Widths::Even,
        };
        plain_call
            && !self.misaligned
            && self.values == Values::Ordinary
            && self.style == Style::Once
    }
}

fn absent_name(absent: Option<u32>) -> String {
    absent.map_or("all".into(), |rank| format!("without{rank}"))
}

const fn place_name(in_place: bool) -> &'static str {
    if in_place { "in-place" } else { "out-of-place" }
}
