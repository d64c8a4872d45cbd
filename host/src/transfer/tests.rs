//! Exporters and importers in one process; processes of their own are in tests/tests/transfer.rs.

use super::*;
use crate::cases::Rng;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

const BYTES: Element = Element { code: 1, bytes: 1 };
const FLOATS: Element = Element { code: 2, bytes: 4 };

fn exporter(least: u64, most: u64) -> Exporter {
    Exporter::create(Limits { least, most, named: 1 << 16, checksums: true }).unwrap()
}

fn line(bytes: usize) -> Shape {
    Shape::new(&[bytes as u64]).unwrap()
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed, "transfer");
    (0..bytes).map(|_| rng.below(256) as u8).collect()
}

/// What an importer reads of a descriptor that travelled as bytes.
fn import(importer: &Importer, descriptor: &Descriptor) -> crate::Result<View> {
    let mut bytes = Vec::new();
    descriptor.write(&mut bytes);
    importer.import(&Descriptor::read(&bytes)?)
}

#[test]
fn tensors_of_all_sizes_arrive() {
    let mut exporter = exporter(4096, 1 << 26);
    let importers: Vec<_> =
        (0..3).map(|index| Importer::open(&exporter.handle(), index).unwrap()).collect();
    for round in 0..3 {
        let sizes = [0, 1, 63, 64, 65, 4096, 5000, 1 << 20, (1 << 20) + 1, 3 << 20];
        let payloads = sizes.map(|bytes| pattern(round, bytes));
        let exported = payloads
            .each_ref()
            .map(|payload| exporter.export(payload, BYTES, line(payload.len())).unwrap());
        for importer in &importers {
            for (payload, descriptor) in payloads.iter().zip(&exported) {
                let view = import(importer, descriptor).unwrap();
                assert_eq!((view.shape(), view.element()), (&[payload.len() as u64][..], BYTES));
                assert_eq!(view.to_vec(), *payload);
            }
        }
        exporter.clear();
    }
    assert!(exporter.usage().peak > 5 << 20);
}

#[test]
fn parts_are_looked_at_where_they_are() {
    let mut exporter = exporter(4096, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let values: Vec<u32> = (0..2 * 3 * 5).collect();
    let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = Shape::new(&[2, 3, 5]).unwrap();
    let exported = exporter.export(&payload, FLOATS, shape).unwrap();
    let expected = |keep: &dyn Fn(u32, u32, u32) -> bool| -> Vec<u8> {
        let kept = values.iter().filter(|v| keep(*v / 15, *v / 5 % 3, *v % 5));
        kept.flat_map(|value| value.to_le_bytes()).collect()
    };
    let view = || import(&importer, &exported).unwrap();
    assert!(view().is_contiguous());
    assert_eq!(view().strides(), [15, 5, 1]);
    let last = view().narrow(2, 1..4).unwrap();
    assert!(!last.is_contiguous());
    assert_eq!((last.shape(), last.bytes()), (&[2, 3, 3][..], 72));
    assert_eq!(last.to_vec(), expected(&|_, _, k| (1..4).contains(&k)));
    let middle = view().narrow(1, 2..3).unwrap().narrow(0, 1..2).unwrap();
    assert_eq!(middle.to_vec(), expected(&|i, j, _| i == 1 && j == 2));
    let first = view().narrow(0, 1..2).unwrap();
    assert!(first.is_contiguous());
    assert_eq!(first.to_vec(), expected(&|i, _, _| i == 1));
    let nothing = view().narrow(1, 3..3).unwrap();
    assert_eq!((nothing.bytes(), nothing.to_vec()), (0, vec![]));
    for (dim, indices, words) in [
        (3, 0..1, "dim: expected below 3"),
        (1, 2..4, "indices: expected a part of 0..3, got 2..4"),
        (1, Range { start: 2, end: 1 }, "indices: expected a part of 0..3, got 2..1"),
    ] {
        let refused = view().narrow(dim, indices).err().unwrap().to_string();
        assert!(refused.contains(words), "{refused}");
    }
}

#[test]
fn scalars_and_tensors_without_elements_arrive() {
    let mut exporter = exporter(64, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let scalar = exporter.export(&[1, 2, 3, 4], FLOATS, Shape::new(&[]).unwrap()).unwrap();
    assert_eq!(import(&importer, &scalar).unwrap().to_vec(), [1, 2, 3, 4]);
    let shape = Shape::new(&[u64::MAX, 0, u64::MAX]).unwrap();
    let nothing = exporter.export(&[], FLOATS, shape).unwrap();
    let view = import(&importer, &nothing).unwrap();
    assert_eq!((view.shape(), view.bytes()), (&[u64::MAX, 0, u64::MAX][..], 0));
    assert!(view.to_vec().is_empty() && view.is_contiguous());
}

#[test]
fn a_view_stays_through_clears_and_the_end() {
    let mut exporter = exporter(4096, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 5).unwrap();
    let old = pattern(1, 1000);
    let kept = exporter.export(&old, BYTES, line(1000)).unwrap();
    let view = import(&importer, &kept).unwrap();
    for round in 2..20 {
        exporter.clear();
        let stale = import(&importer, &kept).err().unwrap().to_string();
        assert!(stale.contains("the tensor was given up: it is of generation 0"), "{stale}");
        let new = pattern(round, 1000);
        let exported = exporter.export(&new, BYTES, line(1000)).unwrap();
        assert_eq!(import(&importer, &exported).unwrap().to_vec(), new);
        assert_eq!(view.to_vec(), old);
    }
    let (view, first) = (view.clone(), view);
    drop(first);
    exporter.clear();
    exporter.export(&[0; 1000], BYTES, line(1000)).unwrap();
    assert_eq!(view.to_vec(), old);
    // One segment for what is looked at, and one for the rest.
    assert_eq!((exporter.usage().segments, exporter.usage().reserved), (2, 8192));
    drop(view);
    exporter.clear();
    assert_eq!(exporter.usage().reserved, 4096);
    let exported = exporter.export(&old, BYTES, line(1000)).unwrap();
    let view = import(&importer, &exported).unwrap();
    drop(exporter);
    assert_eq!(view.to_vec(), old);
    assert!(import(&importer, &exported).is_err());
    drop(importer);
    assert_eq!(view.to_vec(), old);
}

#[test]
fn the_arena_grows_shrinks_and_ends() {
    let mut exporter = exporter(4096, 1 << 20);
    let big = vec![7; 300_000];
    let export = |exporter: &mut Exporter| exporter.export(&big, BYTES, line(big.len()));
    export(&mut exporter).unwrap();
    export(&mut exporter).unwrap();
    let refused = export(&mut exporter).and_then(|_| export(&mut exporter)).unwrap_err();
    let words = "an arena of 1048576 bytes at most has no room for 300032 more";
    assert!(refused.to_string().ends_with(words), "{refused}");
    // From now on in one piece.
    exporter.clear();
    export(&mut exporter).unwrap();
    export(&mut exporter).unwrap();
    let made = exporter.usage().segments;
    for _ in 0..10 {
        exporter.clear();
        export(&mut exporter).unwrap();
        export(&mut exporter).unwrap();
    }
    assert_eq!(exporter.usage().segments, made);
    for _ in 0..70 {
        exporter.clear();
        exporter.export(&[1; 100], BYTES, line(100)).unwrap();
    }
    assert_eq!(exporter.usage().reserved, 4096);
}

#[test]
fn who_borrows_is_named_when_there_is_no_room() {
    let mut exporter = exporter(4096, 8192);
    let importer = Importer::open(&exporter.handle(), 3).unwrap();
    let first = exporter.export(&[1; 4000], BYTES, line(4000)).unwrap();
    let view = import(&importer, &first).unwrap();
    exporter.clear();
    exporter.export(&[2; 4000], BYTES, line(4000)).unwrap();
    let refused = exporter.export(&[3; 4000], BYTES, line(4000)).unwrap_err().to_string();
    assert!(refused.ends_with(": importer 3 holds 1 views of what was given up"), "{refused}");
    drop(view);
    exporter.export(&[3; 4000], BYTES, line(4000)).unwrap();
}

#[test]
fn what_has_a_name_is_copied_once() {
    let mut exporter = exporter(4096, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let name = |exporter: &mut Exporter, name: u64, bytes: usize| {
        exporter.export_named(name, &vec![name as u8; bytes], BYTES, line(bytes)).unwrap()
    };
    let one = name(&mut exporter, 1, 30_000);
    exporter.clear();
    assert_eq!(name(&mut exporter, 1, 30_000), one);
    let view = import(&importer, &one).unwrap();
    name(&mut exporter, 2, 30_000);
    assert_eq!(exporter.usage().named, 60_000);
    // The third does not fit beside both; the first goes, and its view stays.
    name(&mut exporter, 3, 30_000);
    assert_eq!(exporter.usage().named, 60_000);
    assert!(import(&importer, &one).is_err());
    assert_eq!(view.to_vec(), vec![1; 30_000]);
    assert_eq!([1, 2, 3].map(|name| exporter.named(name).is_some()), [false, true, true]);
    assert_ne!(name(&mut exporter, 1, 30_000), one);
    // Another tensor of that name, and one that is too large to be kept.
    let other = name(&mut exporter, 1, 10);
    assert_eq!(import(&importer, &other).unwrap().to_vec(), [1; 10]);
    let large = name(&mut exporter, 9, 70_000);
    assert_eq!(import(&importer, &large).unwrap().bytes(), 70_000);
    assert_eq!(exporter.usage().named, 30_010);
}

#[test]
fn names_are_not_without_number() {
    let mut exporter = Exporter::create(Limits { least: 4096, ..Limits::default() }).unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for name in 0..2000 {
        exporter.export_named(name, &[1; 8], BYTES, line(8)).unwrap();
    }
    // Other tests of this program open files as well.
    assert!(open() < before + 600, "{before} files before, {} after", open());
    assert!(exporter.named(1999).is_some() && exporter.named(1000).is_none());
    assert!(exporter.usage().reserved < 2 << 20);
}

#[test]
fn damage_is_noticed() {
    let mut exporter = exporter(4096, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let exported = exporter.export(&[1; 100], BYTES, line(100)).unwrap();
    let refused =
        |descriptor: Descriptor| import(&importer, &descriptor).err().unwrap().to_string();
    let far = Descriptor { offset: 4096 - 64, ..exported };
    assert!(refused(far).contains("expected a payload inside 4096 bytes, got 100 bytes at 4032"));
    let file = Descriptor { segment: 77, ..exported };
    assert!(refused(file).contains("not the exporter's any more"));
    let file = Descriptor { segment: 78, file: 1 << 20, ..exported };
    assert!(refused(file).contains("cannot be opened"));
    // The standard output or a terminal.
    assert!(refused(Descriptor { segment: 79, file: 0, ..exported }).contains("cannot be opened"));
    let sum = Descriptor { checksum: exported.checksum.map(|sum| sum ^ 1), ..exported };
    assert!(refused(sum).contains("checksum: expected 0x"));
    // None of that is borrowed still.
    exporter.clear();
    assert_eq!(exporter.usage().reserved, 4096);
}

#[test]
fn mistakes_are_named() {
    let refused = |limits| Exporter::create(limits).err().unwrap().to_string();
    let limits = Limits::default();
    assert!(refused(Limits { least: 0, ..limits }).contains("least: expected 1 to `most`"));
    assert!(
        refused(Limits { least: 9, most: 8, ..limits })
            .contains("least: expected 1 to `most`, which is 8")
    );
    let mut exporter = exporter(4096, 1 << 20);
    let refused = |payload: &[u8], element, shape: &[u64]| {
        exporter.export(payload, element, Shape::new(shape).unwrap()).unwrap_err().to_string()
    };
    let mut refused = refused;
    assert!(
        refused(&[1; 8], FLOATS, &[3])
            .contains("payload: expected 12 bytes, as its shape says, got 8 bytes")
    );
    assert!(refused(&[1; 8], FLOATS, &[1 << 62]).contains("a shape whose size is a number"));
    assert!(
        refused(&[], Element { code: 0, bytes: 17 }, &[0])
            .contains("element: expected 1 to 16 bytes")
    );
    let handle = exporter.handle();
    for text in ["", "peerlane-channel:1:1:1", &handle[..handle.len() - 1], &format!("{handle}0")] {
        assert!(Importer::open(text, 0).is_err(), "{text}");
    }
    let refused = Importer::open(&handle, 32).err().unwrap().to_string();
    assert!(refused.contains("index: expected below 32, got 32"), "{refused}");
}

/// An importer that looks at tensors while the exporter gives them up: each look is right, or too late.
#[test]
fn a_race_with_clear_is_lost_or_won() {
    let mut exporter = Exporter::create(Limits { least: 4096, ..Limits::default() }).unwrap();
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let (send, receive) = std::sync::mpsc::sync_channel::<(u8, Descriptor)>(4);
    let over = AtomicBool::new(false);
    let (seen, late) = std::thread::scope(|scope| {
        let looker = scope.spawn(|| {
            let (mut seen, mut late) = (0, 0);
            for (value, descriptor) in receive {
                match importer.import(&descriptor) {
                    Ok(view) => {
                        seen += 1;
                        assert!(view.to_vec().iter().all(|byte| *byte == value));
                        std::thread::yield_now();
                        assert!(view.to_vec().iter().all(|byte| *byte == value));
                    }
                    Err(error) => {
                        late += 1;
                        assert!(
                            matches!(
                                error,
                                Error::Transfer { fault: Fault::Stale { .. } | Fault::Gone { .. } }
                            ),
                            "{error}"
                        );
                    }
                }
            }
            over.store(true, Ordering::Relaxed);
            (seen, late)
        });
        for round in 0..20_000_u32 {
            let value = round as u8;
            let exported = exporter.export(&[value; 512], BYTES, line(512)).unwrap();
            send.send((value, exported)).unwrap();
            if round % 3 != 0 {
                exporter.clear();
            }
        }
        drop(send);
        looker.join().unwrap()
    });
    assert!(seen > 0 && late > 0, "{seen} seen, {late} late: no race");
    assert!(exporter.usage().segments < 20_000);
}

#[test]
fn a_gpu_reads_what_it_was_shown() {
    use crate::gpu::{Stream, sim};
    let gpu = sim::devices(&sim::Config { devices: 1, ..Default::default() }).remove(0);
    let mut exporter = exporter(1 << 20, 1 << 20);
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    // The second one begins within a page.
    exporter.export(&pattern(1, 100), BYTES, line(100)).unwrap();
    let payload = pattern(2, 12 * 700);
    let shape = Shape::new(&[12, 700]).unwrap();
    let descriptor = exporter.export(&payload, BYTES, shape).unwrap();
    let view = import(&importer, &descriptor).unwrap();
    let read = |mapped: &Mapped, bytes: usize| {
        let mut found = vec![0; bytes];
        // SAFETY: the view reaches so far, and nobody frees it meanwhile.
        unsafe { gpu.download(&mut found, mapped.device_ptr(), Stream::default()) }.unwrap();
        found
    };
    let mapped = Mapped::new(view.clone(), gpu.clone()).unwrap();
    assert_eq!(read(&mapped, payload.len()), payload);
    // Its pages are taken; and they are free again when it goes.
    assert!(Mapped::new(view.clone(), gpu.clone()).is_err());
    drop(mapped);
    let part = Mapped::new(view.clone().narrow(1, 3..5).unwrap(), gpu.clone()).unwrap();
    assert_eq!(read(&part, 11 * 700 + 2), payload[3..11 * 700 + 5]);
    exporter.clear();
    drop(exporter);
    assert_eq!(read(&part, 2), payload[3..5], "it outlives its exporter");
    drop(part);
    let none = view.narrow(0, 4..4).unwrap();
    let refusal = Mapped::new(none, gpu.clone()).err().expect("nothing to map").to_string();
    assert!(refusal.contains("expected at least one element, got none"), "{refusal}");
}
