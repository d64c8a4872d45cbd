//! Ranks as processes, on simulated GPUs and, where there are any, on real ones.
//!
//! The program starts itself as each rank. Its own `main`, since libtest's cannot do that.

use peerlane::cases::Rng;
use peerlane::choice::{Entry, TuningTable, VERSION};
use peerlane::gpu::sim;
use peerlane::links::Key;
use peerlane::{Algorithm, Pattern, Transport};
use peerlane_tests::processes::{Gpus, Process, RANK, Start, serve};
use peerlane_tests::{Links, number_from_environment};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

type Test = (&'static str, fn(&Gpus));

/// On any GPUs.
const EVERYWHERE: &[Test] = &[
    ("every_collective_is_right", every_collective_is_right),
    ("every_collective_is_right_through_host_memory", every_collective_by_host),
    ("ranks_may_start_apart", ranks_may_start_apart),
    ("a_rank_that_never_comes_is_named", a_rank_that_never_comes_is_named),
    ("a_killed_rank_is_an_error_at_once", a_killed_rank_is_an_error_at_once),
    ("scheduled_calls_are_right", scheduled_calls_are_right),
    (
        "a_rank_killed_in_a_scheduled_call_is_an_error",
        a_rank_killed_in_a_scheduled_call_is_an_error,
    ),
    ("a_rank_that_does_not_call_steps_is_named", a_rank_that_does_not_call_steps_is_named),
    ("a_rank_killed_between_calls_is_an_error", a_rank_killed_between_calls_is_an_error),
    ("a_rank_killed_while_they_meet_is_named", a_rank_killed_while_they_meet_is_named),
    ("a_rank_that_does_not_call_is_named", a_rank_that_does_not_call_is_named),
    ("ranks_end_in_any_order", ranks_end_in_any_order),
    ("an_abort_stops_every_rank", an_abort_stops_every_rank),
    ("calls_that_differ_are_refused", calls_that_differ_are_refused),
    ("two_groups_share_the_processes", two_groups_share_the_processes),
    ("different_configurations_are_named", different_configurations_are_named),
    ("contradictory_overrides_are_named", contradictory_overrides_are_named),
    ("registered_tensors_are_right", registered_tensors_are_right),
    ("registrations_that_differ_are_named", registrations_that_differ_are_named),
    ("a_rank_that_never_registers_is_named", a_rank_that_never_registers_is_named),
    ("nothing_stays_behind", nothing_stays_behind),
    ("mailboxes_follow_the_workload", mailboxes_follow_the_workload),
    ("a_rank_that_does_not_adapt_is_named", a_rank_that_does_not_adapt_is_named),
    ("a_rank_killed_while_others_adapt_is_named", a_rank_killed_while_others_adapt_is_named),
    ("one_rank_with_a_graph_keeps_all_as_they_are", one_rank_with_a_graph_keeps_all_as_they_are),
    ("ranks_recover_and_their_graphs_too", ranks_recover_and_their_graphs_too),
    ("ranks_recover_through_host_memory", ranks_recover_by_host),
    ("a_rank_that_does_not_recover_is_named", a_rank_that_does_not_recover_is_named),
    ("a_killed_rank_is_left_out", a_killed_rank_is_left_out),
    ("a_rank_killed_while_others_recover_is_left_out", killed_while_others_recover),
    ("a_rank_killed_at_any_moment_is_left_out", killed_at_any_moment),
    ("a_rank_killed_while_all_close_keeps_nobody", killed_while_all_close),
    ("a_rank_that_hangs_is_left_out", a_rank_that_hangs_is_left_out),
];

/// Only where machines can be made to measure.
const SIMULATED: &[Test] = &[
    ("groups_of_many_ranks_are_right", groups_of_many_ranks_are_right),
    ("gpus_without_access_are_named_on_every_rank", gpus_without_access_are_named),
    ("a_link_that_loses_stores_is_found", a_link_that_loses_stores_is_found),
    ("tuning_tables_are_compared", tuning_tables_are_compared),
    ("a_rank_that_gives_up_stops_the_others_through_host_memory", one_gives_up_by_host),
    ("pairs_without_access_use_host_memory", pairs_without_access_use_host_memory),
    ("memory_that_cannot_be_shared_is_named", memory_that_cannot_be_shared_is_named),
    ("ranks_that_meet_in_host_memory_register_nothing", no_registration_by_host),
    ("pairs_that_lose_stores_use_host_memory", pairs_that_lose_stores_use_host_memory),
    ("mailboxes_in_host_memory_follow_too", mailboxes_in_host_memory_follow_too),
    ("many_killed_ranks_are_left_out", many_killed_ranks_are_left_out),
    ("a_rank_killed_while_others_shrink_is_left_out_too", killed_while_others_shrink),
    ("ranks_that_leave_others_out_are_named", ranks_that_leave_others_out_are_named),
    ("a_failed_self_test_is_every_ranks", a_failed_self_test_is_every_ranks),
    ("a_self_test_that_cannot_be_made_stops_nobody", a_self_test_that_cannot_be_made),
];

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { peerlane::gpu::cuda::prepare_environment() };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(RANK) => return serve(&arguments[1..]),
        // As a rank's self-test starts it.
        Some("self-test") => {
            peerlane::selftest::serve();
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let mut failed = run("sim", EVERYWHERE, &Gpus::sim(), &filters);
    failed += run("sim", SIMULATED, &Gpus::sim(), &filters);
    match peerlane_tests::Machine::cuda() {
        Ok(machine) => failed += run("cuda", EVERYWHERE, &machine.all(), &filters),
        Err(reason) => {
            eprintln!("{} tests on real GPUs skipped: {reason}", EVERYWHERE.len());
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the chosen tests; returns how many failed.
fn run(kind: &str, tests: &[Test], gpus: &Gpus, filters: &[&String]) -> usize {
    let chosen = tests.iter().filter(|(name, _)| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    });
    let outcomes = chosen.map(|(name, test)| {
        let begin = Instant::now();
        let good = catch_unwind(AssertUnwindSafe(|| test(gpus))).is_ok();
        let verdict = if good { "ok" } else { "FAILED" };
        println!("test {name} ... {kind}: {verdict} ({:.2} s)", begin.elapsed().as_secs_f64());
        good
    });
    outcomes.filter(|good| !good).count()
}

/// How ranks are started: a fresh name, and times that no healthy run reaches.
fn start(gpus: &Gpus, world: u32) -> Start {
    static NAMES: AtomicU32 = AtomicU32::new(0);
    let number = NAMES.fetch_add(1, Ordering::Relaxed);
    Start {
        name: format!("processes-{}-{number}", std::process::id()),
        rank: 0,
        world,
        gpus: gpus.clone(),
        deadline: Duration::from_secs(50),
        patience: Duration::from_secs(50),
        environment: Vec::new(),
        transport: Transport::Auto,
    }
}

fn launch(start: &Start) -> Vec<Process> {
    (0..start.world).map(|rank| Process::start(&Start { rank, ..start.clone() })).collect()
}

fn expect(ranks: &[Process], answer: &str) {
    for rank in ranks {
        assert_eq!(rank.answer(), answer, "rank {}", rank.start.rank);
    }
}

fn joined(start: &Start) -> Vec<Process> {
    let ranks = launch(start);
    expect(&ranks, "ok joined");
    ranks
}

/// Tells all ranks the same and returns their answers.
fn ask_all(ranks: &mut [Process], command: &str) -> Vec<String> {
    ranks.iter_mut().for_each(|rank| rank.tell(command));
    ranks.iter().map(Process::answer).collect()
}

/// A command that must go right everywhere, with the same answer.
fn all_agree(ranks: &mut [Process], command: &str) {
    let answers = ask_all(ranks, command);
    assert!(answers[0].starts_with("ok "), "{command}: {answers:?}");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{command}: {answers:?}");
}

/// Ends all ranks, which must go well.
fn end(ranks: Vec<Process>) {
    assert!(ranks.into_iter().all(Process::end));
}

fn worlds(gpus: &Gpus) -> Vec<u32> {
    match gpus {
        Gpus::Sim { .. } => vec![1, 2, 3],
        // Never two processes that spin on one GPU.
        Gpus::Cuda(count) => (2..=*count).collect(),
    }
}

fn every_collective_is_right(gpus: &Gpus) {
    every_collective_is_right_over(gpus, Transport::Auto);
}

fn every_collective_by_host(gpus: &Gpus) {
    every_collective_is_right_over(gpus, Transport::Host);
}

fn every_collective_is_right_over(gpus: &Gpus, transport: Transport) {
    for world in worlds(gpus) {
        let mut ranks = joined(&Start { transport, ..start(gpus, world) });
        for seed in 1..=4 {
            all_agree(&mut ranks, &format!("script {seed} 12 3000"));
        }
        all_agree(&mut ranks, "script 5 6 200000");
        end(ranks);
    }
}

fn groups_of_many_ranks_are_right(gpus: &Gpus) {
    for world in [5, 8] {
        let mut ranks = joined(&start(gpus, world));
        all_agree(&mut ranks, "script 1 8 2000");
        end(ranks);
    }
}

fn mailboxes_follow(ranks: &mut [Process]) {
    for round in 1..=3 {
        all_agree(ranks, &format!("script {round} 8 20000"));
        all_agree(ranks, "reduce 30000");
        assert!(ask_all(ranks, "adapt").iter().all(|answer| answer == "ok grown"));
        all_agree(ranks, &format!("script {round} 8 20000"));
        all_agree(ranks, "reduce 30000");
        // What came until now was large, nothing comes after it.
        assert!(ask_all(ranks, "adapt").iter().all(|answer| answer == "ok as it was"));
        assert!(ask_all(ranks, "adapt").iter().all(|answer| answer == "ok shrunk"));
        all_agree(ranks, &format!("script {round} 8 5000"));
        all_agree(ranks, "health");
    }
}

fn mailboxes_follow_the_workload(gpus: &Gpus) {
    for world in worlds(gpus).into_iter().filter(|world| *world > 1) {
        let mut ranks = joined(&start(gpus, world));
        mailboxes_follow(&mut ranks);
        all_agree(&mut ranks, "steps copy-two-shot 9000");
        end(ranks);
    }
}

fn mailboxes_in_host_memory_follow_too(_: &Gpus) {
    let gpus = Gpus::linked(3, Links::Pairs);
    let mut ranks = joined(&start(&gpus, 3));
    mailboxes_follow(&mut ranks);
    let answers = ask_all(&mut ranks, "transports");
    assert!(answers.iter().all(|a| a == "ok by host: 0-2,1-2,2-0,2-1"), "{answers:?}");
    end(ranks);
}

fn a_rank_that_does_not_adapt_is_named(gpus: &Gpus) {
    let world = worlds(gpus)[1..].first().copied().unwrap_or(2);
    let mut ranks = joined(&start(gpus, world));
    all_agree(&mut ranks, "script 1 8 20000");
    ask_all(&mut ranks, "deadline 2000");
    let begin = Instant::now();
    let last = world as usize - 1;
    let answers = ask_all(&mut ranks[..last], "adapt");
    let expected = format!("rendezvous of {world} ranks: waited 2s in vain for rank {last}");
    assert!(answers.iter().all(|answer| answer.contains(&expected)), "{answers:?}");
    assert!(begin.elapsed() < Duration::from_secs(8), "it took {:?}", begin.elapsed());
    // It goes on with the memory it has, and may try again.
    ask_all(&mut ranks, "deadline 50000");
    all_agree(&mut ranks, "script 2 8 20000");
    assert!(ask_all(&mut ranks, "adapt").iter().all(|answer| answer == "ok grown"));
    all_agree(&mut ranks, "script 3 8 20000");
    end(ranks);
}

fn a_rank_killed_while_others_adapt_is_named(gpus: &Gpus) {
    let world = worlds(gpus)[1..].first().copied().unwrap_or(2);
    let mut ranks = joined(&start(gpus, world));
    all_agree(&mut ranks, "script 1 8 20000");
    let mut victim = ranks.pop().expect("a rank");
    ranks.iter_mut().for_each(|rank| rank.tell("deadline 3000"));
    ranks.iter_mut().for_each(|rank| rank.tell("adapt"));
    std::thread::sleep(Duration::from_millis(300));
    victim.kill();
    for rank in &mut ranks {
        assert_eq!(rank.answer(), "ok set");
        let answer = rank.answer();
        assert!(answer.starts_with("error: "), "{answer}");
        let health = rank.ask("health");
        assert!(health.contains(&format!("lost rank {}", victim.start.rank)), "{health}");
        assert!(rank.ask("adapt").starts_with("error: "));
    }
    end(ranks);
}

fn one_rank_with_a_graph_keeps_all_as_they_are(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 2));
    all_agree(&mut ranks, "script 1 8 20000");
    assert_eq!(ranks[1].ask("capture 100"), "ok captured");
    let expected = "error: adapt: rank 1 has captured 1 calls in CUDA graphs, which hold the mailboxes' addresses";
    for _ in 0..2 {
        let answers = ask_all(&mut ranks, "adapt");
        assert!(answers.iter().all(|answer| answer == expected), "{answers:?}");
    }
    all_agree(&mut ranks, "health");
    end(ranks);
}

/// The largest world that every kind of machine has.
fn few(gpus: &Gpus) -> u32 {
    worlds(gpus).last().copied().unwrap_or(2)
}

fn ranks_recover_and_their_graphs_too(gpus: &Gpus) {
    for world in worlds(gpus) {
        recover_and_go_on(joined(&start(gpus, world)), true);
    }
}

fn ranks_recover_by_host(gpus: &Gpus) {
    let start = Start { transport: Transport::Host, ..start(gpus, few(gpus)) };
    recover_and_go_on(joined(&start), false);
}

fn recover_and_go_on(mut ranks: Vec<Process>, registers: bool) {
    let world = ranks.len();
    all_agree(&mut ranks, "script 1 8 3000");
    all_agree(&mut ranks, "record 5000");
    all_agree(&mut ranks, "replay");
    for generation in [1, 3] {
        assert_eq!(ranks[world - 1].ask("abort"), "ok aborted");
        assert!(ask_all(&mut ranks, "reduce 64").iter().all(|a| a.contains("aborted")));
        assert_eq!(ask_all(&mut ranks, "recover")[0], format!("ok generation {generation}"));
        all_agree(&mut ranks, "health");
        all_agree(&mut ranks, "replay");
        all_agree(&mut ranks, "script 2 8 3000");
        // One call, one replay that nobody else makes.
        if world > 1 {
            let command = if generation == 1 { "reduce 5000" } else { "replay" };
            assert_eq!(ranks[0].ask("deadline 300"), "ok set");
            ranks[0].tell(command);
            std::thread::sleep(Duration::from_millis(500));
            // A graph holds the deadline it was captured with.
            assert_eq!(ranks[1].ask("abort"), "ok aborted");
            let answer = ranks[0].answer();
            assert!(answer.starts_with("error: all_reduce: rank 0"), "{answer}");
            assert_eq!(ranks[0].ask("deadline 50000"), "ok set");
        }
        all_agree(&mut ranks, "recover");
        all_agree(&mut ranks, "replay");
    }
    if registers {
        all_agree(&mut ranks, "steps copy-two-shot 9000");
        ask_all(&mut ranks, "registered 3 48")
            .iter()
            .for_each(|a| assert!(a.starts_with("ok"), "{a}"));
    }
    all_agree(&mut ranks, "script 3 8 30000");
    end(ranks);
}

fn a_rank_that_does_not_recover_is_named(gpus: &Gpus) {
    let world = few(gpus);
    let mut ranks = joined(&start(gpus, world));
    ask_all(&mut ranks, "deadline 1000");
    let begin = Instant::now();
    let last = world as usize - 1;
    let answers = ask_all(&mut ranks[..last], "recover");
    let expected = format!("rendezvous of {world} ranks: waited 1s in vain for rank {last}");
    assert!(answers.iter().all(|answer| answer.contains(&expected)), "{answers:?}");
    assert!(begin.elapsed() < Duration::from_secs(6), "it took {:?}", begin.elapsed());
    assert!(ranks[last].ask("reduce 8").contains("aborted"));
    // It may come later, and all try again.
    ask_all(&mut ranks, "deadline 50000");
    ranks[last].tell("recover");
    std::thread::sleep(Duration::from_millis(200));
    assert!(ask_all(&mut ranks[..last], "recover").iter().all(|a| a == "ok generation 1"));
    assert_eq!(ranks[last].answer(), "ok generation 1");
    all_agree(&mut ranks, "script 1 8 3000");
    end(ranks);
}

/// Kills the ranks in `gone`; the others learn of it, and go on without them.
fn kill_and_shrink(mut ranks: Vec<Process>, gone: &[usize]) {
    all_agree(&mut ranks, "script 1 5 2000");
    for rank in gone.iter().rev() {
        ranks.remove(*rank).kill();
    }
    let numbers: Vec<String> = gone.iter().map(usize::to_string).collect();
    let lost = |answer: &String| answer.contains(" lost rank ");
    assert!(ask_all(&mut ranks, "reduce 64").iter().all(lost));
    // Nobody recovers without them, and says what helps.
    for answer in ask_all(&mut ranks, "recover") {
        assert!(lost(&answer) && answer.contains("; shrink, naming every rank"), "{answer}");
    }
    assert!(ask_all(&mut ranks, "health").iter().all(lost));
    let answers = ask_all(&mut ranks, &format!("shrink {}", numbers.join(" ")));
    let left = ranks.len();
    let places: Vec<String> = (0..left).map(|rank| format!("ok rank {rank} of {left}")).collect();
    assert_eq!(answers, places);
    all_agree(&mut ranks, "health");
    all_agree(&mut ranks, "script 2 8 3000");
    // What is left recovers as any group does.
    all_agree(&mut ranks, "recover");
    all_agree(&mut ranks, "script 3 8 3000");
    end(ranks);
}

fn a_killed_rank_is_left_out(gpus: &Gpus) {
    let world = few(gpus);
    // The first, the last: whoever hosts the meeting, and whoever does not.
    for gone in [0, world as usize - 1] {
        kill_and_shrink(joined(&start(gpus, world)), &[gone]);
    }
}

fn many_killed_ranks_are_left_out(gpus: &Gpus) {
    for (world, gone) in [(4, vec![0, 2]), (5, vec![1, 2, 4])] {
        kill_and_shrink(joined(&start(gpus, world)), &gone);
    }
    let start = Start { transport: Transport::Host, ..start(gpus, 3) };
    kill_and_shrink(joined(&start), &[0]);
}

fn killed_while_others_recover(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, few(gpus)));
    all_agree(&mut ranks, "script 1 5 2000");
    let mut victim = ranks.pop().expect("a rank");
    let gone = victim.start.rank;
    ranks.iter_mut().for_each(|rank| rank.tell("recover"));
    std::thread::sleep(Duration::from_millis(300));
    victim.kill();
    let begin = Instant::now();
    for rank in &ranks {
        let answer = rank.answer();
        let number = rank.start.rank;
        let expected = format!("error: recover: rank {number} lost rank {gone}: its process");
        assert!(answer.starts_with(&expected), "{answer}");
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "it took {:?}", begin.elapsed());
    assert!(ask_all(&mut ranks, &format!("shrink {gone}")).iter().all(|a| a.starts_with("ok")));
    all_agree(&mut ranks, "script 2 5 2000");
    end(ranks);
}

/// Tells all ranks to do something, and kills one of them, in turns, at a random moment of it. The others answer `well` or
/// that they have lost it; then they are given to `go_on`, with its number.
fn killed_while_all(
    gpus: &Gpus,
    (command, well): (&str, &str),
    within_us: u64,
    go_on: impl Fn(&mut [Process], usize),
) {
    let mut rng = Rng::new(number_from_environment("PEERLANE_SEED", 1), command);
    for turn in 0..number_from_environment("PEERLANE_MOMENTS", 8) {
        let mut ranks = joined(&start(gpus, few(gpus)));
        let gone = turn as usize % ranks.len();
        all_agree(&mut ranks, "script 1 5 2000");
        let begin = Instant::now();
        ranks.iter_mut().for_each(|rank| rank.tell(command));
        std::thread::sleep(Duration::from_micros(rng.below(within_us)));
        ranks.remove(gone).kill();
        for rank in &ranks {
            let answer = rank.answer();
            let lost = answer.contains(&format!(" lost rank {gone}"));
            assert!(answer == well || lost, "{answer}");
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
        go_on(&mut ranks, gone);
        end(ranks);
    }
}

fn killed_at_any_moment(gpus: &Gpus) {
    killed_while_all(gpus, ("recover", "ok generation 1"), 8000, |ranks, gone| {
        let answers = ask_all(ranks, &format!("shrink {gone}"));
        assert!(answers.iter().all(|answer| answer.starts_with("ok rank")), "{answers:?}");
        all_agree(ranks, "script 2 5 2000");
        all_agree(ranks, "recover");
    });
}

fn killed_while_all_close(gpus: &Gpus) {
    killed_while_all(gpus, ("close", "ok closed"), 3000, |_, _| ());
}

fn killed_while_others_shrink(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 4));
    all_agree(&mut ranks, "script 1 5 2000");
    ranks.remove(3).kill();
    let mut late = ranks.remove(0);
    ranks.iter_mut().for_each(|rank| rank.tell("shrink 3"));
    std::thread::sleep(Duration::from_millis(300));
    late.kill();
    for rank in &ranks {
        let answer = rank.answer();
        let number = rank.start.rank;
        let expected = format!("error: shrink: rank {number} lost rank 0: its process");
        assert!(answer.starts_with(&expected), "{answer}");
    }
    let answers = ask_all(&mut ranks, "shrink 3 0");
    assert_eq!(answers, ["ok rank 0 of 2", "ok rank 1 of 2"]);
    all_agree(&mut ranks, "script 2 5 2000");
    end(ranks);
}

fn ranks_that_leave_others_out_are_named(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 4));
    ranks[1].tell("shrink 3");
    std::thread::sleep(Duration::from_millis(300));
    let answers = [ranks[2].ask("shrink 3 0"), ranks[1].answer()];
    for answer in answers {
        let expected = "rank 1 goes on without rank 3, rank 2 goes on without ranks 0, 3";
        assert!(answer.contains(expected), "{answer}");
    }
    let answers = ask_all(&mut ranks[..3], "shrink 3");
    assert_eq!(answers, ["ok rank 0 of 3", "ok rank 1 of 3", "ok rank 2 of 3"]);
    all_agree(&mut ranks[..3], "script 2 5 2000");
    assert!(ranks[3].ask("health").contains("aborted"));
    end(ranks);
}

fn a_rank_that_hangs_is_left_out(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, few(gpus)));
    all_agree(&mut ranks, "script 1 5 2000");
    let last = ranks.len() - 1;
    // It is alive, and comes to nothing.
    let answers = ask_all(&mut ranks[..last], &format!("shrink {last}"));
    assert!(answers.iter().all(|answer| answer.starts_with("ok rank")), "{answers:?}");
    all_agree(&mut ranks[..last], "script 2 5 2000");
    assert!(ranks[last].ask("health").contains("aborted"));
    let answer = ranks[last].ask("recover");
    assert!(answer.contains("rank 0 has closed its communicator"), "{answer}");
    assert_eq!(ranks[last].ask("close"), "ok closed");
    all_agree(&mut ranks[..last], "script 3 5 2000");
    end(ranks);
}

fn ranks_may_start_apart(gpus: &Gpus) {
    let start = start(gpus, 2);
    let first = Process::start(&start);
    std::thread::sleep(Duration::from_millis(1500));
    let second = Process::start(&Start { rank: 1, ..start });
    let mut ranks = vec![first, second];
    expect(&ranks, "ok joined");
    all_agree(&mut ranks, "script 1 5 1000");
    end(ranks);
}

fn a_rank_that_never_comes_is_named(gpus: &Gpus) {
    let start = Start { patience: Duration::from_secs(2), ..start(gpus, 3) };
    let ranks = [0, 2].map(|rank| Process::start(&Start { rank, ..start.clone() }));
    for rank in ranks {
        let answer = rank.answer();
        assert!(answer.contains("rendezvous of 3 ranks: waited 2s in vain for rank 1"), "{answer}");
    }
}

fn a_killed_rank_is_an_error_at_once(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, worlds(gpus)[1..].first().copied().unwrap_or(2)));
    let mut victim = ranks.pop().expect("a rank");
    ranks.iter_mut().for_each(|rank| rank.tell("reduce 5000"));
    std::thread::sleep(Duration::from_millis(300));
    victim.kill();
    let begin = Instant::now();
    for rank in &mut ranks {
        let answer = rank.answer();
        let number = rank.start.rank;
        let (peer, pid) = (victim.start.rank, victim.pid());
        let expected = format!(
            "error: all_reduce: rank {number} lost rank {peer}: its process (pid {pid}) has ended"
        );
        assert_eq!(answer, expected);
        // It stays.
        assert_eq!(rank.ask("reduce 8"), expected);
        assert_eq!(rank.ask("health"), expected);
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "it took {:?}", begin.elapsed());
    end(ranks);
}

fn scheduled_calls_are_right(gpus: &Gpus) {
    for world in worlds(gpus) {
        let mut ranks = joined(&start(gpus, world));
        for (pattern, seed) in Pattern::ALL.map(Algorithm::Scheduled).iter().zip(1..) {
            all_agree(&mut ranks, &format!("steps {pattern} {}", 1000 + seed));
            all_agree(&mut ranks, &format!("script {seed} 4 2000"));
            all_agree(&mut ranks, &format!("steps {pattern} 9001"));
        }
        end(ranks);
    }
}

fn a_rank_killed_in_a_scheduled_call_is_an_error(gpus: &Gpus) {
    for pattern in Pattern::ALL.map(Algorithm::Scheduled) {
        let mut ranks = joined(&start(gpus, worlds(gpus)[1..].first().copied().unwrap_or(2)));
        let mut victim = ranks.pop().expect("a rank");
        ranks.iter_mut().for_each(|rank| rank.tell(&format!("steps {pattern} 5000")));
        std::thread::sleep(Duration::from_millis(300));
        victim.kill();
        let begin = Instant::now();
        for rank in &mut ranks {
            let (number, peer, pid) = (rank.start.rank, victim.start.rank, victim.pid());
            let expected = format!(
                "error: all_reduce: rank {number} lost rank {peer}: its process (pid {pid}) has ended"
            );
            assert_eq!(rank.answer(), expected, "{pattern}");
            assert_eq!(rank.ask("reduce 8"), expected);
            assert!(rank.ask("close").starts_with("error: "));
        }
        assert!(begin.elapsed() < Duration::from_secs(3), "it took {:?}", begin.elapsed());
        end(ranks);
    }
}

fn a_rank_that_does_not_call_steps_is_named(gpus: &Gpus) {
    let start = Start { deadline: Duration::from_millis(500), ..start(gpus, 2) };
    let mut ranks = joined(&start);
    all_agree(&mut ranks, "steps copy-tree 4000");
    let answer = ranks[1].ask("steps copy-tree 4000");
    // Half a second, and what it takes to look.
    assert!(answer.starts_with("error: all_reduce: rank 1 waited 5"), "{answer}");
    assert!(answer.contains("ms for rank 0"), "{answer}");
}

fn a_rank_killed_between_calls_is_an_error(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 2));
    all_agree(&mut ranks, "reduce 100");
    ranks[0].kill();
    let until = Instant::now() + Duration::from_secs(2);
    while ranks[1].ask("health") == "ok well" {
        assert!(Instant::now() < until, "the loss of rank 0 was not noticed");
        std::thread::sleep(Duration::from_millis(2));
    }
    let answer = ranks[1].ask("reduce 100");
    assert!(answer.contains("health: rank 1 lost rank 0"), "{answer}");
    assert!(ranks.pop().expect("rank 1").end());
}

fn registered_tensors_are_right(gpus: &Gpus) {
    for world in [2, 4] {
        let mut ranks = joined(&start(gpus, world));
        all_agree(&mut ranks, "script 3 5 1000");
        for bytes in [48, 40_000] {
            let answers = ask_all(&mut ranks, &format!("registered 3 {bytes}"));
            let peers = world as usize - 1;
            for answer in answers {
                assert!(answer.starts_with(&format!("ok mapped {peers} in ")), "{answer}");
                let kept = format!("{peers} left, 0 at the end");
                assert!(answer.ends_with(&kept), "{answer}");
                // The first of four registrations maps, in either round.
                let misses = if bytes == 48 { peers } else { 2 * peers };
                let times = format!("{} hits, {misses} misses", 3 * misses);
                assert!(answer.contains(&times), "{answer}");
            }
        }
        all_agree(&mut ranks, "script 4 5 1000");
        end(ranks);
    }
}

fn registrations_that_differ_are_named(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 2));
    ranks[0].tell("register 4096");
    ranks[1].tell("register 2048");
    for rank in &ranks {
        let answer = rank.answer();
        let expected =
            "error: register: bytes: expected 4096, as rank 0 brings, got 2048 from rank 1";
        assert_eq!(answer, expected);
    }
    assert_eq!(ask_all(&mut ranks, "register 64"), ["ok registered", "ok registered"]);
    end(ranks);
}

fn a_rank_that_never_registers_is_named(gpus: &Gpus) {
    let deadline = Duration::from_secs(1);
    let mut ranks = joined(&Start { deadline, ..start(gpus, 2) });
    let begin = Instant::now();
    let answer = ranks[1].ask("register 64");
    assert!(answer.contains("in vain for rank 0"), "{answer}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    // Its own attempt finds nobody either; then both are in step again.
    let answer = ranks[0].ask("register 64");
    assert!(answer.contains("in vain for rank 1"), "{answer}");
    assert_eq!(ask_all(&mut ranks, "register 64"), ["ok registered", "ok registered"]);
    end(ranks);
}

fn memory_that_cannot_be_shared_is_named(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 3));
    ranks[0].tell("register 64");
    ranks[1].tell("register-unshared 64");
    ranks[2].tell("register 64");
    for rank in &ranks {
        let answer = rank.answer();
        let expected = "the memory cannot be shared with other processes";
        assert!(answer.starts_with("error: register: ") && answer.contains(expected), "{answer}");
    }
    assert_eq!(ask_all(&mut ranks, "register 64"), ["ok registered"; 3]);
    end(ranks);
}

fn no_registration_by_host(gpus: &Gpus) {
    let mut ranks = joined(&Start { transport: Transport::Host, ..start(gpus, 2) });
    for answer in ask_all(&mut ranks, "register 64") {
        assert!(answer.contains("through host memory only"), "{answer}");
    }
    end(ranks);
}

fn a_rank_killed_while_they_meet_is_named(gpus: &Gpus) {
    let start = start(gpus, 3);
    let mut ranks = [0, 1].map(|rank| Process::start(&Start { rank, ..start.clone() }));
    std::thread::sleep(Duration::from_millis(1500));
    ranks[1].kill();
    let answer = ranks[0].answer();
    let first_hosts = format!("the process of rank 1 (pid {})", ranks[1].pid());
    assert!(answer.contains(&first_hosts) && answer.contains("ended"), "{answer}");
}

fn a_rank_that_does_not_call_is_named(gpus: &Gpus) {
    let start = Start { deadline: Duration::from_millis(500), ..start(gpus, 2) };
    // The first call waits for others that may still be busy with other things.
    for (calls_before, waited) in [(0, "3s"), (1, "500ms")] {
        let mut ranks = joined(&start);
        (0..calls_before).for_each(|_| all_agree(&mut ranks, "reduce 64"));
        let answer = ranks[1].ask("reduce 64");
        let expected = format!("error: all_reduce: rank 1 waited {waited} for rank 0");
        assert!(answer.starts_with(&expected), "{answer}");
    }
}

fn ranks_end_in_any_order(gpus: &Gpus) {
    let orders: &[&[usize]] = match worlds(gpus).last() {
        Some(3) => &[&[0, 1, 2], &[0, 2, 1], &[1, 0, 2], &[1, 2, 0], &[2, 0, 1], &[2, 1, 0]],
        _ => &[&[0, 1], &[1, 0]],
    };
    for order in orders {
        let mut ranks = joined(&start(gpus, order.len() as u32));
        all_agree(&mut ranks, "script 3 4 1000");
        for rank in *order {
            assert_eq!(ranks[*rank].ask("close"), "ok closed");
        }
        for rank in *order {
            let answer = ranks[*rank].ask("reduce 4");
            assert!(answer.contains("is closed"), "{answer}");
            assert_eq!(ranks[*rank].ask("close"), "ok closed");
        }
        end(ranks);
    }
}

fn an_abort_stops_every_rank(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 2));
    ranks[0].tell("reduce 640");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(ranks[1].ask("abort"), "ok aborted");
    let answer = ranks[0].answer();
    assert!(answer.starts_with("error: all_reduce: rank 0 was aborted"), "{answer}");
}

fn calls_that_differ_are_refused(gpus: &Gpus) {
    let mut ranks = joined(&start(gpus, 2));
    ranks[0].tell("reduce 64");
    std::thread::sleep(Duration::from_millis(300));
    let answer = ranks[1].ask("reduce 32");
    assert!(answer.contains("rank 1 and rank 0 disagree"), "{answer}");
    assert!(answer.contains("256 bytes") && answer.contains("128 bytes"), "{answer}");
    assert_eq!(ranks[1].ask("reduce 64"), "ok reduced");
    assert_eq!(ranks[0].answer(), "ok reduced");
    end(ranks);
}

fn two_groups_share_the_processes(gpus: &Gpus) {
    let start = start(gpus, 2);
    let mut ranks = joined(&start);
    let name = format!("{}-second", start.name);
    assert_eq!(ask_all(&mut ranks, &format!("@b join {name}")), ["ok joined", "ok joined"]);
    for seed in 1..4 {
        all_agree(&mut ranks, &format!("script {seed} 5 1000"));
        all_agree(&mut ranks, &format!("@b script {seed} 5 1000"));
    }
    assert_eq!(ask_all(&mut ranks, "close"), ["ok closed", "ok closed"]);
    all_agree(&mut ranks, "@b script 9 5 1000");
    end(ranks);
}

fn different_configurations_are_named(gpus: &Gpus) {
    let start = start(gpus, 2);
    let other = Start { rank: 1, deadline: Duration::from_secs(40), ..start.clone() };
    for rank in [Process::start(&start), Process::start(&other)] {
        let answer = rank.answer();
        assert!(answer.contains("rank 0 and rank 1 bring different configurations"), "{answer}");
    }
}

fn contradictory_overrides_are_named(gpus: &Gpus) {
    let overrides = [
        ("PEERLANE_ALGORITHM", "two-shot"),
        ("PEERLANE_ROUTE", "chain"),
        ("PEERLANE_TUNING", "off"),
        ("PEERLANE_FIXED", "1"),
        ("PEERLANE_EXACT", "0"),
    ];
    for (variable, value) in overrides {
        let start = start(gpus, 2);
        let environment = vec![(variable, value.to_owned())];
        let other = Start { rank: 1, environment, ..start.clone() };
        for rank in [Process::start(&start), Process::start(&other)] {
            let answer = rank.answer();
            let expected = "rank 0 and rank 1 bring different configurations";
            assert!(answer.contains(expected), "{variable}: {answer}");
        }
    }
}

fn tuning_tables_are_compared(gpus: &Gpus) {
    let file = |name: &str| {
        std::env::temp_dir().join(format!("peerlane-processes-{}-{name}.json", std::process::id()))
    };
    let identity = |gpu: &peerlane::gpu::GpuRef| {
        let properties = gpu.properties();
        (properties.uuid.clone(), properties.pci_bus_id.clone())
    };
    let machine = sim::devices(&sim::Config { devices: 4, ..Default::default() });
    let entry = |choice: &str| vec![Entry { up_to: None, choice: choice.into(), us: None }];
    let table = |broadcast: &str| TuningTable {
        version: VERSION,
        world: 2,
        simulated: true,
        host: false,
        key: Key::simulated(machine[..2].iter().map(identity).collect()),
        all_reduce: entry("two-shot"),
        all_reduce_any: entry("ring"),
        broadcast: entry(broadcast),
    };
    let (one, other) = (file("one"), file("other"));
    table("chain").write(&one).expect("a file can be written");
    table("tree").write(&other).expect("a file can be written");
    let start = start(gpus, 2);
    let with = |path: &std::path::Path| vec![("PEERLANE_TUNING", path.display().to_string())];
    let start = Start { environment: with(&one), ..start };
    for rank in launch(&start) {
        assert_eq!(rank.answer(), "ok joined");
    }
    let odd = Start { rank: 1, environment: with(&other), ..start.clone() };
    for rank in [Process::start(&start), Process::start(&odd)] {
        let answer = rank.answer();
        assert!(answer.contains("different configurations: tuning tables"), "{answer}");
        assert!(answer.contains("-one.json") && answer.contains("-other.json"), "{answer}");
    }
    // One world's table is not another's: rank 0 says so, on every rank.
    let three = Start { name: format!("{}-3", start.name), world: 3, ..start };
    for rank in launch(&three) {
        let answer = rank.answer();
        assert!(answer.contains("expected a tuning table for 3 GPUs"), "{answer}");
    }
    for path in [one, other] {
        std::fs::remove_file(path).expect("it is there");
    }
}

fn one_gives_up_by_host(gpus: &Gpus) {
    let (transport, deadline) = (Transport::Host, Duration::from_secs(3));
    let mut ranks = joined(&Start { transport, deadline, ..start(gpus, 3) });
    all_agree(&mut ranks, "reduce 64");
    ranks[2].tell("reduce 64");
    std::thread::sleep(Duration::from_secs(1));
    // It would wait a second longer than rank 2, whose kernel stops it with a word in its host
    // mailbox.
    let answer = ranks[1].ask("reduce 64");
    assert!(answer.starts_with("error: all_reduce: rank 1 was aborted"), "{answer}");
    let answer = ranks[2].answer();
    assert!(answer.starts_with("error: all_reduce: rank 2 waited 3s for rank 0"), "{answer}");
}

fn gpus_without_access_are_named(_: &Gpus) {
    let missing = vec![(1, 2), (2, 1)];
    let gpus = Gpus::Sim { devices: 3, missing, lossy: vec![] };
    let start = Start { transport: Transport::P2p, ..start(&gpus, 3) };
    let answers: Vec<String> = launch(&start).iter().map(Process::answer).collect();
    assert!(answers[0].starts_with("error: GPU 1 cannot reach GPU 2"), "{answers:?}");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

fn a_link_that_loses_stores_is_found(_: &Gpus) {
    let gpus = Gpus::Sim { devices: 4, missing: vec![], lossy: vec![(3, 2)] };
    let start = Start { transport: Transport::P2p, ..start(&gpus, 4) };
    let answers: Vec<String> = launch(&start).iter().map(Process::answer).collect();
    assert!(answers[0].starts_with("error: GPU 3 cannot reach GPU 2"), "{answers:?}");
    assert!(answers[0].contains("what it stores does not arrive"), "{answers:?}");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

/// The answer of ranks between which exactly `pairs` use host memory.
fn by_host(pairs: &[(u32, u32)]) -> String {
    let pairs: Vec<_> = pairs.iter().map(|(from, to)| format!("{from}-{to}")).collect();
    format!("ok by host: {}", pairs.join(","))
}

/// That a group joins in which exactly `pairs` use host memory, and is right.
fn assert_mixed(start: &Start, pairs: &[(u32, u32)]) {
    let mut ranks = joined(start);
    all_agree(&mut ranks, "transports");
    assert_eq!(ranks[0].ask("transports"), by_host(pairs));
    all_agree(&mut ranks, "script 1 8 2000");
    all_agree(&mut ranks, "script 2 3 60000");
    end(ranks);
}

fn pairs_without_access_use_host_memory(_: &Gpus) {
    for (world, links) in
        [(4, Links::Pairs), (5, Links::Pairs), (3, Links::OneWay), (6, Links::OneWay)]
    {
        let gpus = Gpus::linked(world, links);
        assert_mixed(&start(&gpus, world), &links.missing(world));
    }
}

fn pairs_that_lose_stores_use_host_memory(_: &Gpus) {
    for lossy in [vec![(3, 2)], vec![(0, 1), (1, 0), (2, 3)]] {
        let gpus = Gpus::Sim { devices: 4, missing: vec![], lossy: lossy.clone() };
        assert_mixed(&start(&gpus, 4), &lossy);
    }
}

fn a_failed_self_test_is_every_ranks(_: &Gpus) {
    let program = std::env::current_exe().expect("a program knows its path");
    let environment = vec![
        ("PEERLANE_SELF_TEST", "always".to_owned()),
        ("PEERLANE_SELF_TEST_PROGRAM", program.display().to_string()),
    ];
    let gpus = Gpus::Sim { devices: 3, missing: Vec::new(), lossy: vec![(1, 0)] };
    let auto = Start { environment, ..start(&gpus, 3) };
    let mut ranks = joined(&auto);
    for answer in ask_all(&mut ranks, "transports") {
        assert_eq!(answer, "ok by host: 1-0");
    }
    all_agree(&mut ranks, "script 3 12 900");
    ranks.into_iter().for_each(|rank| assert!(rank.end()));
    let environment = auto.environment.clone();
    let p2p = Start { transport: Transport::P2p, environment, ..start(&gpus, 3) };
    let refused = launch(&p2p);
    let expected =
        "error: GPU 1 cannot reach GPU 0: the self-test found that \"SM stores\" fails: ";
    for rank in refused {
        let answer = rank.answer();
        assert!(answer.starts_with(expected), "rank {}: {answer}", rank.start.rank);
    }
}

fn a_self_test_that_cannot_be_made(gpus: &Gpus) {
    let environment = vec![
        ("PEERLANE_SELF_TEST", "always".to_owned()),
        ("PEERLANE_SELF_TEST_PROGRAM", "/no/such/program".to_owned()),
    ];
    let mut ranks = joined(&Start { environment, ..start(gpus, 2) });
    assert_eq!(ask_all(&mut ranks, "transports"), ["ok by host: ", "ok by host: "]);
    ranks.into_iter().for_each(|rank| assert!(rank.end()));
}

/// Names in the file system and in the socket namespace that a group has made.
fn traces(name: &str) -> Vec<String> {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let sockets = sockets.lines().filter(|line| line.contains(name)).map(str::to_owned);
    let files = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let files = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
    sockets.chain(files.filter(|file| file.to_lowercase().contains("peerlane"))).collect()
}

fn nothing_stays_behind(gpus: &Gpus) {
    let closed = start(gpus, 2);
    end(joined(&closed));
    let killed = start(gpus, 2);
    let mut ranks = joined(&killed);
    ranks.iter_mut().for_each(Process::kill);
    let early = start(gpus, 2);
    let mut first = Process::start(&early);
    std::thread::sleep(Duration::from_millis(300));
    first.kill();
    for start in [closed, killed, early] {
        assert_eq!(traces(&start.name), Vec::<String>::new());
    }
}
