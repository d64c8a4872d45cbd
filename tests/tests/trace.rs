//! What a process records of its collectives, channels and tensors. One test, since a process records once in its life.

use peerlane::channel::{EVERYBODY, Reader, Writer};
use peerlane::gpu::{DevicePtr, GpuRef, sim};
use peerlane::trace::{self, Span, Summary, Timeline, Value};
use peerlane::transfer::{Element, Exporter, Importer, Limits, Shape};
use peerlane::{AllReduce, Communicator, Config, DType, Error};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(30);
/// Elements of a tensor.
const COUNT: usize = 1000;
/// Passes of a rank, and all-reduces of each.
const PASSES: usize = 3;
const CALLS: usize = 5;
/// How long a reader waits for its first message.
const LATE: Duration = Duration::from_millis(20);

#[test]
fn a_process_records_what_it_does_once_it_is_told() {
    let directory = Directory::new();
    // Not told yet.
    ranks();
    assert!(!trace::is_recording());
    trace::record(span("too early"));

    trace::start(&directory.0).unwrap();
    assert!(trace::is_recording());
    let again = trace::start(&directory.0).unwrap_err().to_string();
    assert!(again.contains("started once in a process"), "{again}");
    ranks();
    channel();
    tensor();
    trace::record(span("by hand"));
    forked_child();
    trace::flush();

    let timeline = Timeline::read(&directory.0).unwrap();
    let [process] = &timeline.processes[..] else { panic!("one file: {timeline:?}") };
    assert_eq!((process.pid, process.lost, process.cut), (std::process::id(), 0, false));
    let named =
        |name: &str| process.spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    assert_eq!(
        (named("by hand").len(), named("too early").len(), named("in a child").len()),
        (1, 0, 0)
    );
    assert!(process.spans.iter().all(|span| span.begin <= span.end), "{:?}", process.spans);
    all_reduces(&named("all_reduce"), |span| process.is_gpu(span));
    assert_eq!((named("export").len(), named("import").len()), (1, 1));
    assert_eq!(named("export")[0].args["bytes"], Value::Number(64));

    let summary = Summary::of(&timeline);
    assert_eq!(summary.passes, [("decode".to_owned(), 2 * PASSES)].into());
    let count = |pass: &str, name: &str, place: &str| {
        let is = |stage: &&trace::Stage| {
            (&*stage.pass, &*stage.name, stage.place) == (pass, name, place)
        };
        summary.stages.iter().find(is).map_or(0, |stage| stage.count)
    };
    assert_eq!(count("decode", "pass", "host"), 2 * PASSES, "{summary}");
    assert_eq!(count("decode", "all_reduce", "host"), 2 * PASSES * CALLS, "{summary}");
    assert_eq!(count("decode", "all_reduce", "gpu"), 2 * PASSES * CALLS, "{summary}");
    assert_eq!(count("decode", "all_reduce: waiting", "gpu"), 2 * PASSES * CALLS, "{summary}");
    assert_eq!(count("decode", "synchronize", "host"), 2 * PASSES, "{summary}");
    // The second of two messages was there when it was looked for.
    let message = summary.stages.iter().find(|stage| stage.place == "message").unwrap();
    assert_eq!((&*message.name, message.count), ("send to recv", 1), "{summary}");
    assert!(message.p50_us > 0.0 && message.p50_us < 1e6, "{summary}");
    let recv = named("recv")[0];
    assert!(recv.length() >= LATE.as_nanos() as u64 / 2, "{recv:?}");
}

/// What was recorded of all-reduces: those of passes, those of graphs, and one that was refused.
fn all_reduces(spans: &[&Span], is_gpu: impl Fn(&Span) -> bool) {
    let number = |span: &Span, name: &str| match span.args.get(name) {
        Some(Value::Number(number)) => *number,
        other => panic!("{name}: {other:?} in {span:?}"),
    };
    let of_rank = |gpu: bool, rank: u64| {
        let is = |span: &&&Span| is_gpu(span) == gpu && number(span, "rank") == rank;
        spans.iter().filter(is).count()
    };
    // In passes, one in a graph that only the host sees, a good one, one that only rank 0 makes, and one after recovering; rank 1 is
    // refused once.
    let good = PASSES * CALLS + 2;
    assert_eq!([0, 1].map(|rank| of_rank(true, rank)), [good + 1, good]);
    assert_eq!([0, 1].map(|rank| of_rank(false, rank)), [good + 2, good + 2]);
    let mut calls: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    for span in spans.iter().filter(|span| is_gpu(span)) {
        let key = (number(span, "group"), number(span, "call"));
        calls.entry(key).or_default().push(number(span, "rank"));
    }
    let alone = calls.values().filter(|ranks| ranks.len() == 1).count();
    assert_eq!(
        (calls.len(), alone),
        (good + 1, 1),
        "calls that belong together have one number: {calls:?}"
    );
    for span in spans.iter().filter(|span| is_gpu(span)) {
        assert_eq!((number(span, "bytes"), number(span, "world")), (4 * COUNT as u64, 2));
        assert!(span.length() > 0, "{span:?}");
    }
}

/// Passes of two ranks in a thread each, a call in a graph, and one that is refused.
fn ranks() {
    let gpus = sim::devices(&sim::Config { devices: 2, ..Default::default() });
    let ranks = Communicator::connect(&gpus, &Config::default()).unwrap();
    let together = Barrier::new(2);
    thread::scope(|scope| {
        for mut rank in ranks {
            let together = &together;
            scope.spawn(move || one(&mut rank, together));
        }
    });
}

fn one(rank: &mut Communicator, together: &Barrier) {
    let gpu: GpuRef = rank.gpu().clone();
    let tensor: DevicePtr = gpu.alloc(4 * COUNT).unwrap();
    let stream = gpu.stream_create().unwrap();
    let call = AllReduce::in_place(tensor, COUNT, DType::F32);
    // SAFETY: the tensor has that size, and is not freed.
    unsafe { gpu.fill(tensor, 0, 4 * COUNT, stream).unwrap() };
    for _ in 0..PASSES {
        let _pass = trace::pass("decode");
        for _ in 0..CALLS {
            // SAFETY: as above.
            unsafe { rank.all_reduce(&call, stream).unwrap() };
        }
        rank.synchronize(stream).unwrap();
    }
    let first_alone = |rank: &mut Communicator| {
        together.wait();
        if rank.rank() == 0 {
            // SAFETY: as above.
            unsafe { rank.all_reduce(&call, stream).unwrap() };
        }
        together.wait();
    };
    gpu.capture_begin(stream).unwrap();
    // SAFETY: as above.
    unsafe { rank.all_reduce(&call, stream).unwrap() };
    let graph = gpu.capture_end(stream).unwrap();
    gpu.graph_launch(graph, stream).unwrap();
    rank.synchronize(stream).unwrap();
    first_alone(rank);
    if rank.rank() == 1 {
        let other = AllReduce::in_place(tensor, COUNT / 2, DType::F32);
        // SAFETY: as above.
        let refused = unsafe { rank.all_reduce(&other, stream) };
        assert!(matches!(refused, Err(Error::Mismatch { .. })), "{refused:?}");
        // SAFETY: as above.
        unsafe { rank.all_reduce(&call, stream).unwrap() };
    }
    rank.synchronize(stream).unwrap();
    first_alone(rank);
    if rank.rank() == 1 {
        rank.abort();
    }
    rank.synchronize(stream).unwrap_err();
    rank.recover().unwrap();
    // SAFETY: as above.
    unsafe { rank.all_reduce(&call, stream).unwrap() };
    rank.synchronize(stream).unwrap();
    rank.close().unwrap();
    // SAFETY: it does not run any more.
    unsafe { gpu.graph_destroy(graph).unwrap() };
}

/// Two messages: one that is waited for, one that is there.
fn channel() {
    let mut writer = Writer::create(1 << 14, 1).unwrap();
    let mut reader = Reader::open(&writer.handle(), 0).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(LATE);
            for text in ["one", "two"] {
                writer.send(EVERYBODY, (0, 0), text.as_bytes(), LONG).unwrap();
            }
        });
        assert_eq!(reader.recv(LONG).unwrap().payload, b"one");
        thread::sleep(LATE);
        assert_eq!(reader.recv(LONG).unwrap().payload, b"two");
    });
}

fn tensor() {
    let mut exporter = Exporter::create(Limits::default()).unwrap();
    let importer = Importer::open(&exporter.handle(), 0).unwrap();
    let shape = Shape::new(&[16]).unwrap();
    let descriptor = exporter.export(&[7; 64], Element { code: 0, bytes: 4 }, shape).unwrap();
    assert_eq!(importer.import(&descriptor).unwrap().to_vec(), [7; 64]);
}

/// A child that was forked has the recorder, and not its thread.
fn forked_child() {
    // SAFETY: the child makes no call that may take a lock, and ends without running anything of its parent's.
    match unsafe { libc::fork() } {
        0 => {
            trace::record(span("in a child"));
            trace::flush();
            // SAFETY: ends this process.
            unsafe { libc::_exit(i32::from(trace::is_recording())) }
        }
        child => {
            let mut status = -1;
            // SAFETY: the child is this process's, and `status` lives.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            assert_eq!((waited, status), (child, 0));
        }
    }
}

fn span(name: &'static str) -> Span {
    let now = trace::now();
    Span { name: name.into(), lane: 0, begin: now, end: now, args: Default::default() }
}

/// A directory of its own, gone at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        Directory(
            std::env::temp_dir().join(format!("peerlane-trace-records-{}", std::process::id())),
        )
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
