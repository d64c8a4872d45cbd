//! What NVML adds to a topology: NVLinks, and the way over PCIe.
//!
//! Invariant: nothing here fails. What NVML does not tell is a note and a `None`.

use super::{Link, NvLinks, PciePath, PcieSlot, Topology};
use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use nvml_wrapper::{Device, Nvml};
use std::ffi::OsStr;

/// The library that the driver package installs.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// More than any GPU has: 18 on Hopper and Blackwell. NVML refuses numbers that do not exist.
const MAX_NVLINKS: u32 = 36;

/// A PCI address: domain, bus, device.
type Address = (u32, u32, u32);

/// Where an NVLink leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Gpu(Address),
    Switch,
}

/// A GPU as NVML sees it.
struct Seen<'nvml> {
    device: Device<'nvml>,
    address: Address,
    ends: Vec<End>,
}

/// The version of the driver.
pub(super) fn driver_version() -> Option<String> {
    let nvml = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init().ok()?;
    nvml.sys_driver_version().ok()
}

/// Adds to `topology` what NVML tells.
pub(super) fn describe(topology: &mut Topology) {
    describe_with(topology, LIBRARY);
}

fn describe_with(topology: &mut Topology, library: &str) {
    match Nvml::builder().lib_path(OsStr::new(library)).init() {
        Ok(nvml) => read(topology, &nvml),
        Err(error) => topology
            .notes
            .push(format!("NVLinks and PCIe paths are unknown, NVML is not there: {error}")),
    }
}

fn read(topology: &mut Topology, nvml: &Nvml) {
    let mut seen = Vec::new();
    for node in &mut topology.nodes {
        let properties = &node.properties;
        let found = find(nvml, &properties.uuid).inspect_err(|error| {
            let ordinal = properties.ordinal;
            topology.notes.push(format!("NVML does not describe GPU {ordinal}: {error}"));
        });
        if let Ok(gpu) = &found {
            node.pcie = pcie_slot(&gpu.device).ok();
            node.nvlink = nvlinks(gpu);
        }
        seen.push(found.ok());
    }
    for link in topology.links.iter_mut().filter(|link| !link.same_gpu) {
        let ends = (&seen[link.from as usize], &seen[link.to as usize]);
        if let (Some(from), Some(to)) = ends {
            describe_link(link, from, to);
        }
    }
}

fn find<'nvml>(nvml: &'nvml Nvml, uuid: &str) -> Result<Seen<'nvml>, NvmlError> {
    let device = nvml.device_by_uuid(uuid)?;
    let address = address(&device.pci_info()?);
    let ends = (0..MAX_NVLINKS).filter_map(|number| end(&device, number)).collect();
    Ok(Seen { device, address, ends })
}

fn address(pci: &PciInfo) -> Address {
    (pci.domain, pci.bus, pci.device)
}

/// Where a link leads that is up. Behind a virtual machine's NVLink the other end may be hidden;
/// only switches are.
fn end(device: &Device<'_>, number: u32) -> Option<End> {
    let link = device.link_wrapper_for(number);
    if !link.is_active().unwrap_or(false) {
        return None;
    }
    // nvml-wrapper 0.13's `remote_device_type` always answers `Unknown`, so the kernel is asked.
    let remote = link.remote_pci_info().ok().map(|pci| address(&pci));
    Some(remote.filter(|&remote| is_gpu(remote)).map_or(End::Switch, End::Gpu))
}

/// Whether the PCI device is of class 3, a display controller. Switches are bridges, class 6.
fn is_gpu((domain, bus, device): Address) -> bool {
    let path = format!("/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/class");
    std::fs::read_to_string(path).is_ok_and(|class| class.starts_with("0x03"))
}

fn pcie_slot(device: &Device<'_>) -> Result<PcieSlot, NvmlError> {
    Ok(PcieSlot {
        generation: device.current_pcie_link_gen()?,
        width: device.current_pcie_link_width()?,
        max_generation: device.max_pcie_link_gen()?,
        max_width: device.max_pcie_link_width()?,
    })
}

fn nvlinks(gpu: &Seen<'_>) -> Option<NvLinks> {
    let first = (0..MAX_NVLINKS)
        .map(|number| gpu.device.link_wrapper_for(number))
        .find(|link| link.is_active().unwrap_or(false))?;
    let version = first.version().map_or_else(|_| "of unknown version".into(), version_text);
    Some(NvLinks { active: gpu.ends.len() as u32, version })
}

/// NVML's `nvmlNvlinkVersion_t` as the version that it stands for.
fn version_text(code: u32) -> String {
    let versions = ["1.0", "2.0", "2.2", "3.0", "3.1", "4.0", "5.0", "6.0"];
    let known = (code as usize).checked_sub(1).and_then(|index| versions.get(index));
    known.map_or_else(|| format!("of version code {code}"), |&version| version.into())
}

fn describe_link(link: &mut Link, from: &Seen<'_>, to: &Seen<'_>) {
    link.nvlinks = Some(nvlinks_between((from.address, &from.ends), (to.address, &to.ends)));
    link.pcie = common_ancestor(&from.device, &to.device);
}

/// Links that lead straight to the other GPU, or else through switches: as many as the GPU with
/// fewer of them has, because every GPU of a switched machine is linked to every switch.
fn nvlinks_between(from: (Address, &[End]), to: (Address, &[End])) -> u32 {
    let count = |ends: &[End], end: End| ends.iter().filter(|&&other| other == end).count();
    let direct = count(from.1, End::Gpu(to.0));
    let switched = count(from.1, End::Switch).min(count(to.1, End::Switch));
    (if direct > 0 { direct } else { switched }) as u32
}

fn common_ancestor(from: &Device<'_>, to: &Device<'_>) -> Option<PciePath> {
    Some(match from.nvml().topology_common_ancestor(from, to).ok()? {
        TopologyLevel::Internal => PciePath::Board,
        TopologyLevel::Single => PciePath::Switch,
        TopologyLevel::Multiple => PciePath::Switches,
        TopologyLevel::HostBridge => PciePath::HostBridge,
        TopologyLevel::Node => PciePath::NumaNode,
        TopologyLevel::System => PciePath::System,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::four;
    use super::*;

    const A: Address = (0, 0x1b, 0);
    const B: Address = (0, 0x43, 0);
    const C: Address = (0, 0x52, 0);

    #[test]
    fn missing_nvml_is_a_note() {
        let mut topology = four();
        topology.notes.clear();
        let before = topology.clone();
        describe_with(&mut topology, "libno-such-nvml.so.1");
        assert_eq!(topology.notes.len(), 1);
        assert!(topology.notes[0].contains("libno-such-nvml.so.1"), "{}", topology.notes[0]);
        assert_eq!((topology.nodes, topology.links), (before.nodes, before.links));
    }

    #[test]
    fn links_through_switches_count_as_the_poorer_side_has() {
        let (many, few) = ([End::Switch; 18], [End::Switch; 12]);
        assert_eq!(nvlinks_between((A, &many), (B, &many)), 18);
        assert_eq!(nvlinks_between((A, &many), (B, &few)), 12);
        assert_eq!(nvlinks_between((A, &many), (B, &[])), 0);
    }

    #[test]
    fn direct_links_count_for_their_own_pair() {
        let a = [End::Gpu(B), End::Gpu(B), End::Gpu(C)];
        let b = [End::Gpu(A), End::Gpu(A)];
        assert_eq!(nvlinks_between((A, &a), (B, &b)), 2);
        assert_eq!(nvlinks_between((B, &b), (C, &[End::Gpu(A)])), 0);
    }

    #[test]
    fn versions_have_names() {
        assert_eq!(version_text(6), "4.0");
        assert_eq!(version_text(0), "of version code 0");
        assert_eq!(version_text(99), "of version code 99");
    }
}
