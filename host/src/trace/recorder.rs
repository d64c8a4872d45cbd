//! Where spans go: a queue, and a thread that writes it to this process's file twenty times a second.
//!
//! Invariant: recording takes a lock for a push and never waits for the disk. The queue is bounded: what comes when it is full is
//! counted. A child that was forked records nothing.

use super::gpu;
use super::line::{Line, Span, VERSION};
use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Most lines that wait to be written: some 200 MB.
const MOST: usize = 1 << 20;
/// How often they are.
const EVERY: Duration = Duration::from_millis(50);
/// What a process that is named twice in one directory is tried as.
const NAMES: u32 = 1000;

struct Recorder {
    queue: Mutex<Vec<Line>>,
    lost: AtomicU64,
    file: Mutex<BufWriter<File>>,
}

static RECORDER: OnceLock<Recorder> = OnceLock::new();
/// Whether spans are taken: not before the recorder is there, and never in a forked child.
static ON: AtomicBool = AtomicBool::new(false);
static FORKED: AtomicBool = AtomicBool::new(false);
static LANES: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The lane of this thread, once it has one.
    static LANE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Whether this process records.
#[inline]
pub fn is_recording() -> bool {
    ON.load(Ordering::Acquire)
}

/// Records a span that has ended. Does nothing if this process does not record.
pub fn record(span: Span) {
    push(Line::Span(span));
}

/// Writes what has been recorded until now. A process that ends in an orderly way does so by itself.
pub fn flush() {
    if is_recording() {
        gpu::collect();
    }
    write();
}

fn write() {
    if let (Some(recorder), true) = (RECORDER.get(), is_recording()) {
        recorder.write();
    }
}

/// The lane of the calling thread.
pub(super) fn own_lane() -> u32 {
    LANE.get().unwrap_or_else(|| {
        let thread = std::thread::current();
        let number = rustix::thread::gettid().as_raw_pid();
        let lane = new_lane(
            thread.name().map_or_else(|| format!("thread {number}"), str::to_owned),
            false,
        );
        LANE.set(Some(lane));
        lane
    })
}

/// A lane that is called `name`.
pub(super) fn new_lane(name: String, gpu: bool) -> u32 {
    let lane = LANES.fetch_add(1, Ordering::Relaxed);
    push(Line::Lane { lane, name, gpu });
    lane
}

/// Begins to record, once in the life of a process.
pub(super) fn start(directory: &Path) -> Result<(), String> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = lock(&STARTING);
    if RECORDER.get().is_some() {
        return Err("expected to be started once in a process, was started before".into());
    }
    let file = create(directory)
        .map_err(|error| format!("cannot write to {}: {error}", directory.display()))?;
    let thread = std::thread::Builder::new().name("peerlane-trace".into());
    thread.spawn(write_all_along).map_err(|error| format!("cannot start a thread: {error}"))?;
    let first = Line::Process {
        version: VERSION,
        pid: std::process::id(),
        boot: boot(),
        command: command(),
    };
    let recorder = Recorder {
        queue: Mutex::new(vec![first]),
        lost: AtomicU64::new(0),
        file: Mutex::new(BufWriter::new(file)),
    };
    // Nobody else sets it: the lock is held.
    let _ = RECORDER.set(recorder);
    // SAFETY: both functions are `extern "C"`, end, and do not unwind.
    unsafe {
        libc::pthread_atfork(None, None, Some(stop_in_child));
        libc::atexit(at_exit);
    }
    ON.store(true, Ordering::Release);
    Ok(())
}

impl Recorder {
    fn write(&self) {
        // Whoever has the file takes the queue, so that lines are written in the order in which they came.
        let mut file = lock(&self.file);
        let lines = std::mem::take(&mut *lock(&self.queue));
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let lost = (lost != 0).then_some(Line::Lost(lost));
        let mut written = lines.iter().chain(&lost).map(|line| put(&mut *file, line));
        let outcome = written.try_for_each(|written| written).and_then(|()| file.flush());
        if let Err(error) = outcome {
            ON.store(false, Ordering::Release);
            eprintln!("peerlane: {}: no more is recorded: {error}", super::VARIABLE);
        }
    }
}

fn put(file: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *file, line)?;
    file.write_all(b"\n")
}

fn push(line: Line) {
    let (Some(recorder), true) = (RECORDER.get(), is_recording()) else { return };
    let mut queue = lock(&recorder.queue);
    if queue.len() < MOST {
        queue.push(line);
    } else {
        lose();
    }
}

/// Counts a span that is not recorded.
pub(crate) fn lose() {
    if let Some(recorder) = RECORDER.get() {
        recorder.lost.fetch_add(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere has left a whole list, or a line cut off.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_all_along() {
    loop {
        std::thread::sleep(EVERY);
        flush();
    }
}

extern "C" fn at_exit() {
    // The driver may be gone by now.
    write();
}

extern "C" fn stop_in_child() {
    // The thread that writes is the parent's, and so may be a lock that is held.
    ON.store(false, Ordering::Release);
    FORKED.store(true, Ordering::Release);
}

/// Whether this is a child of a process that records, forked without `exec`.
pub(super) fn is_forked() -> bool {
    FORKED.load(Ordering::Acquire)
}

/// A file that was not there, named after this process.
fn create(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    let pid = std::process::id();
    let name = |number| match number {
        0 => format!("{pid}.jsonl"),
        _ => format!("{pid}-{number}.jsonl"),
    };
    // Numbers of processes are used again, and differ only within a container.
    let mut tried = (0..NAMES).map(|number| open_new(&directory.join(name(number))));
    let free = |opened: &io::Result<File>| !matches!(opened, Err(error) if error.kind() == io::ErrorKind::AlreadyExists);
    tried.find(free).unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()))
}

fn open_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// What the machine's present uptime is called: clocks of two are not compared.
fn boot() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    name.trim().to_owned()
}

fn command() -> String {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    words.collect::<Vec<_>>().join(" ")
}
