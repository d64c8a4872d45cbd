//! Results as text: lines on the terminal, Markdown tables for the documentation.
//!
//! Invariant: a table names the command, the GPUs, the driver and the date it came from, so that no
//! figure in the documentation is without its origin.

use super::plot;
use super::results::{Predicted, Results, Row, Series, Timing};
use crate::parse::bytes_name;
use crate::{Outcome, drawing};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Options of `peerlane report`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Files that `peerlane bench --json` wrote.
    #[arg(required = true, value_name = "RESULTS")]
    files: Vec<PathBuf>,
    /// Write the tables to this file. Left out: to standard output.
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Draw the first file's results into this file, .svg or .png.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Reads results and writes tables and plots of them.
pub(crate) fn run(options: &Options) -> Outcome {
    let all = options.files.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let tables: Vec<_> = all.iter().map(markdown).collect();
    match &options.table {
        Some(path) => write(path, &tables.join("\n"))?,
        None => print!("{}", tables.join("\n")),
    }
    if let (Some(path), Some(results)) = (&options.plot, all.first()) {
        drawing::prepare(path)?;
        plot::draw(path, results)?;
    }
    Ok(true)
}

pub(crate) fn read(path: &Path) -> Result<Results, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("report: cannot read {}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        format!("report: {}: expected results of peerlane bench, got {error}", path.display())
    })
}

/// Writes a table.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text)
        .map_err(|error| format!("--table: cannot write {}: {error}", path.display()))
}

/// The heading of the lines that [`line`] makes of predictions.
pub(crate) fn predicted_head() -> String {
    let (head, count) = (format!("# {:>7}", "size"), "count");
    head + &format!(" {count:>10} {:>10} {:>6} {:>12}  check on", "model us", "steps", "sent/rank")
}

/// The heading of the lines that [`line`] makes.
pub(crate) fn line_head(compared: bool) -> String {
    let mut head = format!(
        "# {:>7} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "size", "count", "time us", "p99 us", "algbw GB/s", "busbw GB/s"
    );
    if compared {
        head += &format!(" {:>10} {:>10} {:>10}", "nccl us", "p99 us", "nccl/ours");
    }
    head + "  check on"
}

/// One size, for the terminal.
pub(crate) fn line(row: &Row, backend: &str) -> String {
    let mut line = format!("{:>9} {:>10}", bytes_name(row.bytes), row.count);
    if let Some(failure) = &row.failure {
        return line + &format!("  FAILED on {backend}: {failure}");
    }
    if let Some(Predicted { time_us, steps, sent_bytes }) = &row.predicted {
        line += &format!(" {time_us:>10.2} {steps:>6} {sent_bytes:>12}");
        let check = if row.checked { "ok   " } else { "model" };
        return line + &format!("  {check} {backend}");
    }
    if let Some(Timing { median_us, p99_us, algbw, busbw, .. }) = &row.ours {
        line += &format!(" {median_us:>10.2} {p99_us:>10.2} {algbw:>10.2} {busbw:>10.2}");
    }
    if let Some(Timing { median_us, p99_us, .. }) = &row.nccl {
        let ratio = row.ratio().unwrap_or(0.0);
        line += &format!(" {median_us:>10.2} {p99_us:>10.2} {ratio:>10.2}");
    }
    line + &format!("  ok    {backend}")
}

/// A file of results as Markdown.
pub(crate) fn markdown(results: &Results) -> String {
    let backend = results.provenance("backend");
    let mut text = format!("{} ({backend}), ", results.devices());
    if results.provenance.get("driver").is_some_and(|driver| driver.is_string()) {
        let _ = write!(text, "driver {}, ", results.provenance("driver"));
    }
    if let Some(version) = &results.nccl_version {
        let _ = write!(text, "NCCL {version}, ");
    }
    let (version, date) = (results.provenance("version"), results.provenance("date"));
    let _ = writeln!(text, "peerlane {version}, {date}.");
    let _ = writeln!(text, "\n    {}", results.provenance("command"));
    if backend == "sim" {
        let _ = writeln!(text, "\nSimulated GPUs: a time is a model's, or means nothing.");
    }
    for series in &results.series {
        text += &table(series);
    }
    text + &comparison(&results.series)
}

/// Series that differ in their algorithm only, as tables with a column for each.
pub(crate) fn comparison(series: &[Series]) -> String {
    let mut subjects: Vec<String> = series.iter().map(Series::subject).collect();
    subjects.dedup();
    let mut text = String::new();
    for subject in subjects {
        let same: Vec<_> = series.iter().filter(|s| s.subject() == subject).collect();
        let Some(first) = same.first().filter(|_| same.len() > 1) else { continue };
        let names: Vec<_> = same.iter().map(|s| s.algorithm.as_str()).collect();
        let _ = writeln!(text, "\n### {subject}: microseconds\n\n| size | {} |", names.join(" | "));
        let _ = writeln!(text, "|---:|{}", "---:|".repeat(same.len()));
        for row in 0..first.rows.len() {
            let time = |series: &&Series| {
                let us = series.rows.get(row).and_then(Row::time_us);
                us.map_or("FAILED".into(), |us| format!("{us:.2}"))
            };
            let times: Vec<_> = same.iter().map(time).collect();
            let _ =
                writeln!(text, "| {} | {} |", bytes_name(first.rows[row].bytes), times.join(" | "));
        }
    }
    text
}

/// Predictions.
fn predicted_table(series: &Series) -> String {
    let mut text = format!("\n### {}\n\n", series.title());
    text += "| size | model, us | steps | bytes out of a rank |\n|---:|---:|---:|---:|\n";
    for row in &series.rows {
        let size = bytes_name(row.bytes);
        let _ = match &row.predicted {
            Some(Predicted { time_us, steps, sent_bytes }) => {
                writeln!(text, "| {size} | {time_us:.2} | {steps} | {sent_bytes} |")
            }
            None => writeln!(text, "| {size} | FAILED | | |"),
        };
    }
    text
}

fn table(series: &Series) -> String {
    if series.fabric.is_some() {
        return predicted_table(series);
    }
    let compared = series.rows.iter().any(|row| row.nccl.is_some());
    let Series { mode, calls, replays, .. } = series;
    let how = if mode == "eager" { "issued one by one" } else { "in a graph" };
    let mut text =
        format!("\n### {}\n\n{calls} calls {how}, {replays} samples.\n\n", series.title());
    text += "| size | time, us | p99, us | algbw, GB/s | busbw, GB/s |";
    text += if compared { " NCCL, us | NCCL p99, us | NCCL / ours |\n" } else { "\n" };
    text += "|---:|---:|---:|---:|---:|";
    text += if compared { "---:|---:|---:|\n" } else { "\n" };
    for row in &series.rows {
        text += &table_row(row, compared);
    }
    text
}

fn table_row(row: &Row, compared: bool) -> String {
    let mut text = format!("| {} |", bytes_name(row.bytes));
    match &row.ours {
        Some(Timing { median_us, p99_us, algbw, busbw, .. }) => {
            let _ = write!(text, " {median_us:.2} | {p99_us:.2} | {algbw:.2} | {busbw:.2} |");
        }
        None => text += " FAILED | | | |",
    }
    if let Some(Timing { median_us, p99_us, .. }) = &row.nccl {
        let ratio = row.ratio().unwrap_or(0.0);
        let _ = write!(text, " {median_us:.2} | {p99_us:.2} | {ratio:.2} |");
    } else if compared {
        text += " | | |";
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let timing = |us| Timing::new(vec![us], 1 << 20, 1.0);
        let row = Row {
            bytes: 1 << 20,
            count: 1 << 19,
            ours: Some(timing(10.0)),
            nccl: Some(timing(15.0)),
            predicted: None,
            checked: true,
            failure: None,
        };
        let series = Series {
            op: "all_reduce".into(),
            dtype: "bf16".into(),
            wire: "native".into(),
            reduce: "sum".into(),
            algorithm: "auto".into(),
            root: 0,
            world: 2,
            mode: "graph".into(),
            calls: 20,
            replays: 20,
            fabric: None,
            rows: vec![row],
        };
        let provenance = serde_json::json!({
            "backend": "cuda",
            "driver": "580.1",
            "version": "0.1.0",
            "date": "2026-11-22T00:00:00Z",
            "command": "peerlane bench all_reduce",
            "devices": [{"name": "NVIDIA H200"}, {"name": "NVIDIA H200"}],
        });
        Results {
            provenance: provenance.as_object().cloned().unwrap_or_default(),
            nccl_version: Some("2.28.9".into()),
            series: vec![series],
        }
    }

    #[test]
    fn a_table_names_its_origin() {
        let text = markdown(&results());
        let head = "2 x NVIDIA H200 (cuda), driver 580.1, NCCL 2.28.9, peerlane 0.1.0";
        assert!(text.starts_with(head), "{text}");
        assert!(text.contains("### all_reduce bf16 sum, auto, 2 ranks"), "{text}");
        assert!(text.contains("| 1M | 10.00 | 10.00 | 104.86 | 104.86 | 15.00 | 15.00 | 1.50 |"));
    }

    #[test]
    fn algorithms_are_compared_in_columns() {
        let mut series = results().series;
        assert_eq!(comparison(&series), "");
        series.push(Series { algorithm: "ring".into(), ..series[0].clone() });
        series[1].rows[0].ours = None;
        series[1].rows[0].predicted = Some(Predicted { time_us: 3.0, steps: 2, sent_bytes: 9 });
        let text = comparison(&series);
        assert!(text.contains("### all_reduce bf16 sum, 2 ranks: microseconds"), "{text}");
        assert!(text.contains("| size | auto | ring |\n"), "{text}");
        assert!(text.contains("| 1M | 10.00 | 3.00 |\n"), "{text}");
    }

    #[test]
    fn files_read_back() {
        let written = serde_json::to_string(&results()).unwrap();
        let read: Results = serde_json::from_str(&written).unwrap();
        assert_eq!(read.series, results().series);
        assert_eq!(markdown(&read), markdown(&results()));
    }

    #[test]
    fn a_failure_is_not_a_time() {
        let mut row = results().series[0].rows[0].clone();
        (row.ours, row.nccl) = (None, None);
        row.failure = Some("element 3".into());
        assert!(line(&row, "sim").ends_with("FAILED on sim: element 3"));
        assert!(table_row(&row, false).contains("FAILED"));
    }
}
