//! The table of fault classes that a run fills in, and the page that shows it.

use super::class::Class;
use super::play::{Ending, Verdict};
use super::recovery::After;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const BEGIN: &str = "<!-- faults:begin -->";
const END: &str = "<!-- faults:end -->";

/// What became of all scenes of a class.
#[derive(Clone, Debug, Default)]
struct Row {
    tries: u64,
    struck: u64,
    right: u64,
    detected: u64,
    errors: BTreeMap<&'static str, u64>,
    recovered: u64,
    shrunk: u64,
    closed: u64,
    wrong: u64,
}

/// What became of all scenes.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    rows: BTreeMap<(Class, bool), Row>,
}

impl Tally {
    /// Counts a scene.
    pub fn add(&mut self, verdict: &Verdict) {
        let row = self.rows.entry((verdict.class, verdict.checked)).or_default();
        row.tries += 1;
        row.struck += u64::from(verdict.struck);
        match verdict.ending {
            Ending::Right => row.right += 1,
            Ending::Detected => row.detected += 1,
            Ending::Wrong => row.wrong += 1,
        }
        for error in &verdict.errors {
            *row.errors.entry(error).or_default() += 1;
        }
        match verdict.after {
            After::Unneeded => {}
            After::Recovered => row.recovered += 1,
            After::Shrunk => row.shrunk += 1,
            After::Closed => row.closed += 1,
        }
    }

    /// Adds what another thread has counted.
    pub fn merge(&mut self, other: &Tally) {
        for (class, from) in &other.rows {
            let row = self.rows.entry(*class).or_default();
            row.tries += from.tries;
            row.struck += from.struck;
            row.right += from.right;
            row.detected += from.detected;
            row.recovered += from.recovered;
            row.shrunk += from.shrunk;
            row.closed += from.closed;
            row.wrong += from.wrong;
            for (name, count) in &from.errors {
                *row.errors.entry(name).or_default() += count;
            }
        }
    }

    /// Scenes of all classes.
    pub fn tries(&self) -> u64 {
        self.rows.values().map(|row| row.tries).sum()
    }

    /// The table. `seeds` is how many there were.
    pub fn markdown(&self, seeds: u64) -> String {
        let mut text =
            format!("{seeds} seeds. A fault that came too late to strike is not counted.\n\n");
        text += "| fault | checked | struck | right result anyway | error on some rank | which errors (runs) | recovered | went on without some | nobody left | wrong, no error |\n";
        text += "|---|---|---:|---:|---:|---|---:|---:|---:|---:|\n";
        for ((class, checked), row) in &self.rows {
            let errors: Vec<_> = row.errors.iter().map(|(name, n)| format!("{name} {n}")).collect();
            // Those whose place was not reached are like those without a fault.
            let (struck, right) = match class {
                Class::None => (row.tries, row.right),
                _ => (row.struck, row.right - (row.tries - row.struck).min(row.right)),
            };
            let Row { detected, recovered, shrunk, closed, wrong, .. } = row;
            let (name, errors) = (class.name(), errors.join(", "));
            let checked = if *checked { "yes" } else { "no" };
            let _ = writeln!(
                text,
                "| {name} | {checked} | {struck} | {right} | {detected} | {errors} | {recovered} | {shrunk} | {closed} | {wrong} |"
            );
        }
        text
    }
}

/// `page` with `table` between its marks.
///
/// # Errors
/// It does not have both marks, once each and in order.
pub fn rewrite(page: &str, table: &str) -> Result<String, String> {
    let once = |mark: &str| {
        let mut found = page.match_indices(mark).map(|(at, _)| at);
        match (found.next(), found.next()) {
            (Some(at), None) => Ok(at),
            _ => Err(format!("expected {mark} once")),
        }
    };
    let (begin, end) = (once(BEGIN)? + BEGIN.len(), once(END)?);
    if begin > end {
        return Err(format!("expected {BEGIN} before {END}"));
    }
    Ok(format!("{}\n{}{}", &page[..begin], table, &page[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_goes_between_the_marks() {
        let page = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let new = format!("before\n{BEGIN}\nnew\n{END}\nafter\n");
        assert_eq!(rewrite(&page, "new\n"), Ok(new.clone()));
        assert_eq!(rewrite(&new, "new\n"), Ok(new));
    }

    #[test]
    fn pages_without_marks_are_refused() {
        let wrong = ["", BEGIN, END, &format!("{END}{BEGIN}"), &format!("{BEGIN}{BEGIN}{END}")];
        for page in wrong {
            assert!(rewrite(page, "").is_err(), "{page}");
        }
    }
}
