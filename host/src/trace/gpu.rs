//! When a communicator's calls ran on the GPU: an event before each and one behind it.
//!
//! Invariant: what fails here ends the timing and not the call, for which two events are recorded and no more: asking when they were takes
//! longer, and is done by another thread. Calls that become part of a graph are not timed: the graph runs later, and again.

use super::line::{Span, Value, now};
use super::recorder::{is_forked, is_recording, lose, new_lane, record};
use crate::error::Result;
use crate::gpu::{Event, GpuRef, Stream};
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};

/// How long one comparison of the clocks is good for, in nanoseconds: the driver tells times between two events as f32 of milliseconds,
/// so 4 s to 0.25 us.
const FRESH: u64 = 4_000_000_000;
/// Comparisons of which the quickest counts.
const TRIES: usize = 5;
/// Most calls under way that are timed.
const MOST: usize = 1 << 15;

/// A call.
#[derive(Clone, Copy)]
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) bytes: u64,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    /// The same on all ranks of a group, and on no other.
    pub(crate) group: u64,
    /// The same number of the same group and name is the same call on all ranks.
    pub(crate) call: u64,
}

/// Times the calls of one rank. Queues two events a call; the thread that writes the file finds out later when they were.
pub(crate) struct Timer {
    collector: Arc<Collector>,
    /// The events around the call that is being queued.
    begun: Option<[Event; 2]>,
    lanes: HashMap<Stream, u32>,
}

/// The events of one timer.
pub(super) struct Collector {
    gpu: GpuRef,
    /// For comparing the clocks: nothing else is on it.
    stream: Stream,
    /// An event, and when it was on the host's clock, once they have been compared. Who collects has the lock.
    anchor: Mutex<Option<(Event, u64)>>,
    events: Mutex<Events>,
}

#[derive(Default)]
struct Events {
    free: Vec<Event>,
    under_way: VecDeque<Pending>,
}

struct Pending {
    events: [Event; 2],
    subject: Subject,
    lane: u32,
    /// The thread that queued it, and when.
    by: (u32, u64),
}

/// All that there are.
static COLLECTORS: Mutex<Vec<Weak<Collector>>> = Mutex::new(Vec::new());
/// Whether the driver is there: not once the process ends. Who collects has the lock.
static DRIVER: Mutex<bool> = Mutex::new(true);

/// Records all calls that are done.
pub(super) fn collect() {
    let driver = lock(&DRIVER);
    if *driver {
        collect_all();
    }
}

fn collect_all() {
    let mut all = lock(&COLLECTORS);
    all.retain(|collector| collector.strong_count() != 0);
    let living: Vec<Arc<Collector>> = all.iter().filter_map(Weak::upgrade).collect();
    drop(all);
    for collector in living {
        // What fails here has its own end: the timer's next call fails too.
        let _ = collector.collect();
    }
}

/// Runs before the driver's own end: it was there when this was registered.
extern "C" fn at_exit() {
    if !is_forked() {
        let mut driver = lock(&DRIVER);
        collect_all();
        *driver = false;
    }
}

impl Timer {
    /// A timer; none yet if `stream` is captured. Waits for nothing: clocks are compared by who collects.
    pub(crate) fn new(gpu: &GpuRef, stream: Stream) -> Result<Option<Timer>> {
        static AT_EXIT: Once = Once::new();
        if gpu.is_capturing(stream)? {
            return Ok(None);
        }
        let mut own = Stream::default();
        gpu.beside_captures(&mut || {
            own = gpu.stream_create()?;
            Ok(())
        })?;
        let (anchor, events) = (Mutex::default(), Mutex::default());
        let collector = Arc::new(Collector { gpu: gpu.clone(), stream: own, anchor, events });
        lock(&COLLECTORS).push(Arc::downgrade(&collector));
        // SAFETY: the function is `extern "C"`, ends, and does not unwind.
        AT_EXIT.call_once(|| unsafe {
            libc::atexit(at_exit);
        });
        Ok(Some(Timer { collector, begun: None, lanes: HashMap::new() }))
    }

    /// Marks the beginning of a call that is queued on `stream` next.
    pub(crate) fn begin(&mut self, stream: Stream) -> Result<()> {
        let Collector { gpu, events, .. } = &*self.collector;
        let mut events = lock(events);
        // Of a call that failed.
        events.free.extend(self.begun.take().into_iter().flatten());
        if !is_recording() || gpu.is_capturing(stream)? {
            return Ok(());
        }
        if events.under_way.len() >= MOST {
            lose();
            return Ok(());
        }
        let pair = [events.take(gpu)?, events.take(gpu)?];
        drop(events);
        self.begun = Some(pair);
        gpu.event_record(pair[0], stream)
    }

    /// Marks its end, if its beginning was marked.
    pub(crate) fn end(&mut self, subject: Subject, by: (u32, u64), stream: Stream) -> Result<()> {
        let Some(events) = self.begun else { return Ok(()) };
        self.collector.gpu.event_record(events[1], stream)?;
        self.begun = None;
        let lane = self.lane(stream, subject.rank);
        let pending = Pending { events, subject, lane, by };
        lock(&self.collector.events).under_way.push_back(pending);
        Ok(())
    }

    fn lane(&mut self, stream: Stream, rank: u32) -> u32 {
        let (gpu, number) = (self.collector.gpu.properties().ordinal, self.lanes.len());
        let name = || format!("GPU {gpu}, rank {rank}, stream {number}");
        *self.lanes.entry(stream).or_insert_with(|| new_lane(name(), true))
    }
}

impl Events {
    fn take(&mut self, gpu: &GpuRef) -> Result<Event> {
        self.free.pop().map_or_else(|| gpu.event_create_timed(), Ok)
    }
}

impl Collector {
    /// Records the calls that are done. The lock that calls take is not held meanwhile.
    fn collect(&self) -> Result<()> {
        self.gpu.beside_captures(&mut || {
            let mut anchor = lock(&self.anchor);
            if anchor.is_none_or(|(_, at)| now().saturating_sub(at) > FRESH) {
                self.compare_clocks(&mut anchor)?;
            }
            let Some(anchor) = *anchor else { return Ok(()) };
            let mut oldest = std::mem::take(&mut lock(&self.events).under_way);
            let mut done = Vec::new();
            let outcome = self.measure(&mut oldest, &mut done, anchor);
            let mut events = lock(&self.events);
            events.free.append(&mut done);
            oldest.append(&mut events.under_way);
            events.under_way = oldest;
            outcome
        })
    }

    fn measure(
        &self,
        under_way: &mut VecDeque<Pending>,
        done: &mut Vec<Event>,
        (anchor, at): (Event, u64),
    ) -> Result<()> {
        while let Some(pending) = under_way.front() {
            let [begin, end] = pending.events;
            if !self.gpu.event_query(end)? {
                break;
            }
            // Before the anchor, if it was queued before the clocks were compared.
            let after = nanoseconds(self.gpu.event_elapsed_ms(anchor, begin)?);
            let length = nanoseconds(self.gpu.event_elapsed_ms(begin, end)?);
            record(pending.span(at.saturating_add_signed(after), length.max(0).unsigned_abs()));
            done.extend(pending.events);
            under_way.pop_front();
        }
        Ok(())
    }

    /// Finds out what the host's clock shows when an event happens: the quickest of some tries knows best. Nothing else is on that
    /// stream.
    fn compare_clocks(&self, anchor: &mut Option<(Event, u64)>) -> Result<()> {
        let mut best = u64::MAX;
        for _ in 0..TRIES {
            let event = lock(&self.events).take(&self.gpu)?;
            let before = now();
            self.gpu.event_record(event, self.stream)?;
            self.gpu.event_synchronize(event)?;
            let took = now() - before;
            let other = if took < best {
                best = took;
                anchor.replace((event, before + took / 2)).map(|(last, _)| last)
            } else {
                Some(event)
            };
            lock(&self.events).free.extend(other);
        }
        Ok(())
    }
}

impl Pending {
    fn span(&self, begin: u64, length: u64) -> Span {
        let Subject { name, bytes, rank, world, group, call } = self.subject;
        let numbers: [(&'static str, u64); 7] = [
            ("bytes", bytes),
            ("rank", rank.into()),
            ("world", world.into()),
            ("group", group),
            ("call", call),
            ("thread", self.by.0.into()),
            ("queued", self.by.1),
        ];
        let args =
            numbers.into_iter().map(|(key, number)| (Cow::Borrowed(key), Value::Number(number)));
        Span {
            name: Cow::Borrowed(name),
            lane: self.lane,
            begin,
            end: begin + length,
            args: args.collect(),
        }
    }
}

fn nanoseconds(milliseconds: f32) -> i64 {
    (f64::from(milliseconds) * 1e6) as i64
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere has left whole lists.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Timer {
    fn drop(&mut self) {
        // A lock may be held by a thread that a forked child has not.
        if is_forked() {
            return;
        }
        lock(&self.collector.events).free.extend(self.begun.take().into_iter().flatten());
        // What is done by now is recorded; the rest is not waited for. Nothing is left to report to.
        let _ = self.collector.collect();
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if is_forked() {
            return;
        }
        let (anchor, events) = (*lock(&self.anchor), lock(&self.events));
        let Events { free, under_way } = &*events;
        let under_way = under_way.iter().flat_map(|pending| pending.events);
        let anchor = anchor.map(|(event, _)| event);
        for event in free.iter().copied().chain(under_way).chain(anchor) {
            // SAFETY: made by its timer and not used again; CUDA keeps an event that is still to come.
            let _ = unsafe { self.gpu.event_destroy(event) };
        }
        // SAFETY: made by its timer and not used again.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}
