//! `peerlane topo`: the GPUs, how they reach each other as the driver says, and what the links give.
//!
//! Invariant: it changes no setting, and writes only into memory that it allocated, the cache, and the
//! files it was told to write. What it shows as measured was measured, now or earlier, and it says
//! which.

mod plot;
mod text;

use crate::devices::Devices;
use crate::selftest::{Tested, Wish};
use crate::{Common, Outcome, drawing, output};
use peerlane::links::{self, Cache, Found, Key, Settings, transport};
use peerlane::topology::Topology;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Options of `peerlane topo`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Show what the driver says and what the cache holds of self-tests, and measure nothing.
    #[arg(long)]
    no_measure: bool,
    /// Measure and test anew, whatever the cache holds.
    #[arg(long, conflicts_with = "no_measure")]
    refresh: bool,
    /// Draw heat maps of the measured links into this file, .svg or .png.
    #[arg(long, value_name = "FILE", conflicts_with = "no_measure")]
    plot: Option<PathBuf>,
}

/// Shows the GPUs, the driver's matrix, and what is measured.
pub(crate) fn run(options: &Options) -> Outcome {
    options.plot.as_deref().map_or(Ok(()), drawing::prepare)?;
    let devices = Devices::open(options.common.devices.as_ref(), options.common.seed)?;
    let topology = devices.topology()?;
    println!("{devices}");
    for (position, gpu) in devices.gpus.iter().enumerate() {
        let p = gpu.properties();
        let (major, minor) = p.compute_capability;
        let gib = p.memory_bytes as f64 / f64::from(1 << 30);
        println!(
            "  GPU{position}: device {}, {}, sm_{major}{minor}, {} SMs, {gib:.1} GiB, {}",
            p.ordinal, p.name, p.multiprocessors, p.pci_bus_id
        );
    }
    println!("\nWhat the driver says\n{}", topology.matrix());
    let found = if options.no_measure { None } else { Some(find(&devices, options.refresh)?) };
    if let Some(found) = &found {
        println!("{}", text::measured(found));
    }
    println!("{}", text::transports(&topology, found.as_ref().map(|found| &found.measurement)));
    // Simulated GPUs have no cache, and their test takes a while: only who asks for it gets it.
    let only_cached = options.no_measure || devices.simulated_only();
    let wish = Wish::of(options.refresh, only_cached);
    let tested = Tested::find(&devices, &topology, wish);
    println!("{}", tested.text());
    for note in topology.notes.iter().chain(found.iter().flat_map(|found| &found.notes)) {
        println!("note: {note}");
    }
    if let Some(path) = &options.common.json {
        let mut value = report(&devices, &topology, found.as_ref())?;
        value["self_test"] = tested.json();
        output::write_json(path, &value)?;
    }
    if let (Some(path), Some(found)) = (&options.plot, &found) {
        plot::draw(path, &format!("{devices}, {}", devices.selection), &found.measurement)?;
    }
    Ok(true)
}

/// What was measured before, or else now.
fn find(devices: &Devices, refresh: bool) -> peerlane::Result<Found> {
    let settings = Settings::of(devices.backend());
    let key = devices.driver().and_then(|driver| Key::of(&devices.gpus, &driver));
    let (cache, trouble) = match Cache::of_user() {
        Ok(cache) => (Some(cache), None),
        Err(note) => (None, Some(note)),
    };
    let mut found = links::find(&devices.gpus, &settings, key.as_ref(), cache.as_ref(), refresh)?;
    // Simulated GPUs are never in the cache, so they do not miss it.
    found.notes.extend(trouble.filter(|_| !devices.simulated_only()));
    Ok(found)
}

/// Everything, for `--json`.
fn report(
    devices: &Devices,
    topology: &Topology,
    found: Option<&Found>,
) -> Result<Value, serde_json::Error> {
    let mut value = output::provenance(devices);
    value["topology"] = serde_json::to_value(topology)?;
    let measurement = found.map(|found| &found.measurement);
    let transports = topology.links.iter().map(|link| {
        let how = transport(topology, measurement, link.from, link.to);
        json!({"from": link.from, "to": link.to, "transport": how})
    });
    value["transports"] = transports.collect();
    if let Some(found) = found {
        let measured = &found.measurement;
        let islands = measured.islands().into_iter().map(|members| {
            let hub = measured.hub(&members);
            json!({"members": members, "hub": hub})
        });
        value["islands"] = islands.collect();
        value["hub"] = json!(measured.hub(&text::everyone(measured)));
        value["measurement"] = serde_json::to_value(measured)?;
        value["measurement"]["cached"] = json!(found.cached);
        value["measurement"]["simulated"] = json!(devices.simulated_only());
        value["measurement"]["notes"] = json!(found.notes);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Selection;

    #[test]
    fn json_holds_everything() {
        let devices = Devices::open(Some(&Selection::Sim(3)), 1).unwrap();
        let topology = devices.topology().unwrap();
        let found = find(&devices, false).unwrap();
        assert!(!found.cached && found.notes.is_empty());
        let value = report(&devices, &topology, Some(&found)).unwrap();
        assert_eq!(value["backend"], "sim");
        assert_eq!(value["measurement"]["simulated"], true);
        assert_eq!(value["measurement"]["pairs"].as_array().unwrap().len(), 6);
        assert!(value["measurement"]["pairs"][0]["figures"]["loaded"]["copy_gbps"].is_number());
        assert_eq!(value["transports"][5], json!({"from": 2, "to": 1, "transport": "p2p"}));
        let members = value["islands"].as_array().unwrap().iter();
        let members = members.map(|island| island["members"].as_array().unwrap().len());
        assert_eq!(members.sum::<usize>(), 3);
        assert!(value["hub"].is_number());
        let unmeasured = report(&devices, &topology, None).unwrap();
        assert!(unmeasured.get("measurement").is_none() && unmeasured.get("islands").is_none());
        assert_eq!(unmeasured["transports"].as_array().unwrap().len(), 6);
    }

    #[test]
    fn a_plot_of_unknown_kind_is_refused_before_anything_is_opened() {
        let common = Common { devices: Some(Selection::Cuda(Some(vec![99]))), json: None, seed: 1 };
        let plot = Some(PathBuf::from("links.gif"));
        let options = Options { common, no_measure: false, refresh: false, plot };
        let error = run(&options).unwrap_err().to_string();
        assert_eq!(error, "--plot: expected FILE.svg or FILE.png, got links.gif");
    }
}
