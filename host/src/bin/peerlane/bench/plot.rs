//! Time against size, drawn.
//!
//! Invariant: both axes are logarithmic and start where the data start; a series keeps its colour,
//! and NCCL's line is the same colour, thinner and with open points.

use super::rank::Fail;
use super::results::{Results, Row, Series, Timing};
use crate::drawing::FONT;
use crate::parse::bytes_name;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 560);
/// Draws results. [`prepare`](crate::drawing::prepare) has been called.
pub(crate) fn draw(path: &Path, results: &Results) -> Result<(), Fail> {
    let drawn = if path.extension().is_some_and(|e| e == "svg") {
        draw_on(&SVGBackend::new(path, SIZE).into_drawing_area(), results)
    } else {
        draw_on(&BitMapBackend::new(path, SIZE).into_drawing_area(), results)
    };
    drawn.map_err(|error| format!("--plot: cannot draw {}: {error}", path.display()).into())
}

/// The points of one line.
fn points(series: &Series, timing: impl Fn(&Row) -> Option<&Timing>) -> Vec<(f64, f64)> {
    let point = |row: &Row| timing(row).map(|t| (row.bytes as f64, t.median_us));
    let drawable = |(bytes, us): &(f64, f64)| *bytes > 0.0 && *us > 0.0;
    series.rows.iter().filter_map(point).filter(drawable).collect()
}

fn draw_on<B: DrawingBackend>(area: &DrawingArea<B, Shift>, results: &Results) -> Result<(), Fail>
where
    B::ErrorType: 'static,
{
    let lines: Vec<_> = results
        .series
        .iter()
        .map(|s| (s, points(s, |row| row.ours.as_ref()), points(s, |row| row.nccl.as_ref())))
        .filter(|(_, ours, _)| !ours.is_empty())
        .collect();
    let all = || lines.iter().flat_map(|(_, ours, nccl)| ours.iter().chain(nccl));
    let Some((x, y)) = bounds(all()) else {
        return Err("expected at least one size that was timed, got none".into());
    };
    area.fill(&WHITE)?;
    let backend = results.provenance("backend");
    let note = if backend == "sim" { ": simulated, the times mean nothing" } else { "" };
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{} ({backend}){note}", results.devices()), (FONT, 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((x.0..x.1).log_scale().base(2.0), (y.0..y.1).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("size, bytes")
        .y_desc("time, us")
        .x_label_formatter(&|bytes| bytes_name(bytes.round() as usize))
        .label_style((FONT, 14))
        .light_line_style(WHITE)
        .draw()?;
    for (index, (series, ours, nccl)) in lines.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let (bold, thin) = (color.stroke_width(3).filled(), color.stroke_width(1));
        let key =
            move |style: ShapeStyle| move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style);
        chart
            .draw_series(LineSeries::new(ours.iter().copied(), bold).point_size(4))?
            .label(series.title())
            .legend(key(bold));
        if !nccl.is_empty() {
            chart
                .draw_series(LineSeries::new(nccl.iter().copied(), thin))?
                .label(format!("{}: NCCL", series.op))
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

/// The ranges of both axes, with room around the points.
fn bounds<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Option<((f64, f64), (f64, f64))> {
    let grow = |range: Option<(f64, f64)>, value: f64| {
        range.map_or(Some((value, value)), |(low, high)| Some((low.min(value), high.max(value))))
    };
    let (x, y) = points.fold((None, None), |(x, y), point| (grow(x, point.0), grow(y, point.1)));
    let widen = |(low, high): (f64, f64), by: f64| (low / by, high * by);
    Some((widen(x?, 1.4), widen(y?, 1.6)))
}
