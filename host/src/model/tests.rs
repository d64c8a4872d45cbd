//! What the model says, held to the laws of the algorithms, to closed forms, and to what was measured.
//!
//! The table of steps, bytes and times is here so that a change of the model is seen; the laws are
//! what it must never leave.

use super::fabric::Path;
use super::schedule::Work;
use super::*;
use crate::algorithm::{Pattern, Spread};
use peerlane_device::abi::Format;

const FULL: Algorithm = Algorithm::OneShot(Format::Full);
const MIB: u64 = 1 << 20;

/// (steps, units of 1 MiB out of the rank that sends most of 64 MiB, microseconds for 8 KiB, 256 KiB and
/// 64 MiB).
type Figures = (u32, u64, [f64; 3]);

/// At NVSwitch: name, and figures for 8 and for 16 ranks.
#[rustfmt::skip]
const TABLE: [(&str, [Figures; 2]); 14] = [
    ("packet", [(1, 896, [3.05, 14.87, 2753.32]), (1, 1920, [3.49, 27.22, 5879.67])]),
    ("full", [(1, 448, [2.86, 8.77, 1378.73]), (1, 960, [3.08, 15.74, 2941.97])]),
    ("two-shot", [(2, 112, [4.82, 5.81, 347.35]), (2, 120, [4.82, 5.89, 371.05])]),
    ("staged", [(14, 112, [30.01, 30.50, 589.14]), (30, 120, [63.62, 64.08, 1132.08])]),
    ("ring", [(14, 112, [30.01, 30.50, 589.14]), (30, 120, [63.62, 64.08, 1132.08])]),
    ("tree", [(6, 192, [13.30, 17.43, 638.51]), (8, 256, [17.57, 23.64, 964.95])]),
    ("double-tree", [(6, 128, [13.25, 15.05, 548.29]), (8, 128, [17.48, 19.75, 745.64])]),
    ("hierarchical", [(4, 112, [9.04, 10.33, 384.26]), (4, 120, [9.05, 10.37, 409.26])]),
    ("copy-two-shot", [(2, 112, [67.84, 69.23, 382.17]), (2, 120, [110.25, 111.74, 503.60])]),
    ("copy-ring", [(14, 112, [172.24, 173.53, 395.87]), (30, 120, [353.84, 355.22, 716.93])]),
    ("copy-tree", [(6, 192, [81.62, 88.51, 1355.72]), (8, 256, [104.45, 115.17, 1997.18])]),
    ("copy-double-tree", [(6, 128, [81.52, 85.23, 690.46]), (8, 128, [104.27, 109.43, 905.67])]),
    ("copy-hierarchical", [(4, 112, [65.95, 67.64, 474.59]), (4, 120, [87.15, 88.86, 507.09])]),
    ("copy-one-shot", [(1, 448, [22.18, 27.74, 1371.81]), (1, 960, [22.38, 34.29, 2911.93])]),
];

fn time(algorithm: Algorithm, preset: Preset, world: u32, bytes: usize) -> f64 {
    predict(algorithm, preset, world, bytes).time_us
}

/// The schedule of a call on a usual machine.
fn schedule(algorithm: Algorithm, world: u32, bytes: u64) -> Schedule {
    let shape = shape(&Preset::NvSwitch.fabric(world));
    Schedule::all_reduce(algorithm, &shape, bytes, Cut::of(algorithm, &shape, bytes))
}

/// The same in one chunk.
fn whole(algorithm: Algorithm, world: u32, bytes: u64) -> Schedule {
    let shape = shape(&Preset::NvSwitch.fabric(world));
    Schedule::all_reduce(algorithm, &shape, bytes, Cut::WHOLE)
}

#[test]
fn steps_bytes_and_times_of_every_algorithm_at_8_and_16_ranks() {
    assert_eq!(TABLE.map(|row| row.0), Algorithm::ALL.map(Algorithm::name));
    for (name, columns) in TABLE {
        let algorithm: Algorithm = name.parse().unwrap();
        for ((steps, mib, times), world) in columns.into_iter().zip([8, 16]) {
            for (expected, bytes) in times.into_iter().zip([8 << 10, 256 << 10, 64 << 20]) {
                let predicted = predict(algorithm, Preset::NvSwitch, world, bytes);
                assert_eq!(predicted.steps, steps, "{name} over {world}");
                let off = (predicted.time_us / expected - 1.0).abs();
                let got = predicted.time_us;
                assert!(off < 0.005, "{name} over {world}, {bytes}: {got}, not {expected}");
            }
            let sent = predict(algorithm, Preset::NvSwitch, world, 64 << 20).sent_bytes;
            assert_eq!(sent, mib * MIB, "{name} over {world}");
        }
    }
}

#[test]
fn steps_follow_from_the_number_of_ranks() {
    for n in 2..=16u32 {
        let steps = |algorithm| whole(algorithm, n, 1 << 20).depth();
        for algorithm in Algorithm::ALL {
            let depth = steps(algorithm);
            match algorithm {
                Algorithm::OneShot(_) | Algorithm::Scheduled(Pattern::OneShot) => {
                    assert_eq!(depth, 1);
                }
                Algorithm::TwoShot | Algorithm::Scheduled(Pattern::TwoShot) => assert_eq!(depth, 2),
                Algorithm::Staged | Algorithm::Ring | Algorithm::Scheduled(Pattern::Ring) => {
                    assert_eq!(depth, 2 * (n - 1))
                }
                Algorithm::Tree | Algorithm::Scheduled(Pattern::Tree) => {
                    assert_eq!(depth, 2 * n.ilog2());
                }
                Algorithm::DoubleTree | Algorithm::Scheduled(Pattern::DoubleTree) => {
                    assert!(depth <= 2 * (n + 1).next_power_of_two().ilog2(), "{n}: {depth}");
                }
                Algorithm::Hierarchical | Algorithm::Scheduled(Pattern::Hierarchical) => {
                    assert!(depth <= 4, "{n}: {depth}");
                }
            }
        }
    }
}

#[test]
fn small_calls_grow_with_the_steps_as_log_n_and_as_n() {
    let us = |algorithm, n| time(algorithm, Preset::NvSwitch, n, 1024);
    let step = us(Algorithm::Ring, 3) - us(Algorithm::Ring, 2);
    for n in 2..16 {
        // A rank more: two steps more round the ring, one level more at powers of two only.
        let ring = us(Algorithm::Ring, n + 1) - us(Algorithm::Ring, n);
        assert!((ring / step - 1.0).abs() < 0.02, "{n}: {ring} after {step}");
        let tree = us(Algorithm::Tree, n + 1) - us(Algorithm::Tree, n);
        let expected = if (n + 1).is_power_of_two() { step } else { 0.0 };
        assert!((tree - expected).abs() < 0.05 * step, "{n}: {tree}, not {expected}");
    }
}

#[test]
fn bandwidth_optimal_algorithms_send_two_tensors_less_two_nths() {
    for n in 2..=16 {
        let bytes = n as u64 * 65536;
        let optimal = 2 * (n as u64 - 1) * 65536;
        for algorithm in [Algorithm::TwoShot, Algorithm::Staged, Algorithm::Ring] {
            assert_eq!(schedule(algorithm, n, bytes).sent(), vec![optimal; n as usize]);
        }
        assert_eq!(schedule(FULL, n, bytes).sent(), vec![(n as u64 - 1) * bytes; n as usize]);
        let packet = Algorithm::OneShot(Format::Packet);
        let doubled = 2 * (n as u64 - 1) * bytes;
        assert_eq!(schedule(packet, n, bytes).sent(), vec![doubled; n as usize]);
        // Once up and once down for every rank but the root.
        let tree: u64 = schedule(Algorithm::Tree, n, bytes).sent().iter().sum();
        assert_eq!(tree, 2 * (n as u64 - 1) * bytes);
    }
}

#[test]
fn what_is_sent_is_received_and_taken() {
    for n in 1..=16 {
        for algorithm in Algorithm::ALL {
            for bytes in [1, 999, 65536, 5_000_001] {
                let schedule = schedule(algorithm, n, bytes);
                let (sent, received) = (schedule.sent(), schedule.received());
                assert_eq!(sent.iter().sum::<u64>(), received.iter().sum::<u64>());
                assert_eq!(n == 1, received.iter().all(|bytes| *bytes == 0), "{algorithm} {n}");
                let mut taken = vec![0; n as usize];
                for step in schedule.steps() {
                    if let Work::Take { rank, bytes } = step.work {
                        taken[rank as usize] += bytes;
                    }
                }
                assert_eq!(taken, received, "{algorithm} over {n}, {bytes} bytes");
            }
        }
    }
}

#[test]
fn every_result_has_every_ranks_part_in_it() {
    for n in 2..=16u32 {
        for algorithm in Algorithm::ALL {
            let schedule = whole(algorithm, n, 1 << 20);
            let (mut known, mut last) = (Vec::<u32>::new(), vec![true; schedule.steps().len()]);
            let mut ends = 0u32;
            for step in schedule.steps() {
                let own = match step.work {
                    Work::Send { from, .. } => 1 << from,
                    Work::Take { rank, .. } => 1 << rank,
                };
                let before = step.after.iter().map(|at| known[*at as usize]);
                known.push(before.fold(own, |all, some| all | some));
                step.after.iter().for_each(|at| last[*at as usize] = false);
            }
            for (at, step) in schedule.steps().iter().enumerate().filter(|(at, _)| last[*at]) {
                // A staged rank's last sum waits for all that is sent in its stages.
                let Work::Take { rank, .. } = step.work else {
                    assert_eq!(algorithm, Algorithm::Staged);
                    continue;
                };
                ends |= 1 << rank;
                assert_eq!(known[at], (1 << n) - 1, "{algorithm} over {n}: rank {rank}");
            }
            let roots = (1u32 << n) - 1 - ends;
            // The root of the only tree is done when it has the sum, which others wait for.
            assert!(roots.count_ones() <= 1, "{algorithm} over {n}: {roots:b}");
        }
    }
}

#[test]
fn one_chunk_takes_what_the_formula_says() {
    let costs = Costs::H200;
    for n in 2..=16u32 {
        let (bytes, others) = (128 << 10, f64::from(n - 1) * (128 << 10) as f64 / 1e3);
        let expected = costs.launch_us + 2.1 + others / 356.0 + others / costs.take_gbs;
        let got = time(FULL, Preset::NvSwitch, n, bytes);
        assert!((got / expected - 1.0).abs() < 1e-6, "{n}: {got}, not {expected}");
    }
}

#[test]
fn no_port_ever_carries_more_than_it_can() {
    for preset in Preset::ALL {
        for n in [2, 3, 8, 13] {
            let fabric = preset.fabric(n);
            for algorithm in Algorithm::ALL {
                let predicted = predict_on(algorithm, &fabric, &Costs::H200, 3 << 20);
                let engine = schedule(algorithm, n, 3 << 20).engine();
                for (port, load) in fabric.ports().iter().zip(&predicted.loads) {
                    let name = format!("{algorithm} on {preset} over {n}: {}", port.name);
                    assert!(load.peak <= 1.0 + 1e-9, "{name}: {load:?}");
                    let least = load.bytes as f64 / 1e3 / port.capacity(engine, 1);
                    assert!(load.busy_us >= least * (1.0 - 1e-9), "{name}: {load:?}");
                    assert!(load.busy_us <= predicted.time_us, "{name}: {load:?}");
                }
                // Somewhere the limit is reached.
                assert!(predicted.loads.iter().any(|load| load.peak > 1.0 - 1e-9));
            }
        }
    }
}

#[test]
fn a_shared_link_up_is_shared() {
    let (alone, shared) = (Preset::Pcie.fabric(5), Preset::Pcie.fabric(8));
    let up = |fabric: &Fabric| fabric.ports().iter().position(|p| p.name == "up 0").unwrap();
    // Rank 4 and up are behind the second switch: 4 x 1 pairs cross, then 4 x 4.
    let load = |fabric: &Fabric| {
        let predicted = predict_on(FULL, fabric, &Costs::H200, 1 << 20);
        predicted.loads[up(fabric)]
    };
    assert_eq!(load(&alone).bytes, 4 * MIB);
    assert_eq!(load(&shared).bytes, 16 * MIB);
    let bound = 16.0 * MIB as f64 / 1e3 / 53.0;
    assert!((load(&shared).busy_us / bound - 1.0).abs() < 1e-6, "{:?}", load(&shared));
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let once = || Preset::ALL.map(|preset| predict(Algorithm::DoubleTree, preset, 7, 3_000_001));
    assert_eq!(once(), once());
}

#[test]
fn who_wins_where() {
    let fastest = |preset, world, bytes, among: &[Algorithm]| {
        let us = |algorithm: &&Algorithm| time(**algorithm, preset, world, bytes);
        *among.iter().min_by(|a, b| us(a).total_cmp(&us(b))).unwrap()
    };
    use Algorithm::{Hierarchical, Ring, Staged, Tree, TwoShot};
    let fused = [FULL, TwoShot, Staged, Ring, Tree, Algorithm::DoubleTree, Hierarchical];
    for world in [4, 8, 16] {
        assert_eq!(fastest(Preset::NvSwitch, world, 8 << 10, &fused), FULL, "{world}");
        assert_eq!(fastest(Preset::NvSwitch, world, 64 << 20, &fused), TwoShot, "{world}");
        // Where streams that share a port of a GPU slow each other down.
        let crowded = if world == 4 { Preset::Pcie } else { Preset::NvLinkPairs };
        assert_eq!(fastest(crowded, world, 64 << 20, &[TwoShot, Ring]), Ring, "{world}");
    }
    // Four cards at one switch: one stream at a time beats all at once, but not for small tensors.
    assert_eq!(fastest(Preset::Pcie, 4, 64 << 20, &[TwoShot, Staged]), Staged);
    assert_eq!(fastest(Preset::Pcie, 4, 64 << 10, &[TwoShot, Staged]), TwoShot);
    for world in [8, 16] {
        let sockets = |bytes, among: &[_]| fastest(Preset::TwoSockets, world, bytes, among);
        assert_eq!(sockets(64 << 20, &[TwoShot, Ring, Hierarchical]), Hierarchical, "{world}");
        assert_eq!(sockets(256 << 10, &fused), Hierarchical, "{world}");
        // Shared links up: the ring crosses each with one stream.
        assert_eq!(fastest(Preset::Pcie, world, 64 << 20, &fused), Ring, "{world}");
    }
}

#[test]
fn broadcasts_take_the_steps_of_their_trees() {
    let fabric = Preset::NvSwitch.fabric(8);
    let predicted = |route| predict_broadcast(route, &fabric, &Costs::H200, 0, 64 << 20);
    let steps = |route| predicted(route).steps;
    assert_eq!(Route::FUSED.map(steps), [1, 2, 7, 3, 3]);
    let copied = Spread::ALL.map(|spread| steps(Route::Scheduled(spread)));
    assert_eq!(copied, [1, 2, 7, 3, 3]);
    // A chain keeps every link busy, and the root sends the tensor once.
    assert_eq!(predicted(Route::Chain).sent_bytes, 64 * MIB);
    assert_eq!(predicted(Route::Direct).sent_bytes, 7 * 64 * MIB);
    assert!(predicted(Route::Chain).time_us < predicted(Route::Tree).time_us);
    assert!(predicted(Route::Tree).time_us < predicted(Route::Direct).time_us);
}

/// One-shot all-reduces on two H200s: (bytes, microseconds).
fn measured() -> Vec<(usize, f64)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/results/2026-11-22-2xH200.json");
    let text = std::fs::read_to_string(path).unwrap();
    let results: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rows = results["series"][0]["rows"].as_array().unwrap();
    assert_eq!(results["series"][0]["op"], "all_reduce");
    let row = |row: &serde_json::Value| {
        let us = row["ours"]["median_us"].as_f64().unwrap();
        (row["bytes"].as_u64().unwrap() as usize, us)
    };
    rows.iter().map(row).collect()
}

#[test]
fn constants_fit_the_measurements() {
    let usual = Preset::NvSwitch.fabric(2);
    // The sum of the squares of the relative errors, and the largest.
    let misfit = |latency: f64, costs: Costs| {
        let fabric = Fabric::new(usual.ports().to_vec(), &[0, 1], |from, to| {
            let path = usual.path(from, to).clone();
            Path { latency_us: latency * path.latency_us, ..path }
        });
        let error = |(bytes, us): (usize, f64)| {
            let format = if bytes > 1 << 10 { Format::Full } else { Format::Packet };
            let algorithm = Algorithm::OneShot(format);
            predict_on(algorithm, &fabric, &costs, bytes).time_us / us - 1.0
        };
        measured()
            .into_iter()
            .map(error)
            .fold((0.0, 0.0f64), |(sum, most), error| (sum + error * error, most.max(error.abs())))
    };
    let costs = Costs::H200;
    let (best, most) = misfit(1.0, costs);
    assert!(most < 0.08, "{most}");
    for by in [0.9, 1.1] {
        assert!(misfit(by, costs).0 > best);
        assert!(misfit(1.0, Costs { gap_us: by * costs.gap_us, ..costs }).0 > best);
        assert!(misfit(1.0, Costs { take_gbs: by * costs.take_gbs, ..costs }).0 > best);
    }
}
