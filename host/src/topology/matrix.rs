//! The topology as a table that a person can read.
//!
//! Invariant: every term in a cell is explained below the table, and no other is. The terms are
//! those of `nvidia-smi topo -m` where it has one.

use super::{Link, PciePath, Topology};
use crate::gpu::Backend;
use std::collections::BTreeSet;
use std::fmt;

/// What a cell says. The order is that of the legend.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    Itself,
    SameGpu,
    Simulated,
    NvLink(u32),
    Pcie(PciePath),
    Reachable,
    Unreachable,
}

impl Cell {
    fn of(backend: Backend, link: Option<&Link>) -> Cell {
        let Some(link) = link else {
            return Cell::Itself;
        };
        match (link.nvlinks, link.pcie) {
            _ if !link.access.access => Cell::Unreachable,
            _ if link.same_gpu => Cell::SameGpu,
            _ if backend == Backend::Sim => Cell::Simulated,
            (Some(count @ 1..), _) => Cell::NvLink(count),
            (_, Some(path)) => Cell::Pcie(path),
            _ => Cell::Reachable,
        }
    }

    fn text(self) -> String {
        match self {
            Cell::Itself => "X".into(),
            Cell::SameGpu => "same".into(),
            Cell::Simulated => "sim".into(),
            Cell::NvLink(count) => format!("NV{count}"),
            Cell::Pcie(PciePath::Board) => "PSB".into(),
            Cell::Pcie(PciePath::Switch) => "PIX".into(),
            Cell::Pcie(PciePath::Switches) => "PXB".into(),
            Cell::Pcie(PciePath::HostBridge) => "PHB".into(),
            Cell::Pcie(PciePath::NumaNode) => "NODE".into(),
            Cell::Pcie(PciePath::System) => "SYS".into(),
            Cell::Reachable => "P2P".into(),
            Cell::Unreachable => "--".into(),
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Cell::Itself => "the same rank",
            Cell::SameGpu => "two ranks on one GPU",
            Cell::Simulated => "simulated link",
            Cell::NvLink(_) => "NVLinks, that many of them",
            Cell::Pcie(PciePath::Board) => "PCIe: the switch of one board",
            Cell::Pcie(PciePath::Switch) => "PCIe: one switch",
            Cell::Pcie(PciePath::Switches) => "PCIe: several switches, no host bridge",
            Cell::Pcie(PciePath::HostBridge) => "PCIe: through a host bridge of one CPU",
            Cell::Pcie(PciePath::NumaNode) => "PCIe: between host bridges of one NUMA node",
            Cell::Pcie(PciePath::System) => "PCIe and the interconnect between NUMA nodes",
            Cell::Reachable => "reachable, path unknown",
            Cell::Unreachable => "the driver does not map this memory",
        }
    }
}

impl Topology {
    /// The matrix with its legend: rows write, columns are written to.
    pub fn matrix(&self) -> String {
        let size = self.nodes.len() as u32;
        let cell = |from, to| Cell::of(self.backend, self.link(from, to));
        let rows: Vec<Vec<Cell>> =
            (0..size).map(|from| (0..size).map(|to| cell(from, to)).collect()).collect();
        let mut text = table(&rows);
        let used: BTreeSet<Cell> = rows.into_iter().flatten().collect();
        if !used.is_empty() {
            text += "\nrows write, columns are written to\n";
        }
        for cell in used {
            text += &format!("  {:<5} {}\n", cell.text(), cell.meaning());
        }
        text
    }
}

/// The cells in columns of one width, under and beside the GPUs' positions.
fn table(rows: &[Vec<Cell>]) -> String {
    let last = rows.len().saturating_sub(1).to_string();
    let widest = rows.iter().flatten().map(|cell| cell.text().len()).max().unwrap_or(0);
    let width = widest.max("GPU".len() + last.len());
    let mut text = String::new();
    let mut line = |name: String, cells: Vec<String>| {
        let cells = cells.iter().map(|cell| format!("  {cell:<width$}")).collect::<String>();
        text += format!("{name:<width$}{cells}").trim_end();
        text.push('\n');
    };
    line(String::new(), (0..rows.len()).map(|to| format!("GPU{to}")).collect());
    for (from, row) in rows.iter().enumerate() {
        line(format!("GPU{from}"), row.iter().map(|cell| cell.text()).collect());
    }
    text
}

/// The driver's index of a GPU, where it differs from the position.
fn device(position: usize, ordinal: u32) -> String {
    if position == ordinal as usize { String::new() } else { format!(" (device {ordinal})") }
}

impl fmt::Display for Topology {
    /// The GPUs, one a line, then [`Topology::matrix`], then the notes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, node) in self.nodes.iter().enumerate() {
            let properties = &node.properties;
            let (major, minor) = properties.compute_capability;
            write!(
                f,
                "GPU{position}: {}{}, sm_{major}{minor}, {} SMs, {} GiB, {}",
                properties.name,
                device(position, properties.ordinal),
                properties.multiprocessors,
                properties.memory_bytes >> 30,
                properties.pci_bus_id,
            )?;
            if let Some(pcie) = node.pcie {
                let (generation, width) = (pcie.generation, pcie.width);
                write!(f, ", PCIe {generation} x{width}")?;
                if (generation, width) != (pcie.max_generation, pcie.max_width) {
                    write!(f, " of {} x{}", pcie.max_generation, pcie.max_width)?;
                }
            }
            if let Some(nvlink) = &node.nvlink {
                write!(f, ", {} NVLinks {}", nvlink.active, nvlink.version)?;
            }
            writeln!(f)?;
        }
        write!(f, "\n{}", self.matrix())?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::four;
    use super::super::{NvLinks, PcieSlot};
    use super::*;

    #[test]
    fn the_matrix_reads_row_to_column() {
        let expected = "      GPU0  GPU1  GPU2  GPU3
GPU0  X     NV18  PHB   --
GPU1  NV18  X     PHB   SYS
GPU2  PHB   PHB   X     SYS
GPU3  SYS   SYS   SYS   X

rows write, columns are written to
  X     the same rank
  NV18  NVLinks, that many of them
  PHB   PCIe: through a host bridge of one CPU
  SYS   PCIe and the interconnect between NUMA nodes
  --    the driver does not map this memory
";
        assert_eq!(four().matrix(), expected);
    }

    #[test]
    fn the_cells_without_nvml() {
        let mut topology = four();
        topology.links.iter_mut().for_each(|link| (link.nvlinks, link.pcie) = (None, None));
        topology.links[0].same_gpu = true;
        let row = |topology: &Topology| topology.matrix().lines().nth(1).unwrap().to_owned();
        assert_eq!(row(&topology), "GPU0  X     same  P2P   --");
        topology.backend = Backend::Sim;
        assert_eq!(row(&topology), "GPU0  X     same  sim   --");
    }

    #[test]
    fn it_displays_what_nvml_told() {
        let mut topology = four();
        topology.nodes[0].pcie =
            Some(PcieSlot { generation: 1, width: 16, max_generation: 5, max_width: 16 });
        topology.nodes[1].properties.ordinal = 5;
        topology.nodes[0].nvlink = Some(NvLinks { active: 18, version: "4.0".into() });
        let text = topology.to_string();
        let first = "GPU0: Test GPU, sm_90, 132 SMs, 141 GiB, 0000:00:00.0, PCIe 1 x16 of 5 x16, \
                     18 NVLinks 4.0\n";
        assert!(text.starts_with(first), "{text}");
        assert!(text.contains("GPU1: Test GPU (device 5), sm_90"), "{text}");
        assert!(text.ends_with("note: made by hand\n"), "{text}");
    }
}
