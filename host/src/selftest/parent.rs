//! The parent's side: starts the child, listens, and stops it when it takes too long.
//!
//! Invariant: it returns within the limit, whatever the child does. A child that ends in the middle of a check
//! has given a verdict: that check failed. One that ends before its first check has given none, nor has one that
//! somebody else stopped.

use super::child::{MARK, Machine, Message, Request};
use super::find::Subject;
use super::program::Program;
use super::{Check, Outcome, Pair, Report, Settings, Step, Verdict};
use crate::error::{Error, Result};
use crate::gpu::cuda::{CONNECTIONS, MOST_CONNECTIONS};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A line is never longer, nor is what a child says on its standard error worth more.
const LONGEST_LINE: u64 = 4 << 20;
const LONGEST_COMPLAINT: usize = 300;
/// How long a child may take to end when it should: one that is stuck in the driver may not end at all.
const FAREWELL: Duration = Duration::from_secs(2);
/// Signals by which a program ends that has gone wrong. Others come from people.
const CRASHES: [(i32, &str); 7] = [
    (libc::SIGILL, "SIGILL"),
    (libc::SIGTRAP, "SIGTRAP"),
    (libc::SIGABRT, "SIGABRT"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGSYS, "SIGSYS"),
];

/// Tests the GPUs in a process of its own.
///
/// # Errors
/// [`Error::Unsupported`] if nothing could be tested: the child does not start, says nothing, or refuses.
pub fn in_child(program: &Program, subject: &Subject, settings: &Settings) -> Result<Report> {
    let name = program.path.display();
    let failed = |reason: String| Error::Unsupported { op: "self_test", reason };
    let begin = Instant::now();
    let request = Request::new(subject, settings);
    let text = serde_json::to_string(&request).map_err(|error| failed(error.to_string()))?;
    let mut running = Running::start(program, &request, &text)
        .map_err(|error| failed(format!("{name} does not start: {error}")))?;
    let mut heard = Heard { subject, settings, step: None, outcomes: Vec::new() };
    let end = running.listen(&mut heard, begin + settings.limit);
    match end {
        End::Report(report) => Ok(report),
        End::Refused(reason) => Err(failed(reason)),
        End::Other(reason) => Err(failed(format!("{name} {reason}"))),
        End::Verdict(reason) => match heard.step.take() {
            Some(step) => Ok(heard.report(Some(&step), &reason, begin.elapsed())),
            None => Err(failed(format!("{name} {reason} before its first check"))),
        },
        // What was found until then holds.
        End::Late => match heard.step.take() {
            Some(_) => {
                let reason = format!("{:?} are over", settings.limit);
                Ok(heard.report(None, &reason, begin.elapsed()))
            }
            None => {
                let reason = format!("{name} made no check within {:?}", settings.limit);
                Err(failed(reason))
            }
        },
    }
}

/// How it ended.
enum End {
    Report(Report),
    Refused(String),
    /// By itself, in a way that says something about what it was doing.
    Verdict(String),
    /// In a way that says nothing about it.
    Other(String),
    /// It was stopped, because all of it took too long.
    Late,
}

/// A child that runs. Dropping it ends it.
struct Running {
    child: Option<Child>,
    lines: Receiver<std::io::Result<String>>,
    /// The end of what it said on its standard error.
    complaint: Arc<Mutex<Vec<u8>>>,
    /// What listens to that.
    errors: Option<JoinHandle<()>>,
}

impl Running {
    fn start(program: &Program, request: &Request, text: &str) -> std::io::Result<Running> {
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).env("PEERLANE_SELF_TEST", "off");
        if let Some(directory) = &program.directory {
            command.current_dir(directory);
        }
        if let Machine { gpus, simulation: None } = &request.machine {
            let uuids: Vec<&str> = gpus.iter().map(|gpu| gpu.uuid.as_str()).collect();
            command.env("CUDA_VISIBLE_DEVICES", uuids.join(","));
            if std::env::var_os(CONNECTIONS).is_none() {
                command.env(CONNECTIONS, MOST_CONNECTIONS.to_string());
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (input, output, errors) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (sender, lines) = channel();
        let complaint = Arc::new(Mutex::new(Vec::new()));
        let mut running =
            Running { child: Some(child), lines, complaint: complaint.clone(), errors: None };
        if let Some(output) = output {
            thread::spawn(move || {
                let mut lines = BufReader::new(output.take(LONGEST_LINE * 16)).lines();
                lines.try_for_each(|line| sender.send(line))
            });
        }
        if let Some(errors) = errors {
            let listener = thread::spawn(move || listen_to_errors(errors, &complaint));
            running.errors = Some(listener);
        }
        if let (Some(mut input), Some(child)) = (input, running.child.as_mut()) {
            // One that has ended already is noticed soon.
            let _ = writeln!(input, "{text}");
            // It stays open for as long as the child is held.
            child.stdin = Some(input);
        }
        Ok(running)
    }

    /// Hears the child out.
    fn listen(&mut self, heard: &mut Heard<'_>, until: Instant) -> End {
        let mut began = Instant::now();
        loop {
            let limit = match heard.step {
                Some(_) => until.min(began + heard.settings.check_limit),
                None => until,
            };
            let left = limit.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(Ok(line)) => line,
                Ok(Err(error)) => return End::Other(format!("cannot be understood: {error}")),
                Err(RecvTimeoutError::Timeout) if limit == until => return End::Late,
                Err(RecvTimeoutError::Timeout) => {
                    let limit = heard.settings.check_limit;
                    return End::Verdict(format!(
                        "did not get on within {limit:?}, and was stopped"
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => return self.ended(),
            };
            let Some(text) = line.strip_prefix(MARK) else { continue };
            match serde_json::from_str(text) {
                Ok(Message::Begin(step)) => (heard.step, began) = (Some(step), Instant::now()),
                Ok(Message::Outcome(way, outcome)) => heard.outcomes.push((way, outcome)),
                Ok(Message::Report(report)) if report.is_sound(heard.subject.gpus()) => {
                    return End::Report(report);
                }
                Ok(Message::Report(_)) => return End::Other("reports other GPUs".into()),
                Ok(Message::Refused(reason)) => return End::Refused(reason),
                Err(error) => return End::Other(format!("said what means nothing: {error}")),
            }
        }
    }

    /// What the child's end says.
    fn ended(&mut self) -> End {
        let status = self.child.as_mut().and_then(|child| patient(child, FAREWELL));
        // What it said last may still be on its way.
        let until = Instant::now() + FAREWELL / 10;
        while self.errors.as_ref().is_some_and(|one| !one.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        let complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let complaint = String::from_utf8_lossy(&complaint);
        let said = match complaint.trim() {
            "" => String::new(),
            words => format!(" ({})", words.replace('\n', "; ")),
        };
        match status {
            None => End::Verdict(format!("closed its output and went on{said}")),
            Some(status) => describe(status, &said),
        }
    }
}

fn describe(status: ExitStatus, said: &str) -> End {
    match (status.signal(), status.code()) {
        (Some(signal), _) => match CRASHES.iter().find(|(number, _)| *number == signal) {
            Some((number, name)) => {
                End::Verdict(format!("ended by signal {number} ({name}){said}"))
            }
            None => End::Other(format!("was stopped by signal {signal}{said}")),
        },
        (None, code) => {
            End::Verdict(format!("ended with status {}{said}", code.unwrap_or_default()))
        }
    }
}

/// Waits for a child to end, for so long.
fn patient(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
            _ => return None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // A driver that is stuck holds even a killed process; then a thread waits for it.
        let _ = child.kill();
        if patient(&mut child, FAREWELL).is_none() {
            thread::spawn(move || child.wait());
        }
    }
}

/// Keeps the end of what comes.
fn listen_to_errors(mut errors: impl Read, complaint: &Mutex<Vec<u8>>) {
    let mut part = [0; 512];
    while let Ok(count @ 1..) = errors.read(&mut part) {
        let mut all = complaint.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend_from_slice(&part[..count]);
        let surplus = all.len().saturating_sub(LONGEST_COMPLAINT);
        all.drain(..surplus);
    }
}

/// What a child has said so far.
struct Heard<'a> {
    subject: &'a Subject,
    settings: &'a Settings,
    /// The check that goes on.
    step: Option<Step>,
    outcomes: Vec<((u32, u32), Outcome)>,
}

impl Heard<'_> {
    /// A report of what is known of a child that did not make one: `failed` is the check that ended it.
    fn report(&mut self, failed: Option<&Step>, reason: &str, took: Duration) -> Report {
        let gpus = self.subject.gpus().to_vec();
        let count = gpus.len() as u32;
        let cut_short = format!("the self-test {reason}");
        let outcome = |way: (u32, u32), check: Check| {
            let known = self.outcomes.iter().find(|(of, one)| *of == way && one.check == check);
            if let Some((_, outcome)) = known {
                return outcome.clone();
            }
            let is_cause =
                failed.is_some_and(|step| step.check == check && step.directions.contains(&way));
            let verdict = if is_cause {
                let address = |at: u32| gpus[at as usize].pci_bus_id.as_str();
                let (from, to) = (address(way.0), address(way.1));
                let during = format!("during \"{check}\" of {from} to {to}");
                Verdict::Failed { reason: format!("{cut_short} {during}") }
            } else {
                Verdict::NotRun { reason: cut_short.clone() }
            };
            Outcome { check, verdict, ms: 0.0 }
        };
        let ways = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
        let pairs = ways.filter(|(from, to)| from != to).map(|way| Pair {
            from: way.0,
            to: way.1,
            checks: Check::ALL.map(|check| outcome(way, check)).to_vec(),
        });
        let pairs = pairs.collect();
        let backend = self.subject.backend();
        Report { backend, gpus, pairs, cut_short: Some(cut_short), seconds: took.as_secs_f64() }
    }
}
