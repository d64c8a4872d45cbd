//! Link models: which ports a transfer between two GPUs passes, how fast each is, how long a step takes.
//!
//! A port is one direction of a link, for example what leaves a GPU, or what a switch sends up. All
//! transfers that pass a port at a time share it fairly (max-min, as in network simulators such as
//! SimGrid): that is what NVSwitch ports and PCIe arbiters aim at, and it needs no order of service. What
//! one rank sends to one other goes in order, one chunk at a time: one stream per pair and direction.
//!
//! Invariant: a fabric has a path for every ordered pair of ranks, and every path passes a port.

use crate::algorithm::{UnknownName, named};
use peerlane_device::abi::MAX_RANKS;
use std::fmt;
use std::str::FromStr;

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Stores by multiprocessors.
    Stores,
    /// Copy engines.
    Copies,
}

/// One direction of a link.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// For example `out 3`, or `up 0`.
    pub name: String,
    /// What it carries of stores, GB/s.
    pub stores: f64,
    /// What it carries of copies, GB/s.
    pub copies: f64,
    /// The share of that which is left when it carries more than one stream.
    pub crowded: f64,
}

impl Port {
    /// What the port carries, GB/s, when `streams` transfers pass it.
    pub fn capacity(&self, engine: Engine, streams: usize) -> f64 {
        let alone = match engine {
            Engine::Stores => self.stores,
            Engine::Copies => self.copies,
        };
        if streams > 1 { alone * self.crowded } else { alone }
    }
}

/// What a transfer from one rank to another passes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Path {
    /// Places in [`Fabric::ports`].
    pub ports: Vec<usize>,
    /// From the last byte leaving to the receiver having seen it, microseconds.
    pub latency_us: f64,
}

/// How ranks are connected.
#[derive(Clone, Debug, PartialEq)]
pub struct Fabric {
    world: u32,
    ports: Vec<Port>,
    paths: Vec<Path>,
    islands: [u8; MAX_RANKS],
}

impl Fabric {
    /// A fabric of `ports`, in which `path(from, to)` says what a transfer passes. `islands` says which
    /// ranks are near each other.
    ///
    /// # Panics
    /// If there are more than 16 ranks or none, or a path passes no port or one that is not there.
    pub fn new(ports: Vec<Port>, islands: &[u8], path: impl Fn(u32, u32) -> Path) -> Fabric {
        let world = islands.len() as u32;
        assert!((1..=MAX_RANKS).contains(&islands.len()), "1 to 16 ranks, not {world}");
        let pairs = (0..world).flat_map(|from| (0..world).map(move |to| (from, to)));
        let paths: Vec<Path> = pairs
            .map(|(from, to)| {
                let path = if from == to { Path::default() } else { path(from, to) };
                let known = path.ports.iter().all(|port| *port < ports.len());
                assert!(known && (from == to || !path.ports.is_empty()), "path {from} to {to}");
                path
            })
            .collect();
        let mut table = [0; MAX_RANKS];
        table[..islands.len()].copy_from_slice(islands);
        Fabric { world, ports, paths, islands: table }
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// Every direction of every link.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Which island each rank belongs to.
    pub fn islands(&self) -> [u8; MAX_RANKS] {
        self.islands
    }

    /// What a transfer from `from` to `to` passes.
    pub fn path(&self, from: u32, to: u32) -> &Path {
        &self.paths[(from * self.world + to) as usize]
    }
}

/// Fabrics of usual machines. Each figure's source is beside it; "facts" are public measurements that
/// docs/scaling.md names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Every GPU at one NVSwitch: a port in and a port out for each.
    NvSwitch,
    /// Two GPUs each with an NVLink bridge, all at one PCIe root complex.
    NvLinkPairs,
    /// Four GPUs each at a PCIe switch, whose link up they share.
    Pcie,
    /// Half the GPUs at each of two CPUs, whose interconnect they share.
    TwoSockets,
}

/// A step over NVLink: fitted to two H200s (`calibration` says how), polling included.
const NVLINK_US: f64 = 2.1;
/// A step over PCIe: fitted to published times of other libraries on PCIe Gen5.
const PCIE_US: f64 = 2.5;
/// What crossing a root complex or a CPU interconnect adds: reads of 128 bytes take 0.71 us under one
/// switch and 1.14 to 1.45 across.
const CROSSING_US: f64 = 0.5;
/// NVLink, 18 links of 25 GB/s, through NVSwitch. Measured on two H200s: stores, copy engine.
const NVSWITCH_GBS: (f64, f64) = (356.0, 383.0);
/// NVLink bridge of an H100 NVL, nominally 300 GB/s each way; the share of it that stores and copies
/// reach is assumed to be that of [`NVSWITCH_GBS`] in 450.
const BRIDGE_GBS: (f64, f64) = (237.0, 255.0);
/// PCIe Gen5 x16 of a GPU: stores of one stream, measured on another host; copies, 24% more.
const PCIE_GBS: (f64, f64) = (44.7, 53.0);
/// What is left of it when every GPU sends to three others: 25.4 of 44.7 GB/s. For copies assumed alike.
const PCIE_CROWDED: f64 = 25.4 / 44.7;
/// PCIe Gen5 x16 between a switch and the root complex. No measurement with several streams is known that
/// is not of a host whose posted writes collapse, so nothing is taken off.
const UPLINK_GBS: f64 = 53.0;
/// What crosses between two CPUs, all streams together: a published ceiling.
const SOCKETS_GBS: f64 = 23.8;

impl Preset {
    /// Every preset.
    pub const ALL: [Preset; 4] =
        [Preset::NvSwitch, Preset::NvLinkPairs, Preset::Pcie, Preset::TwoSockets];

    /// The name used on the command line, in tables and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::NvSwitch => "nvswitch",
            Preset::NvLinkPairs => "nvlink-pairs",
            Preset::Pcie => "pcie",
            Preset::TwoSockets => "two-sockets",
        }
    }

    /// The fabric of a machine with `world` GPUs.
    ///
    /// # Panics
    /// If `world` is not 1 to 16.
    pub fn fabric(self, world: u32) -> Fabric {
        match self {
            Preset::NvSwitch => nvswitch(world),
            Preset::NvLinkPairs => nvlink_pairs(world),
            Preset::Pcie => grouped(world, 4, &[("up", UPLINK_GBS), ("down", UPLINK_GBS)]),
            Preset::TwoSockets => grouped(world, world.div_ceil(2), &[("across", SOCKETS_GBS)]),
        }
    }
}

impl FromStr for Preset {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Preset, UnknownName> {
        named(text, &Preset::ALL, Preset::name)
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A port out of and one into each of `world` GPUs: rank r's are 2r and 2r + 1.
fn gpu_ports(kind: &str, world: u32, (stores, copies): (f64, f64), crowded: f64) -> Vec<Port> {
    let port = |name| Port { name, stores, copies, crowded };
    (0..world)
        .flat_map(|rank| [port(format!("{kind}out {rank}")), port(format!("{kind}in {rank}"))])
        .collect()
}

/// The port out of `from` and the one into `to`, where ports begin at `first`.
fn ends(first: u32, from: u32, to: u32) -> [usize; 2] {
    [(first + 2 * from) as usize, (first + 2 * to + 1) as usize]
}

fn nvswitch(world: u32) -> Fabric {
    let ports = gpu_ports("", world, NVSWITCH_GBS, 1.0);
    Fabric::new(ports, &islands(world, world.div_ceil(2)), |from, to| Path {
        ports: ends(0, from, to).into(),
        latency_us: NVLINK_US,
    })
}

fn nvlink_pairs(world: u32) -> Fabric {
    let mut ports = gpu_ports("bridge ", world, BRIDGE_GBS, 1.0);
    ports.extend(gpu_ports("pcie ", world, PCIE_GBS, PCIE_CROWDED));
    Fabric::new(ports, &islands(world, 2), |from, to| {
        if from / 2 == to / 2 {
            Path { ports: ends(0, from, to).into(), latency_us: NVLINK_US }
        } else {
            let latency_us = PCIE_US + CROSSING_US;
            Path { ports: ends(2 * world, from, to).into(), latency_us }
        }
    })
}

/// GPUs at PCIe in groups of `size`. What leaves a group passes the `shared` ports: with two kinds the
/// first kind of its group and the second kind of the other, with one the one of its own group.
fn grouped(world: u32, size: u32, shared: &[(&str, f64)]) -> Fabric {
    let mut ports = gpu_ports("", world, PCIE_GBS, PCIE_CROWDED);
    let groups = world.div_ceil(size);
    for group in 0..groups {
        ports.extend(shared.iter().map(|(kind, gbs)| Port {
            name: format!("{kind} {group}"),
            stores: *gbs,
            copies: *gbs,
            crowded: 1.0,
        }));
    }
    let kinds = shared.len();
    let at = |group: u32, kind: usize| 2 * world as usize + kinds * group as usize + kind;
    Fabric::new(ports, &islands(world, size), |from, to| {
        let mut path = Path { ports: ends(0, from, to).into(), latency_us: PCIE_US };
        let (home, away) = (from / size, to / size);
        if home != away {
            path.ports.push(at(home, 0));
            if kinds > 1 {
                path.ports.push(at(away, 1));
            }
            path.latency_us += CROSSING_US;
        }
        path
    })
}

/// Ranks in islands of `size`.
fn islands(world: u32, size: u32) -> Vec<u8> {
    (0..world).map(|rank| (rank / size) as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_a_path_with_its_own_ends() {
        for preset in Preset::ALL {
            assert_eq!(preset.name().parse(), Ok(preset));
            for world in 1..=MAX_RANKS as u32 {
                let fabric = preset.fabric(world);
                for from in 0..world {
                    for to in (0..world).filter(|to| *to != from) {
                        let path = fabric.path(from, to);
                        let names: Vec<_> =
                            path.ports.iter().map(|p| fabric.ports()[*p].name.as_str()).collect();
                        assert!(names[0].ends_with(&format!("out {from}")), "{names:?}");
                        assert!(names[1].ends_with(&format!("in {to}")), "{names:?}");
                        assert!(path.latency_us >= NVLINK_US);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_shared_lies_between_groups_only() {
        let names = |preset: Preset, from, to| {
            let fabric = preset.fabric(8);
            let path = fabric.path(from, to).ports.clone();
            path.iter().map(|port| fabric.ports()[*port].name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(Preset::Pcie, 1, 3), ["out 1", "in 3"]);
        assert_eq!(names(Preset::Pcie, 1, 6), ["out 1", "in 6", "up 0", "down 1"]);
        assert_eq!(names(Preset::TwoSockets, 6, 1), ["out 6", "in 1", "across 1"]);
        assert_eq!(names(Preset::NvLinkPairs, 2, 3), ["bridge out 2", "bridge in 3"]);
        assert_eq!(names(Preset::NvLinkPairs, 2, 4), ["pcie out 2", "pcie in 4"]);
    }

    #[test]
    fn an_unknown_fabric_is_answered_with_the_known_ones() {
        let error = "star".parse::<Preset>().unwrap_err().to_string();
        assert_eq!(error, "expected one of nvswitch, nvlink-pairs, pcie, two-sockets, got star");
    }
}
