//! Values of options: byte sizes, element types, operators.
//!
//! Invariant: a value that does not parse names what was expected and what came.

use peerlane::algorithm::UnknownName;
use peerlane::model::Preset;
use peerlane::{Algorithm, DType, Operation, ReduceOp, Route, Transport, Wire};
use std::str::FromStr;
use std::time::Duration;

/// The collectives, in the order in which they are reported.
pub(crate) const OPERATIONS: [Operation; 6] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::Broadcast,
    Operation::Gather,
    Operation::Barrier,
];

/// Finds the choice called `text`.
fn choose<T: Copy>(
    text: &str,
    choices: &[T],
    name: impl Fn(T) -> &'static str,
) -> Result<T, String> {
    let found = choices.iter().copied().find(|choice| name(*choice) == text);
    found.ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|choice| name(*choice)).collect();
        format!("expected one of {}, got {text}", names.join(", "))
    })
}

/// A collective, with dashes or underscores.
pub(crate) fn operation(text: &str) -> Result<Operation, String> {
    choose(&text.replace('-', "_"), &OPERATIONS, Operation::name)
}

/// An element type.
pub(crate) fn dtype(text: &str) -> Result<DType, String> {
    choose(text, &DType::ALL, DType::name)
}

/// A reduction operator.
pub(crate) fn reduce_op(text: &str) -> Result<ReduceOp, String> {
    choose(text, &ReduceOp::ALL, ReduceOp::name)
}

/// The name of a wire type.
pub(crate) const fn wire_name(wire: Wire) -> &'static str {
    match wire {
        Wire::Native => "native",
        Wire::Bf16 => "bf16",
    }
}

/// A wire type.
pub(crate) fn wire(text: &str) -> Result<Wire, String> {
    choose(text, &[Wire::Native, Wire::Bf16], wire_name)
}

/// The name of a way to carry out an all-reduce; `None` leaves the choice to the plan.
pub(crate) const fn algorithm_name(algorithm: Option<Algorithm>) -> &'static str {
    match algorithm {
        None => "auto",
        Some(algorithm) => algorithm.name(),
    }
}

/// The name of a way to carry out a broadcast; `None` leaves the choice to the plan.
pub(crate) const fn route_name(route: Option<Route>) -> &'static str {
    match route {
        None => "auto",
        Some(route) => route.name(),
    }
}

/// The value of `--algorithm`: ways to carry out an all-reduce, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Algorithms(pub(crate) Vec<Option<Algorithm>>);

/// The value of `--route`: ways to carry out a broadcast, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Routes(pub(crate) Vec<Option<Route>>);

/// A way to carry out an all-reduce, or all of them.
pub(crate) fn algorithms(text: &str) -> Result<Algorithms, String> {
    ways(text, &Algorithm::ALL).map(Algorithms)
}

/// A way to carry out a broadcast, or all of them.
pub(crate) fn routes(text: &str) -> Result<Routes, String> {
    ways(text, &Route::ALL).map(Routes)
}

fn ways<T: Copy + FromStr<Err = UnknownName>>(
    text: &str,
    all: &[T],
) -> Result<Vec<Option<T>>, String> {
    match text {
        "auto" => Ok(vec![None]),
        "all" => Ok(all.iter().copied().map(Some).collect()),
        _ => {
            let known =
                |error: UnknownName| error.to_string().replacen("one of ", "one of auto, all, ", 1);
            text.parse().map(|way| vec![Some(way)]).map_err(known)
        }
    }
}

/// A machine that the model knows.
pub(crate) fn fabric(text: &str) -> Result<Preset, String> {
    text.parse().map_err(|error: UnknownName| error.to_string())
}

/// What carries data from rank to rank.
pub(crate) fn transport(text: &str) -> Result<Transport, String> {
    choose(text, &Transport::ALL, Transport::name)
}

/// A time in seconds, with an optional suffix s.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let digits = text.strip_suffix('s').unwrap_or(text);
    let seconds = digits.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|time| !time.is_zero() && *time <= Duration::from_secs(86_400))
        .ok_or_else(|| format!("expected seconds above 0 such as 60s, at most a day, got {text}"))
}

/// A number of bytes, with an optional suffix K, M or G.
pub(crate) fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || format!("expected a size such as 512, 64K or 1M, got {text}");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// The sizes from `--min` to `--max`, each `factor` times the one before; `least` is the smallest that means
/// something.
pub(crate) fn sizes(
    least: usize,
    min: usize,
    max: usize,
    factor: usize,
) -> Result<Vec<usize>, String> {
    if min < least || min > max {
        let (least, max) = (bytes_name(least), bytes_name(max));
        return Err(format!("--min: expected {least} to {max}, got {}", bytes_name(min)));
    }
    let next = |size: &usize| size.checked_mul(factor).filter(|next| *next <= max);
    Ok(std::iter::successors(Some(min), next).collect())
}

/// Writes a number of bytes as briefly as it reads back: `65536` as `64K`.
pub(crate) fn bytes_name(bytes: usize) -> String {
    for (shift, suffix) in [(30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts() {
        assert_eq!(bytes("1"), Ok(1));
        assert_eq!(bytes("64K"), Ok(65536));
        assert_eq!(bytes("3M"), Ok(3 << 20));
        assert!(bytes("K").unwrap_err().contains("got K"));
        assert!(bytes("-1").is_err());
        assert!(bytes("99999999999G").is_err());
        for size in [0, 1, 1000, 1024, 65536, 3 << 20, 1 << 30] {
            assert_eq!(bytes(&bytes_name(size)), Ok(size));
        }
    }

    #[test]
    fn ranges_of_sizes() {
        assert_eq!(sizes(1, 1 << 10, 5 << 10, 2), Ok(vec![1 << 10, 2 << 10, 4 << 10]));
        assert_eq!(sizes(2, 2, 2, 4), Ok(vec![2]));
        assert_eq!(sizes(1, usize::MAX, usize::MAX, 2), Ok(vec![usize::MAX]));
        assert_eq!(sizes(2, 1, 64 << 10, 4), Err("--min: expected 2 to 64K, got 1".into()));
        assert_eq!(sizes(1, 2 << 20, 1 << 20, 4), Err("--min: expected 1 to 1M, got 2M".into()));
    }

    #[test]
    fn times() {
        assert_eq!(seconds("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "s", "0", "-1s", "nan", "inf", "1m", "1e9"] {
            assert!(seconds(wrong).unwrap_err().ends_with(&format!("got {wrong}")), "{wrong}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(operation("gather"), Ok(Operation::Gather));
        assert_eq!(transport("host"), Ok(Transport::Host));
        assert_eq!(operation("all-reduce"), operation("all_reduce"));
        assert_eq!(algorithms("auto"), Ok(Algorithms(vec![None])));
        assert_eq!(algorithms("two-shot"), Ok(Algorithms(vec![Some(Algorithm::TwoShot)])));
        assert_eq!(algorithms("all").unwrap().0.len(), Algorithm::ALL.len());
        assert!(algorithms("two").unwrap_err().starts_with("expected one of auto, all, packet, "));
        assert_eq!(routes("hub"), Ok(Routes(vec![Some(Route::Hub)])));
        assert_eq!(routes("all").unwrap().0.len(), Route::ALL.len());
        assert!(routes("ring").unwrap_err().starts_with("expected one of auto, all, direct, "));
        assert_eq!(fabric("pcie"), Ok(Preset::Pcie));
        assert_eq!(
            dtype("f64").unwrap_err(),
            "expected one of f32, f16, bf16, got f64".to_string()
        );
    }
}
