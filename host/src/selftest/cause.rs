//! From facts about two GPUs to what is likely behind their trouble: pure.
//!
//! Invariant: a cause is named only if a fact speaks for it; the likeliest comes first. Facts that are unknown speak
//! for nothing.

use super::facts::{Facts, Iommu};
use crate::topology::PciePath;
use std::fmt;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symptom {
    /// The driver offers no access.
    NoAccess,
    /// It does, and data get lost or changed, or the driver fails.
    Wrong,
}

/// What may be behind it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Cause {
    /// What was found.
    pub what: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

impl Cause {
    fn new(what: impl Into<String>, why: &'static str, remedy: &'static str) -> Cause {
        Cause { what: what.into(), why, remedy }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.remedy)
    }
}

/// What is likely behind `symptom`, the likeliest first. Empty if no fact says anything.
pub fn likely(facts: &Facts, symptom: Symptom) -> Vec<Cause> {
    let by_nvlink = facts.nvlinks.is_some_and(|links| links > 0);
    let mut causes = Vec::new();
    causes.extend(divided(facts));
    causes.extend(fabric(facts, by_nvlink));
    causes.extend(exclusive(facts, symptom));
    match symptom {
        Symptom::NoAccess => {
            causes.extend(consumer(facts, by_nvlink));
            causes.extend(no_nvlink(facts));
            causes.extend(virtual_machine(facts));
            causes.extend(far_apart(facts));
        }
        // Over NVLink nothing passes the IOMMU or a PCIe bridge.
        Symptom::Wrong if by_nvlink => {}
        Symptom::Wrong => {
            causes.extend(translating(facts));
            causes.extend(redirecting(facts));
            causes.extend(patched(facts));
            causes.extend(virtual_machine(facts));
        }
    }
    causes.extend(contained(facts, symptom));
    causes
}

/// The first two likely causes as the end of a message; empty if none is known.
pub(super) fn sentence(facts: &Facts, symptom: Symptom) -> String {
    let causes = likely(facts, symptom);
    let texts: Vec<String> = causes.iter().take(2).map(Cause::to_string).collect();
    if texts.is_empty() {
        texts.concat()
    } else {
        format!(". Likely cause: {}", texts.join("; or "))
    }
}

fn is_geforce(facts: &Facts) -> bool {
    facts.names.iter().any(|name| name.contains("GeForce"))
}

fn divided(facts: &Facts) -> Option<Cause> {
    let what = "a GPU is divided into instances (MIG)";
    let why = "instances have no peer access";
    (facts.mig == Some(true)).then(|| Cause::new(what, why, "turn it off: nvidia-smi -mig 0"))
}

fn fabric(facts: &Facts, by_nvlink: bool) -> Option<Cause> {
    let what = "the machine has NVSwitches and these GPUs have no NVLink that is up";
    let why = "without the fabric manager the switches carry nothing";
    let remedy = "start nvidia-fabricmanager, of the driver's version";
    let down = facts.nvswitch == Some(true) && !by_nvlink && facts.nvlinks_up == Some(0);
    down.then(|| Cause::new(what, why, remedy))
}

fn exclusive(facts: &Facts, symptom: Symptom) -> Option<Cause> {
    let what = "a GPU takes one process only (its compute mode)";
    let why = "a rank that is a process needs its peers' GPUs too";
    let told = facts.exclusive == Some(true) && symptom == Symptom::NoAccess;
    told.then(|| Cause::new(what, why, "nvidia-smi -c DEFAULT"))
}

fn consumer(facts: &Facts, by_nvlink: bool) -> Option<Cause> {
    let what = "a GPU is a GeForce";
    let why = "NVIDIA's driver offers these no peer access over PCIe";
    let remedy = "use host memory, which Peerlane does by itself (transport auto)";
    (is_geforce(facts) && !by_nvlink).then(|| Cause::new(what, why, remedy))
}

fn no_nvlink(facts: &Facts) -> Option<Cause> {
    let what = "there is no NVLink between them, though they have some";
    let why = "a bridge or a link is missing or down";
    let missing = facts.nvlinks == Some(0) && facts.nvlinks_up.is_some_and(|up| up > 0);
    missing.then(|| Cause::new(what, why, "look at nvidia-smi nvlink --status, seat the bridge"))
}

fn far_apart(facts: &Facts) -> Option<Cause> {
    let what = "they are on different CPUs";
    let why = "some platforms carry nothing between PCIe devices of different CPUs";
    let remedy = "put them under one CPU, or use host memory";
    (facts.pcie == Some(PciePath::System)).then(|| Cause::new(what, why, remedy))
}

fn translating(facts: &Facts) -> Option<Cause> {
    let what = "the IOMMU translates what the GPUs send";
    let why = "it drops or misdirects what one GPU sends to another";
    let remedy = "boot with iommu=pt or with amd_iommu=off or intel_iommu=off, or turn it off in the firmware";
    (facts.iommu == Some(Iommu::Translating)).then(|| Cause::new(what, why, remedy))
}

fn redirecting(facts: &Facts) -> Option<Cause> {
    let bridges = facts.acs.as_ref().filter(|bridges| !bridges.is_empty())?;
    let what = format!("PCIe bridges redirect what peers send (ACS on {})", bridges.join(", "));
    let why = "it takes the way over the root, where it may get lost";
    Some(Cause::new(what, why, "turn ACS off in the firmware or with setpci"))
}

/// Many build NVIDIA's open module themselves, unchanged; only a GeForce with access gives a changed one away.
fn patched(facts: &Facts) -> Option<Cause> {
    let what = match facts.local_build {
        Some(true) => {
            "the driver offers a GeForce peer access over PCIe, and its module was not built by NVIDIA"
        }
        _ => "the driver offers a GeForce peer access over PCIe",
    };
    let why =
        "drivers that were changed to offer peer access offer it where the hardware loses data";
    let remedy =
        "use NVIDIA's own driver, or host memory, which Peerlane does by itself (transport auto)";
    let offered = is_geforce(facts) && facts.access == Some(true);
    offered.then(|| Cause::new(what, why, remedy))
}

fn virtual_machine(facts: &Facts) -> Option<Cause> {
    let what = "this is a virtual machine";
    let why = "its devices see each other only as its host lets them";
    let remedy = "let the host pass the GPUs on with their topology and ACS off (for cloud machines: another kind)";
    (facts.virtual_machine == Some(true)).then(|| Cause::new(what, why, remedy))
}

fn contained(facts: &Facts, symptom: Symptom) -> Option<Cause> {
    let what = "this is a container";
    let why = "it may hide devices of the fabric, or forbid what sharing memory needs";
    let remedy = "compare with peerlane topo outside of it";
    let told = facts.container == Some(true) && symptom == Symptom::NoAccess;
    told.then(|| Cause::new(what, why, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let names = ["NVIDIA RTX A6000".to_owned(), "NVIDIA RTX A6000".to_owned()];
        Facts {
            names,
            access: Some(true),
            nvlinks: Some(0),
            nvlinks_up: Some(0),
            ..Facts::default()
        }
    }

    fn geforce() -> Facts {
        let names = ["NVIDIA GeForce RTX 4090".to_owned(), "NVIDIA GeForce RTX 4090".to_owned()];
        Facts { names, ..facts() }
    }

    fn found(facts: Facts, symptom: Symptom) -> Vec<String> {
        likely(&facts, symptom).into_iter().map(|cause| cause.what).collect()
    }

    #[test]
    fn unknown_facts_are_nobodys_fault() {
        for symptom in [Symptom::NoAccess, Symptom::Wrong] {
            assert_eq!(found(Facts::default(), symptom), [""; 0]);
            assert_eq!(found(facts(), symptom), [""; 0]);
        }
        assert_eq!(sentence(&facts(), Symptom::Wrong), "");
    }

    #[test]
    fn each_fact_has_its_cause() {
        let wrong = |facts| found(facts, Symptom::Wrong);
        let none = |facts| found(facts, Symptom::NoAccess);
        let translating = Facts { iommu: Some(Iommu::Translating), ..facts() };
        assert!(wrong(translating.clone())[0].contains("IOMMU translates"));
        assert!(none(translating).is_empty(), "an IOMMU takes no access away");
        assert!(wrong(Facts { iommu: Some(Iommu::PassThrough), ..facts() }).is_empty());
        let acs = Facts { acs: Some(vec!["0000:17:01.0".into()]), ..facts() };
        assert!(wrong(acs)[0].contains("ACS on 0000:17:01.0"));
        assert!(wrong(Facts { acs: Some(Vec::new()), ..facts() }).is_empty());
        let built = Facts { local_build: Some(true), ..facts() };
        assert!(wrong(built).is_empty(), "others build it too");
        let patched = Facts { local_build: Some(true), ..geforce() };
        assert!(wrong(patched)[0].ends_with("and its module was not built by NVIDIA"));
        assert_eq!(wrong(geforce()), ["the driver offers a GeForce peer access over PCIe"]);
        let refused = Facts { access: Some(false), ..geforce() };
        assert_eq!(none(refused.clone()), ["a GPU is a GeForce"]);
        let bridged = Facts { nvlinks_up: Some(4), ..refused };
        assert!(none(bridged)[1].contains("no NVLink between them"));
        assert_eq!(none(Facts { mig: Some(true), ..facts() }).len(), 1);
        let exclusive = Facts { exclusive: Some(true), ..facts() };
        assert!(
            none(exclusive.clone())[0].contains("one process only") && wrong(exclusive).is_empty()
        );
        let switched = Facts { nvswitch: Some(true), ..facts() };
        assert!(none(switched)[0].contains("NVSwitches"));
        let guest = Facts { virtual_machine: Some(true), ..facts() };
        assert_eq!(wrong(guest.clone()), none(guest));
        assert_eq!(none(Facts { container: Some(true), ..facts() }), ["this is a container"]);
        let far = Facts { pcie: Some(PciePath::System), ..facts() };
        assert_eq!(none(far), ["they are on different CPUs"]);
    }

    #[test]
    fn nvlinks_pass_no_bridge() {
        let linked = Facts {
            nvlinks: Some(18),
            nvlinks_up: Some(18),
            nvswitch: Some(true),
            iommu: Some(Iommu::Translating),
            acs: Some(vec!["0000:17:01.0".into()]),
            ..facts()
        };
        assert!(found(linked, Symptom::Wrong).is_empty());
    }

    #[test]
    fn a_message_names_two_causes_at_most() {
        let all =
            Facts { iommu: Some(Iommu::Translating), virtual_machine: Some(true), ..geforce() };
        let text = sentence(&all, Symptom::Wrong);
        assert!(
            text.starts_with(". Likely cause: the IOMMU translates what the GPUs send: "),
            "{text}"
        );
        assert!(
            text.contains("; or the driver offers a GeForce peer access over PCIe: "),
            "{text}"
        );
        assert!(!text.contains("virtual machine"), "{text}");
    }
}
