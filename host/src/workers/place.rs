//! Which cores are near a GPU.
//!
//! Invariant: a thread is only ever moved to cores that it may use already; where the system says nothing, it stays.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs;

/// Keeps the calling thread on the cores near a GPU; whether it does.
pub(super) fn stay_near(pci_bus_id: &str) -> bool {
    let path = format!("/sys/bus/pci/devices/{}/local_cpulist", pci_bus_id.to_lowercase());
    let (Ok(text), Ok(allowed)) = (fs::read_to_string(path), sched_getaffinity(None)) else {
        return false;
    };
    let Some(wanted) = both(&allowed, parse(&text)) else { return false };
    sched_setaffinity(None, &wanted).is_ok()
}

/// The cores of a list that are in `allowed`, if there are any.
fn both(allowed: &CpuSet, list: Option<Vec<usize>>) -> Option<CpuSet> {
    let mut found = CpuSet::new();
    list?.into_iter().filter(|core| allowed.is_set(*core)).for_each(|core| found.set(core));
    (found.count() != 0).then_some(found)
}

/// The numbers of a list such as `0-3,8`; `None` if it is none.
fn parse(text: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores() {
        assert_eq!(parse("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!((parse("7"), parse("\n")), (Some(vec![7]), Some(vec![])));
        for wrong in ["3-1", "x", "1-", "-1", "0-99999999999", "1;2"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_cores_that_are_allowed() {
        let mut allowed = CpuSet::new();
        [1, 2, 9].into_iter().for_each(|core| allowed.set(core));
        let found = both(&allowed, parse("2-9")).unwrap();
        let cores: Vec<usize> = (0..16).filter(|core| found.is_set(*core)).collect();
        assert_eq!(cores, [2, 9]);
        assert!(both(&allowed, parse("3-8")).is_none() && both(&allowed, None).is_none());
        assert!(!stay_near("0000:ff:1f.7"));
    }
}
