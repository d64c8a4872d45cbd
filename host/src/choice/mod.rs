//! Which algorithm a call takes when it does not say: by a table that was measured on this machine, or
//! else by a model of what each costs (docs/tuning.md).
//!
//! Invariant: a choice follows from what all ranks agreed on when they met, so all ranks make the same
//! one. Unless [`Config::exact`] is off, sums are taken in rank order and rounded once, whatever is chosen.

pub mod cost;
mod environment;
mod limits;
mod settle;
mod table;
#[cfg(test)]
mod tests;

pub use cost::{Cost, LinkClass, Links};
pub use environment::Tuning;
pub use limits::Limits;
pub(crate) use settle::{Known, Shown};
pub use table::{Entry, TuningTable, VERSION};

use crate::algorithm::{Algorithm, Pattern, Route};
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::plan::Shape;
use peerlane_device::abi::Format;

/// How many times cheaper the model must find an algorithm than the plain ones before it is chosen
/// unmeasured.
const MARGIN: f64 = 1.3;
/// The largest tensor that a call may have.
const LARGEST: usize = 1 << 34;
const PACKET: Algorithm = Algorithm::OneShot(Format::Packet);
const FULL: Algorithm = Algorithm::OneShot(Format::Full);

/// Where a choice came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The cost model.
    Model,
    /// A table that was measured.
    Table,
    /// One algorithm for all sizes.
    Fixed,
}

/// What the calls of a communicator take that do not choose for themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    all_reduce: Limits<Algorithm>,
    broadcast: Limits<Route>,
    source: Source,
    notes: Vec<String>,
}

impl Choice {
    /// What the cost model says. `exact`: whether sums must be taken in rank order and rounded once.
    pub fn modelled(shape: &Shape, links: &Links, exact: bool) -> Choice {
        let all_reduce = model_all_reduce(shape, links, exact);
        let broadcast = model_broadcast(shape, links);
        Choice { all_reduce, broadcast, source: Source::Model, notes: Vec::new() }
    }

    /// What a table says. `exact` as for [`Choice::modelled`].
    pub fn tuned(table: &TuningTable, exact: bool) -> Choice {
        Choice {
            all_reduce: table.all_reduces(exact),
            broadcast: table.broadcasts(),
            source: Source::Table,
            notes: Vec::new(),
        }
    }

    /// One algorithm and one route for all sizes.
    fn fixed(shape: &Shape) -> Choice {
        let algorithm = if shape.world <= 2 { FULL } else { Algorithm::TwoShot };
        Choice {
            all_reduce: Limits::always(algorithm),
            broadcast: Limits::always(Route::Direct),
            source: Source::Fixed,
            notes: Vec::new(),
        }
    }

    /// What `config` asks for, from what the ranks know.
    pub(crate) fn settle(config: &Config, shape: &Shape, known: &Known) -> Result<Choice> {
        check_fixed(config, shape.world)?;
        // What was measured of links says nothing of host memory.
        let links = known.links.filter(|_| !shape.host);
        let links = links.unwrap_or_else(|| Links::of(shape.class));
        let modelled = || Choice::modelled(shape, &links, config.exact);
        let mut notes = known.notes.clone();
        notes.extend(known.verdicts.all_notes());
        let mut choice = match &known.table {
            _ if config.fixed => Choice::fixed(shape),
            Some(table) => match (table.is_over(shape.host), &config.tuning) {
                (Ok(()), _) => Choice::tuned(table, config.exact),
                (Err(flaw), Tuning::File(path)) => {
                    let got = format!("{}: {}", path.display(), flaw.1);
                    return Err(settle::refused((flaw.0, got)));
                }
                (Err((expected, got)), _) => {
                    notes.push(format!("tuning: expected {expected}, got {got}: ignored"));
                    modelled()
                }
            },
            None => modelled(),
        };
        if let Some(algorithm) = config.algorithm {
            choice.all_reduce = Limits::always(algorithm);
        }
        if let Some(route) = config.route {
            choice.broadcast = Limits::always(route);
        }
        choice.notes = notes;
        Ok(choice)
    }

    /// For an all-reduce that sends elements of `wire_bytes` bytes in all.
    #[inline]
    pub fn all_reduce(&self, wire_bytes: usize) -> Algorithm {
        self.all_reduce.at(wire_bytes)
    }

    /// For a broadcast of `bytes` bytes.
    #[inline]
    pub fn broadcast(&self, bytes: usize) -> Route {
        self.broadcast.at(bytes)
    }

    /// All-reduces by size, in bytes on the wire.
    pub fn all_reduces(&self) -> &Limits<Algorithm> {
        &self.all_reduce
    }

    /// Broadcasts by size.
    pub fn broadcasts(&self) -> &Limits<Route> {
        &self.broadcast
    }

    /// Where it came from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What did not go as it should while it was looked for: a table in the cache that was left out of account, say.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Whether `algorithm` adds in rank order and rounds once. Between two ranks every order is that one.
pub fn is_exact(algorithm: Algorithm, world: u32) -> bool {
    matches!(algorithm, Algorithm::OneShot(_) | Algorithm::TwoShot | Algorithm::Staged)
        || world <= 2
}

/// Whether the bits of a sum do not depend on where in the tensor its elements lie: all elements go
/// along one tree.
pub fn is_uniform(algorithm: Algorithm, world: u32) -> bool {
    matches!(algorithm, Algorithm::Tree | Algorithm::Scheduled(Pattern::Tree))
        || is_exact(algorithm, world)
}

fn check_fixed(config: &Config, world: u32) -> Result<()> {
    let Some(algorithm) = config.algorithm.filter(|a| config.fixed && !is_uniform(*a, world))
    else {
        return Ok(());
    };
    let uniform = Algorithm::ALL.into_iter().filter(|other| is_uniform(*other, world));
    let names: Vec<_> = uniform.map(Algorithm::name).collect();
    Err(Error::InvalidArgument {
        op: "connect",
        argument: "algorithm",
        expected: format!(
            "one whose sums are the same at any size, as fixed asks: {}",
            names.join(", ")
        ),
        got: algorithm.name().into(),
    })
}

/// The cheapest of `plain`, unless one of `others` is cheaper by the margin: then that one. The first of
/// equals.
fn cheapest<T: Copy>(plain: &[(T, Cost)], others: &[(T, Cost)], bytes: usize) -> Option<T> {
    let least = |of: &[(T, Cost)]| {
        let costs = of.iter().map(|(choice, cost)| (*choice, cost.us(bytes)));
        costs.reduce(|best, next| if next.1 < best.1 { next } else { best })
    };
    let (plain, other) = (least(plain)?, least(others));
    Some(other.filter(|other| other.1 * MARGIN < plain.1).unwrap_or(plain).0)
}

fn model_all_reduce(shape: &Shape, links: &Links, exact: bool) -> Limits<Algorithm> {
    if shape.world < 2 {
        return Limits::always(FULL);
    }
    let cost = |algorithm| (algorithm, Cost::of_all_reduce(algorithm, shape, links));
    let plain = [PACKET, FULL, Algorithm::TwoShot].map(cost);
    // Scheduled algorithms leave the multiprocessors to others, and are slower alone.
    let others = [
        Algorithm::Staged,
        Algorithm::Ring,
        Algorithm::Tree,
        Algorithm::DoubleTree,
        Algorithm::Hierarchical,
    ];
    let others: Vec<_> = others
        .into_iter()
        .filter(|algorithm| !exact || is_exact(*algorithm, shape.world))
        .map(cost)
        .collect();
    Limits::found(|bytes| cheapest(&plain, &others, bytes).unwrap_or(FULL), LARGEST)
}

fn model_broadcast(shape: &Shape, links: &Links) -> Limits<Route> {
    if shape.world < 2 {
        return Limits::always(Route::Direct);
    }
    let cost = |route| (route, Cost::of_broadcast(route, shape, links));
    let (plain, others) = ([cost(Route::Direct)], Route::FUSED.map(cost));
    Limits::found(|bytes| cheapest(&plain, &others, bytes).unwrap_or(Route::Direct), LARGEST)
}
