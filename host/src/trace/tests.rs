//! Files and tables of traces that were made up. What real processes record: `tests/tests/trace.rs`.

use super::line::{Line, Span, VERSION, Value};
use super::summary::messages;
use super::timeline::{Process, Timeline};
use super::{Stage, Summary};
use std::fs;
use std::path::PathBuf;

type Argument = (&'static str, Value);

fn span(name: &'static str, lane: u32, (begin, end): (u64, u64), args: &[Argument]) -> Span {
    let args = args.iter().map(|(name, value)| ((*name).into(), value.clone())).collect();
    Span { name: name.into(), lane, begin, end, args }
}

/// A process with a thread, lane 0, and a stream of a GPU, lane 1.
fn process(pid: u32, spans: Vec<Span>) -> Process {
    let lanes = [(0, ("main".to_owned(), false)), (1, ("GPU 0".to_owned(), true))].into();
    Process { pid, command: format!("program {pid}"), lanes, spans, lost: 0, cut: false }
}

fn call(rank: u32, call: u64, times: (u64, u64), queued: u64) -> Span {
    let arguments: [Argument; 6] = [
        ("rank", rank.into()),
        ("world", 2u32.into()),
        ("group", 77u64.into()),
        ("call", call.into()),
        ("thread", 0u32.into()),
        ("queued", queued.into()),
    ];
    span("all_reduce", 1, times, &arguments)
}

fn stage<'a>(summary: &'a Summary, pass: &str, name: &str, place: &str) -> &'a Stage {
    let is = |stage: &&Stage| (&*stage.pass, &*stage.name, stage.place) == (pass, name, place);
    let found: Vec<&Stage> = summary.stages.iter().filter(is).collect();
    assert_eq!(found.len(), 1, "{pass} {name} {place}: {summary}");
    found[0]
}

/// Two ranks, two decoding passes each; the second rank's calls last longer, for it comes first.
fn two_ranks() -> Timeline {
    let pass = |times| span("pass", 0, times, &[("pass", "decode".into())]);
    let main = vec![
        span("send", 0, (110_000, 114_000), &[("sends", "c/1".into())]),
        span("pass inside", 0, (120_000, 190_000), &[("pass", "decode".into())]),
        pass((100_000, 200_000)),
        call(0, 1, (150_000, 160_000), 130_000),
        pass((300_000, 400_000)),
        // Still runs when its pass is over.
        call(0, 2, (399_000, 411_000), 350_000),
        span("send", 0, (310_000, 312_000), &[("sends", "c/2".into())]),
    ];
    let worker = vec![
        span(
            "recv",
            0,
            (10_000, 119_000),
            &[("hears", "c/1".into()), ("waited", 105_000u64.into())],
        ),
        pass((120_000, 195_000)),
        call(1, 1, (140_000, 160_500), 125_000),
        // It was late: the message had been there for long.
        span("recv", 0, (330_000, 331_000), &[("hears", "c/2".into()), ("waited", 0u64.into())]),
        pass((331_000, 390_000)),
        call(1, 2, (391_000, 410_000), 340_000),
        // The other rank's was not recorded.
        call(1, 3, (500_000, 900_000), 450_000),
    ];
    Timeline { processes: vec![process(5, main), process(6, worker)] }
}

#[test]
fn stages_belong_to_passes_and_waits_to_who_came_first() {
    let summary = Summary::of(&two_ranks());
    assert_eq!(summary.passes, [("decode".to_owned(), 4)].into());
    let pass = stage(&summary, "decode", "pass", "host");
    assert_eq!((pass.count, pass.p50_us, pass.max_us), (4, 75.0, 100.0));
    let on_gpu = stage(&summary, "decode", "all_reduce", "gpu");
    // 10, 12, 20.5, 19 us; the fifth call was outside of any pass.
    assert_eq!((on_gpu.count, on_gpu.p50_us, on_gpu.p99_us), (4, 12.0, 20.5));
    assert_eq!((on_gpu.per_pass, on_gpu.pass_us), (Some(1.0), Some(61.5 / 4.0)));
    let waiting = stage(&summary, "decode", "all_reduce: waiting", "gpu");
    assert_eq!((waiting.count, waiting.p50_us, waiting.max_us), (4, 0.0, 10.5));
    let outside = stage(&summary, "", "all_reduce", "gpu");
    assert_eq!((outside.count, outside.per_pass, outside.pass_us), (1, None, None));
    // Begun in the pass of nobody, and the one that found its message there is no wake-up.
    let message = stage(&summary, "", "send to recv", "message");
    assert_eq!((message.count, message.p50_us), (1, 9.0));
    assert!(summary.stages.last().is_some_and(|stage| stage.pass.is_empty()), "{summary}");
    let text = summary.to_string();
    assert!(text.starts_with("# decode: 4 passes, all ranks'\nstage"), "{text}");
    assert!(text.contains("# outside of passes"), "{text}");
}

#[test]
fn percentiles_are_lengths_that_were() {
    let spans = (1..=200).map(|us| span("x", 0, (0, us * 1000), &[])).collect();
    let summary = Summary::of(&Timeline { processes: vec![process(1, spans)] });
    let of = stage(&summary, "", "x", "host");
    assert_eq!((of.count, of.p50_us, of.p99_us, of.max_us), (200, 100.0, 198.0, 200.0));
}

#[test]
fn chrome_gets_microseconds_names_and_arrows() {
    let timeline = two_ranks();
    let mut text = Vec::new();
    timeline.write_chrome(&mut text).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let events = value["traceEvents"].as_array().unwrap();
    let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();
    assert_eq!((of("X").len(), of("M").len()), (timeline.len(), 6));
    let pass = of("X").into_iter().find(|event| event["name"] == "pass").unwrap();
    // The first span of all began at 10 us.
    assert_eq!((&pass["ts"], &pass["dur"], &pass["pid"]), (&90.0.into(), &100.0.into(), &5.into()));
    assert!(of("X").iter().any(|event| event["cat"] == "gpu" && event["args"]["call"] == 2));
    let (sent, heard) = (of("s"), of("f"));
    assert_eq!((sent.len(), heard.len()), (2, 2));
    let first = sent.iter().find(|event| event["ts"] == 100.0).unwrap();
    let its = heard.iter().find(|event| event["id"] == first["id"]).unwrap();
    assert_eq!((&its["pid"], &its["ts"]), (&6.into(), &109.0.into()));
    assert_eq!(messages(&timeline).count(), 2);
}

/// A directory of its own, gone at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path =
            std::env::temp_dir().join(format!("peerlane-trace-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn write(&self, name: &str, lines: &[Line], rest: &str) {
        let lines = lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n");
        fs::write(self.0.join(name), lines.collect::<String>() + rest).unwrap();
    }

    fn read(&self) -> Result<Timeline, String> {
        Timeline::read(&self.0).map_err(|error| error.to_string())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn head(pid: u32, boot: &str) -> Line {
    Line::Process { version: VERSION, pid, boot: boot.into(), command: "python x.py".into() }
}

#[test]
fn files_are_read_as_they_were_written() {
    let directory = Directory::new("read");
    let spans = two_ranks().processes.swap_remove(0).spans;
    let lane = Line::Lane { lane: 0, name: "main".into(), gpu: false };
    let mut lines = vec![head(9, "a"), lane];
    lines.extend(spans.iter().cloned().map(Line::Span));
    lines.push(Line::Lost(3));
    directory.write("9.jsonl", &lines, "{\"span\":{\"name\":\"half of");
    directory.write("9-1.jsonl", &[head(9, "a")], "");
    // Begun and killed, or somebody else's.
    directory.write("10.jsonl", &[], "{\"proc");
    directory.write("notes.txt", &[], "hello");
    let timeline = directory.read().unwrap();
    let [first, second] = &timeline.processes[..] else { panic!("{timeline:?}") };
    let (whole, other) = if first.cut { (first, second) } else { (second, first) };
    assert_eq!((&whole.spans, whole.lost, whole.cut), (&spans, 3, true));
    assert_eq!((other.cut, other.spans.len(), whole.command.as_str()), (false, 0, "python x.py"));
    assert_ne!(whole.pid, other.pid);
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    let refused = |name: &str, lines: &[Line], rest: &str, part: &str| {
        let directory = Directory::new(name);
        directory.write("1.jsonl", &[head(1, "a")], "");
        directory.write("2.jsonl", lines, rest);
        let error = directory.read().unwrap_err();
        assert!(error.contains("2.jsonl") && error.contains(part), "{error}");
    };
    refused("boot", &[head(2, "b")], "", "since its last start");
    let later =
        Line::Process { version: VERSION + 1, pid: 2, boot: "a".into(), command: "x".into() };
    refused("version", &[later], "", "version 2");
    refused("line", &[head(2, "a")], "{\"span\": 7}\n", "line 2");
    refused("first", &[Line::Lost(1)], "", "the process in line 1");
    refused("twice", &[head(2, "a"), head(2, "a")], "", "another in line 2");
    refused(
        "backwards",
        &[head(2, "a"), Line::Span(span("x", 0, (7, 6), &[]))],
        "",
        "line 2: 7 to 6",
    );
    let directory = Directory::new("folder");
    fs::create_dir(directory.0.join("2.jsonl")).unwrap();
    assert!(directory.read().unwrap_err().contains("a plain file"));
    let missing = Timeline::read("/nonexistent/directory".as_ref()).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/directory"), "{missing}");
}
