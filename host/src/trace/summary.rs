//! A timeline as a table: how long each stage of a pass takes.
//!
//! A span belongs to the pass, a span with the argument `pass`, that contains it on its thread; a GPU's span to that of the thread which queued
//! it, when it did. Invariant: pure; the same timeline gives the same table.

use super::line::Span;
use super::timeline::Timeline;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// Calls that end on all ranks together, so that the shortest on any rank is what the call takes, and the rest is waiting.
const TOGETHER: [&str; 4] = ["all_reduce", "reduce_scatter", "all_gather", "barrier"];

/// All stages.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Passes of each kind, on all ranks together.
    pub passes: BTreeMap<String, usize>,
    /// The stages, by kind of pass, then by what they take.
    pub stages: Vec<Stage>,
}

/// Spans of one name in one kind of pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stage {
    /// The kind of pass; empty outside of all.
    pub pass: String,
    /// The spans' name.
    pub name: String,
    /// Where: `host`, `gpu`, or `message` for the time from the beginning of what sends to the end of what hears.
    pub place: &'static str,
    /// How many there are.
    pub count: usize,
    /// How many in a pass of a rank that has any.
    pub per_pass: Option<f64>,
    /// Half of them are not longer, in microseconds.
    pub p50_us: f64,
    /// 99% of them are not longer.
    pub p99_us: f64,
    /// None is longer.
    pub max_us: f64,
    /// All of a pass of such a rank, on average.
    pub pass_us: Option<f64>,
}

/// Something sent and heard, with the processes' numbers.
pub(super) struct Message<'a> {
    pub(super) sent: (u32, &'a Span),
    pub(super) heard: (u32, &'a Span),
}

/// The messages of which both ends were recorded.
pub(super) fn messages(timeline: &Timeline) -> impl Iterator<Item = Message<'_>> {
    let all = || {
        timeline
            .processes
            .iter()
            .flat_map(|process| process.spans.iter().map(|span| (process.pid, span)))
    };
    let sent: HashMap<&str, (u32, &Span)> =
        all().filter_map(|(pid, span)| Some((span.text("sends")?, (pid, span)))).collect();
    all().filter_map(move |heard| Some(Message { sent: *sent.get(heard.1.text("hears")?)?, heard }))
}

impl Summary {
    /// The table of a timeline.
    pub fn of(timeline: &Timeline) -> Summary {
        let passes = Passes::of(timeline);
        let mut table = Table::default();
        for process in &timeline.processes {
            for span in &process.spans {
                let place = if process.is_gpu(span) { "gpu" } else { "host" };
                table.add(
                    &passes,
                    process.pid,
                    span,
                    (span.name.to_string(), place),
                    span.length(),
                );
            }
        }
        for (pid, span, waited) in waits(timeline) {
            table.add(&passes, pid, span, (format!("{}: waiting", span.name), "gpu"), waited);
        }
        for Message { sent: (_, sent), heard: (pid, heard) } in messages(timeline) {
            if heard.number("waited") != Some(0) {
                let name = format!("{} to {}", sent.name, heard.name);
                table.add(
                    &passes,
                    pid,
                    heard,
                    (name, "message"),
                    heard.end.saturating_sub(sent.begin),
                );
            }
        }
        Summary { passes: passes.counted(), stages: table.stages(&passes) }
    }
}

/// The outermost passes of every thread, in the order of time.
struct Passes<'a>(BTreeMap<(u32, u32), Vec<&'a Span>>);

impl<'a> Passes<'a> {
    fn of(timeline: &'a Timeline) -> Passes<'a> {
        let mut found: BTreeMap<(u32, u32), Vec<&Span>> = BTreeMap::new();
        for process in &timeline.processes {
            for span in process.spans.iter().filter(|span| span.text("pass").is_some()) {
                found.entry((process.pid, span.lane)).or_default().push(span);
            }
        }
        for spans in found.values_mut() {
            // Of two that begin together the longer one is the outer one.
            spans.sort_by_key(|span| (span.begin, std::cmp::Reverse(span.end)));
            let mut until = 0;
            spans.retain(|span| {
                let outermost = span.begin >= until;
                until = until.max(span.end);
                outermost
            });
        }
        Passes(found)
    }

    /// The kind of pass that `span` belongs to, and the thread whose pass it is.
    fn around(&self, pid: u32, span: &Span) -> (&'a str, (u32, u32)) {
        let (lane, at) = match (span.number("thread"), span.number("queued")) {
            (Some(thread), Some(queued)) => (thread as u32, queued),
            _ => (span.lane, span.begin),
        };
        let key = (pid, lane);
        let spans = self.0.get(&key).map(Vec::as_slice).unwrap_or_default();
        let before = spans.partition_point(|pass| pass.begin <= at);
        let pass = before.checked_sub(1).map(|last| spans[last]).filter(|pass| at <= pass.end);
        (pass.and_then(|pass| pass.text("pass")).unwrap_or_default(), key)
    }

    /// How many passes of a kind a thread has.
    fn count(&self, kind: &str, thread: &(u32, u32)) -> usize {
        let of_kind = |pass: &&&Span| pass.text("pass") == Some(kind);
        self.0.get(thread).map_or(0, |passes| passes.iter().filter(of_kind).count())
    }

    fn counted(&self) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        for kind in self.0.values().flatten().filter_map(|pass| pass.text("pass")) {
            *found.entry(kind.to_owned()).or_default() += 1;
        }
        found
    }
}

/// What each rank waited in calls that end on all together, if all ranks were recorded.
fn waits(timeline: &Timeline) -> Vec<(u32, &Span, u64)> {
    type Call<'a> = (u64, &'a str, u64);
    let mut calls: BTreeMap<Call<'_>, Vec<(u32, &Span)>> = BTreeMap::new();
    for process in &timeline.processes {
        for span in process
            .spans
            .iter()
            .filter(|span| TOGETHER.contains(&&*span.name) && process.is_gpu(span))
        {
            if let (Some(group), Some(call)) = (span.number("group"), span.number("call")) {
                calls.entry((group, &span.name, call)).or_default().push((process.pid, span));
            }
        }
    }
    let mut found = Vec::new();
    for ranks in calls.into_values() {
        let all = ranks.iter().all(|(_, span)| span.number("world") == Some(ranks.len() as u64));
        let Some(shortest) = ranks.iter().map(|(_, span)| span.length()).min().filter(|_| all)
        else {
            continue;
        };
        found.extend(ranks.iter().map(|(pid, span)| (*pid, *span, span.length() - shortest)));
    }
    found
}

type Key<'a> = (&'a str, String, &'static str);

/// Lengths in nanoseconds by stage, and the threads in whose passes they were.
#[derive(Default)]
struct Table<'a>(BTreeMap<Key<'a>, Lengths>);

type Lengths = (Vec<u64>, BTreeSet<(u32, u32)>);

impl<'a> Table<'a> {
    fn add(
        &mut self,
        passes: &Passes<'a>,
        pid: u32,
        span: &Span,
        (name, place): (String, &'static str),
        length: u64,
    ) {
        let (kind, thread) = passes.around(pid, span);
        let (lengths, threads) = self.0.entry((kind, name, place)).or_default();
        lengths.push(length);
        threads.insert(thread);
    }

    fn stages(self, passes: &Passes<'_>) -> Vec<Stage> {
        let stage = |((pass, name, place), (mut lengths, threads)): (Key<'_>, Lengths)| {
            lengths.sort_unstable();
            let us = |length: u64| length as f64 / 1e3;
            let count: usize = threads.iter().map(|thread| passes.count(pass, thread)).sum();
            let a_pass = |all: f64| (count != 0).then(|| all / count as f64);
            Stage {
                pass: pass.to_owned(),
                name,
                place,
                count: lengths.len(),
                per_pass: a_pass(lengths.len() as f64),
                p50_us: us(rank(&lengths, 0.50)),
                p99_us: us(rank(&lengths, 0.99)),
                max_us: us(lengths.last().copied().unwrap_or_default()),
                pass_us: a_pass(us(lengths.iter().sum())),
            }
        };
        let mut stages: Vec<Stage> = self.0.into_iter().map(stage).collect();
        // Passes first, what is outside of them last.
        let taken = |stage: &Stage| stage.pass_us.unwrap_or_default();
        stages.sort_by(|a, b| {
            (a.pass.is_empty(), &a.pass)
                .cmp(&(b.pass.is_empty(), &b.pass))
                .then(taken(b).total_cmp(&taken(a)))
        });
        stages
    }
}

/// The smallest of sorted lengths that so large a part of them does not exceed.
fn rank(sorted: &[u64], part: f64) -> u64 {
    let place = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or_default()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = self.stages.iter().map(|stage| stage.name.len()).max().unwrap_or(0).max(5);
        let mut last = None;
        for stage in &self.stages {
            if last != Some(&stage.pass) {
                match self.passes.get(&stage.pass) {
                    Some(count) => writeln!(f, "# {}: {count} passes, all ranks'", stage.pass)?,
                    None => writeln!(f, "# outside of passes")?,
                }
                let (name, place) = ("stage", "where");
                writeln!(
                    f,
                    "{name:widest$}  {place:7} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10}",
                    "count", "per pass", "p50 us", "p99 us", "max us", "us/pass"
                )?;
            }
            last = Some(&stage.pass);
            let Stage { name, place, count, p50_us, p99_us, max_us, .. } = stage;
            let part = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
            let (per_pass, pass_us) = (part(stage.per_pass), part(stage.pass_us));
            writeln!(
                f,
                "{name:widest$}  {place:7} {count:>9} {per_pass:>9} {p50_us:>10.1} {p99_us:>10.1} {max_us:>10.1} {pass_us:>10}"
            )?;
        }
        Ok(())
    }
}
