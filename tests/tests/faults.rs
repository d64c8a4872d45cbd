//! Deterministic simulation testing: seeds that each draw a machine, calls and a fault
//! ([`peerlane_tests::faults`]), on all cores.
//!
//! `PEERLANE_SEEDS` says how many, or `PEERLANE_HOURS` for how long; `PEERLANE_FIRST` with which to begin.
//! `PEERLANE_SEED` plays one only, as a failure tells. `PEERLANE_WRITE_TABLE` names a file for the table of classes,
//! `--rewrite FILE` a page in which to renew it. Its own `main`: what it counts must be seen, and a hang must end it.

use peerlane_device::abi::flags;
use peerlane_tests::faults::{Class, Ending, Kind, Scene, Tally, Verdict, judge, rewrite};
use peerlane_tests::number_from_environment;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{ExitCode, exit};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Seeds without being told otherwise: a minute or two on two idle cores.
const SEEDS: u64 = 6000;
/// Real time after which a scene counts as hung. Most take a tenth of a second.
const HUNG: Duration = Duration::from_secs(120);
/// What one thread has at hand for kernels' lanes and the calls around them.
const STACK: usize = 8 << 20;

/// Seeds that have shown something, and what.
const REGRESSIONS: &[(u64, &str)] = &[
    (
        224,
        "a rank that had failed renewed its seals in its next call, over slots that it had left empty",
    ),
    (1196, "a rank that had failed sealed a later call, over slots that it had left empty"),
    (5250, "a rank in the middle of a broadcast failed and sealed what it had not passed on"),
    (5765, "the same in a double tree"),
    (19363, "a monitor raised flags because a kernel had failed, and no other host knew"),
    (72218, "the same in a hierarchical schedule"),
];

/// What all workers share.
struct Run {
    next: AtomicU64,
    last: u64,
    until: Option<Instant>,
    tally: Mutex<Tally>,
    failures: Mutex<Vec<String>>,
    /// The seed that each worker plays, and since when.
    playing: Mutex<Vec<Option<(u64, Instant)>>>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("negative_controls: test\nregressions: test\nseeds: test");
        return ExitCode::SUCCESS;
    }
    let page = arguments.iter().position(|argument| argument == "--rewrite");
    let page = page.and_then(|at| arguments.get(at + 1));
    if std::env::var("PEERLANE_SEED").is_ok() {
        return replay(number_from_environment("PEERLANE_SEED", 1));
    }
    let began = Instant::now();
    let mut failures = negative_controls();
    println!("negative controls: {} of them missed, {:?}", failures.len(), began.elapsed());
    for (seed, what) in REGRESSIONS {
        failures
            .extend(outcome(*seed).err().map(|reason| format!("{reason}\n  it showed: {what}")));
    }
    let (seeds, tally, failed) = run();
    failures.extend(failed);
    let table = tally.markdown(seeds);
    println!("{table}\n{seeds} seeds, {} scenes, {:?}", tally.tries(), began.elapsed());
    write(&table, page.map(String::as_str));
    for failure in &failures {
        println!("{failure}");
    }
    println!("{} failures", failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Leaves the table where it was asked for.
fn write(table: &str, page: Option<&str>) {
    if let Ok(path) = std::env::var("PEERLANE_WRITE_TABLE") {
        std::fs::write(&path, table).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    if let Some(path) = page {
        let old = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let new = rewrite(&old, table).unwrap_or_else(|error| panic!("{path}: {error}"));
        std::fs::write(path, new).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Plays one seed and tells all about it.
fn replay(seed: u64) -> ExitCode {
    let scene = Scene::new(seed);
    println!("{scene:#?}");
    match outcome(seed) {
        Ok(verdicts) => {
            println!("{verdicts:#?}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn outcome(seed: u64) -> Result<Vec<Verdict>, String> {
    let replay = format!("PEERLANE_SEED={seed} cargo test -p peerlane-tests --test faults");
    let scene = Scene::new(seed);
    let judged = catch_unwind(AssertUnwindSafe(|| judge(&scene)));
    let verdict = judged.unwrap_or_else(|_| Err("it panicked".into()));
    verdict.map_err(|reason| {
        let Scene { class, kind, world, .. } = scene;
        format!("seed {seed} ({class:?}, {kind:?}, {world} ranks): {reason}\n  replay: {replay}")
    })
}

/// Plays seeds on all cores until there are enough.
fn run() -> (u64, Tally, Vec<String>) {
    let hours = number_from_environment("PEERLANE_HOURS", 0);
    let first = number_from_environment("PEERLANE_FIRST", 1);
    let seeds = number_from_environment("PEERLANE_SEEDS", SEEDS);
    // Where a machine waits for its deadline its worker sleeps a little.
    let workers = 2 * thread::available_parallelism().map_or(1, usize::from);
    let run = Run {
        next: AtomicU64::new(first),
        last: if hours > 0 { u64::MAX } else { first + seeds - 1 },
        until: (hours > 0).then(|| Instant::now() + Duration::from_secs(3600 * hours)),
        tally: Mutex::default(),
        failures: Mutex::default(),
        playing: Mutex::new(vec![None; workers]),
    };
    let played = AtomicU64::new(0);
    thread::scope(|scope| {
        for worker in 0..workers {
            let (run, played) = (&run, &played);
            let builder = thread::Builder::new().stack_size(STACK);
            let work = move || {
                played.fetch_add(run.work(worker), Ordering::Relaxed);
            };
            builder.spawn_scoped(scope, work).expect("a thread for every core");
        }
        while run.next.load(Ordering::Relaxed) <= run.last && !run.is_over()
            || run.playing.lock().unwrap().iter().any(Option::is_some)
        {
            thread::sleep(Duration::from_millis(200));
            run.look_for_hangs();
        }
    });
    let Run { tally, failures, .. } = run;
    (played.into_inner(), tally.into_inner().unwrap(), failures.into_inner().unwrap())
}

impl Run {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Plays seeds; returns how many.
    fn work(&self, worker: usize) -> u64 {
        let (mut tally, mut played) = (Tally::default(), 0);
        while !self.is_over() {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            if seed > self.last {
                break;
            }
            self.playing.lock().unwrap()[worker] = Some((seed, Instant::now()));
            match outcome(seed) {
                Ok(verdicts) => verdicts.iter().for_each(|verdict| tally.add(verdict)),
                Err(reason) => {
                    println!("{reason}");
                    self.failures.lock().unwrap().push(reason);
                }
            }
            self.playing.lock().unwrap()[worker] = None;
            played += 1;
        }
        self.tally.lock().unwrap().merge(&tally);
        played
    }

    /// A thread that hangs cannot be ended: the program is.
    fn look_for_hangs(&self) {
        for (seed, since) in self.playing.lock().unwrap().iter().flatten() {
            if since.elapsed() > HUNG {
                println!(
                    "seed {seed} hangs\n  replay: PEERLANE_SEED={seed} cargo test -p peerlane-tests --test faults"
                );
                exit(1);
            }
        }
    }
}

/// What the harness must notice.
fn negative_controls() -> Vec<String> {
    let of = |class: Class| (1..).map(Scene::new).filter(move |s| s.class == class);
    let fused = |class| {
        let plain = |scene: &Scene| scene.kind == Kind::Fused && !scene.config.checked;
        of(class).filter(move |scene| plain(scene) && scene.world > 1)
    };
    let mut missed = Vec::new();
    let mut notices = |what: &str, noticed: bool| {
        if !noticed {
            missed.push(format!("not noticed: {what}"));
        }
    };
    let unclean = |mut scene: Scene| {
        scene.config.broken = flags::BREAK_CLEAN;
        judge(&scene).is_err()
    };
    notices("slots that are not cleaned", fused(Class::None).take(20).any(unclean));
    let wrong = |scene: Scene| {
        judge(&scene).is_ok_and(|all| all.iter().any(|verdict| verdict.ending == Ending::Wrong))
    };
    notices("flipped bits", fused(Class::BitFlipped).take(20).any(wrong));
    let mute = |class| {
        move |mut scene: Scene| {
            scene.mute = class == scene.class;
            judge(&scene).is_err_and(|reason| reason.contains("allowed are"))
        }
    };
    for class in [Class::ProcessDies, Class::Abort] {
        let noticed = fused(class).take(12).any(mute(class));
        notices(&format!("{}, and nobody is told", class.name()), noticed);
    }
    let endless = |mut scene: Scene| {
        scene.config.deadline = Duration::from_secs(3600);
        judge(&scene).is_err_and(|reason| reason.contains("five minutes"))
    };
    notices("a wait without a deadline", fused(Class::CallMissing).take(3).any(endless));
    missed
}
