//! What a message costs between two threads: a round trip of 64 bytes over two channels, spinning and sleeping, and of eight
//! messages as one batch; beside it, in the same run, the same over two pipes. Between processes nothing is different:
//! the memory is mapped twice here too.
//!
//! Criterion shows means; the 50th and 99th percentiles of single round trips are printed after them.

use criterion::{Criterion, criterion_group, criterion_main};
use peerlane::channel::{self, Reader, Writer};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::thread;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);
/// Longer than a trip takes, and short enough to give way where both ends are on one busy core.
const SPINNING: Duration = Duration::from_micros(500);
const BYTES: usize = 64;
const BATCH: u16 = 8;
/// Round trips that percentiles are of.
const TRIPS: usize = 20_000;
/// The kind of the message after which the other end stops.
const END: u16 = u16::MAX;

/// One end of two channels.
struct End {
    to: Writer,
    from: Reader,
    buffer: Vec<u8>,
}

/// Two ends that spin for `spin`.
fn ends(spin: Duration) -> (End, End) {
    let make = || {
        let mut writer = Writer::create(1 << 16, 1).expect("there is memory");
        let mut reader = Reader::open(&writer.handle(), 0).expect("the handle is good");
        writer.set_spin(spin);
        reader.set_spin(spin);
        (writer, reader)
    };
    let ((there, here), (back, home)) = (make(), make());
    let end = |to, from| End { to, from, buffer: Vec::new() };
    (end(there, home), end(back, here))
}

impl End {
    /// Sends `count` messages as one batch.
    fn send(&mut self, count: u16) {
        for kind in 0..count {
            self.to.stage(1, (kind, 0), &[7; BYTES], LONG).expect("it is read");
        }
        self.to.publish();
    }

    fn receive(&mut self) -> u16 {
        self.from.recv_into(&mut self.buffer, LONG).expect("it is sent").kind
    }

    fn trip(&mut self, count: u16) {
        self.send(count);
        self.receive();
    }

    /// Answers each batch of `count` with one message.
    fn answer(mut self, count: u16) {
        loop {
            match self.receive() {
                END => return,
                kind if kind + 1 == count => self.send(1),
                _ => {}
            }
        }
    }
}

/// Runs `body` with what makes a round trip of a batch of `count`.
fn with_channel(spin: Duration, count: u16, body: impl FnOnce(&mut dyn FnMut())) {
    let (mut near, far) = ends(spin);
    thread::scope(|scope| {
        scope.spawn(move || far.answer(count));
        body(&mut || near.trip(count));
        near.to.send(1, (END, 0), b"", LONG).expect("it is read");
    });
}

/// The same with pipes, whose reads block.
fn with_pipes(count: u16, body: impl FnOnce(&mut dyn FnMut())) {
    let (mut here, mut there) = pipe().expect("there are pipes");
    let (mut home, mut back) = pipe().expect("there are pipes");
    let answer = move |here: &mut PipeReader, back: &mut PipeWriter| {
        let mut batch = vec![0; BYTES * usize::from(count)];
        while here.read_exact(&mut batch).is_ok() {
            back.write_all(&[7; BYTES]).expect("it is read");
        }
    };
    thread::scope(|scope| {
        scope.spawn(move || answer(&mut here, &mut back));
        body(&mut || {
            // As senders of single messages do; a batch over a pipe is one write at best.
            there.write_all(&vec![7; BYTES * usize::from(count)]).expect("it is read");
            home.read_exact(&mut [0; BYTES]).expect("it is sent");
        });
        drop(there);
    });
}

fn percentiles(name: &str, trip: &mut dyn FnMut()) {
    let mut took: Vec<Duration> = (0..TRIPS)
        .map(|_| {
            let begin = Instant::now();
            trip();
            begin.elapsed()
        })
        .collect();
    took.sort_unstable();
    let [half, most] = [TRIPS / 2, TRIPS * 99 / 100].map(|at| took[at]);
    println!("{name}: p50 {half:?}, p99 {most:?}");
}

fn round_trips(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("channel");
    group.warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    let cases = [("spinning", SPINNING, 1), ("default", channel::SPIN, 1)];
    let more = [("sleeping", Duration::ZERO, 1), ("batch of 8", SPINNING, BATCH)];
    for (name, spin, count) in cases.into_iter().chain(more) {
        with_channel(spin, count, |trip| {
            group.bench_function(name, |bencher| bencher.iter(&mut *trip));
            percentiles(name, trip);
        });
    }
    for (name, count) in [("pipe", 1), ("pipe, batch of 8", BATCH)] {
        with_pipes(count, |trip| {
            group.bench_function(name, |bencher| bencher.iter(&mut *trip));
            percentiles(name, trip);
        });
    }
    group.finish();
}

criterion_group!(benches, round_trips);
criterion_main!(benches);
