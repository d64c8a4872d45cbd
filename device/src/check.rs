//! Checked calls: ranks compare what they are about to do before any data are used, and checksums of all that
//! travelled before the call ends.
//!
//! Invariant: each block exchanges with the same block of every rank that takes part, a *head* when it
//! begins (the call's signature), a *foot* when it ends (the checksum of all that it has ever sent to that rank), and a
//! *verdict* once all feet that came to it were right. So a call ends well on all ranks or on none: what one rank took wrong
//! and passed on is no other rank's result. All are packets whose flag is the number of the call, and each has one place: a head
//! is written over only after the verdict of its call has come, which its reader sends after it has read the head; a foot only
//! after the head of the next call has come, a verdict after the foot of the next one. All go both ways, whichever way the
//! data go.
//!
//! A checksum is a sum over units, so the order does not matter, and neither does which thread adds. Every word
//! is multiplied by an odd number that depends on its place: what changes one word changes the sum.

use crate::abi::{UNIT, check_words, flags, phase, state};
use crate::lane::{Lane, Unit};
use crate::pipe::{Call, Failure, Form, Packet, Patience, record, stop_all};
use crate::unrolled;

/// The checksum of one unit's payload, which lies at `index` of slot number `number`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn checksum(payload: Unit, number: u32, index: u32) -> u32 {
    let place = number.wrapping_mul(0x9e37_79b9) ^ index.wrapping_mul(0x85eb_ca6b) | 1;
    let [a, b, c, d] = payload;
    let words = a
        .wrapping_add(b.wrapping_mul(3))
        .wrapping_add(c.wrapping_mul(5))
        .wrapping_add(d.wrapping_mul(7));
    place.wrapping_mul(words)
}

/// # Safety
/// The contract of all verbs, stated on [`Call`].
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the impl")]
impl<L: Lane, F: Form> Call<'_, L, F> {
    /// Whether this call is checked. Never, at no cost, in kernels that were not compiled for it.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) fn is_checked(&self) -> bool {
        L::CHECKED && self.args.flags & flags::CHECKED != 0
    }

    /// Address of `rank`'s entry of `size` bytes at `offset` in this lane's part of the checks of the mailbox at
    /// `mailbox`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn entry(&self, mailbox: u64, offset: usize, size: usize, rank: u32) -> u64 {
        mailbox
            + self.args.layout.checks(self.number) as u64
            + (offset + size * rank as usize) as u64
    }

    /// Address of one of this rank's own words.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn own_entry(&self, offset: usize, rank: u32) -> u64 {
        self.entry(self.lane.peer(self.args.rank), offset, 4, rank)
    }

    /// Adds units to what was sent to `peer` or taken from it.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) unsafe fn note<const N: usize>(
        &self,
        sum: usize,
        peer: u32,
        number: u32,
        index: u32,
        units: [Unit; N],
    ) {
        let mut total = 0u32;
        unrolled!(N, |u| {
            let index = index + u as u32 * self.lane.threads();
            // A packet carries two of a payload's words, whatever the others hold.
            let [a, b, c, d] = units[u];
            let carried = if F::WORDS == 2 { [a, b, 0, 0] } else { [a, b, c, d] };
            total = total.wrapping_add(checksum(carried, number, index));
        });
        // SAFETY: a word of this rank's own, which other threads only add to.
        unsafe { self.lane.add_word(self.own_entry(sum, peer), total) };
    }

    /// The number of this call between this block and that of the rank of this thread's number.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn call_number(&self) -> u32 {
        let at = self.own_entry(check_words::CALLS, self.lane.thread());
        // SAFETY: a word of this rank's own.
        unsafe { self.lane.poll_word(at) }.wrapping_add(1)
    }

    /// Waits for the packet with the number `call` at `address`, from the rank of this thread's number.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn receive(&mut self, address: u64, call: u32, phase: u32) -> Unit {
        let (lane, peer) = (self.lane, self.lane.thread());
        let mut patience = Patience::new();
        // SAFETY: a unit of this rank's mailbox that only that rank writes.
        unsafe {
            loop {
                let unit = lane.poll_unit(address);
                if Packet::arrived(unit, call) || !self.keep_waiting(&mut patience, peer, phase) {
                    return Packet::decode(unit);
                }
            }
        }
    }

    /// Exchanges signatures. Where one differs no thread of the block goes on.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) unsafe fn compare_signatures(&mut self) {
        let (lane, thread, rank) = (self.lane, self.lane.thread(), self.args.rank);
        // SAFETY: units of the peer's mailbox that only this rank writes, and the other way round.
        unsafe {
            self.return_credits();
            if self.checks {
                let call = self.call_number();
                let there = self.entry(lane.peer(thread), check_words::HEAD, 2 * UNIT, rank);
                let here = self.entry(self.inbox(thread), check_words::HEAD, 2 * UNIT, thread);
                let [first, second] = self.args.signature;
                lane.put_unit(there, Packet::encode(halves(first), call));
                lane.put_unit(there + UNIT as u64, Packet::encode(halves(second), call));
                let [a, b, ..] = self.receive(here, call, phase::SIGNATURE);
                let [c, d, ..] = self.receive(here + UNIT as u64, call, phase::SIGNATURE);
                let theirs = [whole(a, b), whole(c, d)];
                if self.ok() && theirs != [first, second] {
                    self.refuse(Failure::new(state::MISMATCH, phase::SIGNATURE, thread), theirs);
                }
            }
            if lane.sync_threads_or(!self.ok()) && self.ok() {
                self.failure = Failure::ELSEWHERE;
            }
        }
    }

    /// Exchanges checksums, if no wait of the block has failed, and then that they were right.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) unsafe fn compare_sums(&mut self) {
        let (lane, thread, rank) = (self.lane, self.lane.thread(), self.args.rank);
        // SAFETY: as above.
        unsafe {
            self.return_credits();
            // What the block's threads have added is in the sums after this.
            let failed = lane.sync_threads_or(!self.ok());
            let call = if self.checks { self.call_number() } else { 0 };
            if !failed && self.checks {
                let there = self.entry(lane.peer(thread), check_words::FOOT, UNIT, rank);
                let here = self.entry(self.inbox(thread), check_words::FOOT, UNIT, thread);
                let sent = lane.poll_word(self.own_entry(check_words::SENT, thread));
                lane.put_unit(there, Packet::encode([sent, 0, 0, 0], call));
                let [theirs, ..] = self.receive(here, call, phase::CHECKSUM);
                let taken = lane.poll_word(self.own_entry(check_words::TAKEN, thread));
                if self.ok() && theirs != taken {
                    self.refuse(Failure::new(state::CORRUPT, phase::CHECKSUM, thread), [0; 2]);
                }
            }
            let failed = failed | lane.sync_threads_or(!self.ok());
            if !failed && self.checks {
                let there = self.entry(lane.peer(thread), check_words::VERDICT, UNIT, rank);
                let here = self.entry(self.inbox(thread), check_words::VERDICT, UNIT, thread);
                lane.put_unit(there, Packet::encode([0; 4], call));
                self.receive(here, call, phase::VERDICT);
                lane.add_word(self.own_entry(check_words::CALLS, thread), 1);
            }
        }
    }

    /// Leaves the record at once and stops every rank.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn refuse(&mut self, failure: Failure, theirs: [u64; 2]) {
        // SAFETY: passed on to the caller.
        unsafe {
            if record(self.lane, self.args, failure, theirs) {
                stop_all(self.lane, self.args);
            }
        }
        self.failure = Failure::ELSEWHERE;
    }
}

/// A word as the payload of a packet.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn halves(word: u64) -> Unit {
    [word as u32, (word >> 32) as u32, 0, 0]
}

/// The word whose halves these are.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn whole(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}
