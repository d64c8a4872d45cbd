//! The files of all processes, read, and written again for a viewer of timelines.
//!
//! Invariant: every line is checked; a file that is not ours, or of another start of the machine, is an error that names it. The last
//! line of a process that was killed may be cut off, and is left out.

use super::line::{Line, Span, VERSION, Value};
use super::summary::messages;
use crate::error::{Error, Result, clipped};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Most bytes of one file.
const MOST_BYTES: u64 = 8 << 30;

/// What all processes have recorded.
#[derive(Debug, Default)]
pub struct Timeline {
    /// One for each file.
    pub processes: Vec<Process>,
}

/// What one process has recorded.
#[derive(Debug)]
pub struct Process {
    /// Its number; if several files have the same, another one for all but the first.
    pub pid: u32,
    /// Its command line.
    pub command: String,
    /// Names of its threads and streams, and whether they are a GPU's.
    pub lanes: BTreeMap<u32, (String, bool)>,
    /// In the order in which they ended, or were heard of.
    pub spans: Vec<Span>,
    /// Spans that were not recorded because too many were.
    pub lost: u64,
    /// Whether its last line was cut off.
    pub cut: bool,
}

impl Timeline {
    /// Reads what processes have written to `directory`.
    pub fn read(directory: &Path) -> Result<Timeline> {
        let failed =
            |error: io::Error| invalid(directory, "a directory of records", error.to_string());
        let entries = fs::read_dir(directory).map_err(failed)?;
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                paths.push(path);
            }
        }
        paths.sort();
        let mut timeline = Timeline::default();
        let mut boot: Option<String> = None;
        for path in paths {
            let Some((process, of)) = read(&path)? else { continue };
            if *boot.get_or_insert_with(|| of.clone()) != of {
                let expected = "records of one machine since its last start";
                return Err(invalid(&path, expected, "another's".into()));
            }
            timeline.add(process);
        }
        Ok(timeline)
    }

    fn add(&mut self, mut process: Process) {
        while self.processes.iter().any(|other| other.pid == process.pid) {
            process.pid = process.pid.wrapping_add(1 << 24);
        }
        self.processes.push(process);
    }

    /// Number of spans.
    pub fn len(&self) -> usize {
        self.processes.iter().map(|process| process.spans.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the first span began and the last one ended.
    pub fn bounds(&self) -> Option<(u64, u64)> {
        let spans = || self.processes.iter().flat_map(|process| &process.spans);
        Some((spans().map(|span| span.begin).min()?, spans().map(|span| span.end).max()?))
    }

    /// Writes it in the JSON format of Chrome's tracing, which Perfetto reads: microseconds since the first span, arrows from who sends to who hears.
    pub fn write_chrome(&self, to: &mut impl Write) -> io::Result<()> {
        let (start, _) = self.bounds().unwrap_or_default();
        let time = |at: u64| at.saturating_sub(start) as f64 / 1e3;
        let mut out = Events { to, any: false };
        out.to.write_all(b"{\"displayTimeUnit\": \"ns\", \"traceEvents\": [")?;
        for process in &self.processes {
            let pid = process.pid;
            let named = |what: &str, tid: u32, name: &str| json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } });
            out.put(&named("process_name", 0, &process.command))?;
            for (lane, (name, _)) in &process.lanes {
                out.put(&named("thread_name", *lane, name))?;
            }
            for span in &process.spans {
                let category = if process.is_gpu(span) { "gpu" } else { "host" };
                out.put(&json!({
                    "ph": "X", "name": span.name, "cat": category, "pid": pid, "tid": span.lane,
                    "ts": time(span.begin), "dur": span.length() as f64 / 1e3, "args": arguments(span),
                }))?;
            }
        }
        for (number, message) in messages(self).enumerate() {
            let end = |phase: &str, (pid, span): (u32, &Span), at: u64| {
                json!({
                    "ph": phase, "bp": "e", "id": number, "name": "message", "cat": "message",
                    "pid": pid, "tid": span.lane, "ts": time(at),
                })
            };
            out.put(&end("s", message.sent, message.sent.1.begin))?;
            out.put(&end("f", message.heard, message.heard.1.end))?;
        }
        out.to.write_all(b"\n]}\n")
    }
}

impl Process {
    /// Whether a span is one of a GPU.
    pub fn is_gpu(&self, span: &Span) -> bool {
        self.lanes.get(&span.lane).is_some_and(|(_, gpu)| *gpu)
    }
}

/// A list of JSON objects, a line each.
struct Events<'a, W> {
    to: &'a mut W,
    any: bool,
}

impl<W: Write> Events<'_, W> {
    fn put(&mut self, event: &serde_json::Value) -> io::Result<()> {
        self.to.write_all(if self.any { b",\n" } else { b"\n" })?;
        self.any = true;
        Ok(serde_json::to_writer(&mut *self.to, event)?)
    }
}

fn arguments(span: &Span) -> Map<String, serde_json::Value> {
    let value = |value: &Value| match value {
        Value::Number(number) => json!(number),
        Value::Text(text) => json!(text),
    };
    span.args.iter().map(|(name, of)| (name.to_string(), value(of))).collect()
}

/// A file's process and the start of its machine; `None` if it had not written anything yet.
fn read(path: &Path) -> Result<Option<(Process, String)>> {
    let failed = |error: io::Error| invalid(path, "a readable file", error.to_string());
    let about = fs::metadata(path).map_err(failed)?;
    let size = about.len();
    if !about.is_file() {
        return Err(invalid(path, "a plain file", "something else".into()));
    }
    if size > MOST_BYTES {
        return Err(invalid(path, "at most 8 GiB", format!("{size} bytes")));
    }
    let text = fs::read(path).map_err(failed)?;
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let mut lines = text[..whole].split(|byte| *byte == b'\n').enumerate();
    let parsed = |number: usize, line: &[u8]| {
        serde_json::from_slice(line).map_err(|error| {
            let got = format!("{error}: {}", clipped(&String::from_utf8_lossy(line)));
            invalid(path, "a record in every line", format!("line {}: {got}", number + 1))
        })
    };
    let Some((number, first)) = lines.next().filter(|(_, line)| !line.is_empty()) else {
        return Ok(None);
    };
    let Line::Process { version, pid, boot, command } = parsed(number, first)? else {
        return Err(invalid(
            path,
            "the process in line 1",
            clipped(&String::from_utf8_lossy(first)).to_string(),
        ));
    };
    if version != VERSION {
        return Err(invalid(path, format!("version {VERSION}"), format!("version {version}")));
    }
    let cut = whole != text.len();
    let mut process =
        Process { pid, command, lanes: BTreeMap::new(), spans: Vec::new(), lost: 0, cut };
    for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
        match parsed(number, line)? {
            Line::Lane { lane, name, gpu } => drop(process.lanes.insert(lane, (name, gpu))),
            Line::Span(span) if span.end < span.begin => {
                let got = format!("line {}: {} to {}", number + 1, span.begin, span.end);
                return Err(invalid(path, "spans that end after they begin", got));
            }
            Line::Span(span) => process.spans.push(span),
            Line::Lost(count) => process.lost = process.lost.saturating_add(count),
            Line::Process { .. } => {
                return Err(invalid(
                    path,
                    "one process",
                    format!("another in line {}", number + 1),
                ));
            }
        }
    }
    Ok(Some((process, boot)))
}

fn invalid(path: &Path, expected: impl Into<String>, got: String) -> Error {
    Error::InvalidArgument {
        op: "trace",
        argument: "directory",
        expected: format!("{} in {}", expected.into(), path.display()),
        got,
    }
}
