//! Who can reach whom, over what: the GPUs of a communicator and every ordered pair of them.
//!
//! Invariant: a pair is reachable exactly if the GPU's driver says so. What NVML adds (NVLinks, the
//! way over PCIe) describes the path and decides nothing, so a machine without NVML works as well.
//! Pairs are named by positions in the list given to [`Topology::discover`], which for a
//! communicator are ranks.

mod matrix;
mod nvml;

use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef, PeerAccess, Properties, cuda};

/// GPUs and the links between them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Topology {
    /// Whether the GPUs are real.
    pub backend: Backend,
    /// The GPUs, in the order given.
    pub nodes: Vec<Node>,
    /// Every ordered pair of two different positions, by `from`, then by `to`.
    pub links: Vec<Link>,
    /// What could not be found out, and why.
    pub notes: Vec<String>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Node {
    /// What it is.
    #[serde(flatten)]
    pub properties: Properties,
    /// Its PCIe slot, if NVML tells.
    pub pcie: Option<PcieSlot>,
    /// Its NVLinks, if NVML tells and it has any that are up.
    pub nvlink: Option<NvLinks>,
}

/// How a GPU is plugged in. An idle GPU lowers its generation to save power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PcieSlot {
    /// Generation at the moment.
    pub generation: u32,
    /// Lanes at the moment.
    pub width: u32,
    /// Highest generation that the GPU and the slot can do.
    pub max_generation: u32,
    /// Most lanes that the GPU and the slot can do.
    pub max_width: u32,
}

/// A GPU's NVLinks.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NvLinks {
    /// Links that are up, wherever they lead.
    pub active: u32,
    /// The version that NVML reports, for example `4.0`.
    pub version: String,
}

/// The way from one GPU to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Link {
    /// Position of the GPU that writes.
    pub from: u32,
    /// Position of the GPU that is written to.
    pub to: u32,
    /// What the driver says.
    #[serde(flatten)]
    pub access: PeerAccess,
    /// Both positions are the same GPU.
    pub same_gpu: bool,
    /// NVLinks between the two, directly or through switches, if NVML tells.
    pub nvlinks: Option<u32>,
    /// The way over PCIe, if NVML tells. Two GPUs with NVLinks have one too.
    pub pcie: Option<PciePath>,
}

/// What two GPUs have in common on the way over PCIe, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PciePath {
    /// Both sit on one board, behind its own switch.
    Board,
    /// One PCIe switch.
    Switch,
    /// Several PCIe switches, but no host bridge.
    Switches,
    /// A PCIe host bridge of one CPU.
    HostBridge,
    /// The host bridges of one NUMA node.
    NumaNode,
    /// Only the interconnect between NUMA nodes.
    System,
}

impl Topology {
    /// Asks the GPUs' driver, and NVML if it is there.
    ///
    /// # Errors
    /// Real and simulated GPUs are mixed, or the driver fails. Missing NVML is a note.
    pub fn discover(gpus: &[GpuRef]) -> Result<Topology> {
        let backend = common_backend(gpus)?;
        let nodes = gpus
            .iter()
            .map(|gpu| Node { properties: gpu.properties().clone(), pcie: None, nvlink: None })
            .collect();
        let mut links = Vec::new();
        for from in 0..gpus.len() {
            for to in (0..gpus.len()).filter(|&to| to != from) {
                links.push(read_link(gpus, from, to)?);
            }
        }
        let mut topology = Topology { backend, nodes, links, notes: Vec::new() };
        if backend == Backend::Cuda {
            nvml::describe(&mut topology);
        }
        Ok(topology)
    }

    /// The link between two different positions.
    pub fn link(&self, from: u32, to: u32) -> Option<&Link> {
        self.links.iter().find(|link| (link.from, link.to) == (from, to))
    }

    /// Whether every GPU reaches every other.
    pub fn fully_connected(&self) -> bool {
        self.links.iter().all(|link| link.access.access)
    }

    /// The ordered pairs (from, to) where `from` cannot map the memory of `to`.
    pub fn unreachable_pairs(&self) -> Vec<(u32, u32)> {
        let unreachable = self.links.iter().filter(|link| !link.access.access);
        unreachable.map(|link| (link.from, link.to)).collect()
    }
}

/// The version of the driver, as NVML says it (`580.65.06`) or else as CUDA does (`CUDA 13.0`). None
/// where there is no driver.
pub fn driver_version() -> Option<String> {
    let cuda = || cuda::version().ok().map(|(major, minor)| format!("CUDA {major}.{minor}"));
    nvml::driver_version().or_else(cuda)
}

fn common_backend(gpus: &[GpuRef]) -> Result<Backend> {
    let backend = gpus.first().map_or(Backend::Sim, |gpu| gpu.backend());
    match gpus.iter().position(|gpu| gpu.backend() != backend) {
        None => Ok(backend),
        Some(other) => Err(Error::InvalidArgument {
            op: "Topology::discover",
            argument: "gpus",
            expected: format!("GPUs of one kind, {backend:?} like the first"),
            got: format!("{:?} at position {other}", gpus[other].backend()),
        }),
    }
}

fn read_link(gpus: &[GpuRef], from: usize, to: usize) -> Result<Link> {
    let peer = gpus[to].properties().ordinal;
    let same_gpu = gpus[from].properties().ordinal == peer;
    let access = if same_gpu {
        PeerAccess { access: true, native_atomics: true, performance_rank: 0 }
    } else {
        gpus[from].peer_access(peer)?
    };
    Ok(Link { from: from as u32, to: to as u32, access, same_gpu, nvlinks: None, pcie: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four hand-made GPUs: 0 and 1 by NVLink, 2 near them, 3 out of reach of 0.
    pub(super) fn four() -> Topology {
        let node = |ordinal| Node {
            properties: Properties {
                ordinal,
                name: "Test GPU".into(),
                uuid: format!("GPU-{ordinal}"),
                pci_bus_id: format!("0000:{ordinal:02x}:00.0"),
                compute_capability: (9, 0),
                multiprocessors: 132,
                memory_bytes: 141 << 30,
            },
            pcie: None,
            nvlink: None,
        };
        let link = |from, to| Link {
            from,
            to,
            access: PeerAccess {
                access: (from, to) != (0, 3),
                native_atomics: false,
                performance_rank: 0,
            },
            same_gpu: false,
            nvlinks: Some(if from + to == 1 { 18 } else { 0 }),
            pcie: match from.max(to) {
                1 => Some(PciePath::Switch),
                2 => Some(PciePath::HostBridge),
                _ => Some(PciePath::System),
            },
        };
        let pairs = (0..4).flat_map(|from| (0..4).map(move |to| (from, to)));
        Topology {
            backend: Backend::Cuda,
            nodes: (0..4).map(node).collect(),
            links: pairs.filter(|(from, to)| from != to).map(|(from, to)| link(from, to)).collect(),
            notes: vec!["made by hand".into()],
        }
    }

    #[test]
    fn an_unreachable_pair_is_one_direction() {
        let mut topology = four();
        assert_eq!(topology.unreachable_pairs(), [(0, 3)]);
        assert!(!topology.fully_connected());
        assert_eq!(topology.link(3, 0).unwrap().pcie, Some(PciePath::System));
        assert_eq!(topology.link(1, 1), None);
        for link in &mut topology.links {
            link.access.access = true;
        }
        assert!(topology.fully_connected() && topology.unreachable_pairs().is_empty());
    }

    #[test]
    fn it_serialises_flat() {
        let json = serde_json::to_value(four()).unwrap();
        assert_eq!(json["backend"], "cuda");
        assert_eq!(json["nodes"][2]["uuid"], "GPU-2");
        assert_eq!(json["links"][0]["nvlinks"], 18);
        assert_eq!(json["links"][2]["access"], false);
        assert_eq!(json["links"][1]["pcie"], "host_bridge");
    }

    #[test]
    fn no_gpus_are_a_topology_too() {
        let topology = Topology::discover(&[]).unwrap();
        assert!(topology.fully_connected() && topology.nodes.is_empty());
    }
}
