//! Which GPUs belong together, and which is the best middle.
//!
//! Pure: functions of a matrix of rates, `[from][to]`, none where there is no link. A link counts as
//! much as its slower direction. The same matrix gives the same answer on every rank.
//!
//! The rule for islands: GPUs and groups merge in the order of their *slowest* mutual link, fastest
//! first (complete linkage). Merging stops at the first clear gap: where the next merge would take
//! in a link that the previous one beats by [`GAP`], or one that is not there. So every pair within an
//! island has a link, and where all links are about alike there is one island.

/// A link is clearly faster than another from this factor on. Links of one kind differ by a few
/// percent; NVLink and PCIe, or a switch and the way between sockets, by more than this.
pub const GAP: f64 = 1.5;

/// Of GPUs whose worst links differ by less than this factor, the lowest becomes the hub: noise is
/// not to choose.
pub const TIE: f64 = 1.05;

/// The islands, each in ascending order, by their lowest GPU.
pub fn islands(rates: &[Vec<Option<f64>>]) -> Vec<Vec<u32>> {
    let mut groups: Vec<Vec<u32>> = (0..rates.len() as u32).map(|gpu| vec![gpu]).collect();
    let mut previous = None;
    while let Some((rate, into, from)) = best_merge(rates, &groups) {
        if rate <= 0.0 || previous.is_some_and(|previous| previous >= GAP * rate) {
            break;
        }
        previous = Some(rate);
        // `from` comes after `into`, so groups stay ordered by their lowest GPU.
        let members = groups.remove(from);
        groups[into].extend(members);
        groups[into].sort_unstable();
    }
    groups
}

/// The two groups whose slowest mutual link is fastest, the earliest of equals: its rate and both
/// indices, in ascending order. None if there is only one group.
fn best_merge(rates: &[Vec<Option<f64>>], groups: &[Vec<u32>]) -> Option<(f64, usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    for (first, a) in groups.iter().enumerate() {
        for (second, b) in groups.iter().enumerate().skip(first + 1) {
            let pairs = a.iter().flat_map(|&x| b.iter().map(move |&y| (x, y)));
            let slowest = pairs.map(|(x, y)| both_ways(rates, x, y)).fold(f64::INFINITY, f64::min);
            if best.is_none_or(|(rate, ..)| slowest > rate) {
                best = Some((slowest, first, second));
            }
        }
    }
    best
}

/// The GPU of `members` with the best worst link to the others, the lowest where it makes no
/// difference. One that reaches more of the others comes first. None if there is none.
pub fn hub(rates: &[Vec<Option<f64>>], members: &[u32]) -> Option<u32> {
    let mut members = members.to_vec();
    members.sort_unstable();
    let standing = |gpu: u32| {
        let others = members.iter().filter(|&&other| other != gpu);
        let links = others.map(|&other| both_ways(rates, gpu, other)).filter(|&rate| rate > 0.0);
        links.fold((0, f64::INFINITY), |(count, worst), rate| (count + 1, worst.min(rate)))
    };
    let standings: Vec<(usize, f64)> = members.iter().map(|&gpu| standing(gpu)).collect();
    let most = standings.iter().map(|(reached, _)| *reached).max()?;
    let reaching = || standings.iter().filter(|(reached, _)| *reached == most);
    let best = reaching().map(|(_, worst)| *worst).fold(0.0, f64::max);
    let chosen =
        standings.iter().position(|&(reached, worst)| reached == most && worst * TIE >= best)?;
    Some(members[chosen])
}

/// What a link gives in its slower direction; 0 if one is missing.
fn both_ways(rates: &[Vec<Option<f64>>], a: u32, b: u32) -> f64 {
    let rate = |from: u32, to: u32| rates[from as usize][to as usize].unwrap_or(0.0);
    rate(a, b).min(rate(b, a))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rates = Vec<Vec<Option<f64>>>;

    fn machine(world: u32, rate: impl Fn(u32, u32) -> f64) -> Rates {
        let link = |from, to| Some(rate(from, to)).filter(|rate| from != to && *rate > 0.0);
        (0..world).map(|from| (0..world).map(|to| link(from, to)).collect()).collect()
    }

    /// A few percent up and down, different for each pair and direction.
    fn noise(from: u32, to: u32) -> f64 {
        1.0 + f64::from((from * 31 + to * 17) % 7) / 100.0
    }

    fn everyone(rates: &Rates) -> Vec<u32> {
        (0..rates.len() as u32).collect()
    }

    #[test]
    fn a_switch_is_one_island_in_every_world() {
        for world in 1..=16 {
            let rates = machine(world, |a, b| 370.0 * noise(a, b));
            assert_eq!(islands(&rates), [everyone(&rates)], "{world} GPUs");
            let even = machine(world, |_, _| 370.0);
            assert_eq!(hub(&even, &everyone(&even)), Some(0), "{world} GPUs");
        }
        assert_eq!(islands(&Vec::new()), Vec::<Vec<u32>>::new());
        assert_eq!(hub(&Vec::new(), &[]), None);
    }

    #[test]
    fn nvlink_pairs_over_pcie_are_islands_in_every_world() {
        for world in 3..=16 {
            let pair = |a: u32, b: u32| if a / 2 == b / 2 { 50.0 } else { 12.0 };
            let rates = machine(world, |a, b| pair(a, b) * noise(a, b));
            let expected: Vec<Vec<u32>> =
                (0..world).step_by(2).map(|low| (low..world.min(low + 2)).collect()).collect();
            assert_eq!(islands(&rates), expected, "{world} GPUs");
        }
    }

    #[test]
    fn two_sockets_with_switches() {
        // Two GPUs a switch, two switches a socket.
        let rate = |switch: f64, socket: f64, system: f64| {
            move |a: u32, b: u32| {
                let rate = if a / 2 == b / 2 {
                    switch
                } else if a / 4 == b / 4 {
                    socket
                } else {
                    system
                };
                rate * noise(a, b)
            }
        };
        // The switch is about as fast as the way across the socket: sockets are the islands.
        let sockets = machine(8, rate(25.0, 20.0, 9.0));
        assert_eq!(islands(&sockets), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        // The first clear gap counts, even if a larger one follows.
        let switches = machine(8, rate(25.0, 14.0, 5.0));
        assert_eq!(islands(&switches), [[0, 1], [2, 3], [4, 5], [6, 7]]);
        // No gap of 1.5 anywhere.
        assert_eq!(islands(&machine(8, rate(25.0, 20.0, 16.0))).len(), 1);
    }

    #[test]
    fn a_gpu_without_p2p_is_alone_and_no_hub() {
        for alone in 0..5 {
            let rates = machine(5, |a, b| if a == alone || b == alone { 0.0 } else { 20.0 });
            let others: Vec<u32> = (0..5).filter(|&gpu| gpu != alone).collect();
            let mut expected = vec![others.clone(), vec![alone]];
            expected.sort();
            assert_eq!(islands(&rates), expected);
            assert_eq!(hub(&rates, &everyone(&rates)), Some(others[0]));
        }
        // None has: nobody to wait for, GPU 0 is as good as any.
        let none = machine(3, |_, _| 0.0);
        assert_eq!(islands(&none), [[0], [1], [2]]);
        assert_eq!(hub(&none, &[2, 1, 0]), Some(0));
    }

    #[test]
    fn nvlink_pairs_stay_islands_beside_a_gpu_without_p2p() {
        let rate = |a: u32, b: u32| match (a, b) {
            (4, _) | (_, 4) => 0.0,
            _ if a / 2 == b / 2 => 50.0,
            _ => 12.0,
        };
        assert_eq!(islands(&machine(5, rate)), [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn a_link_is_as_fast_as_its_slower_direction() {
        // 0 -> 1 is fast, 1 -> 0 is not.
        let rates = machine(3, |a, b| if (a, b) == (1, 0) { 5.0 } else { 20.0 });
        assert_eq!(islands(&rates), [vec![0, 2], vec![1]]);
        assert_eq!(hub(&rates, &[0, 1, 2]), Some(2));
        // One direction missing is no link.
        let half = machine(2, |a, _| if a == 0 { 20.0 } else { 0.0 });
        assert_eq!(islands(&half), [[0], [1]]);
    }

    #[test]
    fn a_chain_is_no_island() {
        // 0 - 1 - 2 by NVLink, 0 and 2 by PCIe only: mutual links decide.
        let rates = machine(3, |a, b| if a.abs_diff(b) == 1 { 50.0 } else { 12.0 });
        assert_eq!(islands(&rates), [vec![0, 1], vec![2]]);
        assert_eq!(hub(&rates, &[0, 1, 2]), Some(1));
    }

    #[test]
    fn noise_does_not_choose_the_hub() {
        let rates = machine(4, |a, b| 100.0 + f64::from(a.max(b)));
        assert_eq!(hub(&rates, &[3, 2, 1, 0]), Some(0));
        let far = machine(4, |a, b| if a.min(b) == 0 { 50.0 } else { 100.0 });
        // All of them have a link to 0.
        assert_eq!(hub(&far, &[0, 1, 2, 3]), Some(0));
        assert_eq!(hub(&far, &[1, 2, 3]), Some(1));
    }
}
