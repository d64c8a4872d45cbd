//! Calls take no memory that they do not give back. One test, since it looks at the whole process.

use peerlane::cases::Rng;
use peerlane::gpu::{GpuRef, sim};
use peerlane::{Communicator, Config, Sizing};
use peerlane_tests::{Group, Machine, Script, random_jobs, small};

/// Bytes of memory that this process has in use.
fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = text.split(' ').nth(1).expect("the second number is the resident set");
    4096 * pages.parse::<usize>().expect("it is a number")
}

/// The largest piece of memory that a GPU has left.
fn free_bytes(gpu: &GpuRef) -> usize {
    let fits = |bytes: usize| {
        let Ok(memory) = gpu.alloc(bytes) else { return false };
        // SAFETY: nobody has used it.
        unsafe { gpu.free(memory) }.expect("it was allocated");
        true
    };
    let (mut low, mut high) = (0usize, 1usize << 30);
    while low + 1 < high {
        let middle = low.midpoint(high);
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[test]
fn calls_and_communicators_leave_nothing_behind() {
    let memory_bytes = 64 << 20;
    let machine = Machine::simulated(&sim::Config {
        devices: 2,
        seed: 1,
        memory_bytes,
        ..Default::default()
    });
    let gpu = machine.gpus(1)[0].clone();
    let empty = free_bytes(&gpu);
    assert_eq!(empty as u64, memory_bytes, "all memory is free at first");
    let jobs = random_jobs(2, 50, 2000, &mut Rng::new(1, "memory"));
    let script = Script::new(2, &jobs, 1);
    let mut group = Group::connect(&machine, 2, &small(2));
    let run = |group: &mut Group| group.run(&script).map(drop).expect("the calls are right");
    (0..5).for_each(|_| run(&mut group));
    let (device, host) = (free_bytes(&gpu), resident_bytes());
    (0..60).for_each(|_| run(&mut group));
    assert_eq!(free_bytes(&gpu), device, "3000 calls take no device memory");
    let grown = resident_bytes().saturating_sub(host);
    assert!(grown < 1 << 20, "3000 calls took {grown} bytes of host memory");
    drop(group);
    for _ in 0..20 {
        let config = Config { mailbox_bytes: 4 << 20, ..Config::default() };
        let _ = Group::connect(&machine, 2, &config);
    }
    assert_eq!(free_bytes(&gpu), empty, "closed communicators give everything back");
    let small = small(2);
    let sizing =
        Sizing { least_mailbox_bytes: small.mailbox_bytes, patience: 1, ..Sizing::default() };
    let mut group = Group::connect(&machine, 2, &Config { sizing: Some(sizing), ..small });
    let mut adapt = |calls: bool| {
        if calls {
            run(&mut group);
        }
        let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        Communicator::adapt_all(&mut ranks).expect("there is memory").changed()
    };
    let mut free = Vec::new();
    for _ in 0..6 {
        assert!(adapt(true) && adapt(false), "it grows, and shrinks when idle");
        free.push(free_bytes(&gpu));
    }
    assert!(free.iter().all(|bytes| *bytes == free[0]), "{free:?}");
    drop(group);
    assert_eq!(free_bytes(&gpu), empty, "memory that was replaced is given back");
    recovery_leaves_nothing_behind(&machine, &gpu, empty);
}

/// Files that this process has open.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

/// Groups that fail and recover again and again, and lose a rank in the end.
fn recovery_leaves_nothing_behind(machine: &Machine, gpu: &GpuRef, empty: usize) {
    let jobs = random_jobs(3, 10, 2000, &mut Rng::new(2, "memory"));
    let round = |script: &Script| {
        let mut group = Group::connect(machine, 3, &small(3));
        for _ in 0..5 {
            group.run(script).expect("the calls are right");
            group.ranks[0].communicator.abort();
            let mut ranks: Vec<_> =
                group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
            Communicator::recover_all(&mut ranks).expect("all are there");
        }
        group.ranks.remove(1);
        let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        Communicator::shrink_all(&mut ranks, &[1]).expect("two are left");
        drop(group);
        (free_bytes(gpu), open_files(), resident_bytes())
    };
    let script = Script::new(3, &jobs, 2);
    let (device, files, host) = round(&script);
    assert_eq!(device, empty, "recovering and shrinking give everything back");
    for _ in 0..10 {
        let (device, open, _) = round(&script);
        assert_eq!((device, open), (empty, files));
    }
    let grown = resident_bytes().saturating_sub(host);
    assert!(grown < 1 << 20, "10 groups that recovered took {grown} bytes of host memory");
}
