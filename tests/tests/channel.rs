//! A channel between processes: sizes, masks, slow ends, and ends that are killed.
//!
//! The program starts itself as each end. Its own `main`, since libtest's cannot do that.

use peerlane::channel::{EVERYBODY, Fault, Reader, Side, Writer};
use peerlane::{Error, Result};
use peerlane_tests::ends::{End, run_named};
use std::io::Write;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than anything that goes well takes.
const LONG: Duration = Duration::from_secs(30);
/// How soon an end hears that another was killed.
const NOTICED: Duration = Duration::from_millis(100);
/// Within this all of a machine that is busy with other tests may happen.
const BUSY: Duration = Duration::from_millis(400);

const TESTS: &[(&str, fn())] = &[
    ("messages_arrive_whole_and_in_order", messages_arrive_whole_and_in_order),
    ("slow_readers_hold_the_writer_up", slow_readers_hold_the_writer_up),
    ("a_killed_writer_is_noticed_by_all", a_killed_writer_is_noticed_by_all),
    ("a_writer_killed_at_any_moment_tears_no_message", a_writer_killed_at_any_moment),
    ("a_killed_reader_is_named_and_forgotten", a_killed_reader_is_named_and_forgotten),
    ("poison_ends_waits_in_other_processes", poison_ends_waits_in_other_processes),
    ("nothing_stays_behind", nothing_stays_behind),
    ("a_handle_dies_with_its_writer", a_handle_dies_with_its_writer),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["reader", handle, index, pause] => return read(handle, index, pause),
        ["idle", handle, index] => return idle(handle, index),
        ["writer"] => return write(Duration::from_secs(60)),
        ["stream"] => return write(Duration::ZERO),
        _ => {}
    }
    run_named(TESTS, &words)
}

/// Number `number` of a sequence that both ends know.
fn draw(number: u64) -> u64 {
    let mixed = (number.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 16
}

/// Message `number`: who it is for among `readers`, and its payload, of 0 bytes up to all that fits.
fn message(number: u64, readers: u32, most: u64) -> (u32, Vec<u8>) {
    let mask = draw(number) as u32 % (1 << readers);
    let size = match draw(number + 1_000_000) % 20 {
        0 => 0,
        1 => most,
        2 => draw(number + 2_000_000) % (most + 1),
        _ => draw(number + 2_000_000) % 300,
    };
    (mask.max(1), (0..size).map(|at| (at ^ number) as u8).collect())
}

/// A reader: says what it received, until the channel ends, and then why that is.
fn read(handle: &str, index: &str, pause: &str) -> ExitCode {
    let index: u32 = index.parse().expect("an index");
    let pause = Duration::from_micros(pause.parse().expect("microseconds"));
    let mut reader = Reader::open(handle, index).expect("the handle is good");
    println!("open");
    let mut good = 0;
    let fault = loop {
        match reader.recv(LONG) {
            Ok(received) => {
                let info = received.info;
                let (mask, payload) =
                    message(info.sequence - 1, u32::from(info.flags), u64::from(info.kind));
                assert_eq!((info.readers, &received.payload), (mask, &payload));
                good += 1;
            }
            Err(Error::Channel { fault, .. }) => break fault,
            Err(other) => panic!("{other}"),
        }
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    };
    println!("{good} {fault:?}");
    ExitCode::SUCCESS
}

/// A reader that receives nothing, until it is killed.
fn idle(handle: &str, index: &str) -> ExitCode {
    let index = index.parse().expect("an index");
    let _reader = Reader::open(handle, index).expect("the handle is good");
    println!("open");
    thread::sleep(LONG);
    ExitCode::FAILURE
}

/// A writer for three readers that sends messages in batches of three, with a pause after each batch, until it is killed.
fn write(pause: Duration) -> ExitCode {
    let mut writer = Writer::create(4096, 3).expect("there is memory");
    println!("{}", writer.handle());
    let most = writer.max_payload();
    for number in 0u64.. {
        let (mask, payload) = message(number, 3, most);
        writer.stage(mask, (most as u16, 3), &payload, LONG).expect("readers read");
        if number % 3 == 2 {
            writer.publish();
            thread::sleep(pause);
        }
    }
    ExitCode::FAILURE
}

fn idle_reader(handle: &str, index: u32) -> End {
    let mut end = End::start(&["idle", handle, &index.to_string()]);
    assert_eq!(end.line(), "open");
    end
}

fn reader(handle: &str, index: u32, pause: Duration) -> End {
    let pause = pause.as_micros().to_string();
    let mut end = End::start(&["reader", handle, &index.to_string(), &pause]);
    assert_eq!(end.line(), "open");
    end
}

fn fault<T>(result: Result<T>) -> Fault {
    match result.map(drop) {
        Err(Error::Channel { fault, .. }) => fault,
        other => panic!("{other:?}"),
    }
}

/// Sends `count` messages to three readers, some of them in batches; how many went to each.
fn stream(writer: &mut Writer, count: u64) -> [u64; 3] {
    let most = writer.max_payload();
    let mut sent = [0; 3];
    for number in 0..count {
        let (mask, payload) = message(number, 3, most);
        writer.stage(mask, (most as u16, 3), &payload, LONG).expect("readers read");
        if draw(number + 3_000_000).is_multiple_of(3) {
            writer.publish();
        }
        (0..3).filter(|r| mask >> r & 1 == 1).for_each(|r| sent[r] += 1);
    }
    writer.publish();
    sent
}

fn stressed(count: u64, pauses: [u64; 3]) {
    let mut writer = Writer::create(4096, 3).expect("there is memory");
    let start = |index| {
        let pause = Duration::from_micros(pauses[index]);
        reader(&writer.handle(), index as u32, pause)
    };
    let mut readers = [0, 1, 2].map(start);
    assert_eq!(writer.attached(EVERYBODY), Ok(()));
    let sent = stream(&mut writer, count);
    writer.close();
    for (reader, sent) in readers.iter_mut().zip(sent) {
        assert_eq!(reader.line(), format!("{sent} {:?}", Fault::Closed { who: Side::Writer }));
    }
}

fn messages_arrive_whole_and_in_order() {
    stressed(30_000, [0, 0, 0]);
}

fn slow_readers_hold_the_writer_up() {
    stressed(600, [0, 700, 3000]);
}

fn a_killed_writer_is_noticed_by_all() {
    let mut writer = End::start(&["writer"]);
    let handle = writer.line();
    let mut readers: Vec<_> = (0..2).map(|index| reader(&handle, index, Duration::ZERO)).collect();
    let mut own = Reader::open(&handle, 2).expect("the handle is good");
    while own.recv(Duration::from_millis(200)).is_ok() {}
    let pid = writer.pid();
    // Not waited for: a process that has ended and is still listed is gone too.
    let begin = Instant::now();
    writer.kill();
    assert_eq!(fault(own.recv(LONG)), Fault::Died { who: Side::Writer, pid });
    let waited = begin.elapsed();
    println!("a killed writer was noticed after {waited:?}");
    assert!(waited < NOTICED + BUSY, "{waited:?}");
    for reader in &mut readers {
        let line = reader.line();
        assert!(line.contains("Died { who: Writer"), "{line}");
    }
}

/// The readers check every message that they receive.
fn a_writer_killed_at_any_moment() {
    for round in 0..20 {
        let mut writer = End::start(&["stream"]);
        let handle = writer.line();
        let open = |index| reader(&handle, index, Duration::ZERO);
        let mut readers = [0, 1, 2].map(open);
        thread::sleep(Duration::from_micros(draw(round) % 20_000));
        writer.kill();
        for reader in &mut readers {
            let line = reader.line();
            assert!(line.contains("Died { who: Writer"), "{line}");
        }
    }
}

fn a_killed_reader_is_named_and_forgotten() {
    let mut writer = Writer::create(4096, 2).expect("there is memory");
    let mut victim = idle_reader(&writer.handle(), 1);
    let mut other = Reader::open(&writer.handle(), 0).expect("the handle is good");
    let most = writer.max_payload() as u16;
    let (_, payload) = message(0, 2, u64::from(most));
    let mut send = |timeout| writer.send(3, (most, 2), &payload, timeout);
    while send(Duration::from_millis(50)).is_ok() {
        while other.try_recv().expect("it is open").is_some() {}
    }
    let begin = Instant::now();
    victim.kill();
    let (who, pid) = (Side::Reader(1), victim.pid());
    assert_eq!(fault(send(LONG)), Fault::Died { who, pid });
    let waited = begin.elapsed();
    println!("a killed reader was noticed after {waited:?}");
    assert!(waited < NOTICED + BUSY, "{waited:?}");
    writer.forget(1).expect("there is a reader 1");
    for number in 0..100u8 {
        writer.send(EVERYBODY, (0, 0), &[number; 200], LONG).expect("it goes on");
        while let Some(received) = other.try_recv().expect("it is open") {
            assert!(received.payload == payload || received.payload == [number; 200]);
        }
    }
}

fn poison_ends_waits_in_other_processes() {
    let writer = Writer::create(4096, 3).expect("there is memory");
    let handle = writer.handle();
    let mut readers: Vec<_> = (0..2).map(|index| reader(&handle, index, Duration::ZERO)).collect();
    let own = Reader::open(&handle, 2).expect("the handle is good");
    thread::sleep(Duration::from_millis(100));
    let begin = Instant::now();
    own.poison(77);
    let expected = Fault::Poisoned { by: Side::Reader(2), reason: 77 };
    for reader in &mut readers {
        assert_eq!(reader.line(), format!("0 {expected:?}"));
    }
    assert!(begin.elapsed() < BUSY, "{:?}", begin.elapsed());
    drop(writer);
}

fn nothing_stays_behind() {
    let names = || -> Vec<_> {
        let files = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        files.map(|f| f.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut writer = End::start(&["writer"]);
    let reader = reader(&writer.line(), 0, Duration::ZERO);
    assert!(!names().iter().any(|name| name.contains("peerlane-channel")));
    drop((writer, reader));
}

fn a_handle_dies_with_its_writer() {
    let mut writer = End::start(&["writer"]);
    let handle = writer.line();
    drop(writer);
    let refused = Reader::open(&handle, 0).map(drop);
    assert!(matches!(refused, Err(Error::InvalidArgument { argument: "handle", .. })));
    let _ = std::io::stdout().flush();
}
