//! What the benches share: a GPU that does nothing, ranks to call on, lone kernels, and a table.
//!
//! Three benches use it. `host_cost` measures what a call costs before the driver has it,
//! `simulator` how fast simulated GPUs run, `kernels` what each kernel takes on a real GPU by
//! itself. Whole collectives against NCCL are `peerlane bench`.
//!
//! Invariant: everything but [`real_gpus`] works on any `dyn Gpu`, so the tests beside the benches
//! run the same code on simulated GPUs.

pub mod null_gpu;
pub mod ranks;
pub mod rig;
pub mod solo;
pub mod table;

use peerlane::gpu::{GpuRef, cuda};

/// The real GPUs of this machine, or why there are none to measure.
pub fn real_gpus() -> Result<Vec<GpuRef>, String> {
    match cuda::devices() {
        Ok(gpus) if gpus.is_empty() => Err("the driver shows no GPU".into()),
        Ok(gpus) => Ok(gpus),
        Err(error) => Err(error.to_string()),
    }
}

/// One GPU a rank for `world` ranks: round robin, so that ranks may share one.
pub fn for_ranks(gpus: &[GpuRef], world: usize) -> Vec<GpuRef> {
    gpus.iter().cycle().take(world).cloned().collect()
}

/// The middle of `samples`, which it sorts. 0 for none.
pub fn median(samples: &mut [f64]) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_sample() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut []), 0.0);
    }
}
