//! How results leave the program: JSON files with what is needed to repeat them, and a progress
//! bar where somebody watches.
//!
//! Invariant: every file names the command, the time, the versions and the GPUs.

use crate::bench::rank::Fail;
use crate::devices::Devices;
use crate::parse::bytes_name;
use indicatif::{ProgressBar, ProgressStyle};
use peerlane::choice::{Choice, Source};
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

/// What carries the data of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    P2p,
    Host,
    /// Each between some pairs.
    Both,
}

impl Carrier {
    /// What carries the data of the group of `rank`.
    pub(crate) fn of(rank: &Communicator) -> Result<Carrier> {
        let ranks = 0..rank.world_size();
        let pairs = ranks.clone().flat_map(|from| ranks.clone().map(move |to| (from, to)));
        let pairs = pairs.filter(|(from, to)| from != to);
        let used: Vec<Transport> =
            pairs.map(|(from, to)| rank.transport(from, to)).collect::<Result<_>>()?;
        let has = |transport| used.contains(&transport);
        Ok(match (has(Transport::P2p), has(Transport::Host)) {
            (true, true) => Carrier::Both,
            (false, true) => Carrier::Host,
            (_, false) => Carrier::P2p,
        })
    }

    /// Its name in reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Carrier::P2p => "p2p",
            Carrier::Host => "host",
            Carrier::Both => "p2p and host",
        }
    }
}

/// What calls take that do not choose for themselves, and a line for each thing that did not go as it should.
pub(crate) fn choices(choice: &Choice) -> String {
    let (all_reduce, broadcast) =
        (limits(choice.all_reduces().entries()), limits(choice.broadcasts().entries()));
    let list = |limits: Vec<(Option<usize>, String)>| {
        let one = |(limit, name): &(Option<usize>, String)| match limit {
            Some(limit) => format!("{name} up to {}", bytes_name(*limit)),
            None => name.clone(),
        };
        limits.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let source = source_name(choice.source());
    let (all_reduce, broadcast) = (list(all_reduce), list(broadcast));
    let mut text = format!("# choices: {source}: all_reduce {all_reduce}; broadcast {broadcast}\n");
    choice.notes().iter().for_each(|note| text += &format!("# note: {note}\n"));
    text
}

/// The same for `--json`.
pub(crate) fn choices_json(choice: &Choice) -> Value {
    let list = |limits: Vec<(Option<usize>, String)>| {
        let one = |(limit, name)| json!({ "up_to": limit, "choice": name });
        limits.into_iter().map(one).collect::<Vec<_>>()
    };
    json!({
        "source": source_name(choice.source()),
        "all_reduce": list(limits(choice.all_reduces().entries())),
        "broadcast": list(limits(choice.broadcasts().entries())),
        "notes": choice.notes(),
    })
}

/// Limits and names; no limit where the last is.
fn limits<T: std::fmt::Display>(entries: &[(usize, T)]) -> Vec<(Option<usize>, String)> {
    let one = |(limit, way): &(usize, T)| {
        (Some(*limit).filter(|limit| *limit != usize::MAX), way.to_string())
    };
    entries.iter().map(one).collect()
}

const fn source_name(source: Source) -> &'static str {
    match source {
        Source::Model => "model",
        Source::Table => "table",
        Source::Fixed => "fixed",
    }
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
    use peerlane::gpu::sim;
    use peerlane::{Algorithm, Config, Route, Tuning};
    use std::time::Duration;

    #[test]
    fn choices_are_shown_with_their_source() {
        let gpus = sim::devices(&sim::Config { devices: 3, ..Default::default() });
        let choice = |config: Config| {
            let ranks = Communicator::connect(&gpus, &Config { tuning: Tuning::Off, ..config });
            ranks.unwrap()[0].choice().clone()
        };
        let fixed = choice(Config { fixed: true, ..Config::default() });
        let text = choices(&fixed);
        assert_eq!(text, "# choices: fixed: all_reduce two-shot; broadcast direct\n");
        let named = Config {
            algorithm: Some(Algorithm::Ring),
            route: Some(Route::Hub),
            ..Config::default()
        };
        let value = choices_json(&choice(named));
        assert_eq!(value["broadcast"], json!([{ "up_to": null, "choice": "hub" }]));
        assert_eq!(value["all_reduce"], json!([{ "up_to": null, "choice": "ring" }]));
        assert_eq!((&value["source"], &value["notes"]), (&json!("model"), &json!([])));
        let modelled = choices(&choice(Config::default()));
        assert!(modelled.starts_with("# choices: model: all_reduce packet up to "), "{modelled}");
    }

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
