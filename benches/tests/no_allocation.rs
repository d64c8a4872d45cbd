//! After its first call, no collective allocates: the allocator counts, and must count nothing.

use peerlane::Config;
use peerlane_benches::null_gpu::NullGpu;
use peerlane_benches::ranks::{Collective, Rank};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

/// Calls of each collective on each rank.
const CALLS: u64 = 10_000;

/// The system's allocator, with a count for each thread: tests run in threads of one process.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    COUNT.with(|count| count.set(count.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator. The count is a plain thread-local
// without a destructor, so counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: passed on to the caller.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.with(Cell::get);
    work();
    COUNT.with(Cell::get) - before
}

/// Allocations of `CALLS` calls of every rank, the ranks in turn, after one call each. `stream`
/// says on which of its two streams a rank makes its k-th call.
fn allocations_of(
    world: u32,
    bytes: usize,
    collective: Collective,
    stream: impl Fn(u64) -> usize,
) -> u64 {
    let gpus = NullGpu::several(world);
    let mut ranks = Rank::connect(&NullGpu::refs(&gpus), &Config::default(), bytes).unwrap();
    let mut round = |number| {
        for rank in &mut ranks {
            rank.call_on(stream(number), collective).unwrap();
        }
    };
    round(0);
    let counted = allocations(|| (1..=CALLS).for_each(&mut round));
    for gpu in &gpus {
        assert_eq!(gpu.launches(), CALLS + 1, "{}", collective.name());
    }
    counted
}

#[test]
fn the_allocator_counts() {
    assert_eq!(allocations(|| drop(black_box(Box::new(1)))), 1);
    assert_eq!(allocations(|| drop(black_box(vec![0u8; 100]))), 1);
    assert_eq!(allocations(|| ()), 0);
}

#[test]
fn no_collective_allocates() {
    for collective in Collective::ALL {
        for world in [2, 8] {
            // One size for packets, one for the largest algorithm that the world takes.
            for bytes in [16 << 10, 16 << 20] {
                let counted = allocations_of(world, bytes, collective, |_| 0);
                assert_eq!(counted, 0, "{}, {world} ranks, {bytes} bytes", collective.name());
            }
        }
    }
}

#[test]
fn a_change_of_stream_allocates_nothing() {
    for collective in Collective::ALL {
        let counted = allocations_of(2, 16 << 10, collective, |call| call as usize % 2);
        assert_eq!(counted, 0, "{}", collective.name());
    }
}

#[test]
fn a_call_beside_allocates_nothing() {
    for world in [2, 8] {
        let gpus = NullGpu::several(world);
        let refs = NullGpu::refs(&gpus);
        let mut ranks = Rank::connect(&refs, &Config::default(), 16 << 10).unwrap();
        let mut round = |_| ranks.iter_mut().for_each(|rank| rank.call_beside().unwrap());
        round(0);
        assert_eq!(allocations(|| (1..=CALLS).for_each(&mut round)), 0, "{world} ranks");
    }
}
