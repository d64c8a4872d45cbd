//! SIGKILL of a rank at a random moment, again and again: every survivor must end with an error that names it, soon.
//!
//! Invariant: a round counts only if the victim had joined and the survivors were making calls, or were about to.
//! On simulated GPUs a few rounds; on real ones as many as `PEERLANE_KILLS` says (200). Prints how long after
//! the kill the survivors had their error, and writes it to the file that `PEERLANE_WRITE_KILLS` names.

use peerlane::Transport;
use peerlane::cases::Rng;
use peerlane_tests::processes::{Gpus, Process, RANK, Start, monotonic_ns, serve};
use peerlane_tests::{Machine, number_from_environment};
use std::process::ExitCode;
use std::time::Duration;

/// Upper ends of the histogram's bins, in milliseconds.
const BINS: [f64; 9] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 1000.0];

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { peerlane::gpu::cuda::prepare_environment() };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == RANK) {
        return serve(&arguments[1..]);
    }
    run("sim", &Gpus::sim(), 3, number_from_environment("PEERLANE_SIM_KILLS", 20));
    match Machine::cuda() {
        Ok(machine) => {
            let gpus = machine.all();
            let Gpus::Cuda(count) = gpus else { unreachable!("real GPUs") };
            if count < 2 {
                eprintln!("kills on real GPUs skipped: one GPU only");
            } else {
                run("cuda", &gpus, count, number_from_environment("PEERLANE_KILLS", 200));
            }
        }
        Err(reason) => eprintln!("kills on real GPUs skipped: {reason}"),
    }
    ExitCode::SUCCESS
}

/// Survivors stay from round to round; every victim is a process of its own, started a round early.
fn run(kind: &str, gpus: &Gpus, world: u32, rounds: u64) {
    let start = |rank| Start {
        name: String::new(),
        rank,
        world,
        gpus: gpus.clone(),
        deadline: Duration::from_secs(50),
        patience: Duration::from_secs(50),
        environment: Vec::new(),
        transport: Transport::Auto,
    };
    let victim = world - 1;
    let ready = |process: Process| {
        assert_eq!(process.answer(), "ok joined", "rank {}", process.start.rank);
        process
    };
    let mut survivors: Vec<Process> = (0..victim).map(|r| Process::start(&start(r))).collect();
    survivors = survivors.into_iter().map(ready).collect();
    let mut next = Process::start(&start(victim));
    let mut rng = Rng::new(number_from_environment("PEERLANE_SEED", 1), "kills");
    let mut times = Vec::new();
    for round in 0..rounds {
        let mut process = ready(std::mem::replace(&mut next, Process::start(&start(victim))));
        let name = format!("kills-{}-{kind}-{round}", std::process::id());
        for rank in survivors.iter_mut().chain([&mut process]) {
            rank.tell(&format!("@{round} join {name}"));
        }
        let joined: Vec<String> = survivors.iter().chain([&process]).map(Process::answer).collect();
        assert!(joined.iter().all(|answer| answer == "ok joined"), "{joined:?}");
        for rank in survivors.iter_mut().chain([&mut process]) {
            rank.tell(&format!("@{round} loop {}", 1 + round));
        }
        std::thread::sleep(Duration::from_micros(rng.below(60_000)));
        let killed = monotonic_ns();
        process.kill();
        for rank in &mut survivors {
            let answer = rank.answer();
            let (at, error) = noticed(&answer).unwrap_or_else(|| panic!("round {round}: {answer}"));
            assert!(error.contains(&format!("lost rank {victim}")), "round {round}: {error}");
            times.push(at.saturating_sub(killed) as f64 / 1e6);
            let closed = rank.ask(&format!("@{round} close"));
            assert!(closed.contains(&format!("lost rank {victim}")), "round {round}: {closed}");
        }
    }
    report(kind, world, rounds, &mut times);
}

/// When a survivor had its error, and which.
fn noticed(answer: &str) -> Option<(u64, &str)> {
    let (at, error) = answer.strip_prefix("ok failed ")?.split_once(' ')?;
    Some((at.parse().ok()?, error))
}

fn report(kind: &str, world: u32, rounds: u64, times: &mut [f64]) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let [median, p99, most] = [0.5, 0.99, 1.0].map(at);
    println!(
        "{kind}: {rounds} of {rounds} kills of one of {world} ranks ended in PeerLost on every survivor; \
         ms to the error: median {median:.2}, p99 {p99:.2}, most {most:.2}"
    );
    let mut before = 0;
    let mut bins = Vec::new();
    for end in BINS {
        let below = times.partition_point(|time| *time <= end);
        println!("  up to {end:>6} ms: {:>5}", below - before);
        bins.push(serde_json::json!({"up_to_ms": end, "count": below - before}));
        before = below;
    }
    assert!(most <= 1000.0, "a survivor waited {most} ms");
    if let Ok(path) = std::env::var("PEERLANE_WRITE_KILLS")
        && kind == "cuda"
    {
        let value = serde_json::json!({
            "what": "milliseconds from SIGKILL of a rank to the survivor's error",
            "world": world, "kills": rounds, "errors": times.len(),
            "median_ms": median, "p99_ms": p99, "most_ms": most, "bins": bins, "all_ms": times,
        });
        std::fs::write(&path, format!("{value:#}\n")).expect("the file can be written");
    }
}
