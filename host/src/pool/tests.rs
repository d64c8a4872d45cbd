//! Pools on simulated GPUs: the books add up, blocks never overlap, and streams never meet in a
//! block, except in the pool that is broken on purpose.

use super::*;
use crate::gpu::sim;
use proptest::prelude::*;

fn gpu(seed: u64) -> GpuRef {
    sim::devices(&sim::Config { devices: 1, seed, ..Default::default() }).remove(0)
}

fn pool(gpu: &GpuRef, kind: Kind, limit: usize) -> Pool {
    Pool::new(gpu, Config::new(kind, limit)).unwrap()
}

const STREAM: Stream = Stream(0);

#[test]
fn a_block_freed_is_used_again() {
    let gpu = gpu(1);
    for kind in [Kind::Device, Kind::Host] {
        let pool = pool(&gpu, kind, 1 << 20);
        let first = pool.alloc(5000, STREAM).unwrap();
        assert_eq!((first.bytes(), first.capacity(), first.stream()), (5000, 5120, STREAM));
        assert_eq!(first.host().is_some(), kind == Kind::Host);
        let at = first.device();
        let other = pool.alloc(5000, STREAM).unwrap();
        assert_ne!(other.device(), at);
        drop(first);
        assert_eq!(pool.alloc(5100, STREAM).unwrap().device(), at);
        let stats = pool.stats();
        assert_eq!((stats.hits, stats.misses, stats.high_water), (1, 2, 10240));
        assert_eq!((stats.requested, stats.in_use, stats.reserved()), (5000, 5120, 10240));
        assert!((stats.fragmentation() - 5240.0 / 10240.0).abs() < 1e-9);
    }
}

#[test]
fn memory_reserved_beforehand_is_found() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Device, 10_000);
    pool.reserve(2000, 3).unwrap();
    assert_eq!(pool.stats().idle, 3 * 2048);
    let blocks: Vec<_> = (0..3).map(|_| pool.alloc(2048, STREAM).unwrap()).collect();
    assert_eq!((pool.stats().hits, pool.stats().misses), (3, 0));
    drop(blocks);
    let error = pool.reserve(2000, 2).unwrap_err().to_string();
    assert_eq!(
        error,
        "pool: bytes: expected a block of at most 1792 bytes: 8192 of the limit of 10000 are \
         reserved, got 2000"
    );
}

#[test]
fn the_limit_holds_and_the_error_says_what_is_left() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Device, 8192);
    let block = pool.alloc(5120, STREAM).unwrap();
    let error = pool.alloc(4000, STREAM).err().unwrap().to_string();
    assert_eq!(
        error,
        "pool: bytes: expected a block of at most 3072 bytes: 5120 of the limit of 8192 are in \
         use, got 4000"
    );
    drop(block);
    // The idle block makes room.
    let block = pool.alloc(4096, STREAM).unwrap();
    assert_eq!((pool.stats().reserved(), pool.stats().trimmed), (4096, 1));
    drop(block);
    for (bytes, got) in [(0, "got 0"), (8193, "got 8193"), (usize::MAX, "got 18446744073709551615")]
    {
        let error = pool.alloc(bytes, STREAM).err().unwrap().to_string();
        assert!(error.starts_with("pool: bytes: expected 1 to 8192 bytes"), "{error}");
        assert!(error.ends_with(got), "{error}");
    }
}

#[test]
fn a_driver_without_memory_gets_what_is_idle() {
    let config = sim::Config { devices: 1, memory_bytes: 8192, ..Default::default() };
    let gpu = sim::devices(&config).remove(0);
    let pool = pool(&gpu, Kind::Device, 1 << 20);
    drop(pool.alloc(5120, STREAM).unwrap());
    let block = pool.alloc(6144, STREAM).unwrap();
    assert_eq!(pool.stats().reserved(), 6144);
    assert!(matches!(pool.alloc(4096, STREAM), Err(Error::Driver { .. })));
    drop(block);
    drop(pool);
    // Nothing is left behind.
    gpu.alloc(8192).unwrap();
}

#[test]
fn trimming_gives_back_what_is_idle_and_not_exported() {
    let gpu = gpu(1);
    const BLOCK: usize = 2 << 20;
    let pool = pool(&gpu, Kind::Shared, 16 * BLOCK);
    let mut exported = pool.alloc(2 * BLOCK, STREAM).unwrap();
    let at = exported.device();
    // SAFETY: nobody maps it.
    unsafe { exported.export().unwrap() };
    let kept = pool.alloc(3 * BLOCK, STREAM).unwrap();
    drop((exported, pool.alloc(8 * BLOCK, STREAM).unwrap(), pool.alloc(1, STREAM).unwrap()));
    assert_eq!(pool.trim(6 * BLOCK).unwrap(), 8 * BLOCK);
    assert_eq!(pool.trim(0).unwrap(), BLOCK);
    assert_eq!(pool.stats().reserved(), (2 + 3) * BLOCK);
    drop(kept);
    assert_eq!(pool.trim(0).unwrap(), 3 * BLOCK);
    // It is used again, though.
    assert_eq!(pool.alloc(2 * BLOCK, STREAM).unwrap().device(), at);
    // SAFETY: refused before anything is shared.
    let refused =
        unsafe { tests::pool(&gpu, Kind::Device, 4096).alloc(1, STREAM).unwrap().export() };
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
}

#[test]
fn adapting_keeps_what_the_last_two_windows_needed() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Host, 1 << 20);
    let use_at_once = |small: usize, large: usize| {
        let small: Vec<_> = (0..small).map(|_| pool.alloc(4096, STREAM).unwrap()).collect();
        let large: Vec<_> = (0..large).map(|_| pool.alloc(65536, STREAM).unwrap()).collect();
        drop((small, large));
    };
    let idle = || pool.stats().idle;
    use_at_once(3, 2);
    let all = 3 * 4096 + 2 * 65536;
    assert_eq!((pool.adapt().unwrap(), idle()), (0, all));
    // Fewer, one after the other: it is the most at a time that counts.
    for _ in 0..5 {
        use_at_once(1, 0);
    }
    assert_eq!((pool.adapt().unwrap(), idle()), (0, all));
    use_at_once(1, 1);
    // Two windows ago there were three and two.
    assert_eq!((pool.adapt().unwrap(), idle()), (2 * 4096 + 65536, 4096 + 65536));
    // What is in use counts, in this window and in the next.
    let held = [pool.alloc(4096, STREAM).unwrap(), pool.alloc(4096, STREAM).unwrap()];
    assert_eq!((pool.adapt().unwrap(), idle()), (0, 65536));
    drop(held);
    assert_eq!((pool.adapt().unwrap(), idle()), (65536, 2 * 4096));
    assert_eq!((pool.adapt().unwrap(), idle()), (0, 2 * 4096));
    assert_eq!((pool.adapt().unwrap(), idle(), pool.stats().trimmed), (2 * 4096, 0, 6));
}

#[test]
fn a_captured_stream_takes_no_block_and_a_lost_one_gives_none_back() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Device, 1 << 20);
    let stream = gpu.stream_create().unwrap();
    let mut block = pool.alloc(4096, stream).unwrap();
    gpu.capture_begin(stream).unwrap();
    assert!(matches!(pool.alloc(1, stream), Err(Error::Unsupported { .. })));
    assert!(matches!(block.move_to(STREAM), Err(Error::Unsupported { .. })));
    drop(pool.alloc(4096, STREAM).unwrap());
    // What the graph does with the block it will do again.
    drop(block);
    assert_eq!((pool.stats().retired, pool.stats().idle), (4096, 4096));
    let graph = gpu.capture_end(stream).unwrap();
    let block = pool.alloc(1024, stream).unwrap();
    // SAFETY: the graph is not running and not used again, and neither is the stream.
    unsafe {
        gpu.graph_destroy(graph).unwrap();
        gpu.stream_destroy(stream).unwrap();
    }
    drop(block);
    assert_eq!((pool.stats().retired, pool.stats().in_use), (5120, 0));
}

#[test]
fn the_host_reads_what_the_gpu_wrote_into_pinned_memory() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Host, 1 << 20);
    let block = pool.alloc(4096, STREAM).unwrap();
    // SAFETY: the block has that size, and the host reads after the wait.
    let found = unsafe {
        gpu.fill(block.device(), 7, 4096, STREAM).unwrap();
        block.wait().unwrap();
        std::slice::from_raw_parts(block.host().unwrap(), 4096)
    };
    assert!(found.iter().all(|byte| *byte == 7));
}

#[test]
fn threads_share_a_pool() {
    let gpu = gpu(1);
    let pool = pool(&gpu, Kind::Device, 1 << 20);
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (pool, gpu) = (pool.clone(), &gpu);
            scope.spawn(move || {
                let stream = gpu.stream_create().unwrap();
                for turn in 0..50 {
                    let bytes = 1000 * (1 + (thread + turn) % 3);
                    let block = pool.alloc(bytes, stream).unwrap();
                    let value = (thread * 50 + turn) as u8;
                    let mut found = vec![0; bytes];
                    // SAFETY: the block has that size.
                    unsafe {
                        gpu.fill(block.device(), value, bytes, stream).unwrap();
                        gpu.download(&mut found, block.device(), stream).unwrap();
                    }
                    assert!(found.iter().all(|byte| *byte == value));
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.hits + stats.misses, stats.in_use, stats.requested), (200, 0, 0));
}

/// Two streams use blocks in turn, each filling and then copying out; whether every copy holds what
/// its own stream wrote.
fn streams_never_meet(gpu: &GpuRef, bytes: usize, broken: bool) -> bool {
    let config = Config { broken, ..Config::new(Kind::Device, bytes) };
    let pool = Pool::new(gpu, config).unwrap();
    let streams = [gpu.stream_create().unwrap(), gpu.stream_create().unwrap()];
    let turns = 8;
    let out = gpu.alloc(turns * bytes).unwrap();
    for turn in 0..turns {
        let stream = streams[turn % 2];
        let block = pool.alloc(bytes, stream).unwrap();
        // SAFETY: both have room.
        unsafe {
            gpu.fill(block.device(), turn as u8, bytes, stream).unwrap();
            gpu.copy(out.offset(turn * bytes), block.device(), bytes, stream).unwrap();
        }
    }
    assert_eq!(pool.stats().misses, 1);
    gpu.synchronize().unwrap();
    let mut found = vec![0; turns * bytes];
    // SAFETY: it has that size.
    unsafe { gpu.download(&mut found, out, STREAM).unwrap() };
    // SAFETY: nothing uses it any more, nor the streams.
    unsafe {
        gpu.free(out).unwrap();
        streams.iter().for_each(|stream| gpu.stream_destroy(*stream).unwrap());
    }
    found.chunks(bytes).enumerate().all(|(turn, bytes)| bytes.iter().all(|b| *b == turn as u8))
}

#[test]
fn a_block_changes_streams_only_behind_its_event() {
    for seed in 0..50 {
        assert!(streams_never_meet(&gpu(seed), 4096, false), "seed {seed}");
    }
}

#[test]
fn without_the_event_streams_meet() {
    let met = (0..50).filter(|seed| !streams_never_meet(&gpu(*seed), 4096, true)).count();
    assert!(met > 0, "{met} of 50 seeds");
}

#[test]
#[ignore = "needs a GPU"]
fn pools_on_real_gpus() {
    let gpu = crate::gpu::cuda::device(0).expect("tests that need a GPU run only when asked for");
    assert!(streams_never_meet(&gpu, 64 << 20, false));
    for kind in [Kind::Device, Kind::Host, Kind::Shared] {
        let pool = pool(&gpu, kind, 32 << 20);
        let mut block = pool.alloc(1 << 20, STREAM).unwrap();
        let mut found = vec![0; 1 << 20];
        // SAFETY: the block has that size, and nobody maps what is exported.
        unsafe {
            gpu.fill(block.device(), 9, 1 << 20, STREAM).unwrap();
            gpu.download(&mut found, block.device(), STREAM).unwrap();
            assert_eq!(block.export().is_ok(), kind == Kind::Shared);
        }
        assert!(found.iter().all(|byte| *byte == 9), "{kind:?}");
        drop(block);
        assert_eq!(pool.alloc(1 << 20, STREAM).unwrap().bytes(), 1 << 20);
        assert_eq!((pool.stats().hits, pool.stats().misses), (1, 1));
    }
}

#[test]
fn a_block_moved_is_ordered_too() {
    for seed in 0..20 {
        let gpu = gpu(seed);
        let pool = pool(&gpu, Kind::Device, 1 << 20);
        let streams = [gpu.stream_create().unwrap(), gpu.stream_create().unwrap()];
        let mut block = pool.alloc(4096, streams[0]).unwrap();
        let mut found = vec![0; 4096];
        // SAFETY: the block has that size.
        unsafe {
            gpu.fill(block.device(), 3, 4096, streams[0]).unwrap();
            block.move_to(streams[1]).unwrap();
            gpu.download(&mut found, block.device(), streams[1]).unwrap();
        }
        assert!(found.iter().all(|byte| *byte == 3), "seed {seed}");
        assert_eq!(block.stream(), streams[1]);
    }
}

/// One thing that a user of a pool does.
#[derive(Clone, Debug)]
enum Action {
    Alloc { bytes: usize, stream: usize },
    Free { which: usize },
    Trim { keep: usize },
    Adapt,
    Reserve { bytes: usize, blocks: usize },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (1usize..40_000, 0usize..3).prop_map(|(bytes, stream)| Action::Alloc { bytes, stream }),
        4 => (0usize..16).prop_map(|which| Action::Free { which }),
        1 => (0usize..100_000).prop_map(|keep| Action::Trim { keep }),
        1 => Just(Action::Adapt),
        1 => (1usize..5_000, 1usize..4).prop_map(|(bytes, blocks)| Action::Reserve { bytes, blocks }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn live_blocks_never_overlap_and_the_books_add_up(
        seed in 0u64..1000, limit in 10_000usize..200_000,
        actions in proptest::collection::vec(action(), 1..80),
    ) {
        let gpu = gpu(seed);
        let pool = pool(&gpu, Kind::Device, limit);
        let streams = [STREAM, gpu.stream_create().unwrap(), gpu.stream_create().unwrap()];
        let (mut live, mut allocated): (Vec<Block>, u64) = (Vec::new(), 0);
        for action in actions {
            match action {
                Action::Alloc { bytes, stream } => {
                    let held: usize = live.iter().map(Block::capacity).sum();
                    match pool.alloc(bytes, streams[stream]) {
                        Ok(block) => {
                            allocated += 1;
                            live.push(block);
                        }
                        // Refused only where it does not fit beside what is in use.
                        Err(error) => {
                            let class = classes::class_of(Kind::Device, bytes).unwrap();
                            prop_assert!(held + class > limit, "{error}");
                        }
                    }
                }
                Action::Free { which } if !live.is_empty() => {
                    live.swap_remove(which % live.len());
                }
                Action::Free { .. } => {}
                Action::Trim { keep } => {
                    let before = pool.stats().reserved();
                    let freed = pool.trim(keep).unwrap();
                    let after = pool.stats();
                    prop_assert_eq!(before - freed, after.reserved());
                    prop_assert!(after.reserved() <= keep || after.idle == 0);
                }
                Action::Adapt => {
                    let before = pool.stats().reserved();
                    let freed = pool.adapt().unwrap();
                    prop_assert_eq!(before - freed, pool.stats().reserved());
                }
                Action::Reserve { bytes, blocks } => {
                    let before = pool.stats();
                    let reserved = pool.reserve(bytes, blocks);
                    let grown = pool.stats().idle - before.idle;
                    let class = classes::class_of(Kind::Device, bytes).unwrap();
                    prop_assert_eq!(reserved.is_ok(), grown == blocks * class);
                }
            }
            let mut ranges: Vec<_> =
                live.iter().map(|b| (b.device().0, b.device().0 + b.capacity() as u64)).collect();
            ranges.sort_unstable();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:?}");
            let stats = pool.stats();
            prop_assert_eq!(stats.in_use, live.iter().map(Block::capacity).sum::<usize>());
            prop_assert_eq!(stats.requested, live.iter().map(Block::bytes).sum::<usize>());
            prop_assert_eq!((stats.hits + stats.misses, stats.retired), (allocated, 0));
            prop_assert!(stats.reserved() <= limit && stats.in_use <= stats.high_water);
            prop_assert!((0.0..=1.0).contains(&stats.fragmentation()));
        }
        live.clear();
        prop_assert_eq!(pool.stats().in_use, 0);
        pool.trim(0).unwrap();
        prop_assert_eq!(pool.stats().reserved(), 0);
    }
}
