//! Measured links, drawn: a heat map for each quantity, alone and under load.
//!
//! Invariant: every cell holds its number, so the colour only helps to find it; a colour means the
//! same in both panels of a quantity. A pair without a figure is crossed out.

use super::text::number;
use crate::bench::rank::Fail;
use crate::drawing::{self, FONT, Picture};
use peerlane::gpu::Backend;
use peerlane::links::{Measurement, Quantity, Traffic};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

type Area<'a, B> = DrawingArea<B, Shift>;

/// Pixels: a cell, the room left of and above a panel's cells, the heading of the picture.
const CELL: i32 = 54;
const LEFT: i32 = 64;
const TOP: i32 = 58;
const HEAD: i32 = 64;
/// A panel's title needs this much.
const LEAST_WIDTH: i32 = 300;
const PALE: RGBColor = RGBColor(235, 243, 250);
const DEEP: RGBColor = RGBColor(8, 64, 129);
const EMPTY: RGBColor = RGBColor(225, 225, 225);

/// Draws what was measured on `devices`. [`prepare`](crate::drawing::prepare) has been called.
pub(crate) fn draw(path: &Path, devices: &str, measurement: &Measurement) -> Result<(), Fail> {
    drawing::draw(path, size(measurement), &Heat { devices, measurement })
}

/// Heat maps of what was measured.
struct Heat<'a> {
    devices: &'a str,
    measurement: &'a Measurement,
}

/// Width and height of a panel.
fn panel(measurement: &Measurement) -> (i32, i32) {
    let cells = CELL * measurement.gpus as i32;
    ((LEFT + cells + 16).max(LEAST_WIDTH), TOP + cells + 20)
}

fn size(measurement: &Measurement) -> (u32, u32) {
    let (width, height) = panel(measurement);
    let (columns, rows) = (Quantity::ALL.len() as i32, Traffic::ALL.len() as i32);
    ((columns * width) as u32, (HEAD + rows * height) as u32)
}

fn title(devices: &str, measurement: &Measurement) -> String {
    let note = match measurement.backend {
        Backend::Cuda => "",
        Backend::Sim => ": simulated, the figures mean nothing",
    };
    format!("Links of {devices}{note}")
}

impl Picture for Heat<'_> {
    fn draw_on<B: DrawingBackend>(&self, area: &Area<'_, B>) -> Result<(), Fail>
    where
        B::ErrorType: 'static,
    {
        let Heat { devices, measurement } = *self;
        area.fill(&WHITE)?;
        area.draw_text(&title(devices, measurement), &style(20, &BLACK, HPos::Left), (16, 22))?;
        let axes = "rows act (store, load, copy), columns are the GPUs whose memory is used";
        area.draw_text(axes, &style(13, &BLACK, HPos::Left), (16, 46))?;
        let (width, height) = panel(measurement);
        for (column, quantity) in (0..).zip(Quantity::ALL) {
            let panels = Traffic::ALL.map(|traffic| measurement.matrix(quantity, traffic));
            let range = range(panels.iter().flatten().flatten().flatten());
            for ((row, traffic), cells) in (0..).zip(Traffic::ALL).zip(&panels) {
                let at = (column * width, HEAD + row * height);
                let name = format!("{}: {}", quantity.title(), traffic.name());
                draw_panel(area, at, &name, cells, range)?;
            }
        }
        area.present()?;
        Ok(())
    }
}

/// Text of `size` pixels, beside its point or around it, at the height of its point.
fn style(size: i32, color: &RGBColor, at: HPos) -> TextStyle<'_> {
    TextStyle::from((FONT, size).into_font()).color(color).pos(Pos::new(at, VPos::Center))
}

/// The least and the greatest of the figures.
fn range<'a>(figures: impl Iterator<Item = &'a f64>) -> (f64, f64) {
    figures.fold((f64::INFINITY, 0.0), |(low, high), &f| (low.min(f), high.max(f)))
}

fn draw_panel<B: DrawingBackend>(
    area: &Area<'_, B>,
    (x, y): (i32, i32),
    name: &str,
    cells: &[Vec<Option<f64>>],
    range: (f64, f64),
) -> Result<(), Fail>
where
    B::ErrorType: 'static,
{
    area.draw_text(name, &style(15, &BLACK, HPos::Left), (x + 16, y + 14))?;
    for index in 0..cells.len() {
        let (label, at) = (format!("GPU{index}"), CELL * index as i32 + CELL / 2);
        area.draw_text(&label, &style(13, &BLACK, HPos::Center), (x + LEFT + at, y + TOP - 14))?;
        area.draw_text(&label, &style(13, &BLACK, HPos::Right), (x + LEFT - 8, y + TOP + at))?;
    }
    for (from, row) in cells.iter().enumerate() {
        for (to, figure) in row.iter().enumerate() {
            let corner = (x + LEFT + CELL * to as i32, y + TOP + CELL * from as i32);
            let far = (corner.0 + CELL - 2, corner.1 + CELL - 2);
            let middle = (corner.0 + CELL / 2 - 1, corner.1 + CELL / 2 - 1);
            let (fill, ink) = match figure {
                Some(figure) => shade(*figure, range),
                None if from == to => (WHITE, BLACK),
                None => (EMPTY, BLACK),
            };
            area.draw(&Rectangle::new([corner, far], fill.filled()))?;
            match figure {
                Some(figure) => {
                    area.draw_text(&number(*figure), &style(14, &ink, HPos::Center), middle)?;
                }
                None if from == to => {}
                None => {
                    area.draw(&PathElement::new([corner, far], BLACK))?;
                    area.draw(&PathElement::new([(corner.0, far.1), (far.0, corner.1)], BLACK))?;
                }
            }
        }
    }
    Ok(())
}

/// The colour of a figure, deeper where it is larger, and one that is legible on it.
fn shade(figure: f64, (low, high): (f64, f64)) -> (RGBColor, RGBColor) {
    // Figures that are about alike look alike: the scale begins at half the greatest, or below.
    let low = low.min(high / 2.0);
    let part = if high > low { ((figure - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
    let mix = |a: u8, b: u8| (f64::from(a) + part * (f64::from(b) - f64::from(a))).round() as u8;
    let fill = RGBColor(mix(PALE.0, DEEP.0), mix(PALE.1, DEEP.1), mix(PALE.2, DEEP.2));
    (fill, if part > 0.5 { WHITE } else { BLACK })
}

#[cfg(test)]
mod tests {
    use super::super::text::tests::three;
    use super::*;

    #[test]
    fn both_formats_are_written() {
        let directory = std::env::temp_dir();
        for extension in ["svg", "png"] {
            let path = directory.join(format!("peerlane-links-{}.{extension}", std::process::id()));
            drawing::prepare(&path).unwrap();
            draw(&path, "3 x Test GPU (cuda)", &three(Backend::Cuda)).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            if extension == "png" {
                assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 5000, "{}", bytes.len());
                continue;
            }
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains("Links of 3 x Test GPU (cuda)"), "{text}");
            // Eight panels with two cells that are crossed out.
            assert_eq!(text.matches("<polyline").count(), 8 * 2 * 2);
            assert_eq!(text.matches("GPU2").count(), 8 * 2);
            assert!(text.contains("351") && text.contains("copy engine, GB/s: all pairs at once"));
        }
    }

    #[test]
    fn a_title_says_what_is_simulated() {
        let of = |backend| title("the GPUs", &three(backend));
        assert_eq!(of(Backend::Cuda), "Links of the GPUs");
        assert!(of(Backend::Sim).ends_with("simulated, the figures mean nothing"));
    }

    #[test]
    fn shades_go_from_pale_to_deep() {
        assert_eq!(shade(10.0, (10.0, 100.0)), (PALE, BLACK));
        assert_eq!(shade(100.0, (10.0, 100.0)), (DEEP, WHITE));
        assert_eq!(shade(100.0, (100.0, 100.0)).0, DEEP);
        let (almost, _) = shade(98.0, (97.0, 100.0));
        assert!(almost.0 < 20, "figures that differ little look alike: {almost:?}");
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let path = Path::new("/nowhere/links.svg");
        drawing::prepare(path).unwrap();
        let error = draw(path, "", &three(Backend::Sim)).unwrap_err().to_string();
        assert!(error.starts_with("--plot: cannot draw /nowhere/links.svg"), "{error}");
    }
}
