//! `peerlane model`: predictions for machines that are not here, beside what was measured on one that was.
//!
//! Invariant: docs/scaling.md is what this command writes, from the constants of `peerlane::model` and a
//! file of results; no figure in its tables is typed.

use crate::Outcome;
use crate::bench::plot::{self, Chart, Line};
use crate::bench::report;
use crate::bench::results::{Results, Row, Series};
use crate::drawing;
use crate::parse::bytes_name;
use peerlane::model::{self, Costs, Prediction, Preset};
use peerlane::{Algorithm, Format, Route};
use std::fmt::Write;
use std::path::PathBuf;

/// Options of `peerlane model`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Results of two GPUs that `peerlane bench --json` wrote, to compare predictions with.
    #[arg(default_value = MEASURED, value_name = "RESULTS")]
    measured: PathBuf,
    /// Write the page to this file. Left out: to standard output.
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Draw the pictures of the page into this directory.
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

/// Measurements of two GPUs, from the repository's root.
const MEASURED: &str = "benches/results/2026-11-22-2xH200.json";
/// What stands above the tables.
const HEAD: &str = include_str!("model/head.md");
/// Sizes of the tables of predictions.
const SIZES: [usize; 5] = [8 << 10, 64 << 10, 512 << 10, 4 << 20, 64 << 20];
/// Numbers of ranks of the tables of predictions.
const WORLDS: [u32; 3] = [4, 8, 16];

/// All-reduces of other programs on four H200s (NV18 between every pair), bf16, graph-replayed, in one run,
/// November 2026: KiB, a bare packet one-shot kernel without deadlines or flow control, vLLM's two-stage
/// kernel, NCCL 2.28.9. Microseconds.
const OTHERS: [(usize, Option<f64>, f64, f64); 12] = [
    (2, Some(2.75), 7.7, 9.5),
    (8, Some(2.88), 7.8, 10.0),
    (16, Some(3.07), 8.1, 10.9),
    (32, Some(3.53), 8.4, 11.1),
    (64, Some(4.20), 8.6, 11.3),
    (128, Some(5.36), 8.9, 11.5),
    (256, Some(7.83), 9.2, 11.7),
    (512, Some(13.7), 10.0, 14.5),
    (1024, Some(25.3), 11.6, 19.9),
    (4096, None, 29.1, 42.3),
    (16384, None, 94.0, 99.0),
    (65536, None, 361.0, 311.0),
];

/// Writes the page.
pub(crate) fn run(options: &Options) -> Outcome {
    let text = page(&report::read(&options.measured)?)?;
    match &options.table {
        Some(path) => report::write(path, &text)?,
        None => print!("{text}"),
    }
    if let Some(directory) = &options.plots {
        for (name, chart) in charts() {
            let path = directory.join(name);
            drawing::prepare(&path)?;
            drawing::draw(&path, plot::SIZE, &chart)?;
        }
    }
    Ok(true)
}

/// docs/scaling.md.
fn page(measured: &Results) -> Result<String, String> {
    let mut text = HEAD.to_owned();
    let reduced = series(measured, "all_reduce")?;
    let sent = series(measured, "broadcast")?;
    let fabric = Preset::NvSwitch.fabric(2);
    let date = measured.provenance("date");
    let _ = writeln!(text, "\n## Two GPUs: predicted and measured\n");
    let _ = writeln!(text, "{}, {date}.", measured.devices());
    text += &beside(
        "All-reduce, automatic choice: what the constants are fitted to",
        reduced,
        |bytes| model::predict_on(model::usual(2, bytes), &fabric, &Costs::H200, bytes),
    );
    text += &beside(
        "Broadcast, which nothing is fitted to. Roots do not wait for receivers, so calls in a graph \
         overlap, and small ones take less than one alone would; and what leaves in one direction only \
         leaves a little faster, 363 GB/s",
        sent,
        |bytes| model::predict_broadcast(Route::Direct, &fabric, &Costs::H200, 0, bytes),
    );
    text += &others();
    for preset in Preset::ALL {
        let _ = writeln!(text, "\n## Predicted: {preset}\n\n![{preset}](scaling-{preset}.svg)");
        WORLDS.iter().for_each(|world| text += &predictions(preset, *world));
    }
    let _ = writeln!(
        text,
        "\n## Predicted: 8 KiB over the number of ranks\n\n![ranks](scaling-ranks.svg)\n"
    );
    Ok(text + &over_ranks())
}

fn series<'a>(results: &'a Results, op: &str) -> Result<&'a Series, String> {
    let found = results.series.iter().find(|s| s.op == op && s.world == 2);
    found.ok_or_else(|| format!("model: expected {op} of 2 ranks in the results, got none"))
}

/// A table of predictions beside the measurements of `series`.
fn beside(title: &str, series: &Series, predict: impl Fn(usize) -> Prediction) -> String {
    let mut text = format!("\n{title}.\n\n| size | model, us | measured, us | error |\n");
    text += "|---:|---:|---:|---:|\n";
    for (bytes, us) in series.rows.iter().filter_map(|row: &Row| Some((row.bytes, row.time_us()?)))
    {
        let time_us = predict(bytes).time_us;
        let _ = writeln!(
            text,
            "| {} | {time_us:.2} | {us:.2} | {} |",
            bytes_name(bytes),
            error(time_us, us)
        );
    }
    text
}

/// How far a prediction is off.
fn error(predicted: f64, measured: f64) -> String {
    // Adding nothing turns -0.0 into 0.0.
    format!("{:+.1}%", (1e3 * (predicted / measured - 1.0)).round() / 10.0 + 0.0)
}

fn others() -> String {
    let mut text = "\n## Four GPUs: predicted, and other programs measured\n\n".to_owned();
    text += "Four H200s, other programs, one run. The bare packet kernel is the algorithm `packet` without deadlines\n\
             and flow control; vLLM's two-stage kernel is a two-shot with a barrier between its halves. NCCL is\n\
             version 2.28.9.\n\n";
    text += "| size | model of packet, us | bare packet kernel, us | error | model of two-shot, us | vLLM two-stage, us | NCCL, us |\n";
    text += "|---:|---:|---:|---:|---:|---:|---:|\n";
    for (kib, bare, vllm, nccl) in OTHERS {
        let us = |algorithm| model::predict(algorithm, Preset::NvSwitch, 4, kib << 10).time_us;
        let (packet, two_shot) = (us(Algorithm::OneShot(Format::Packet)), us(Algorithm::TwoShot));
        let (bare, off) =
            bare.map_or(("".into(), "".into()), |bare| (format!("{bare:.2}"), error(packet, bare)));
        let size = bytes_name(kib << 10);
        let _ = writeln!(
            text,
            "| {size} | {packet:.2} | {bare} | {off} | {two_shot:.2} | {vllm:.2} | {nccl:.2} |"
        );
    }
    text
}

/// All algorithms on one fabric; the fastest of a column in bold.
fn predictions(preset: Preset, world: u32) -> String {
    let all = Algorithm::ALL.map(|a| SIZES.map(|bytes| model::predict(a, preset, world, bytes)));
    let mut text = format!("\n### {preset}, {world} ranks: microseconds\n\n| algorithm | steps |");
    text += " tensors out of a rank |";
    SIZES.iter().for_each(|bytes| text += &format!(" {} |", bytes_name(*bytes)));
    text += &format!("\n|---|---:|---:|{}\n", "---:|".repeat(SIZES.len()));
    for (algorithm, row) in Algorithm::ALL.iter().zip(&all) {
        let (size, last) = (SIZES[SIZES.len() - 1], &row[SIZES.len() - 1]);
        let tensors = last.sent_bytes as f64 / size as f64;
        let _ = write!(text, "| {algorithm} | {} | {tensors:.2} |", last.steps);
        for (column, predicted) in row.iter().enumerate() {
            let fastest = all.iter().all(|other| predicted.time_us <= other[column].time_us);
            let mark = if fastest { "**" } else { "" };
            let _ = write!(text, " {mark}{:.2}{mark} |", predicted.time_us);
        }
        text.push('\n');
    }
    text
}

/// Algorithms whose growth with the number of ranks is worth a look.
const GROWING: [Algorithm; 6] = [
    Algorithm::OneShot(Format::Full),
    Algorithm::TwoShot,
    Algorithm::Ring,
    Algorithm::Tree,
    Algorithm::DoubleTree,
    Algorithm::Hierarchical,
];

fn over_ranks() -> String {
    let names = GROWING.map(|algorithm| algorithm.to_string());
    let mut text =
        format!("| ranks | {} |\n|---:|{}\n", names.join(" | "), "---:|".repeat(GROWING.len()));
    for world in 2..=16 {
        let us = GROWING.map(|a| model::predict(a, Preset::NvSwitch, world, 8 << 10).time_us);
        let _ = writeln!(text, "| {world} | {} |", us.map(|us| format!("{us:.2}")).join(" | "));
    }
    text
}

/// The pictures of the page, by file name.
fn charts() -> Vec<(String, Chart)> {
    let sizes = || (10..=26).map(|shift| 1usize << shift);
    let lines = |preset: Preset| {
        Algorithm::ALL.map(|algorithm| Line {
            label: algorithm.to_string(),
            points: sizes()
                .map(|bytes| (bytes as f64, model::predict(algorithm, preset, 8, bytes).time_us))
                .collect(),
            nccl: Vec::new(),
        })
    };
    let over_sizes = |preset: Preset| {
        let caption = format!("All-reduce over 8 ranks, {preset}: a model's times");
        let chart = Chart { caption, x: "size, bytes", lines: lines(preset).into() };
        (format!("scaling-{preset}.svg"), chart)
    };
    let grown = GROWING.map(|algorithm| Line {
        label: algorithm.to_string(),
        points: (2..=16)
            .map(|n| {
                (f64::from(n), model::predict(algorithm, Preset::NvSwitch, n, 8 << 10).time_us)
            })
            .collect(),
        nccl: Vec::new(),
    });
    let caption = "All-reduce of 8 KiB, nvswitch: a model's times".to_owned();
    let ranks = Chart { caption, x: "ranks", lines: grown.into() };
    let mut charts: Vec<_> = Preset::ALL.map(over_sizes).into();
    charts.push(("scaling-ranks.svg".into(), ranks));
    charts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_page_in_docs_is_what_the_command_writes() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let written = page(&report::read(&root.join(MEASURED)).unwrap()).unwrap();
        let kept = std::fs::read_to_string(root.join("docs/scaling.md")).unwrap_or_default();
        for (line, (kept, written)) in (1..).zip(kept.lines().zip(written.lines())) {
            assert_eq!(kept, written, "line {line}: run `peerlane model --table docs/scaling.md`");
        }
        assert_eq!(kept.len(), written.len(), "run `peerlane model --table docs/scaling.md`");
    }

    #[test]
    fn every_picture_of_the_page_is_drawn() {
        let names: Vec<_> = charts().into_iter().map(|(name, _)| name).collect();
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let page = std::fs::read_to_string(root.join("docs/scaling.md")).unwrap_or_default();
        assert_eq!(page.matches(".svg)").count(), names.len());
        for name in names {
            assert!(page.contains(&name) && root.join("docs").join(&name).exists(), "{name}");
        }
    }
}
