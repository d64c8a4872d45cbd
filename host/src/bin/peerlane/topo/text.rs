//! Measured links as tables for the terminal.
//!
//! Invariant: a table says whether its figures are simulated and how old they may be; a cell without
//! a figure is marked, and the reason stands below.

use peerlane::gpu::Backend;
use peerlane::links::{Found, Measurement, Quantity, Traffic, transport};
use peerlane::topology::Topology;
use std::fmt::Write;

/// Every position.
pub(crate) fn everyone(measurement: &Measurement) -> Vec<u32> {
    (0..measurement.gpus).collect()
}

/// The matrices, why cells are empty, islands and hubs.
pub(crate) fn measured(found: &Found) -> String {
    let measurement = &found.measurement;
    let mut text = format!("{}\n", heading(found));
    if measurement.gpus > 1 {
        text += "rows act (store, load, copy), columns are the GPUs whose memory is used\n";
    }
    for quantity in Quantity::ALL {
        if measurement.gpus < 2 {
            break;
        }
        for traffic in Traffic::ALL {
            let rows = measurement.matrix(quantity, traffic);
            let cell = |from: usize, to: usize| match rows[from][to] {
                _ if from == to => "X".to_owned(),
                figure => figure.map_or_else(|| "--".to_owned(), number),
            };
            let _ = write!(text, "\n{}: {}\n", quantity.title(), traffic.name());
            text += &table(rows.len(), cell);
        }
    }
    let missing = measurement.pairs.iter().filter_map(|pair| Some((pair, pair.reason.as_ref()?)));
    for (index, (pair, reason)) in missing.enumerate() {
        let gap = if index == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{gap}-- GPU{} to GPU{}: {reason}", pair.from, pair.to);
    }
    text + &groups(measurement)
}

fn heading(found: &Found) -> &'static str {
    match (found.measurement.backend, found.cached) {
        (Backend::Sim, _) => {
            "Measured (simulated GPUs: the figures are simulated and mean nothing)"
        }
        (Backend::Cuda, false) => "Measured just now",
        (Backend::Cuda, true) => "Measured earlier (from the cache; --refresh measures anew)",
    }
}

/// Islands and hubs.
fn groups(measurement: &Measurement) -> String {
    let mut text = "\n".to_owned();
    for (number, members) in measurement.islands().iter().enumerate() {
        let hub = measurement.hub(members).unwrap_or(members[0]);
        let names: Vec<_> = members.iter().map(|gpu| format!("GPU{gpu}")).collect();
        let _ = writeln!(text, "island {number}: {} (hub GPU{hub})", names.join(" "));
    }
    if let Some(hub) = measurement.hub(&everyone(measurement)) {
        let _ = writeln!(text, "hub of all: GPU{hub}");
    }
    text
}

/// How each pair can be served.
pub(crate) fn transports(topology: &Topology, measurement: Option<&Measurement>) -> String {
    let source = if measurement.is_some() { "by measurement" } else { "if the driver is right" };
    let cell = |from: usize, to: usize| {
        let how = transport(topology, measurement, from as u32, to as u32);
        how.map_or("X", |transport| transport.name()).to_owned()
    };
    let mut text = format!("Transports, {source}\n{}", table(topology.nodes.len(), cell));
    text += "  p2p   each GPU writes into the other's memory\n";
    text += "  host  only through host memory\n";
    text + "  same  two ranks on one GPU\n"
}

/// A figure in at most five characters, for the sizes that links have.
pub(crate) fn number(value: f64) -> String {
    match value {
        v if v >= 99_950.0 => format!("{v:.0e}"),
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Cells in columns of one width, under and beside the GPUs' positions.
fn table(size: usize, cell: impl Fn(usize, usize) -> String) -> String {
    let width = "GPU".len() + size.saturating_sub(1).to_string().len();
    let rows: Vec<Vec<String>> =
        (0..size).map(|from| (0..size).map(|to| cell(from, to)).collect()).collect();
    let widest = rows.iter().flatten().map(String::len).max().unwrap_or(0).max(width);
    let mut text = format!("{:width$}", "");
    for to in 0..size {
        let _ = write!(text, "  {:>widest$}", format!("GPU{to}"));
    }
    text.push('\n');
    for (from, row) in rows.iter().enumerate() {
        let _ = write!(text, "{:<width$}", format!("GPU{from}"));
        for cell in row {
            let _ = write!(text, "  {cell:>widest$}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use peerlane::links::{Figures, Pair, Quantities};

    /// Three GPUs, of which 0 does not reach 2, nor 2 GPU 0.
    pub(crate) fn three(backend: Backend) -> Measurement {
        let quantities = |n: f64| Quantities {
            latency_us: Some(1.0 + n),
            store_gbps: 350.0 + n,
            load_gbps: 30.25 + n,
            copy_gbps: 387.0 + n,
        };
        let pair = |from: u32, to: u32| {
            let n = f64::from(from + to);
            let figures = Figures { alone: quantities(n), loaded: quantities(n / 10.0) };
            let apart = from + to == 2;
            Pair {
                from,
                to,
                figures: (!apart).then_some(figures),
                reason: apart.then(|| "no way".into()),
            }
        };
        let all = (0..3).flat_map(|from| (0..3).map(move |to| (from, to)));
        let pairs = all.filter(|(a, b)| a != b).map(|(a, b)| pair(a, b)).collect();
        Measurement { backend, gpus: 3, message_bytes: 1 << 20, pairs }
    }

    #[test]
    fn tables_say_what_they_show() {
        let found = |backend, cached| {
            measured(&Found { measurement: three(backend), cached, notes: Vec::new() })
        };
        let text = found(Backend::Cuda, false);
        let expected = "
SM stores, GB/s: alone
      GPU0  GPU1  GPU2
GPU0     X   351    --
GPU1   351     X   353
GPU2    --   353     X
";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("\nlatency, us: all pairs at once\n"), "{text}");
        assert!(text.contains("-- GPU0 to GPU2: no way\n"), "{text}");
        assert!(
            text.contains("island 0: GPU0 (hub GPU0)\nisland 1: GPU1 GPU2 (hub GPU1)"),
            "{text}"
        );
        assert!(text.ends_with("hub of all: GPU1\n"), "{text}");
        assert!(found(Backend::Cuda, true).contains("from the cache"));
        assert!(found(Backend::Sim, false).contains("simulated and mean nothing"));
    }

    #[test]
    fn one_gpu_has_no_tables() {
        let measurement = Measurement { gpus: 1, pairs: Vec::new(), ..three(Backend::Cuda) };
        let text = measured(&Found { measurement, cached: false, notes: Vec::new() });
        assert_eq!(text, "Measured just now\n\nisland 0: GPU0 (hub GPU0)\nhub of all: GPU0\n");
    }

    #[test]
    fn numbers_are_short() {
        for (value, expected) in [
            (0.5, "0.50"),
            (9.996, "10.0"),
            (12.34, "12.3"),
            (99.96, "100"),
            (387.4, "387"),
            (1e6, "1e6"),
        ] {
            assert_eq!(number(value), expected);
        }
    }
}
