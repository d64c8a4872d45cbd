//! Both ends in one process: what fits, what wraps, who waits for whom, and what a tampered segment does.

use super::segment::{Handle, Segment};
use super::*;
use crate::error::Result;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

/// Longer than anything that goes well takes.
const LONG: Duration = Duration::from_secs(20);
const NOW: Duration = Duration::ZERO;

fn pair() -> (Writer, Reader) {
    let writer = Writer::create(4096, 1).unwrap();
    let reader = Reader::open(&writer.handle(), 0).unwrap();
    (writer, reader)
}

fn trio() -> (Writer, Reader, Reader) {
    let writer = Writer::create(4096, 2).unwrap();
    let [one, two] = [0, 1].map(|index| Reader::open(&writer.handle(), index).unwrap());
    (writer, one, two)
}

/// The segment of a writer, mapped once more.
fn segment(writer: &Writer) -> Segment {
    Segment::open(&writer.handle().parse::<Handle>().unwrap()).unwrap()
}

fn why<T>(result: Result<T>) -> Fault {
    match result.map(drop).unwrap_err() {
        Error::Channel { fault, .. } => fault,
        other => panic!("{other}"),
    }
}

fn text<T>(result: Result<T>) -> String {
    result.map(drop).unwrap_err().to_string()
}

fn bytes(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(31) ^ seed.wrapping_mul(97)) as u8).collect()
}

#[test]
fn any_size_arrives_whole_and_in_order() {
    let (mut writer, mut reader) = pair();
    let most = writer.max_payload() as usize;
    assert_eq!(most, 4096 - 32);
    let sizes = [0, 1, 7, 8, 31, 32, 33, 64, 95, 96, 97, 1000, 2048, 3000, most - 1, most, 0, most];
    for round in 0..40u64 {
        for (index, size) in sizes.into_iter().enumerate() {
            let payload = bytes(size, round);
            let sequence = writer.send(1, (index as u16, 9), &payload, NOW).unwrap();
            let message = reader.recv(NOW).unwrap();
            assert_eq!(message.payload, payload, "{size} bytes");
            let (kind, length) = (index as u16, size as u64);
            assert_eq!(message.info, Info { kind, flags: 9, length, sequence, readers: 1 });
        }
    }
    assert_eq!(reader.try_recv().unwrap(), None);
}

#[test]
fn arguments_are_named() {
    for (capacity, readers) in [(0, 1), (4095, 1), ((1 << 32) + 1, 1)] {
        let text = text(Writer::create(capacity, readers));
        assert!(text.contains("capacity: expected 4096 to 4294967296 bytes"), "{text}");
    }
    assert!(text(Writer::create(4096, 0)).contains("readers: expected 1 to 32, got 0"));
    assert!(text(Writer::create(4096, 33)).contains("got 33"));
    let (mut writer, _reader) = pair();
    let large = text(writer.send(1, (0, 0), &[0; 4065], NOW));
    assert!(large.contains("payload: expected at most 4064 bytes, got 4065 bytes"), "{large}");
    for mask in [0, 2, 3] {
        assert!(text(writer.send(mask, (0, 0), b"", NOW)).contains("readers: expected"));
    }
    assert!(text(writer.forget(1)).contains("reader: expected below 1, got 1"));
}

#[test]
fn ends_go_to_other_threads() {
    fn is_send<T: Send>() {}
    fn is_shared<T: Send + Sync>() {}
    is_send::<(Writer, Reader, Message)>();
    is_shared::<Poisoner>();
}

#[test]
fn an_index_is_taken_once() {
    let (writer, reader) = pair();
    let handle = writer.handle();
    assert!(text(Reader::open(&handle, 0)).contains("one that nobody has taken"));
    assert!(text(Reader::open(&handle, 1)).contains("index: expected below 1, got 1"));
    drop(reader);
    assert!(text(Reader::open(&handle, 0)).contains("one that nobody has taken"));
}

#[test]
fn who_is_not_addressed_holds_nobody_up() {
    let (mut writer, mut one, mut two) = trio();
    for round in 0..200u64 {
        writer.send(1, (1, 0), &bytes(500, round), NOW).unwrap();
        assert_eq!(one.recv(NOW).unwrap().payload, bytes(500, round));
    }
    writer.send(2, (2, 0), b"two", NOW).unwrap();
    writer.send(3, (3, 0), b"both", NOW).unwrap();
    writer.send(1, (1, 0), b"one", NOW).unwrap();
    writer.send(2, (2, 0), b"end", NOW).unwrap();
    let all = |reader: &mut Reader| {
        std::iter::from_fn(|| reader.try_recv().unwrap()).map(|m| m.payload).collect::<Vec<_>>()
    };
    assert_eq!(all(&mut two), [&b"two"[..], b"both", b"end"]);
    assert_eq!(all(&mut one), [&b"both"[..], b"one"]);
}

#[test]
fn the_slowest_reader_is_waited_for_and_named() {
    let (mut writer, mut one, mut two) = trio();
    while writer.try_send(3, (0, 0), &[7; 200]).unwrap().is_some() {
        one.recv(NOW).unwrap();
    }
    let begin = Instant::now();
    let waited = why(writer.send(3, (0, 0), &[7; 200], Duration::from_millis(30)));
    assert!(begin.elapsed() >= Duration::from_millis(30));
    assert!(matches!(waited, Fault::Timeout { who: Side::Reader(1), .. }), "{waited}");
    // A message to the other alone needs the same space.
    assert_eq!(writer.try_send(1, (0, 0), &[7; 200]).unwrap(), None);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            two.recv(NOW).unwrap();
        });
        writer.send(3, (0, 0), &[7; 200], LONG).unwrap();
    });
}

#[test]
fn a_batch_is_seen_at_once_and_may_exceed_the_ring() {
    let (mut writer, mut reader) = pair();
    for number in 0..8 {
        writer.stage(1, (number, 0), b"part", NOW).unwrap();
        assert_eq!(reader.try_recv().unwrap(), None);
    }
    writer.publish();
    for number in 0..8 {
        assert_eq!(reader.recv(NOW).unwrap().info.kind, number);
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..100 {
                assert_eq!(reader.recv(LONG).unwrap().info.kind, number);
            }
        });
        for number in 0..100 {
            writer.stage(1, (number, 0), &[1; 600], LONG).unwrap();
        }
        writer.publish();
    });
}

#[test]
fn a_wait_has_a_deadline_and_says_for_whom() {
    let (_writer, mut reader) = pair();
    for limit in [0, 1, 45] {
        let begin = Instant::now();
        let fault = why(reader.recv(Duration::from_millis(limit)));
        let Fault::Timeout { who: Side::Writer, waited } = fault else { panic!("{fault}") };
        assert!(waited >= Duration::from_millis(limit) && waited <= begin.elapsed());
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_closed_channel_is_drained_first() {
    let (mut writer, mut reader) = pair();
    writer.send(1, (1, 0), b"sent", NOW).unwrap();
    writer.stage(1, (2, 0), b"staged", NOW).unwrap();
    writer.close();
    assert_eq!(reader.recv(LONG).unwrap().payload, b"sent");
    assert_eq!(reader.recv(LONG).unwrap().payload, b"staged");
    assert_eq!(why(reader.recv(LONG)), Fault::Closed { who: Side::Writer });
}

#[test]
fn a_reader_that_closed_is_named_until_it_is_forgotten() {
    let (mut writer, mut one, two) = trio();
    two.close();
    assert_eq!(why(writer.send(3, (0, 0), b"", NOW)), Fault::Closed { who: Side::Reader(1) });
    writer.forget(1).unwrap();
    writer.send(EVERYBODY, (5, 0), b"on", NOW).unwrap();
    assert_eq!(one.recv(NOW).unwrap().info.readers, 1);
    assert!(text(writer.send(2, (0, 0), b"", NOW)).contains("not forgotten"));
}

#[test]
fn a_reader_that_is_forgotten_is_told() {
    let (mut writer, _one, mut two) = trio();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| why(two.recv(LONG)));
        thread::sleep(Duration::from_millis(40));
        writer.forget(1).unwrap();
        let told = waiting.join().unwrap();
        assert_eq!(told, Fault::Poisoned { by: Side::Writer, reason: FORGOTTEN });
    });
}

/// Ends every wait of a channel by `end` and checks what the waits say, and that they say it at once.
fn ended_by(end: impl FnOnce(&Poisoner, &Poisoner), expected: &Fault) {
    let (mut writer, mut one, two) = trio();
    while writer.try_send(2, (0, 0), &[0; 500]).unwrap().is_some() {}
    let (w, r) = (writer.poisoner(), two.poisoner());
    thread::scope(|scope| {
        let sending = scope.spawn(|| why(writer.send(2, (0, 0), &[0; 500], LONG)));
        let receiving = scope.spawn(|| why(one.recv(LONG)));
        thread::sleep(Duration::from_millis(60));
        let begin = Instant::now();
        end(&w, &r);
        assert_eq!((&sending.join().unwrap(), &receiving.join().unwrap()), (expected, expected));
        assert!(begin.elapsed() < Duration::from_millis(500));
    });
}

#[test]
fn poison_ends_every_wait() {
    let by_writer = Fault::Poisoned { by: Side::Writer, reason: 42 };
    ended_by(|writer, _| writer.poison(42), &by_writer);
    let by_reader = Fault::Poisoned { by: Side::Reader(1), reason: 0 };
    ended_by(|_, reader| reader.poison(0), &by_reader);
    // The first counts.
    ended_by(|w, r| (r.poison(0), w.poison(42)).0, &by_reader);
}

#[test]
fn poison_is_not_drained() {
    let (mut writer, mut reader) = pair();
    writer.send(1, (0, 0), b"lost", NOW).unwrap();
    reader.poison(3);
    let poisoned = Fault::Poisoned { by: Side::Reader(0), reason: 3 };
    assert_eq!(why(reader.recv(LONG)), poisoned);
    assert_eq!(why(writer.send(1, (0, 0), b"", NOW)), poisoned);
}

#[test]
fn a_panic_poisons() {
    let (writer, mut reader) = pair();
    let panicked = thread::spawn(move || {
        let _writer = writer;
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(panicked.join().is_err());
    let poisoned = Fault::Poisoned { by: Side::Writer, reason: PANICKED };
    assert_eq!(why(reader.recv(LONG)), poisoned);
}

#[test]
fn a_peeked_message_stays_until_it_is_accepted() {
    let (mut writer, mut reader) = pair();
    writer.send(1, (1, 0), b"first", NOW).unwrap();
    writer.send(1, (2, 0), b"second", NOW).unwrap();
    assert_eq!(reader.peek(NOW).unwrap().info().kind, 1);
    let peek = reader.peek(NOW).unwrap();
    let mut copy = [0; 5];
    peek.copy_to(&mut copy).unwrap();
    // SAFETY: five bytes of payload, which nobody changes.
    let there = unsafe { std::slice::from_raw_parts(peek.as_ptr(), 5) };
    assert_eq!((&copy, there), (b"first", &b"first"[..]));
    assert!(text(peek.copy_to(&mut [0; 4])).contains("expected 5 bytes, got 4"));
    peek.accept();
    assert_eq!(reader.recv(NOW).unwrap().payload, b"second");
}

/// Many sleeps and wake-ups: one that is lost costs a slice, and all of them far more than there is time for.
#[test]
fn no_wake_up_is_lost() {
    const ROUNDS: u32 = 20_000;
    let (mut ping, mut pong) = (pair(), pair());
    for (writer, reader) in [&mut ping, &mut pong] {
        writer.set_spin(NOW);
        reader.set_spin(NOW);
    }
    let begin = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                let message = ping.1.recv(LONG).unwrap();
                pong.0.send(1, (0, 0), &message.payload, LONG).unwrap();
            }
        });
        for round in 0..ROUNDS {
            ping.0.send(1, (0, 0), &round.to_le_bytes(), LONG).unwrap();
            assert_eq!(pong.1.recv(LONG).unwrap().payload, round.to_le_bytes());
        }
    });
    assert!(begin.elapsed() < Duration::from_millis(20) * ROUNDS / 10, "{:?}", begin.elapsed());
}

#[test]
fn handles_that_are_none_are_refused() {
    let (writer, _reader) = pair();
    let good = writer.handle();
    let wrong_token =
        format!("{}{}", &good[..good.len() - 1], if good.ends_with('0') { 1 } else { 0 });
    for (handle, reason) in [
        ("", "text of Writer::handle"),
        ("peerlane-channel:1:1:1", "text of Writer::handle"),
        ("peerlane-channel:2:1:1:0000000000000000", "text of Writer::handle"),
        ("peerlane-channel:1:+1:1:0000000000000000", "text of Writer::handle"),
        (&wrong_token, "token"),
        ("peerlane-channel:1:4194304:1:0000000000000000", "an open channel of this user"),
    ] {
        let text = text(Reader::open(handle, 0));
        assert!(text.contains(reason), "{handle}: {text}");
    }
    drop(writer);
}

#[test]
fn segments_that_are_none_are_refused() {
    for (word, value, reason) in [
        (0, 0, "magic"),
        (1, 2 | 1 << 32, "version"),
        (1, 1, "number of readers"),
        (1, 1 | 33 << 32, "number of readers"),
        (1, 1 | 32 << 32, "size"),
        (2, 8192, "size"),
        (2, 5000, "capacity"),
        (2, u64::MAX, "capacity"),
        (3, 7, "token"),
        (4, 77_777, "user"),
        (5, 1, "pid namespace"),
        (6, 0, "names no writer"),
    ] {
        let (writer, _reader) = pair();
        segment(&writer).wide(8 * word).store(value, Ordering::Relaxed);
        let text = text(Reader::open(&writer.handle(), 0));
        assert!(text.contains(reason), "word {word}: {text}");
    }
}

#[test]
fn files_that_are_none_are_refused() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let open = |file| Segment::check(file, 0).map(drop).unwrap_err();
    let loose = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&loose, 16384).unwrap();
    assert!(open(loose).contains("sealed"));
    for size in [0, 8, 64, 4096] {
        let file = crate::sealed::create("test", size).unwrap();
        let reason = open(file);
        assert!(reason.contains("at least") || reason.contains("magic"), "{reason}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a model: what was sent and not received, for each of three readers.
    #[test]
    fn readers_receive_what_was_sent_to_them(
        steps in prop::collection::vec((0u32..8, 0usize..3000, any::<bool>()), 1..200),
    ) {
        let mut writer = Writer::create(4096, 3).unwrap();
        let open = |index| Reader::open(&writer.handle(), index).unwrap();
        let mut readers = [open(0), open(1), open(2)];
        let mut model: [VecDeque<Vec<u8>>; 3] = Default::default();
        for (number, (mask, size, large)) in steps.into_iter().enumerate() {
            let payload = bytes(if large { size } else { size % 100 }, number as u64);
            if mask != 0 && writer.try_send(mask, (0, 0), &payload).unwrap().is_some() {
                (0..3).filter(|r| mask >> r & 1 == 1).for_each(|r| model[r].push_back(payload.clone()));
                continue;
            }
            for (reader, sent) in readers.iter_mut().zip(&mut model) {
                let received = reader.try_recv().unwrap().map(|message| message.payload);
                prop_assert_eq!(received, sent.pop_front());
            }
        }
        for (reader, sent) in readers.iter_mut().zip(model) {
            for payload in sent {
                prop_assert_eq!(reader.recv(NOW).unwrap().payload, payload);
            }
            prop_assert_eq!(reader.try_recv().unwrap(), None);
        }
    }

    /// Garbage anywhere, also in words that matter: messages or typed errors, in time.
    #[test]
    fn garbage_is_an_error_or_a_message(
        changes in prop::collection::vec((0usize..100, any::<u64>(), 0u8..6), 1..30),
    ) {
        let mut writer = Writer::create(4096, 2).unwrap();
        let open = |index| Reader::open(&writer.handle(), index).unwrap();
        let mut readers = [open(0), open(1)];
        let memory = segment(&writer);
        for (place, value, how) in changes {
            // Half of the places are cursors and states, the others headers and data.
            let line = if place < 50 { 1 + place % 15 } else { 14 + place };
            let word = memory.wide(64 * line + 8 * (value % 3) as usize);
            let old = word.load(Ordering::Relaxed);
            let new = match how {
                0 => value,
                1 => value & 0xfff,
                2 => old.wrapping_add(64),
                3 => old.wrapping_sub(64),
                4 => old ^ 1 << (value % 64),
                _ => !63,
            };
            word.store(new, Ordering::Relaxed);
            for _ in 0..3 {
                let _ = writer.send(3, (1, 2), &bytes((value % 3000) as usize, 0), NOW);
                for reader in &mut readers {
                    if let Ok(Some(message)) = reader.try_recv() {
                        prop_assert!(message.payload.len() < 4096);
                    }
                }
            }
        }
    }
}
