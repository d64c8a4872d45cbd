//! Everything that reads what a file or another process says, as functions of any bytes: for `fuzz/` (docs/security.md)
//! and for a property test that runs with the others.
//!
//! Invariant: no function here panics, waits or touches memory that is not its own, whatever the bytes. This module exists
//! under `cfg(fuzzing)` and in this crate's tests only.

use crate::channel::raw as raw_channel;
use crate::choice::{Choice, Known, TuningTable};
use crate::communicator::Config;
use crate::error::LONGEST_REASON;
use crate::gpu::{Exported, GpuRef, MemoryHandle, sim};
use crate::group::{Agreement, Card};
use crate::links::{Cache, Key, LINKS};
use crate::mailbox::{Extent, Offer};
use crate::plan::Shape;
use crate::registration;
use crate::rendezvous::raw;
use crate::transfer::{Descriptor, Element, Exporter, Importer, Limits, Shape as Sizes};
use crate::transport::Pairs;
use peerlane_device::abi::{Layout, MAX_RANKS};
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::OnceLock;

#[cfg(test)]
mod tests;

/// Longest error: what came from elsewhere is clipped, twice at most.
const LONGEST_ERROR: usize = 4 * 3 * LONGEST_REASON;

fn bounded(error: &impl ToString) {
    let length = error.to_string().len();
    assert!(length <= LONGEST_ERROR, "an error of {length} bytes");
}

fn layout() -> Option<Layout> {
    Layout::new(4, 4, 16)
}

/// Asks a choice for sizes, as calls do.
fn ask(choice: &Choice) {
    for bytes in [0, 1, 4096, 1 << 20, usize::MAX] {
        let _ = (choice.all_reduce(bytes), choice.broadcast(bytes));
    }
}

/// A tuning table, as a file has it.
pub fn tuning_table(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match TuningTable::parse(text) {
        Err((expected, got)) => bounded(&(expected + &got)),
        Ok(table) => {
            let again = serde_json::to_string(&table).map(|text| TuningTable::parse(&text));
            assert!(matches!(again, Ok(Ok(again)) if again == table), "it reads as it is written");
            [true, false].iter().for_each(|exact| ask(&Choice::tuned(&table, *exact)));
        }
    }
}

/// A measurement in the cache: `m` and the measurement under the right key, or the whole file.
pub fn cached_measurement(data: &[u8]) {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        std::env::temp_dir().join(format!("peerlane-fuzzing-{}", std::process::id()))
    });
    let gpu = |n: u32| (format!("GPU-{n}"), format!("0000:{n:02x}:00.0"));
    let key = Key::new(vec![gpu(0), gpu(1)], "580.1");
    let text = match data.split_first() {
        Some((b'm', rest)) => {
            let Ok(named) = serde_json::to_vec(&key) else { return };
            [b"{\"key\":", named.as_slice(), b",\"measurement\":", rest, b"}"].concat()
        }
        _ => data.to_vec(),
    };
    let thread = format!("{:?}", std::thread::current().id());
    let cache = Cache::at(directory.join(thread.replace(['(', ')'], "")));
    let path = cache.file_of(LINKS, &key);
    let Some(parent) = path.parent() else { return };
    if std::fs::create_dir_all(parent).is_err() || std::fs::write(&path, text).is_err() {
        return;
    }
    match cache.load(&key) {
        Err(error) => bounded(&error),
        Ok(None) => {}
        Ok(Some(measured)) => {
            let _ = (measured.islands(), measured.hub(&[0, 1]));
        }
    }
}

/// What the host of a meeting hears.
pub fn host_hears(data: &[u8]) {
    raw::host_hears(data);
}

/// What a guest hears from its host.
pub fn guest_hears(data: &[u8]) {
    raw::guest_hears(data);
}

/// The memory that processes share.
pub fn segment(data: &[u8]) {
    raw::segment(data);
}

/// The memory of a channel.
pub fn channel(data: &[u8]) {
    raw_channel::channel(data, bounded);
}

/// What ranks show and offer each other when they join.
#[derive(Deserialize)]
enum Shown {
    Cards(Vec<Card>),
    Known(Box<Known>),
    Offer(Offer),
    Unreached(Vec<u16>),
    /// A handle, and the bytes that are said to be behind it.
    Handle(MemoryHandle, usize),
}

/// Cards, offers and verdicts of ranks that join.
pub fn offers(data: &[u8]) {
    static GPU: OnceLock<GpuRef> = OnceLock::new();
    let (Ok(shown), Some(layout)) = (serde_json::from_slice(data), layout()) else { return };
    match shown {
        Shown::Cards(cards) => match Agreement::of(&cards, &Config::default()) {
            Err(error) => bounded(&error),
            Ok(agreement) => {
                assert_eq!(agreement.shape.world as usize, cards.len());
                assert!(agreement.shape.max_blocks >= 1);
            }
        },
        Shown::Known(known) => match known.check(2) {
            Err(error) => bounded(&error),
            Ok(()) => {
                let config = Config { exact: false, ..Config::default() };
                let settled = Choice::settle(&config, &Shape::new(2, layout, 4), &known);
                settled.iter().for_each(ask);
            }
        },
        Shown::Offer(offer) => {
            let extent = Extent::new(layout, 2, 0);
            offer.check((7, 1), extent).err().iter().for_each(bounded);
        }
        Shown::Unreached(unreached) => {
            let pairs = Pairs::of(&unreached);
            for rank in 0..MAX_RANKS as u32 {
                assert!(!pairs.by_host(rank, rank));
                assert_eq!(u64::from(pairs.senders(rank)) >> unreached.len().min(16), 0);
            }
        }
        Shown::Handle(handle, bytes) => {
            let gpu = GPU.get_or_init(|| {
                sim::devices(&sim::Config { devices: 1, ..Default::default() }).swap_remove(0)
            });
            let exported = Exported { handle, file: raw::small_file() };
            if let Ok(memory) = gpu.import(exported, bytes, 0) {
                // SAFETY: imported just now, and nothing uses it.
                let _ = unsafe { gpu.release(memory) };
            }
        }
    }
}

/// What ranks bring when they register a tensor.
pub fn tensor_cards(data: &[u8]) {
    registration::check_cards(data).err().iter().for_each(bounded);
}

/// The descriptor of a tensor: the bytes as they are, and as changes of a right one; and what its importer makes of it.
pub fn tensor_descriptor(data: &[u8]) {
    let checksums = data.first().is_some_and(|byte| byte % 2 == 1);
    let limits = Limits { least: 4096, most: 1 << 16, named: 4096, checksums };
    let Ok(mut exporter) = Exporter::create(limits) else { return };
    let payload: Vec<u8> = (0..48).collect();
    let sizes = Sizes::new(&[2, 3, 4]).expect("three dimensions");
    let exported = exporter.export(&payload, Element { code: 1, bytes: 2 }, sizes);
    let importer = Importer::open(&exporter.handle(), 0);
    let (exported, importer) = (exported.expect("room"), importer.expect("its own exporter"));
    let mut right = Vec::new();
    exported.write(&mut right);
    let changes = data.iter().chain(std::iter::repeat(&0));
    let changed: Vec<u8> = right.iter().zip(changes).map(|(byte, change)| byte ^ change).collect();
    for bytes in [data, &changed] {
        match Descriptor::read(bytes) {
            Err(fault) => bounded(&fault),
            Ok(descriptor) => {
                let mut again = Vec::new();
                descriptor.write(&mut again);
                assert_eq!(again, bytes, "it reads as it is written");
                match importer.import(&descriptor) {
                    Err(error) => bounded(&error),
                    Ok(view) => assert_eq!(view.to_vec().len() as u64, descriptor.bytes()),
                }
            }
        }
    }
}
