//! A table of what was fastest on one machine, as `peerlane tune` measures and keeps it.
//!
//! Invariant: a table is used only if every field of it is sound, and only by the ranks, GPUs, driver
//! and version that it was measured for.

use super::limits::Limits;
use crate::algorithm::{Algorithm, Route, UnknownName};
use crate::error::clipped;
use crate::links::{Cache, Key};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::str::FromStr;

/// The version of the file's format.
pub const VERSION: u32 = 1;
/// What tables are called in the cache.
pub(super) const KIND: &str = "tuning";

/// What is fastest, by operation and size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuningTable {
    /// [`VERSION`].
    pub version: u32,
    /// Number of ranks.
    pub world: u32,
    /// Whether the GPUs were simulated.
    pub simulated: bool,
    /// Whether some ranks reached each other through host memory.
    pub host: bool,
    /// The ranks' GPUs, the driver and the version of Peerlane.
    pub key: Key,
    /// All-reduces whose sums are taken in rank order and rounded once.
    pub all_reduce: Vec<Entry>,
    /// All-reduces of any kind.
    pub all_reduce_any: Vec<Entry>,
    /// Broadcasts.
    pub broadcast: Vec<Entry>,
}

/// What is fastest up to a size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The largest size it holds for, in bytes on the wire. None: all that are larger than in the entries before.
    pub up_to: Option<u64>,
    /// The name of an algorithm or a route.
    pub choice: String,
    /// Microseconds measured. None: not measured, but the model's choice.
    pub us: Option<f64>,
}

/// What is wrong with a table: what was expected and what came.
type Flaw = (String, String);

impl TuningTable {
    /// A table from the text of a file, complete and sound, for whatever machine.
    ///
    /// # Errors
    /// What was expected and what came.
    pub fn parse(text: &str) -> Result<TuningTable, (String, String)> {
        let wrong =
            |error: serde_json::Error| ("a tuning table".to_owned(), clipped(&error.to_string()));
        let value: serde_json::Value = serde_json::from_str(text).map_err(wrong)?;
        // The version first: another one has other fields.
        let version = value.get("version").cloned().unwrap_or_default();
        if version != VERSION {
            let got = clipped(&version.to_string());
            return Err((format!("a tuning table of version {VERSION}"), got));
        }
        let table: TuningTable = serde_json::from_value(value).map_err(wrong)?;
        table.check().map_err(|(expected, got)| (clipped(&expected), clipped(&got)))?;
        Ok(table)
    }

    /// That every field is sound.
    pub(super) fn check(&self) -> Result<(), Flaw> {
        let gpus = self.key.ranks();
        if gpus != self.world as usize {
            return Err((
                format!("a GPU for each of {} ranks", self.world),
                format!("{gpus} GPUs"),
            ));
        }
        check_entries::<Algorithm>("all_reduce", &self.all_reduce)?;
        check_entries::<Algorithm>("all_reduce_any", &self.all_reduce_any)?;
        check_entries::<Route>("broadcast", &self.broadcast)?;
        let all = self.all_reduce.iter().chain(&self.all_reduce_any);
        let algorithms = all.filter_map(|entry| entry.choice.parse::<Algorithm>().ok());
        let routes = self.broadcast.iter().filter_map(|entry| entry.choice.parse::<Route>().ok());
        let copies = algorithms.filter(|a| a.is_scheduled()).map(Algorithm::name);
        let copies = copies.chain(routes.filter(|r| r.is_scheduled()).map(Route::name)).next();
        if let Some(name) = copies {
            // A communicator has a staging area only where its Config asks for one.
            let expected =
                "algorithms and routes that are one kernel; copies are asked for by name";
            return Err((expected.into(), name.into()));
        }
        let wrong = self.all_reduce.iter().find(|entry| {
            let algorithm = entry.choice.parse();
            algorithm.is_ok_and(|algorithm| !super::is_exact(algorithm, self.world))
        });
        wrong.map_or(Ok(()), |entry| {
            let expected = "all_reduce: algorithms that add in rank order and round once";
            Err((expected.into(), entry.choice.clone()))
        })
    }

    /// That it was measured for `key`.
    ///
    /// # Errors
    /// What was expected and what came.
    pub fn is_for(&self, key: &Key) -> Result<(), (String, String)> {
        self.key.differs(key).map_or(Ok(()), |(expected, got)| {
            let (expected, got) = (clipped(&expected), clipped(&got));
            Err((format!("a tuning table for {expected}"), format!("one for {got}")))
        })
    }

    /// That it was measured over what carries the data of these ranks.
    pub(super) fn is_over(&self, host: bool) -> Result<(), Flaw> {
        let means = |host| if host { "host memory" } else { "peer-to-peer access" };
        if self.host == host {
            return Ok(());
        }
        let expected = format!("a tuning table for {}", means(host));
        Err((expected, format!("one for {}", means(self.host))))
    }

    /// A table from a file.
    ///
    /// # Errors
    /// What was expected and what came.
    pub fn read(path: &Path) -> Result<TuningTable, (String, String)> {
        let readable = |error: std::io::Error| {
            ("a file that can be read".to_owned(), format!("{}: {error}", path.display()))
        };
        let text = crate::links::read_file(path, false).map_err(readable)?;
        let whose = |(expected, got)| (expected, format!("{}: {got}", path.display()));
        TuningTable::parse(&text).map_err(whose)
    }

    /// The table for `key` in the cache, if there is one.
    ///
    /// # Errors
    /// There is one that cannot be used: why, in words.
    pub fn load(cache: &Cache, key: &Key) -> Result<Option<TuningTable>, String> {
        let path = cache.file_of(KIND, key);
        let ignored = |reason: String| format!("tuning: {} is ignored: {reason}", path.display());
        let text = match crate::links::read_file(&path, true) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ignored(error.to_string())),
        };
        let flawed = |(expected, got)| ignored(format!("expected {expected}, got {got}"));
        let table = TuningTable::parse(&text).map_err(flawed)?;
        table.is_for(key).map_err(flawed)?;
        if table.simulated {
            return Err(ignored("it was measured on simulated GPUs".into()));
        }
        Ok(Some(table))
    }

    /// Writes it to `path`, in place of what was there: whole or not at all.
    ///
    /// # Errors
    /// It cannot be written, or nobody could read it: why, in words.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        self.check().map_err(|(expected, got)| {
            format!("tuning: {} is not written: expected {expected}, got {got}", path.display())
        })?;
        let written = serde_json::to_string_pretty(self)
            .map_err(std::io::Error::from)
            .and_then(|text| crate::links::replace_file(path, &(text + "\n")));
        written.map_err(|error| format!("tuning: cannot write {}: {error}", path.display()))
    }

    /// Where the cache keeps it.
    pub fn place(cache: &Cache, key: &Key) -> std::path::PathBuf {
        cache.file_of(KIND, key)
    }

    pub(super) fn all_reduces(&self, exact: bool) -> Limits<Algorithm> {
        limits(if exact { &self.all_reduce } else { &self.all_reduce_any }, super::FULL)
    }

    pub(super) fn broadcasts(&self) -> Limits<Route> {
        limits(&self.broadcast, Route::Direct)
    }
}

/// The entries of a table that was checked; `none` if it has none.
fn limits<T: Copy + PartialEq + FromStr>(entries: &[Entry], none: T) -> Limits<T> {
    let parsed = entries.iter().map(|entry| {
        let limit = entry.up_to.map_or(usize::MAX, |limit| limit as usize);
        (limit, entry.choice.parse().unwrap_or(none))
    });
    let parsed: Vec<(usize, T)> = parsed.collect();
    let rest = parsed.last().map_or(none, |(_, choice)| *choice);
    Limits::new(parsed, rest)
}

fn check_entries<T: FromStr<Err = UnknownName>>(
    operation: &str,
    entries: &[Entry],
) -> Result<(), Flaw> {
    let flaw = |expected: &str, got: String| Err((format!("{operation}: {expected}"), got));
    let Some((last, earlier)) = entries.split_last() else {
        return flaw("one entry or more", "none".into());
    };
    if let Some(limit) = last.up_to {
        return flaw("a last entry without limit", format!("one up to {limit}"));
    }
    let mut before = 0;
    for entry in earlier {
        match entry.up_to {
            Some(limit) if limit > before => before = limit,
            Some(limit) => return flaw(&format!("a limit above {before}"), limit.to_string()),
            None => return flaw("a limit in every entry but the last", "none".into()),
        }
    }
    for entry in entries {
        if let Err(unknown) = entry.choice.parse::<T>() {
            return Err((format!("{operation}: a known name"), unknown.to_string()));
        }
        if let Some(us) = entry.us.filter(|us| !(us.is_finite() && *us > 0.0)) {
            return flaw("microseconds above 0", us.to_string());
        }
    }
    Ok(())
}
