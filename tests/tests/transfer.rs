//! Tensors between processes: what importers see, and ends that are killed.
//!
//! The program starts itself as each end. Its own `main`, since libtest's cannot do that.

use peerlane::Error;
use peerlane::transfer::{Descriptor, Element, Exporter, Fault, Importer, Limits, Shape};
use peerlane_tests::ends::{End, run_named};
use std::process::ExitCode;

const FLOATS: Element = Element { code: 2, bytes: 4 };

const TESTS: &[(&str, fn())] = &[
    ("processes_see_what_was_exported", processes_see_what_was_exported),
    ("an_importer_killed_with_a_view_holds_nothing", an_importer_killed_with_a_view),
    ("a_view_outlives_its_killed_exporter", a_view_outlives_its_killed_exporter),
    ("an_index_is_one_process", an_index_is_one_process),
    ("nothing_stays_behind", nothing_stays_behind),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["importer", handle, index] => return import(handle, index),
        ["exporter"] => return export(),
        _ => {}
    }
    run_named(TESTS, &words)
}

/// A number that both sides know of a tensor.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn hex(descriptor: &Descriptor) -> String {
    let mut bytes = Vec::new();
    descriptor.write(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().map(|digit| digit.to_digit(16).expect("hex")).collect();
    digits.as_chunks::<2>().0.iter().map(|[high, low]| (high * 16 + low) as u8).collect()
}

/// An importer: for each line with a descriptor says the sum of its second row, and holds the last view.
fn import(handle: &str, index: &str) -> ExitCode {
    let importer = Importer::open(handle, index.parse().expect("an index")).expect("a good handle");
    let mut held = None;
    for line in std::io::stdin().lines() {
        let descriptor = Descriptor::read(&unhex(&line.expect("text"))).expect("a descriptor");
        match importer.import(&descriptor) {
            Ok(view) => {
                let rows = view.shape()[0];
                let row = view.narrow(0, 1..rows).expect("rows");
                println!("{}", sum(&row.to_vec()));
                held = Some(row);
            }
            Err(error) => println!("{error}"),
        }
    }
    drop(held);
    ExitCode::SUCCESS
}

/// An exporter of one tensor, which waits to be killed.
fn export() -> ExitCode {
    let mut exporter = Exporter::create(Limits::default()).expect("there is memory");
    println!("{}", exporter.handle());
    println!("{}", hex(&tensor(&mut exporter, 5, 40_000).0));
    std::io::stdin().lines().for_each(drop);
    ExitCode::FAILURE
}

/// Exports two rows of `columns` floats; also says the sum of the second.
fn tensor(exporter: &mut Exporter, seed: u64, columns: u64) -> (Descriptor, u64) {
    let shape = Shape::new(&[2, columns]).expect("few dimensions");
    let payload: Vec<u8> = (0..8 * columns).map(|at| (at * seed % 251) as u8).collect();
    let exported = exporter.export(&payload, FLOATS, shape).expect("there is room");
    (exported, sum(&payload[payload.len() / 2..]))
}

fn start(exporter: &Exporter, index: u32) -> End {
    End::start(&["importer", &exporter.handle(), &index.to_string()])
}

fn ask(importer: &mut End, descriptor: &Descriptor) -> String {
    importer.tell(&hex(descriptor));
    importer.line()
}

fn processes_see_what_was_exported() {
    let limits = Limits { least: 4096, checksums: true, ..Limits::default() };
    let mut exporter = Exporter::create(limits).expect("there is memory");
    let mut importers: Vec<_> = (0..3).map(|index| start(&exporter, index)).collect();
    for round in 1..40 {
        // Each round another size: the arena grows while all of them hold a view of the last round.
        for part in 1..4 {
            let (descriptor, expected) = tensor(&mut exporter, round * part, round * round * 100);
            for one in &mut importers {
                assert_eq!(ask(one, &descriptor), expected.to_string());
            }
        }
        exporter.clear();
    }
    let (descriptor, _) = tensor(&mut exporter, 3, 8);
    exporter.clear();
    assert!(ask(&mut importers[0], &descriptor).contains("the tensor was given up"));
}

fn an_importer_killed_with_a_view() {
    let limits = Limits { least: 4096, most: 8192, ..Limits::default() };
    let mut exporter = Exporter::create(limits).expect("there is memory");
    let mut importer = start(&exporter, 7);
    let (descriptor, expected) = tensor(&mut exporter, 1, 512);
    assert_eq!(ask(&mut importer, &descriptor), expected.to_string());
    exporter.clear();
    // What is held and what is new fill the arena.
    tensor(&mut exporter, 2, 512);
    let shape = Shape::new(&[4096]).expect("few dimensions");
    let third =
        |exporter: &mut Exporter| exporter.export(&[3; 4096], Element { code: 1, bytes: 1 }, shape);
    let refused = third(&mut exporter).expect_err("it is full");
    let borrower = Some((7, 1));
    assert!(
        matches!(&refused, Error::Transfer { fault: Fault::Full { borrower: found, .. } } if *found == borrower),
        "{refused}"
    );
    importer.kill();
    importer.wait();
    third(&mut exporter).expect("the dead hold nothing");
    // The next process under that index begins with nothing.
    let mut importer = start(&exporter, 7);
    exporter.clear();
    let (descriptor, expected) = tensor(&mut exporter, 4, 100);
    assert_eq!(ask(&mut importer, &descriptor), expected.to_string());
}

fn a_view_outlives_its_killed_exporter() {
    let mut exporter = End::start(&["exporter"]);
    let importer = Importer::open(&exporter.line(), 0).expect("a good handle");
    let descriptor = Descriptor::read(&unhex(&exporter.line())).expect("a descriptor");
    let view = importer.import(&descriptor).expect("it is there");
    let before = view.to_vec();
    exporter.kill();
    exporter.wait();
    assert_eq!(view.to_vec(), before);
    // What is mapped can be looked at still; another importer finds nobody.
    assert_eq!(importer.import(&descriptor).expect("it is mapped").to_vec(), before);
    let handle = End::start(&["exporter"]).line();
    let late = Importer::open(&handle, 0).expect("a good handle");
    let refused = late.import(&descriptor).err().expect("nobody is there");
    assert!(matches!(refused, Error::Transfer { fault: Fault::Gone { .. } }), "{refused}");
}

fn an_index_is_one_process() {
    let mut exporter = Exporter::create(Limits::default()).expect("there is memory");
    let mut first = start(&exporter, 2);
    let mut second = start(&exporter, 2);
    let (descriptor, expected) = tensor(&mut exporter, 1, 10);
    assert_eq!(ask(&mut first, &descriptor), expected.to_string());
    assert!(
        ask(&mut second, &descriptor)
            .contains("index: expected an index that no other process has, got 2")
    );
    first.kill();
    first.wait();
    assert_eq!(ask(&mut second, &descriptor), expected.to_string());
}

/// No file descriptors; the memory has no name anywhere.
fn nothing_stays_behind() {
    let count = || std::fs::read_dir("/proc/self/fd").expect("there is a list").count();
    let before = count();
    for _ in 0..20 {
        let limits = Limits { least: 4096, ..Limits::default() };
        let mut exporter = Exporter::create(limits).expect("there is memory");
        let importer = Importer::open(&exporter.handle(), 0).expect("a good handle");
        for round in 0..5 {
            let (descriptor, _) = tensor(&mut exporter, 1, 1000 * (round % 3 + 1));
            let _view = importer.import(&descriptor).expect("it is there");
            exporter.clear();
        }
    }
    assert_eq!(count(), before);
}
