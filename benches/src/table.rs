//! What `kernels` prints and writes: rows of measurements, as a table for people and as JSON.

use crate::rig::Timing;
use peerlane::gpu::Properties;
use serde::Serialize;
use std::path::Path;

/// One measurement of one kernel on one GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SoloRow {
    /// The kernel's symbol, or what else was timed.
    pub name: String,
    /// Bytes of the tensor.
    pub bytes: usize,
    /// Blocks of the launch; 0 where the driver chose.
    pub blocks: u32,
    /// Threads of a block; 0 where the driver chose.
    pub threads: u32,
    /// The time of one launch.
    #[serde(flatten)]
    pub timing: Timing,
    /// Memory read and written in the median time, in GB/s.
    pub gb_per_s: f64,
}

impl SoloRow {
    /// The rate at which `traffic` bytes moved in the median time, in GB/s.
    pub fn rate(traffic: u64, timing: Timing) -> f64 {
        if timing.median_us > 0.0 { traffic as f64 / timing.median_us / 1e3 } else { 0.0 }
    }
}

/// One measurement of one pair of ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairRow {
    /// Ordinals of the two GPUs; equal where one GPU held both ranks.
    pub gpus: [u32; 2],
    /// What was timed.
    pub name: &'static str,
    /// Its time, or why there is none.
    pub timing: Result<Timing, String>,
}

/// Everything that one run measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What makes these numbers again.
    pub command: String,
    /// CUDA version of the driver, (major, minor).
    pub driver: (u32, u32),
    /// The GPUs, by ordinal.
    pub gpus: Vec<Properties>,
    /// Kernels alone on the first GPU.
    pub solo: Vec<SoloRow>,
    /// Pairs of ranks.
    pub pairs: Vec<PairRow>,
}

impl Report {
    /// Writes the report as JSON.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(self).map_err(|error| error.to_string())?;
        std::fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// The line over the rows of kernels.
pub fn solo_header() -> String {
    format!(
        "{:<42} {:>10} {:>12} {:>10} {:>10} {:>9}",
        "kernel", "bytes", "grid", "median us", "least us", "GB/s"
    )
}

/// A kernel's row.
pub fn solo_line(row: &SoloRow) -> String {
    let grid = match row.blocks {
        0 => "driver's".into(),
        blocks => format!("{blocks} x {}", row.threads),
    };
    let Timing { median_us, least_us } = row.timing;
    format!(
        "{:<42} {:>10} {grid:>12} {median_us:>10.2} {least_us:>10.2} {:>9.1}",
        row.name,
        size(row.bytes),
        row.gb_per_s
    )
}

/// The line over the rows of pairs.
pub fn pair_header() -> String {
    format!("{:<42} {:>10} {:>10}", "pair", "median us", "least us")
}

/// A pair's row.
pub fn pair_line(row: &PairRow) -> String {
    let [from, to] = row.gpus;
    let name = format!("{}, GPU {from} and GPU {to}", row.name);
    match &row.timing {
        Ok(timing) => format!("{name:<42} {:>10.2} {:>10.2}", timing.median_us, timing.least_us),
        Err(reason) => format!("{name:<42} {reason}"),
    }
}

/// A size in the largest unit that divides it.
fn size(bytes: usize) -> String {
    match bytes {
        0 => "0".into(),
        _ if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing { least_us: 1.5, median_us: 2.0 };

    #[test]
    fn columns_line_up() {
        let row = |blocks, bytes| SoloRow {
            name: "peerlane_local_reduce_bf16".into(),
            bytes,
            blocks,
            threads: 128,
            timing: TIMING,
            gb_per_s: SoloRow::rate(3 * bytes as u64, TIMING),
        };
        let rows = [row(0, 0), row(132, 16 << 10), row(132, 256 << 20), row(1, 100)];
        for line in rows.iter().map(solo_line) {
            assert_eq!(line.len(), solo_header().len(), "{line}");
        }
        assert!(
            solo_line(&rows[1]).contains("16 KiB    132 x 128       2.00       1.50      24.6")
        );
    }

    #[test]
    fn a_report_is_json() {
        let report = Report {
            command: "cargo bench".into(),
            driver: (13, 0),
            gpus: Vec::new(),
            solo: Vec::new(),
            pairs: vec![
                PairRow { gpus: [0, 1], name: "barrier", timing: Ok(TIMING) },
                PairRow { gpus: [0, 2], name: "probe", timing: Err("unreachable".into()) },
            ],
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["pairs"][0]["timing"]["Ok"]["median_us"], 2.0);
        assert_eq!(json["pairs"][1]["timing"]["Err"], "unreachable");
    }
}
