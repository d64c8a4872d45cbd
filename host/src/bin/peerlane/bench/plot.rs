//! Time against size, drawn.
//!
//! Invariant: both axes are logarithmic and start where the data start; a series keeps its colour,
//! and NCCL's line is the same colour, thinner and with open points. A caption says whether times are
//! measured or a model's.

use super::rank::Fail;
use super::results::{Results, Row, Series};
use crate::drawing::{self, FONT, Picture};
use crate::parse::bytes_name;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Pixels of a picture.
pub(crate) const SIZE: (u32, u32) = (900, 560);
/// One line and the one beside it.
pub(crate) struct Line {
    /// What the key says.
    pub(crate) label: String,
    /// Size or number of ranks, and microseconds.
    pub(crate) points: Vec<(f64, f64)>,
    /// What NCCL took, where it took part.
    pub(crate) nccl: Vec<(f64, f64)>,
}

/// A picture.
pub(crate) struct Chart {
    /// What stands above it.
    pub(crate) caption: String,
    /// What stands below it.
    pub(crate) x: &'static str,
    /// What it shows.
    pub(crate) lines: Vec<Line>,
}

/// Draws results. [`prepare`](crate::drawing::prepare) has been called.
pub(crate) fn draw(path: &Path, results: &Results) -> Result<(), Fail> {
    drawing::draw(path, SIZE, &chart(results))
}

/// The picture of results.
fn chart(results: &Results) -> Chart {
    let subjects = || results.series.iter().map(Series::subject);
    // Where all series have one subject, it stands above the picture and the key names algorithms.
    let common = subjects()
        .next()
        .filter(|first| results.series.len() > 1 && subjects().all(|subject| subject == *first));
    let label = |series: &Series| match &common {
        Some(_) => series.algorithm.clone(),
        None => series.title(),
    };
    let line = |series: &Series| Line {
        label: label(series),
        points: points(series, Row::time_us),
        nccl: points(series, |row| row.nccl.as_ref().map(|timing| timing.median_us)),
    };
    let backend = results.provenance("backend");
    let modelled = results.series.iter().all(|series| series.fabric.is_some());
    let note = match backend {
        "sim" if modelled => ": a model's times",
        "sim" => ": simulated, the times mean nothing",
        _ => "",
    };
    let subject = common.iter().fold(String::new(), |_, subject| format!("{subject}, "));
    let caption = format!("{subject}{} ({backend}){note}", results.devices());
    let lines = results.series.iter().map(line).filter(|line| !line.points.is_empty());
    Chart { caption, x: "size, bytes", lines: lines.collect() }
}

/// The points of one line.
fn points(series: &Series, us: impl Fn(&Row) -> Option<f64>) -> Vec<(f64, f64)> {
    let point = |row: &Row| us(row).map(|us| (row.bytes as f64, us));
    let drawable = |(bytes, us): &(f64, f64)| *bytes > 0.0 && *us > 0.0;
    series.rows.iter().filter_map(point).filter(drawable).collect()
}

impl Picture for Chart {
    fn draw_on<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), Fail>
    where
        B::ErrorType: 'static,
    {
        let all = || self.lines.iter().flat_map(|line| line.points.iter().chain(&line.nccl));
        let Some((x, y)) = bounds(all()) else {
            return Err("expected at least one size that was timed, got none".into());
        };
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(&self.caption, (FONT, if self.caption.len() > 60 { 16 } else { 20 }))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d((x.0..x.1).log_scale().base(2.0), (y.0..y.1).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc("time, us")
            .x_label_formatter(&|bytes| bytes_name(bytes.round() as usize))
            .label_style((FONT, 14))
            .light_line_style(WHITE)
            .draw()?;
        for (index, Line { label, points: ours, nccl }) in self.lines.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let (bold, thin) = (color.stroke_width(3).filled(), color.stroke_width(1));
            let key = move |style: ShapeStyle| {
                move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style)
            };
            chart
                .draw_series(LineSeries::new(ours.iter().copied(), bold).point_size(4))?
                .label(label)
                .legend(key(bold));
            if !nccl.is_empty() {
                chart
                    .draw_series(LineSeries::new(nccl.iter().copied(), thin))?
                    .label(format!("{label}: NCCL"))
                    .legend(key(thin));
                chart.draw_series(nccl.iter().map(|point| Circle::new(*point, 4, thin)))?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font((FONT, 14))
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

/// The ranges of both axes, with room around the points.
fn bounds<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Option<((f64, f64), (f64, f64))> {
    let grow = |range: Option<(f64, f64)>, value: f64| {
        range.map_or(Some((value, value)), |(low, high)| Some((low.min(value), high.max(value))))
    };
    let (x, y) = points.fold((None, None), |(x, y), point| (grow(x, point.0), grow(y, point.1)));
    let widen = |(low, high): (f64, f64), by: f64| (low / by, high * by);
    Some((widen(x?, 1.4), widen(y?, 1.6)))
}
