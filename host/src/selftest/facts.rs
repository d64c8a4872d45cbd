//! What this machine says about the way between two GPUs, as far as it says anything.
//!
//! Invariant: gathering never fails and changes nothing. What cannot be found out is `None`.

use crate::gpu::{Backend, GpuRef};
use crate::topology::{PciePath, Topology};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::ComputeMode;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// How the IOMMU treats a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Iommu {
    /// There is none, or it is off.
    Off,
    /// It passes addresses on as they are.
    PassThrough,
    /// It translates addresses: what one device sends to another goes through it.
    Translating,
}

/// What is known about an ordered pair of GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Facts {
    /// What both are called.
    pub names: [String; 2],
    /// Whether the driver offers the first access to the second.
    pub access: Option<bool>,
    /// NVLinks between them.
    pub nvlinks: Option<u32>,
    /// NVLinks of either that are up, wherever they lead.
    pub nvlinks_up: Option<u32>,
    /// The way over PCIe.
    pub pcie: Option<PciePath>,
    /// How the IOMMU treats them.
    pub iommu: Option<Iommu>,
    /// Bridges on the way that send peers' requests up to the root (ACS). Only root may look.
    pub acs: Option<Vec<String>>,
    /// Whether somebody other than NVIDIA built the kernel module, changed or not.
    pub local_build: Option<bool>,
    /// Whether this is a virtual machine.
    pub virtual_machine: Option<bool>,
    /// Whether this is a container.
    pub container: Option<bool>,
    /// Whether either is divided into instances.
    pub mig: Option<bool>,
    /// Whether either takes one process only.
    pub exclusive: Option<bool>,
    /// Whether the machine has NVSwitches.
    pub nvswitch: Option<bool>,
}

impl Facts {
    /// All that can be found out.
    pub fn gather(from: &GpuRef, to: &GpuRef) -> Facts {
        let properties = [from.properties(), to.properties()];
        let mut facts = Facts { names: properties.map(|gpu| gpu.name.clone()), ..Facts::default() };
        let topology = Topology::discover(&[from.clone(), to.clone()]).ok();
        if let Some(link) = topology.as_ref().and_then(|all| all.link(0, 1)) {
            facts.access = Some(link.access.access);
            facts.nvlinks = link.nvlinks;
            facts.pcie = link.pcie;
        }
        if from.backend() == Backend::Sim {
            return facts;
        }
        // A GPU without a link that is up says nothing; one that NVML does not describe says as little.
        let up = |all: &Topology| {
            let links = all.nodes.iter().filter_map(|node| Some(node.nvlink.as_ref()?.active));
            links.max().unwrap_or(0)
        };
        facts.nvlinks_up = topology.as_ref().filter(|all| all.notes.is_empty()).map(up);
        let addresses = properties.map(|gpu| gpu.pci_bus_id.to_lowercase());
        let addresses = [addresses[0].as_str(), addresses[1].as_str()];
        facts.of_machine(Path::new("/"), addresses);
        facts.of_nvml(properties.map(|gpu| gpu.uuid.as_str()));
        facts
    }

    /// What the files under `root` say.
    pub(super) fn of_machine(&mut self, root: &Path, addresses: [&str; 2]) {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        self.iommu = iommu(root, addresses);
        self.acs = acs(root, addresses);
        self.virtual_machine = text("proc/cpuinfo").map(|cpu| cpu.contains(" hypervisor"));
        let marks = [".dockerenv", "run/.containerenv"];
        let marked = marks.iter().any(|mark| root.join(mark).exists());
        let grouped = text("proc/1/cgroup").map(|groups| {
            ["docker", "kubepods", "containerd", "libpod", "lxc"].iter().any(|n| groups.contains(n))
        });
        self.container = if marked { Some(true) } else { grouped };
        self.local_build =
            text("proc/driver/nvidia/version").and_then(|version| is_local_build(&version));
        self.nvswitch =
            root.join("dev").is_dir().then(|| root.join("dev/nvidia-nvswitchctl").exists());
    }

    fn of_nvml(&mut self, uuids: [&str; 2]) {
        let Ok(nvml) = Nvml::builder().lib_path(OsStr::new("libnvidia-ml.so.1")).init() else {
            return;
        };
        for device in uuids.iter().filter_map(|uuid| nvml.device_by_uuid(*uuid).ok()) {
            if let Ok(mode) = device.mig_mode() {
                self.mig = Some(self.mig.unwrap_or(false) || mode.current != 0);
            }
            if let Ok(mode) = device.compute_mode() {
                let alone =
                    mode == ComputeMode::ExclusiveProcess || mode == ComputeMode::Prohibited;
                self.exclusive = Some(self.exclusive.unwrap_or(false) || alone);
            }
        }
    }
}

/// NVIDIA's own builds name its build machines.
fn is_local_build(version: &str) -> Option<bool> {
    let line = version.lines().find(|line| line.starts_with("NVRM version:"))?;
    // Closed modules cannot be built by others.
    Some(line.contains("Open Kernel Module") && !line.contains("dvs-builder@"))
}

fn iommu(root: &Path, addresses: [&str; 2]) -> Option<Iommu> {
    let kind = |address: &str| {
        let group = root.join("sys/bus/pci/devices").join(address).join("iommu_group/type");
        fs::read_to_string(group).ok()
    };
    let kinds: Vec<String> = addresses.iter().filter_map(|address| kind(address)).collect();
    if !kinds.is_empty() {
        let passes = kinds.iter().all(|kind| kind.trim() == "identity");
        return Some(if passes { Iommu::PassThrough } else { Iommu::Translating });
    }
    let units = fs::read_dir(root.join("sys/class/iommu"));
    let is_there = match units {
        Ok(units) => units.flatten().next().is_some(),
        // The kernel has no such thing, or does not show it.
        Err(_) => return root.join("sys/class").is_dir().then_some(Iommu::Off),
    };
    if !is_there {
        return Some(Iommu::Off);
    }
    let line = fs::read_to_string(root.join("proc/cmdline")).unwrap_or_default();
    let says = |word: &str| line.split_whitespace().any(|one| one == word);
    match (says("iommu=pt") || says("iommu.passthrough=1"), says("iommu=off")) {
        (_, true) => Some(Iommu::Off),
        (true, _) => Some(Iommu::PassThrough),
        // Kernels have different defaults.
        _ => None,
    }
}

/// The bridges above either GPU whose ACS redirects peers' requests; none known where one cannot be read.
fn acs(root: &Path, addresses: [&str; 2]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    for address in addresses {
        for bridge in bridges(root, address)? {
            let name = bridge.file_name()?.to_string_lossy().into_owned();
            if redirects(&fs::read(bridge.join("config")).ok()?)? && !found.contains(&name) {
                found.push(name);
            }
        }
    }
    Some(found)
}

/// The bridges between a device and the root: the directories that its own lies in.
fn bridges(root: &Path, address: &str) -> Option<Vec<PathBuf>> {
    let device = fs::canonicalize(root.join("sys/bus/pci/devices").join(address)).ok()?;
    let parents = device.ancestors().skip(1);
    let is_device = |path: &&Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().matches(':').count() == 2)
    };
    Some(parents.take_while(is_device).map(Path::to_path_buf).collect())
}

/// Whether a device's configuration space has an ACS capability with request redirection on. None if not all of
/// it is there.
fn redirects(config: &[u8]) -> Option<bool> {
    const ACS: u32 = 0x0d;
    /// ACS P2P Request Redirect Enable.
    const REDIRECT: u16 = 1 << 2;
    if config.len() < 4096 {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(config.get(at..at + 4)?.try_into().ok()?));
    let mut at = 0x100;
    // The list may be broken: no longer than there is room for.
    for _ in 0..960 {
        let header = word(at)?;
        if header & 0xffff == ACS {
            let control = (word(at + 4)? >> 16) as u16;
            return Some(control & REDIRECT != 0);
        }
        at = (header >> 20) as usize & !3;
        if at < 0x100 {
            return Some(false);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::sim;
    use std::os::unix::fs::symlink;

    const ADDRESSES: [&str; 2] = ["0000:18:00.0", "0000:20:00.0"];

    /// A made-up file system that goes when the test ends.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &[u8])]) -> Root {
            let root = std::env::temp_dir().join(format!("peerlane-{}-{name}", std::process::id()));
            for (path, content) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            fs::create_dir_all(&root).unwrap();
            Root(root)
        }

        fn facts(&self) -> Facts {
            let mut facts = Facts::default();
            facts.of_machine(&self.0, ADDRESSES);
            facts
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_empty_machine_says_nothing() {
        assert_eq!(Root::new("facts-empty", &[]).facts(), Facts::default());
    }

    #[test]
    fn files_say_what_the_machine_is_like() {
        let root = Root::new(
            "facts-files",
            &[
                ("proc/cpuinfo", b"flags\t\t: fpu vme hypervisor lahf_lm\n"),
                ("proc/1/cgroup", b"0::/kubepods/burstable\n"),
                ("proc/driver/nvidia/version", b"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (me@home)  Mon\nGCC version: 13\n"),
                ("sys/class/iommu/dmar0", b""),
                ("proc/cmdline", b"root=/dev/sda intel_iommu=on iommu=pt\n"),
                ("dev/nvidia-nvswitchctl", b""),
            ],
        );
        let facts = root.facts();
        assert_eq!(facts.virtual_machine, Some(true));
        assert_eq!(facts.container, Some(true));
        assert_eq!(facts.local_build, Some(true));
        assert_eq!(facts.iommu, Some(Iommu::PassThrough));
        assert_eq!(facts.nvswitch, Some(true));
        let group = "sys/bus/pci/devices/0000:18:00.0/iommu_group/type";
        fs::create_dir_all(root.0.join(group).parent().unwrap()).unwrap();
        fs::write(root.0.join(group), "DMA-FQ\n").unwrap();
        assert_eq!(root.facts().iommu, Some(Iommu::Translating), "the group knows better");
    }

    #[test]
    fn nvidias_own_module_is_told_apart() {
        let line = |rest: &str| format!("NVRM version: NVIDIA UNIX {rest}\n");
        let own =
            "Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3-AE18)";
        assert_eq!(is_local_build(&line(own)), Some(false));
        assert_eq!(is_local_build(&line("x86_64 Kernel Module  535.1  Tue")), Some(false));
        assert_eq!(is_local_build("something else"), None);
    }

    #[test]
    fn bridges_that_redirect_are_found() {
        let mut config = vec![0_u8; 4096];
        config[0x100..0x104].copy_from_slice(&(0x0001_u32 | 0x150 << 20).to_le_bytes());
        config[0x150..0x154].copy_from_slice(&0x000d_u32.to_le_bytes());
        assert_eq!(redirects(&config), Some(false));
        config[0x156] = 1 << 2;
        assert_eq!(redirects(&config), Some(true));
        assert_eq!(redirects(&config[..64]), None, "what others than root see");
        // A list that leads round in circles.
        config[0x100..0x104].copy_from_slice(&(0x0001_u32 | 0x100 << 20).to_le_bytes());
        assert_eq!(redirects(&config), None);

        config[0x100..0x104].copy_from_slice(&0x000d_u32.to_le_bytes());
        config[0x106] = 1 << 2;
        let ends: [(&str, &[u8]); 3] = [
            ("sys/devices/pci0000:17/0000:17:01.0/config", &config),
            ("sys/devices/pci0000:17/0000:17:01.0/0000:18:00.0/class", b""),
            ("sys/devices/pci0000:17/0000:17:01.0/0000:20:00.0/class", b""),
        ];
        let root = Root::new("facts-acs", &ends);
        let devices = root.0.join("sys/bus/pci/devices");
        fs::create_dir_all(&devices).unwrap();
        for address in ADDRESSES {
            let to = format!("../../../devices/pci0000:17/0000:17:01.0/{address}");
            symlink(to, devices.join(address)).unwrap();
        }
        assert_eq!(root.facts().acs, Some(vec!["0000:17:01.0".into()]));
    }

    #[test]
    fn simulated_gpus_have_the_facts_of_a_driver() {
        let config = sim::Config { devices: 2, unreachable: vec![(0, 1)], ..Default::default() };
        let gpus = sim::devices(&config);
        let facts = Facts::gather(&gpus[0], &gpus[1]);
        assert_eq!((facts.access, facts.iommu), (Some(false), None));
    }
}
