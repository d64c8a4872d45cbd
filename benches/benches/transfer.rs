//! What a tensor costs between an exporter and an importer: to export and look at, and to copy out again; beside it, in the same
//! run, a copy of as many bytes within a process. Between processes nothing is different: the memory is mapped twice here too.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use peerlane::transfer::{Descriptor, Element, Exporter, Importer, Limits, Shape};
use std::hint::black_box;

const ELEMENT: Element = Element { code: 2, bytes: 4 };
/// A scalar of a command, a block table, the fp32 rows of 2048 tokens of 4096 values.
const SIZES: [u64; 3] = [4, 16 << 10, 32 << 20];
/// Tensors of a pass that are given up at once.
const PASS: usize = 4;

fn between(c: &mut Criterion, name: &str, copy_out: bool) {
    let mut group = c.benchmark_group(name);
    for bytes in SIZES {
        let mut exporter = Exporter::create(Limits::default()).expect("there is memory");
        let importer = Importer::open(&exporter.handle(), 0).expect("the handle is good");
        let payload = vec![7; bytes as usize];
        let shape = Shape::new(&[bytes / 4]).expect("one dimension");
        let (mut message, mut out) = (Vec::new(), vec![0; bytes as usize]);
        group.throughput(Throughput::Bytes(bytes * PASS as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| {
                for _ in 0..PASS {
                    message.clear();
                    let exported = exporter.export(&payload, ELEMENT, shape).expect("room");
                    exported.write(&mut message);
                    let descriptor = Descriptor::read(&message).expect("as written");
                    let view = importer.import(&descriptor).expect("not given up");
                    if copy_out {
                        view.copy_to(&mut out).expect("as many bytes");
                    }
                    black_box(view.as_ptr());
                }
                exporter.clear();
            });
        });
    }
    group.finish();
}

fn views(c: &mut Criterion) {
    between(c, "export and look, 4 tensors", false);
}

fn copies(c: &mut Criterion) {
    between(c, "export and copy out, 4 tensors", true);
}

/// The floor: what a copy alone takes.
fn plain(c: &mut Criterion) {
    let mut group = c.benchmark_group("plain copy, 4 times");
    for bytes in SIZES {
        let (payload, mut out) = (vec![7_u8; bytes as usize], vec![0; bytes as usize]);
        group.throughput(Throughput::Bytes(bytes * PASS as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| {
                for _ in 0..PASS {
                    out.copy_from_slice(black_box(&payload));
                    black_box(&mut out);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(transfer, views, copies, plain);
criterion_main!(transfer);
