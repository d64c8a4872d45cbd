//! Probe: do stores, loads and their ordering work between two GPUs, through the very instructions
//! that the collectives use?
//!
//! One block of one warp. The pattern of a unit depends on who wrote it, in which round and where,
//! so a stale, misplaced or zeroed unit is seen. A wrong one is recorded as `state::CORRUPT`.

use crate::abi::{
    Args, CONTROL_BYTES, PROBE_BYTES, Status, TICK_SHIFT, UNIT, phase, probe as mode, state,
};
use crate::lane::{Lane, Unit};
use crate::pipe::{Failure, aborted, record, stop};
use core::mem::offset_of;

/// Units of the pattern.
const UNITS: u32 = 120;
/// Binary logarithm of the ticks between two looks at the host's abort word, about 1 ms.
const LOOK_SHIFT: u32 = 20 - TICK_SHIFT;
const HALF: u64 = UNITS as u64 * UNIT as u64;
/// The flag follows two patterns: rounds alternate between them, since a rank may write round r+1
/// while its peer still reads round r. Round r+2 it writes only after the peer's flag r+1, which
/// comes after those reads.
const FLAG: u64 = 2 * HALF;
const _: () = assert!(FLAG as usize + UNIT <= PROBE_BYTES);

/// Carries out `args.mode` with rank `args.peer`. Rounds are numbered from `args.rows` on, a number
/// that both ranks choose above all earlier ones.
///
/// # Safety
/// As for [`super::run`]. `args.dst` has room for the pattern in mode LOAD.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn probe<L: Lane>(lane: L, args: &Args) {
    let by_host = args.host_senders >> args.peer & 1 != 0;
    let inbox = if by_host { args.host_mailbox } else { lane.peer(args.rank) };
    let (mine, theirs) =
        (inbox + CONTROL_BYTES as u64, lane.peer(args.peer) + CONTROL_BYTES as u64);
    // SAFETY: passed on to the caller.
    unsafe {
        match args.mode {
            mode::STORE => write_pattern(lane, theirs, args.rank, args.rows as u32),
            mode::LOAD => {
                let mut index = lane.thread();
                while index < UNITS {
                    let unit = lane.poll_unit(theirs + index as u64 * UNIT as u64);
                    lane.store_u32x4(args.dst + index as u64 * UNIT as u64, unit);
                    index += lane.threads();
                }
            }
            _ => {
                let start = lane.clock_ns();
                let mut round = 0;
                while round < args.rounds && exchange(lane, args, mine, theirs, round) {
                    round += 1;
                }
                if lane.thread() == 0 {
                    let elapsed = lane.clock_ns() - start;
                    let at = args.status + offset_of!(Status, probe_ns) as u64;
                    lane.put_word(at, elapsed as u32);
                    lane.put_word(at + 4, (elapsed >> 32) as u32);
                }
            }
        }
    }
}

/// The unit that `writer` puts at `index` in `round`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn pattern(writer: u32, round: u32, index: u32) -> Unit {
    let seed = (round.wrapping_mul(0x9e37_79b9) ^ writer << 24)
        .wrapping_add(index.wrapping_mul(0x85eb_ca6b));
    [seed, !seed, seed.rotate_left(13), seed ^ 0x5555_5555]
}

#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn write_pattern<L: Lane>(lane: L, area: u64, writer: u32, round: u32) {
    let mut index = lane.thread();
    while index < UNITS {
        // SAFETY: the probe area holds `UNITS` units and the flag.
        unsafe { lane.put_unit(area + index as u64 * UNIT as u64, pattern(writer, round, index)) };
        index += lane.threads();
    }
}

/// One round, the `turn`-th: data, then a flag; the peer's flag, then its data. False once it failed.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn exchange<L: Lane>(lane: L, args: &Args, mine: u64, theirs: u64, turn: u32) -> bool {
    let round = args.rows as u32 + turn;
    // A rank whose peer gave up in the first round, because nothing arrived there, is stopped by it
    // before it could take the same view of the other direction.
    let deadline = args.deadline.saturating_mul(1 + (turn != 0) as u32);
    // SAFETY: both probe areas hold `UNITS` units and the flag.
    unsafe {
        let half = (round & 1) as u64 * HALF;
        write_pattern(lane, theirs + half, args.rank, round);
        lane.sync_threads();
        if lane.thread() == 0 {
            lane.fence_system();
            lane.put_word(theirs + FLAG, round);
        }
        let came = wait_flag(lane, args, mine + FLAG, round, deadline);
        let mut wrong = false;
        let mut index = lane.thread();
        while came && index < UNITS {
            wrong |= lane.poll_unit(mine + half + index as u64 * UNIT as u64)
                != pattern(args.peer, round, index);
            index += lane.threads();
        }
        if wrong {
            give_up(lane, args, state::CORRUPT);
        }
        // Also keeps this round's reads before this rank's next flag.
        !lane.sync_threads_or(wrong || !came)
    }
}

/// Waits for the peer's flag of `round`; false if the deadline or an abort came first.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn wait_flag<L: Lane>(lane: L, args: &Args, flag: u64, round: u32, deadline: u32) -> bool {
    let now = || (lane.clock_ns() >> TICK_SHIFT) as u32;
    let since = now();
    let mut host_looks = 0;
    // SAFETY: the flag lies in this rank's mailbox for the peer.
    unsafe {
        while (lane.poll_word(flag).wrapping_sub(round) as i32) < 0 {
            lane.pause();
            let waited = now().wrapping_sub(since);
            let due = waited >> LOOK_SHIFT;
            let stopped = aborted(lane, args, due > host_looks);
            host_looks = due;
            if stopped || waited > deadline {
                let state = if stopped { state::ABORTED } else { state::TIMED_OUT };
                give_up(lane, args, state);
                return false;
            }
        }
        lane.fence_system();
    }
    true
}

/// Records that the probe failed and stops the peer. No other rank: each pair has its own verdict.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn give_up<L: Lane>(lane: L, args: &Args, state: u32) {
    let failure = Failure::new(state, phase::PROBE, args.peer);
    // SAFETY: the status page and both mailboxes are alive.
    unsafe {
        if record(lane, args, failure, [0; 2]) {
            stop(lane, args.peer);
        }
    }
}
