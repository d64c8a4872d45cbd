//! How results leave the program: JSON files with what is needed to repeat them, and a progress
//! bar where somebody watches.
//!
//! Invariant: every file names the command, the time, the versions and the GPUs.

use crate::bench::rank::Fail;
use crate::devices::Devices;
use indicatif::{ProgressBar, ProgressStyle};
use peerlane::{Communicator, Error, Result, Transport};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// What led to a result.
pub(crate) fn provenance(devices: &Devices) -> Value {
    json!({
        "program": "peerlane",
        "version": env!("CARGO_PKG_VERSION"),
        "command": command_line(),
        "date": date(SystemTime::now()),
        "backend": devices.backend(),
        "driver": devices.driver(),
        "devices": devices.properties(),
    })
}

/// What carries the data of a group: p2p, host, or both between different pairs.
pub(crate) fn transport(rank: &Communicator) -> Result<&'static str> {
    let ranks = 0..rank.world_size();
    let pairs = ranks.clone().flat_map(|from| ranks.clone().map(move |to| (from, to)));
    let pairs = pairs.filter(|(from, to)| from != to).map(|(from, to)| rank.transport(from, to));
    let used: Vec<Transport> = pairs.collect::<Result<_>>()?;
    let has = |transport| used.contains(&transport);
    Ok(match (has(Transport::P2p), has(Transport::Host)) {
        (true, true) => "p2p and host",
        (false, true) => "host",
        (_, false) => "p2p",
    })
}

/// Whether an error says that a communicator does not do this: nothing was queued then.
pub(crate) fn is_refusal(error: &Fail) -> bool {
    error.downcast_ref().is_some_and(refuses)
}

/// [`is_refusal`], of the library's own error.
pub(crate) fn refuses(error: &Error) -> bool {
    matches!(error, Error::InvalidArgument { .. } | Error::Unsupported { .. })
}

/// Writes `value` to `path`.
pub(crate) fn write_json(path: &Path, value: &Value) -> std::result::Result<(), String> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(|e| format!("--json: cannot write {}: {e}", path.display()))
}

/// The command line, without the program's directory, which means nothing elsewhere.
fn command_line() -> String {
    let words: Vec<_> = std::env::args().skip(1).collect();
    format!("peerlane {}", words.join(" "))
}

/// A progress bar of `length` steps; hidden unless stderr is a terminal.
pub(crate) fn progress(length: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length as u64);
    match ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A time as `2026-11-22T19:04:00Z`.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Days since 0000-03-01, when the leap day comes last; 400 years have 146097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let leaps = day_of_era / 1460 + day_of_era / 146_096;
    let year_of_era = (day_of_era + day_of_era / 36_524 - leaps) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        let at = |seconds| date(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_374_240), "2026-11-22T19:04:00Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
