//! What the environment asks for.
//!
//! Invariant: a value that means nothing is an error that names the variable and what it may be. What a
//! program or a caller says comes before the environment, and that before a table.

use crate::algorithm::UnknownName;
use crate::communicator::Config;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where the table of measured choices comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tuning {
    /// From the user's cache, if there is one for this machine.
    #[default]
    Auto,
    /// From nowhere: the model chooses.
    Off,
    /// From this file, which must be for this machine.
    File(PathBuf),
}

impl FromStr for Tuning {
    type Err = UnknownName;

    fn from_str(text: &str) -> std::result::Result<Tuning, UnknownName> {
        match text {
            "auto" => Ok(Tuning::Auto),
            "off" => Ok(Tuning::Off),
            "" => Err(UnknownName::new("auto, off, a file's name", "nothing")),
            file => Ok(Tuning::File(file.into())),
        }
    }
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tuning::Auto => f.write_str("auto"),
            Tuning::Off => f.write_str("off"),
            Tuning::File(path) => path.display().fmt(f),
        }
    }
}

impl Config {
    /// The default configuration, as the environment changes it: `PEERLANE_ALGORITHM`,
    /// `PEERLANE_ROUTE`, `PEERLANE_FIXED`, `PEERLANE_EXACT`, `PEERLANE_TUNING`, `PEERLANE_TRANSPORT`,
    /// `PEERLANE_SELF_TEST`, `PEERLANE_CHECKED`. A variable that is not set changes nothing.
    ///
    /// # Errors
    /// A variable holds what it cannot mean: which one, and what it may hold.
    pub fn from_environment() -> Result<Config> {
        read(|variable| std::env::var_os(variable))
    }
}

fn read(environment: impl Fn(&str) -> Option<OsString>) -> Result<Config> {
    let mut config = Config::default();
    let value = |variable: &'static str| -> Result<Option<String>> {
        let Some(value) = environment(variable).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let text = value.into_string().map_err(|raw| {
            wrong(variable, "UTF-8 text".into(), raw.to_string_lossy().into_owned())
        })?;
        Ok(Some(text))
    };
    config.algorithm = named("PEERLANE_ALGORITHM", value("PEERLANE_ALGORITHM")?)?;
    config.route = named("PEERLANE_ROUTE", value("PEERLANE_ROUTE")?)?;
    if let Some(fixed) = truth("PEERLANE_FIXED", value("PEERLANE_FIXED")?)? {
        config.fixed = fixed;
    }
    if let Some(exact) = truth("PEERLANE_EXACT", value("PEERLANE_EXACT")?)? {
        config.exact = exact;
    }
    if let Some(checked) = truth("PEERLANE_CHECKED", value("PEERLANE_CHECKED")?)? {
        config.checked = checked;
    }
    if let Some(transport) = value("PEERLANE_TRANSPORT")? {
        config.transport = transport.parse().map_err(|unknown: UnknownName| {
            let (expected, got) = unknown.into_parts();
            wrong("PEERLANE_TRANSPORT", expected, got)
        })?;
    }
    if let Some(mode) = value("PEERLANE_SELF_TEST")? {
        config.self_test = mode.parse().map_err(|unknown: UnknownName| {
            let (expected, got) = unknown.into_parts();
            wrong("PEERLANE_SELF_TEST", expected, got)
        })?;
    }
    if let Some(tuning) = value("PEERLANE_TUNING")? {
        config.tuning = tuning.parse().unwrap_or_default();
    }
    Ok(config)
}

/// A choice by name; `auto` is none.
fn named<T: FromStr<Err = UnknownName>>(
    variable: &'static str,
    value: Option<String>,
) -> Result<Option<T>> {
    let Some(text) = value.filter(|text| text != "auto") else { return Ok(None) };
    text.parse().map(Some).map_err(|unknown: UnknownName| {
        let (expected, got) = unknown.into_parts();
        wrong(variable, format!("one of auto, {expected}"), got)
    })
}

fn truth(variable: &'static str, value: Option<String>) -> Result<Option<bool>> {
    match value.as_deref() {
        None => Ok(None),
        Some("1" | "true" | "on" | "yes") => Ok(Some(true)),
        Some("0" | "false" | "off" | "no") => Ok(Some(false)),
        Some(other) => {
            Err(wrong(variable, "1, true, on, yes, 0, false, off or no".into(), other.into()))
        }
    }
}

fn wrong(argument: &'static str, expected: String, got: String) -> Error {
    Error::InvalidArgument { op: "environment", argument, expected, got }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::{Algorithm, Route};
    use crate::{SelfTest, Transport};
    use std::os::unix::ffi::OsStringExt;

    fn from(set: &[(&str, &str)]) -> Result<Config> {
        let find = |name: &str| set.iter().find(|(key, _)| *key == name);
        read(|name| find(name).map(|(_, value)| OsString::from(value)))
    }

    #[test]
    fn an_empty_environment_changes_nothing() {
        assert_eq!(from(&[]), Ok(Config::default()));
        let empty = [
            ("PEERLANE_ALGORITHM", ""),
            ("PEERLANE_TUNING", ""),
            ("PEERLANE_TRANSPORT", ""),
            ("PEERLANE_ROUTE", "auto"),
        ];
        assert_eq!(from(&empty), Ok(Config::default()));
    }

    #[test]
    fn every_name_is_understood() {
        for algorithm in Algorithm::ALL {
            let config = from(&[("PEERLANE_ALGORITHM", algorithm.name())]).unwrap();
            assert_eq!(config.algorithm, Some(algorithm));
        }
        for route in Route::ALL {
            assert_eq!(from(&[("PEERLANE_ROUTE", route.name())]).unwrap().route, Some(route));
        }
        for transport in Transport::ALL {
            let config = from(&[("PEERLANE_TRANSPORT", transport.name())]).unwrap();
            assert_eq!(config.transport, transport);
        }
        for mode in SelfTest::ALL {
            let config = from(&[("PEERLANE_SELF_TEST", mode.name())]).unwrap();
            assert_eq!(config.self_test, mode);
        }
        for (text, truth) in [("1", true), ("on", true), ("0", false), ("no", false)] {
            let names = ["PEERLANE_FIXED", "PEERLANE_EXACT", "PEERLANE_CHECKED"];
            let config = from(&names.map(|name| (name, text))).unwrap();
            assert_eq!((config.fixed, config.exact, config.checked), (truth, truth, truth));
        }
        let tuning = |text| from(&[("PEERLANE_TUNING", text)]).unwrap().tuning;
        assert_eq!(tuning("off"), Tuning::Off);
        assert_eq!(tuning("auto"), Tuning::Auto);
        assert_eq!(tuning("/x/t.json"), Tuning::File("/x/t.json".into()));
    }

    #[test]
    fn what_means_nothing_names_the_variable_and_the_choices() {
        let error = |name, value| from(&[(name, value)]).unwrap_err().to_string();
        let text = error("PEERLANE_ALGORITHM", "rings");
        assert!(
            text.starts_with("environment: PEERLANE_ALGORITHM: expected one of auto, packet, "),
            "{text}"
        );
        assert!(text.ends_with("got rings"), "{text}");
        let text = error("PEERLANE_ROUTE", "ring");
        assert!(text.contains("PEERLANE_ROUTE: expected one of auto, direct, hub"), "{text}");
        let text = error("PEERLANE_TRANSPORT", "nvlink");
        assert_eq!(text, "environment: PEERLANE_TRANSPORT: expected auto, p2p, host, got nvlink");
        let text = error("PEERLANE_SELF_TEST", "never");
        assert!(text.ends_with("PEERLANE_SELF_TEST: expected auto, off, always, got never"));
        let text = error("PEERLANE_FIXED", "maybe");
        assert!(text.contains("PEERLANE_FIXED: expected 1, true, on"), "{text}");
        let raw = read(|name| (name == "PEERLANE_EXACT").then(|| OsString::from_vec(vec![0xff])));
        assert!(raw.unwrap_err().to_string().contains("PEERLANE_EXACT: expected UTF-8 text"));
    }
}
