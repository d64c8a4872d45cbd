//! `peerlane topo`: the GPUs and how they reach each other.
//!
//! Invariant: it only reads; it changes no setting and sends no data.

use crate::devices::Devices;
use crate::{Common, Outcome, output};

/// Options of `peerlane topo`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
}

/// Prints the GPUs and the matrix of links.
pub(crate) fn run(options: &Options) -> Outcome {
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let topology = devices.topology()?;
    println!("{devices}");
    for gpu in &devices.gpus {
        let p = gpu.properties();
        let (major, minor) = p.compute_capability;
        let gib = p.memory_bytes as f64 / f64::from(1 << 30);
        println!(
            "  GPU {}: {}, sm_{major}{minor}, {} SMs, {gib:.1} GiB, {}",
            p.ordinal, p.name, p.multiprocessors, p.pci_bus_id
        );
    }
    println!("\n{}", topology.matrix());
    if let Some(path) = &options.common.json {
        let mut value = output::provenance(&devices);
        value["topology"] = serde_json::to_value(&topology)?;
        output::write_json(path, &value)?;
    }
    Ok(true)
}
