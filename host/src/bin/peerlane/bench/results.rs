//! Results of `peerlane bench`: what a JSON file holds, and what tables and plots are drawn from.
//!
//! Invariant: every number is derived from the samples once, here.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The times of one contender at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Timing {
    /// Median of the samples, microseconds per call. A sample is the slowest rank's.
    pub(crate) median_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// The fastest sample.
    pub(crate) min_us: f64,
    /// Size over median, GB/s.
    pub(crate) algbw: f64,
    /// `algbw` times the factor of the collective, as nccl-tests defines it.
    pub(crate) busbw: f64,
}

impl Timing {
    /// Sums up `samples`, each in microseconds per call.
    pub(crate) fn new(mut samples: Vec<f64>, bytes: usize, bus_factor: f64) -> Timing {
        samples.sort_by(f64::total_cmp);
        let median_us = percentile(&samples, 0.5);
        // Bytes per microsecond are megabytes per second.
        let algbw = if median_us > 0.0 { bytes as f64 / median_us / 1e3 } else { 0.0 };
        let min_us = samples.first().copied().unwrap_or(0.0);
        let (p99_us, busbw) = (percentile(&samples, 0.99), algbw * bus_factor);
        Timing { median_us, p99_us, min_us, algbw, busbw }
    }
}

/// The smallest sample that at least this share of all does not exceed.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// What the model says of a call on a machine that is not here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Predicted {
    /// Microseconds on the virtual clock.
    pub(crate) time_us: f64,
    /// Transfers that follow one another.
    pub(crate) steps: u32,
    /// Bytes out of the rank that sends most.
    pub(crate) sent_bytes: u64,
}

/// One size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Size as nccl-tests counts it.
    pub(crate) bytes: usize,
    /// Elements that the call is given.
    pub(crate) count: usize,
    /// Peerlane; nothing where its result was wrong, since a wrong result is not timed.
    pub(crate) ours: Option<Timing>,
    /// NCCL, where it was asked for.
    pub(crate) nccl: Option<Timing>,
    /// The model's answer, on simulated GPUs, whose own times mean nothing.
    pub(crate) predicted: Option<Predicted>,
    /// Whether the call was made and its result looked at. (Files from before there were predictions
    /// hold only such rows.)
    #[serde(default = "yes")]
    pub(crate) checked: bool,
    /// What was wrong with a result.
    pub(crate) failure: Option<String>,
}

fn yes() -> bool {
    true
}

impl Row {
    /// Microseconds, measured or predicted.
    pub(crate) fn time_us(&self) -> Option<f64> {
        let measured = self.ours.as_ref().map(|timing| timing.median_us);
        measured.or(self.predicted.as_ref().map(|predicted| predicted.time_us))
    }

    /// How many times faster Peerlane is than NCCL.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let (ours, nccl) = (self.ours.as_ref()?, self.nccl.as_ref()?);
        (ours.median_us > 0.0).then(|| nccl.median_us / ours.median_us)
    }
}

/// One collective over a range of sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// The collective.
    pub(crate) op: String,
    /// Element type.
    pub(crate) dtype: String,
    /// Wire type.
    pub(crate) wire: String,
    /// Reduction operator.
    pub(crate) reduce: String,
    /// Algorithm of an all-reduce, route of a broadcast.
    pub(crate) algorithm: String,
    /// Root, where there is one.
    pub(crate) root: u32,
    /// Number of ranks.
    pub(crate) world: u32,
    /// `graph` or `eager`.
    pub(crate) mode: String,
    /// Calls in a sample.
    pub(crate) calls: usize,
    /// Samples.
    pub(crate) replays: usize,
    /// The machine that times are predicted for.
    pub(crate) fabric: Option<String>,
    /// The sizes, in order.
    pub(crate) rows: Vec<Row>,
}

impl Series {
    /// For example `all_reduce f32 sum, wire bf16, two-shot, 4 ranks`.
    pub(crate) fn title(&self) -> String {
        self.title_of(&format!(", {}", self.algorithm))
    }

    /// The same without the algorithm: what series that can be compared have in common.
    pub(crate) fn subject(&self) -> String {
        self.title_of("")
    }

    fn title_of(&self, algorithm: &str) -> String {
        let mut title = self.op.clone();
        if self.op != "barrier" {
            title += &format!(" {}", self.dtype);
        }
        if matches!(self.op.as_str(), "all_reduce" | "reduce_scatter") {
            title += &format!(" {}", self.reduce);
            if self.wire != "native" {
                title += &format!(", wire {}", self.wire);
            }
        }
        if self.op == "all_reduce" {
            title += algorithm;
        }
        if matches!(self.op.as_str(), "broadcast" | "gather") {
            title += &format!(", root {}", self.root);
        }
        // Files from before there was a choice say "auto" of every broadcast.
        if self.op == "broadcast" && self.algorithm != "auto" {
            title += algorithm;
        }
        title += &format!(", {} rank{}", self.world, if self.world == 1 { "" } else { "s" });
        self.fabric.iter().fold(title, |title, fabric| title + &format!(", model of {fabric}"))
    }
}

/// A file of results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Command, date, versions, devices.
    #[serde(flatten)]
    pub(crate) provenance: serde_json::Map<String, Value>,
    /// NCCL's version, where it took part.
    pub(crate) nccl_version: Option<String>,
    /// The collectives.
    pub(crate) series: Vec<Series>,
}

impl Results {
    /// A field of the provenance that is a string.
    pub(crate) fn provenance(&self, key: &str) -> &str {
        self.provenance.get(key).and_then(Value::as_str).unwrap_or("unknown")
    }

    /// For example `2 x NVIDIA H200`.
    pub(crate) fn devices(&self) -> String {
        let devices = self.provenance.get("devices").and_then(Value::as_array);
        let devices = devices.map_or(&[][..], Vec::as_slice);
        let name = devices.first().and_then(|d| d["name"].as_str()).unwrap_or("no device");
        format!("{} x {name}", devices.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timing_of_samples() {
        let samples = (1..=20).rev().map(f64::from).collect();
        let timing = Timing::new(samples, 1 << 20, 1.5);
        assert_eq!((timing.min_us, timing.median_us, timing.p99_us), (1.0, 10.0, 20.0));
        assert_eq!(timing.algbw, (1 << 20) as f64 / 10.0 / 1e3);
        assert_eq!(timing.busbw, timing.algbw * 1.5);
        assert_eq!(Timing::new(vec![], 1, 1.0).algbw, 0.0);
    }
}
