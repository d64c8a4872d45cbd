//! Ranks compare what they are about to launch.
//!
//! Each rank writes the signature of its k-th common call with each peer before it launches, and
//! reads the peer's k-th if it is there already. The fence between the two makes sure that of two
//! ranks calling at once at least one sees the other. Cost: one store and one load per peer, on the
//! host; the GPU checks nothing. A rank that sees a mismatch takes its entry back and launches
//! nothing, so it can call again with the right arguments.

use crate::error::{Error, Result};
use crate::rendezvous::Segment;
use peerlane_device::abi::{DType, Operation, ReduceOp, Wire};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Calls that a rank may run ahead of the slowest before its entries are overwritten, after which a
/// mismatch that old goes unnoticed.
const DEPTH: u64 = 256;

/// What must be equal on all ranks that take part in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    pub operation: Operation,
    /// Element type and its travelling type; `None` where only bytes count.
    pub element: Option<(DType, Wire)>,
    pub op: ReduceOp,
    /// The algorithm's code.
    pub algorithm: u8,
    pub root: u32,
    pub bytes: usize,
    /// A hash of what else must agree: gather's rows and widths.
    pub shape: u32,
}

impl Signature {
    /// All of it in two words.
    pub(crate) fn words(self) -> [u64; 2] {
        let element = match self.element {
            None => 0,
            Some((dtype, wire)) => 1 + 2 * dtype as u64 + (wire == Wire::Bf16) as u64,
        };
        let head = self.operation as u64
            | element << 8
            | (self.op as u64) << 16
            | (self.algorithm as u64) << 24
            | (self.root as u64 & 0xff) << 28;
        [head ^ (self.shape as u64) << 36, self.bytes as u64]
    }

    /// How a person would say it; `words` may be another rank's.
    pub(crate) fn describe([head, bytes]: [u64; 2]) -> String {
        let operation =
            Operation::from_code((head & 0xff) as u32).map_or("unknown", Operation::name);
        let element = match (head >> 8 & 0xff) as usize {
            0 => String::new(),
            code => {
                let (dtype, wire) = (DType::ALL[((code - 1) / 2).min(2)], (code - 1) % 2);
                let op = ReduceOp::ALL[(head >> 16 & 3) as usize].name();
                format!(" {} {op}{}", dtype.name(), if wire == 1 { " over bf16" } else { "" })
            }
        };
        format!(
            "{operation}{element} of {bytes} bytes (root {}, variant {:x})",
            head >> 28 & 0xff,
            head >> 24 & 0xf | head >> 36 << 4
        )
    }
}

/// One call of one rank with one peer. All zeros: none yet.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Entry {
    /// Number of the call plus 1, once the words are valid.
    number: AtomicU64,
    words: [AtomicU64; 2],
}

/// How many entries the log of `world` ranks has.
pub(crate) fn entries(world: u32) -> usize {
    (world as u64 * world as u64 * DEPTH) as usize
}

/// The logs of all pairs of a group.
pub(crate) struct CallLog {
    world: u32,
    /// A number that no other log of this process has.
    number: u64,
    entries: Entries,
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Where the entries are.
enum Entries {
    /// In this process, whose ranks they are.
    Own(Box<[Entry]>),
    /// In the memory that the ranks' processes share.
    Shared(Arc<Segment>),
}

impl CallLog {
    /// The log of ranks of this process.
    pub(crate) fn new(world: u32) -> CallLog {
        let own = (0..entries(world)).map(|_| Entry::default()).collect();
        CallLog { world, number: next_number(), entries: Entries::Own(own) }
    }

    /// The log of ranks that share `segment`.
    pub(crate) fn shared(world: u32, segment: Arc<Segment>) -> CallLog {
        CallLog { world, number: next_number(), entries: Entries::Shared(segment) }
    }

    /// A number that no other log has: of this process's ranks, or of those that share memory.
    pub(crate) fn number(&self) -> u64 {
        match &self.entries {
            Entries::Own(_) => u64::from(std::process::id()) << 32 ^ self.number,
            Entries::Shared(segment) => segment.number(),
        }
    }

    /// The `call`-th entry that `from` wrote for `to`.
    fn entry(&self, from: u32, to: u32, call: u64) -> &Entry {
        let pair = (from * self.world + to) as u64;
        let index = (pair * DEPTH + call % DEPTH) as usize;
        match &self.entries {
            Entries::Own(own) => &own[index],
            Entries::Shared(segment) => {
                assert!(index < entries(self.world));
                // SAFETY: the segment has that many, all zeros at first, and every process
                // accesses them as what they are: atomics.
                unsafe { &*segment.log().add(index) }
            }
        }
    }

    /// Announces `rank`'s next call to each rank in `peers` (a bit each) and compares it with theirs.
    /// `calls[p]` counts the calls that `rank` made together with p; it is advanced on success.
    pub(crate) fn enter(
        &self,
        rank: u32,
        peers: u32,
        calls: &mut [u64],
        signature: Signature,
    ) -> Result<()> {
        let words = signature.words();
        let each = (0..self.world).filter(|p| peers >> p & 1 != 0);
        for peer in each.clone() {
            let call = calls[peer as usize];
            let mine = self.entry(rank, peer, call);
            mine.words[0].store(words[0], Ordering::Relaxed);
            mine.words[1].store(words[1], Ordering::Relaxed);
            mine.number.store(call + 1, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        for peer in each.clone() {
            let call = calls[peer as usize];
            if let Some(theirs) = self.read(peer, rank, call).filter(|theirs| *theirs != words) {
                for peer in each {
                    self.entry(rank, peer, calls[peer as usize]).number.store(0, Ordering::Release);
                }
                return Err(Error::Mismatch {
                    op: signature.operation.name(),
                    rank,
                    peer,
                    call,
                    mine: Signature::describe(words),
                    theirs: Signature::describe(theirs),
                });
            }
        }
        for peer in each {
            calls[peer as usize] += 1;
        }
        Ok(())
    }

    /// Takes all entries of `rank` back, as if it had made no calls.
    pub(crate) fn forget(&self, rank: u32) {
        for (peer, call) in
            (0..self.world).flat_map(|peer| (0..DEPTH).map(move |call| (peer, call)))
        {
            self.entry(rank, peer, call).number.store(0, Ordering::Release);
        }
    }

    /// The words of `from`'s `call`-th entry for `to`, if it is there and stays there while they
    /// are read.
    fn read(&self, from: u32, to: u32, call: u64) -> Option<[u64; 2]> {
        let entry = self.entry(from, to, call);
        let valid = || entry.number.load(Ordering::Acquire) == call + 1;
        if !valid() {
            return None;
        }
        let words =
            [entry.words[0].load(Ordering::Relaxed), entry.words[1].load(Ordering::Relaxed)];
        fence(Ordering::Acquire);
        valid().then_some(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: usize) -> Signature {
        Signature {
            operation: Operation::AllReduce,
            element: Some((DType::Bf16, Wire::Native)),
            op: ReduceOp::Sum,
            algorithm: 1,
            root: 0,
            bytes,
            shape: 0,
        }
    }

    #[test]
    fn equal_calls_pass_however_far_one_rank_runs_ahead() {
        let log = CallLog::new(2);
        let (mut a, mut b) = ([0; 2], [0; 2]);
        for size in 0..1000 {
            log.enter(0, 0b10, &mut a, sum(size)).unwrap();
        }
        for size in 0..1000 {
            log.enter(1, 0b01, &mut b, sum(size)).unwrap();
        }
    }

    #[test]
    fn forgotten_calls_are_compared_with_none() {
        let log = CallLog::new(2);
        log.enter(0, 0b10, &mut [0; 2], sum(64)).unwrap();
        log.enter(1, 0b01, &mut [0; 2], sum(32)).unwrap_err();
        log.forget(0);
        log.enter(1, 0b01, &mut [0; 2], sum(32)).unwrap();
        log.enter(0, 0b10, &mut [0; 2], sum(64)).unwrap_err();
        log.enter(0, 0b10, &mut [0; 2], sum(32)).unwrap();
    }

    #[test]
    fn the_second_rank_learns_of_a_mismatch_and_may_call_again() {
        let log = CallLog::new(3);
        let (mut a, mut b) = ([0; 3], [0; 3]);
        log.enter(0, 0b110, &mut a, sum(64)).unwrap();
        let error = log.enter(1, 0b101, &mut b, sum(32)).unwrap_err().to_string();
        assert!(
            error.contains("64 bytes") && error.contains("32 bytes") && error.contains("rank 0"),
            "{error}"
        );
        assert_eq!(b, [0; 3]);
        log.enter(1, 0b101, &mut b, sum(64)).unwrap();
    }
}
