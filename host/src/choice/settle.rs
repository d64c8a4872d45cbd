//! What ranks show and tell each other about tuning when they meet.
//!
//! Invariant: every rank shows what file it was told to use, and the files must hold the same table. Rank 0
//! alone looks for a table, in that file or in the cache, and all ranks use what it found. So ranks never
//! choose by different tables.

use super::cost::{LinkClass, Links};
use super::environment::Tuning;
use super::table::{KIND, TuningTable};
use crate::communicator::Config;
use crate::error::{Error, Result, clipped};
use crate::links::{Cache, Key, LINKS, fingerprint};
use crate::selftest::Verdicts;
use crate::topology;
use serde::{Deserialize, Serialize};

/// The file that a rank was told to use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub(crate) file: String,
    /// Of what the table says.
    pub(crate) hash: String,
}

impl Shown {
    /// What `config` names, read and found sound; none if it names nothing.
    pub(crate) fn of(config: &Config) -> Result<Option<Shown>> {
        let Tuning::File(path) = &config.tuning else { return Ok(None) };
        let table = TuningTable::read(path).map_err(refused)?;
        Ok(Some(Shown { file: path.display().to_string(), hash: fingerprint(&table) }))
    }
}

pub(super) fn refused((expected, got): (String, String)) -> Error {
    Error::InvalidArgument { op: "connect", argument: "tuning", expected, got }
}

/// What rank 0 found, for all ranks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) table: Option<TuningTable>,
    pub(crate) links: Option<Links>,
    pub(crate) notes: Vec<String>,
    /// Which pairs of ranks must not use their links.
    pub(crate) verdicts: Verdicts,
}

/// Most notes, and most characters in one, that rank 0 may tell.
const MOST_NOTES: (usize, usize) = (8, 4000);

impl Known {
    /// That what came from rank 0 is what it would have believed itself, had it read it from a file.
    pub(crate) fn check(&self, world: u32) -> std::result::Result<(), String> {
        let told = |expected: &str, got: &str| {
            Err(clipped(&format!("rank 0 tells of tuning: expected {expected}, got {got}")))
        };
        if let Some(table) = &self.table {
            if let Err((expected, got)) = table.check() {
                return told(&expected, &got);
            }
            if table.world != world {
                return told(&format!("a table for {world} ranks"), &table.world.to_string());
            }
        }
        if self.links.is_some_and(|links| !links.are_sound()) {
            return told("rates and times above 0", &format!("{:?}", self.links));
        }
        let (most, longest) = MOST_NOTES;
        if self.notes.len() > most || self.notes.iter().any(|note| note.len() > longest) {
            return told("a few notes", &format!("{}, or a long one", self.notes.len()));
        }
        Ok(())
    }

    /// Looks for a table, and for measured links where the model needs them. `gpus` are the UUIDs and PCI addresses of
    /// all ranks; none if the GPUs are simulated. Only rank 0 calls it.
    ///
    /// # Errors
    /// The file that `config` names holds no table, another one than `shown`, or one for another machine.
    pub(crate) fn find(
        config: &Config,
        shown: Option<&Shown>,
        gpus: &[(String, String)],
        (simulated, class): (bool, LinkClass),
    ) -> Result<Known> {
        match &config.tuning {
            // Nothing is looked for that would not be used.
            _ if config.fixed => Ok(Known::default()),
            Tuning::File(path) => {
                let table = TuningTable::read(path).map_err(refused)?;
                if shown.is_none_or(|shown| shown.hash != fingerprint(&table)) {
                    let got = format!("{}, which changed meanwhile", path.display());
                    return Err(refused(("the table that was shown".into(), got)));
                }
                let key = if simulated {
                    Key::simulated(gpus.to_vec())
                } else {
                    Key::new(gpus.to_vec(), &topology::driver_version().unwrap_or_default())
                };
                let whose = |(expected, got)| (expected, format!("{}: {got}", path.display()));
                table.is_for(&key).map_err(|flaw| refused(whose(flaw)))?;
                Ok(Known { table: Some(table), ..Known::default() })
            }
            Tuning::Auto if !simulated => {
                let Ok(cache) = Cache::of_user() else { return Ok(Known::default()) };
                Ok(Known::cached(&cache, gpus, class, true))
            }
            Tuning::Off if !simulated => {
                let Ok(cache) = Cache::of_user() else { return Ok(Known::default()) };
                Ok(Known::cached(&cache, gpus, class, false))
            }
            Tuning::Auto | Tuning::Off => Ok(Known::default()),
        }
    }

    /// What the cache holds for these GPUs. Links matter where their kind says little.
    fn cached(cache: &Cache, gpus: &[(String, String)], class: LinkClass, tables: bool) -> Known {
        let links = class != LinkClass::NvLink && cache.holds(LINKS);
        let tables = tables && cache.holds(KIND);
        let mut known = Known::default();
        if !links && !tables {
            return known;
        }
        // It takes the driver some time to say its version.
        let Some(driver) = topology::driver_version() else { return known };
        let key = Key::new(gpus.to_vec(), &driver);
        if tables {
            match TuningTable::load(cache, &key) {
                Ok(table) => known.table = table,
                Err(note) => known.notes.push(note),
            }
        }
        if links {
            match cache.load(&key) {
                Ok(measured) => known.links = measured.and_then(|m| Links::measured(class, &m)),
                Err(note) => known.notes.push(note),
            }
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rank_0_tells_is_checked_as_a_file_is() {
        let links = Links::of(LinkClass::NvLink);
        assert_eq!(Known { links: Some(links), ..Known::default() }.check(2), Ok(()));
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let links = Some(Links { single_gbps: wrong, ..links });
            let reason = Known { links, ..Known::default() }.check(2).unwrap_err();
            assert!(reason.contains("rates and times above 0"), "{reason}");
        }
        let notes =
            |count, length| Known { notes: vec!["x".repeat(length); count], ..Known::default() };
        assert_eq!(notes(8, 4000).check(2), Ok(()));
        assert!(notes(9, 1).check(2).is_err() && notes(1, 4001).check(2).is_err());
        let seed = include_str!("../../../fuzz/seeds/tuning_table/two-ranks");
        let table = TuningTable::parse(seed).unwrap();
        let known = |table| Known { table: Some(table), ..Known::default() };
        assert_eq!(known(table.clone()).check(2), Ok(()));
        assert!(known(table.clone()).check(3).unwrap_err().contains("a table for 3 ranks"));
        let empty = TuningTable { broadcast: Vec::new(), ..table };
        assert!(known(empty).check(2).unwrap_err().contains("broadcast: one entry or more"));
    }
}
