//! What every plot needs: a file name that says how, a font, and a place to draw.
//!
//! Invariant: what can go wrong without data goes wrong here, before a command measures.

use crate::bench::rank::Fail;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::prelude::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::style::{FontStyle, register_font};
use std::path::Path;

/// The name under which the font is registered.
pub(crate) const FONT: &str = "peerlane";
/// Where distributions keep a font that has what is needed.
const FONT_FILES: [&str; 5] = [
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf",
    "/usr/share/fonts/TTF/DejaVuSans.ttf",
    "/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
];

/// Checks the file's name and finds a font: what can go wrong before there is anything to draw.
pub(crate) fn prepare(path: &Path) -> Result<(), String> {
    let extension = path.extension().and_then(|e| e.to_str());
    if !matches!(extension, Some("svg" | "png")) {
        return Err(format!("--plot: expected FILE.svg or FILE.png, got {}", path.display()));
    }
    let named = std::env::var("PEERLANE_FONT").ok();
    let mut files = named.as_deref().into_iter().chain(FONT_FILES);
    let Some(font) = files.find_map(|file| std::fs::read(file).ok()) else {
        return Err(
            "--plot: expected a font such as DejaVuSans.ttf, got none: install one, or name \
                    one in PEERLANE_FONT"
                .into(),
        );
    };
    // The library keeps fonts for as long as the program runs.
    register_font(FONT, FontStyle::Normal, Vec::leak(font))
        .map_err(|_| "--plot: expected a TrueType font in PEERLANE_FONT, got something else".into())
}

/// What can be drawn.
pub(crate) trait Picture {
    /// Draws it on all of `area`.
    fn draw_on<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), Fail>
    where
        B::ErrorType: 'static;
}

/// Draws a picture of `size` pixels. [`prepare`] has been called.
pub(crate) fn draw(path: &Path, size: (u32, u32), picture: &impl Picture) -> Result<(), Fail> {
    let drawn = if path.extension().is_some_and(|e| e == "svg") {
        picture.draw_on(&SVGBackend::new(path, size).into_drawing_area())
    } else {
        picture.draw_on(&BitMapBackend::new(path, size).into_drawing_area())
    };
    drawn.map_err(|error| format!("--plot: cannot draw {}: {error}", path.display()).into())
}
