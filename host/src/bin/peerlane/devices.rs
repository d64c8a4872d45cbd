//! Which GPUs a command runs on.
//!
//! Invariant: nothing else in this program knows where GPUs come from; everything else takes
//! [`GpuRef`]s.

use peerlane::gpu::{Backend, GpuRef, Properties, cuda, sim};
use peerlane::topology::{self, Topology};
use peerlane::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Simulated GPUs where there are no real ones and none were asked for.
const DEFAULT_SIMULATED: u32 = 8;

/// The value of `--devices`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Simulated GPUs, this many.
    Sim(u32),
    /// Real GPUs: these, or all of them.
    Cuda(Option<Vec<u32>>),
}

impl FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Selection, String> {
        let wrong = || format!("expected sim:N with N from 1 to 16, cuda or cuda:0,1, got {text}");
        if text == "cuda" {
            return Ok(Selection::Cuda(None));
        }
        if let Some(count) = text.strip_prefix("sim:") {
            let count = count.parse().ok().filter(|n| (1..=16).contains(n));
            return count.map(Selection::Sim).ok_or_else(wrong);
        }
        let ordinals = text.strip_prefix("cuda:").ok_or_else(wrong)?;
        let ordinals: std::result::Result<Vec<u32>, _> =
            ordinals.split(',').map(str::parse).collect();
        ordinals.map(|list| Selection::Cuda(Some(list))).map_err(|_| wrong())
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selection::Sim(count) => write!(f, "sim:{count}"),
            Selection::Cuda(None) => write!(f, "cuda"),
            Selection::Cuda(Some(list)) => {
                let list: Vec<_> = list.iter().map(u32::to_string).collect();
                write!(f, "cuda:{}", list.join(","))
            }
        }
    }
}

/// The GPUs of one run.
pub(crate) struct Devices {
    /// The GPUs, in the order asked for.
    pub(crate) gpus: Vec<GpuRef>,
    /// What `--devices` would say.
    pub(crate) selection: Selection,
}

impl Devices {
    /// Opens what was asked for.
    pub(crate) fn open(selection: Option<&Selection>, seed: u64) -> Result<Devices> {
        match selection {
            Some(Selection::Sim(count)) => Ok(Devices::simulated(*count, seed)),
            Some(Selection::Cuda(ordinals)) => Devices::real(ordinals.as_deref()),
            None => match Devices::real(None) {
                Err(Error::NoDriver { .. }) => Ok(Devices::simulated(DEFAULT_SIMULATED, seed)),
                Ok(devices) if devices.gpus.is_empty() => {
                    Ok(Devices::simulated(DEFAULT_SIMULATED, seed))
                }
                other => other,
            },
        }
    }

    fn simulated(count: u32, seed: u64) -> Devices {
        let config = sim::Config { devices: count, seed, ..Default::default() };
        Devices { gpus: sim::devices(&config), selection: Selection::Sim(count) }
    }

    fn real(ordinals: Option<&[u32]>) -> Result<Devices> {
        let all = cuda::devices()?;
        let gpus = match ordinals {
            None => all,
            Some(list) => list.iter().map(|n| pick(&all, *n)).collect::<Result<_>>()?,
        };
        Ok(Devices { gpus, selection: Selection::Cuda(ordinals.map(<[u32]>::to_vec)) })
    }

    /// Whether the GPUs are real.
    pub(crate) fn backend(&self) -> Backend {
        self.gpus.first().map_or(Backend::Sim, |gpu| gpu.backend())
    }

    /// Whether the GPUs are simulated.
    pub(crate) fn simulated_only(&self) -> bool {
        self.backend() == Backend::Sim
    }

    /// `cuda` or `sim`.
    pub(crate) fn backend_name(&self) -> &'static str {
        match self.backend() {
            Backend::Cuda => "cuda",
            Backend::Sim => "sim",
        }
    }

    /// The GPU of each of `world` ranks: round robin, so that ranks may share one.
    pub(crate) fn for_ranks(&self, world: u32) -> Vec<GpuRef> {
        self.gpus.iter().cycle().take(world as usize).cloned().collect()
    }

    /// How the GPUs reach each other.
    pub(crate) fn topology(&self) -> Result<Topology> {
        Topology::discover(&self.gpus)
    }

    /// What the GPUs are.
    pub(crate) fn properties(&self) -> Vec<Properties> {
        self.gpus.iter().map(|gpu| gpu.properties().clone()).collect()
    }

    /// The version of the driver, where there is one.
    pub(crate) fn driver(&self) -> Option<String> {
        if self.simulated_only() { None } else { topology::driver_version() }
    }
}

impl fmt::Display for Devices {
    /// For example `2 x NVIDIA H200 (cuda)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.simulated_only() {
            let plural = if self.gpus.len() == 1 { "" } else { "s" };
            return write!(f, "{} simulated GPU{plural} (sim)", self.gpus.len());
        }
        let mut names: Vec<_> = self.gpus.iter().map(|g| g.properties().name.clone()).collect();
        names.dedup();
        write!(f, "{} x {} (cuda)", self.gpus.len(), names.join(", "))
    }
}

/// The GPU with this ordinal.
fn pick(all: &[GpuRef], ordinal: u32) -> Result<GpuRef> {
    let found = all.iter().find(|gpu| gpu.properties().ordinal == ordinal);
    found.cloned().ok_or_else(|| Error::InvalidArgument {
        op: "peerlane",
        argument: "--devices",
        expected: format!("GPUs below {}", all.len()),
        got: format!("GPU {ordinal}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_read_as_they_are_written() {
        for text in ["sim:1", "sim:16", "cuda", "cuda:0", "cuda:0,3"] {
            assert_eq!(text.parse::<Selection>().unwrap().to_string(), text);
        }
        for text in ["", "sim", "sim:0", "sim:17", "sim:x", "cuda:", "cuda:a", "cuda:0,", "gpu"] {
            let error = text.parse::<Selection>().unwrap_err();
            assert!(error.ends_with(&format!("got {text}")), "{error}");
        }
    }
}
