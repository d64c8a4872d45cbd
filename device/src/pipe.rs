//! The verbs that algorithms are written in: begin, reserve, put, take, turn, end.
//!
//! A *pipe* carries chunks from one rank to another through one *lane* (one block on either side).
//! It is a first-in first-out queue of slots in the receiver's mailbox, in its GPU's memory or, for
//! senders that cannot reach that, in host memory. Invariants:
//! - a free slot holds `abi::FREE` in every word; a receiver sees arrival by the words changing,
//!   and cleans what it has read (calls that seal all, from host memory: sees the seal, and cleans nothing);
//! - `sent` and `received` count slots and are never reset; both ends of a lane move them by the
//!   same amount in every call, whatever the number of blocks;
//! - a sender writes slot number s only once `credit > s - slots`: the receiver has cleaned the
//!   slot's last use;
//! - every wait ends by data, by the deadline or by an abort word.
//!
//! docs/protocol.md argues why each reuse is safe.

use crate::abi::{
    Args, Control, FREE, Format, Layout, MAX_RANKS, Operation, Status, TICK_SHIFT, UNIT,
    check_words, flags, lane_words, phase, state,
};
use crate::lane::{Lane, Unit};
use crate::unrolled;
use core::marker::PhantomData;
use core::mem::offset_of;

/// A format's encoding: payload words to a unit of the wire and back.
pub trait Form: Copy {
    /// Which format this is.
    const FORMAT: Format;
    /// Payload words in a unit.
    const WORDS: usize;
    /// The unit that carries `payload` as slot number `number`.
    fn encode(payload: Unit, number: u32) -> Unit;
    /// Whether `unit` has arrived completely as slot number `number`.
    fn arrived(unit: Unit, number: u32) -> bool;
    /// The payload of an arrived unit.
    fn decode(unit: Unit) -> Unit;
    /// Whether `payload` looks like a free slot once it has arrived.
    fn hidden(payload: Unit) -> bool;
}

/// Data and flag in one store: each 8-byte half carries its own flag.
#[derive(Clone, Copy)]
pub struct Packet;

/// Four payload words a unit.
#[derive(Clone, Copy)]
pub struct Full;

/// The flag of slot number `number`: never `FREE`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn tag(number: u32) -> u32 {
    number & (FREE >> 1)
}

impl Form for Packet {
    const FORMAT: Format = Format::Packet;
    const WORDS: usize = 2;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn encode(payload: Unit, number: u32) -> Unit {
        [payload[0], tag(number), payload[1], tag(number)]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn arrived(unit: Unit, number: u32) -> bool {
        unit[1] == tag(number) && unit[3] == tag(number)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn decode(unit: Unit) -> Unit {
        [unit[0], unit[2], 0, 0]
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn hidden(_: Unit) -> bool {
        false
    }
}

impl Form for Full {
    const FORMAT: Format = Format::Full;
    const WORDS: usize = 4;

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn encode(payload: Unit, _: u32) -> Unit {
        payload
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn arrived(unit: Unit, _: u32) -> bool {
        !Full::hidden(unit)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn decode(unit: Unit) -> Unit {
        unit
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn hidden(payload: Unit) -> bool {
        // FREE is the largest word, so one comparison of the maximum looks at all four.
        payload[0].max(payload[1]).max(payload[2].max(payload[3])) == FREE
    }
}

/// One thread's part in one call.
pub struct Call<'a, L, F> {
    pub(crate) lane: L,
    pub(crate) args: &'a Args,
    /// This block's lane.
    pub(crate) number: u32,
    /// Address of this lane's counters in this rank's mailbox.
    words: u64,
    /// Whether this thread keeps the books of the pipes to and from the rank of its own number.
    pub(crate) books: bool,
    /// Whether it exchanges with that rank what checked calls do: also where no pipe leads there.
    pub(crate) checks: bool,
    /// Whether it has returned the credits of earlier calls.
    returned: bool,
    /// How the first failed wait of this thread failed, if one has.
    pub(crate) failure: Failure,
    form: PhantomData<F>,
}

/// How a wait failed, in one word, since a register holds it through the whole kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Failure(u32);

impl Failure {
    const NONE: Failure = Failure(0);
    /// Another thread of the block knows why.
    pub(crate) const ELSEWHERE: Failure = Failure(1);

    /// A wait for `peer` in `phase` that ended in `state`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn new(state: u32, phase: u32, peer: u32) -> Failure {
        Failure(state << 16 | phase << 8 | peer)
    }

    /// The same, knowing whether it was the rank's first.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn noted(self, first: bool) -> Failure {
        Failure(self.0 | (first as u32) << 31)
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn is_first(self) -> bool {
        self.0 >> 31 != 0
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn state(self) -> u32 {
        self.0 >> 16 & 0x7fff
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn phase(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn peer(self) -> u32 {
        self.0 & 0xff
    }
}

/// Where a slot lies that may be written, and whose it is.
#[derive(Clone, Copy)]
pub struct Room {
    address: u64,
    peer: u32,
}

impl Room {
    /// For a chunk that goes nowhere.
    pub const NOWHERE: Room = Room { address: 0, peer: 0 };
}

/// How long a wait has lasted.
pub(crate) struct Patience {
    turns: u32,
    /// When it looked at the clock first, in ticks; 0 before.
    since: u32,
}

impl Patience {
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) const fn new() -> Patience {
        Patience { turns: 0, since: 0 }
    }
}

/// Turns of a wait loop between two looks at the clock and the abort word: more than a wait takes
/// that succeeds in the usual time, so such a wait pays nothing for them.
const TURNS_PER_LOOK: u32 = 128;
/// Whoever looks up within the first [`HOST_LOOK_WINDOW`] ticks of every so many, about 1 ms, looks at the host's abort
/// word too; who has waited for longer than [`HOST_LOOK_PATIENCE`], always. The word lies behind PCIe: when every waiting warp
/// read it at each look, the reads alone held up calls for milliseconds. That the clock says so takes no register.
const HOST_LOOK_PERIOD: u32 = 64;
const HOST_LOOK_WINDOW: u32 = 8;
const HOST_LOOK_PATIENCE: u32 = 1024;
/// Turns between two looks at the sender's seal, which arrives after the hidden data.
const TURNS_PER_SEAL: u32 = 4;
/// In every stretch of so many slots there is one of [`SEAL_RENEWAL`], and calls that begin there renew their
/// seals: a seal 2^31 slots old would look as if it were ahead, and most calls seal nothing.
const SEAL_STRETCH: u32 = 1 << 30;
/// More slots than any call uses whose slots have 1 KiB or more; renewals are rare, since they fence.
const SEAL_RENEWAL: u32 = 1 << 24;
/// Nanoseconds between two polls of host memory. Each is a read over PCIe, and polls in vain must not
/// crowd out payload.
const HOST_POLL_NS: u32 = 100;

/// # Safety
/// One contract for all verbs: `args` is what [`Args`] says it is, and the peers named take part in
/// the call.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the impl")]
impl<'a, L: Lane, F: Form> Call<'a, L, F> {
    /// Begins a call that uses the pipes to and from the ranks in `peers` (a bit each).
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn begin(lane: L, args: &'a Args, peers: u32) -> Self {
        // Calls that seal all have the upper half of the lanes to themselves: nobody looks for FREE
        // there, so what came through host memory need not be cleaned.
        let first = if seals_all::<F>(args) { args.layout.lanes / 2 } else { 0 };
        let number = first + lane.block();
        let words = lane.peer(args.rank) + args.layout.words(number) as u64;
        let thread = lane.thread();
        let other = thread < args.world && thread != args.rank;
        let books = other && peers >> thread & 1 != 0;
        let checks = if args.operation == Operation::Gather as u32 { books } else { other };
        let failure = Failure::NONE;
        let mut call = Call {
            lane,
            args,
            number,
            words,
            books,
            checks,
            returned: false,
            failure,
            form: PhantomData,
        };
        if call.is_checked() {
            // SAFETY: passed on to the caller.
            unsafe { call.compare_signatures() };
        }
        call
    }

    /// Returns to their senders the slots that earlier calls consumed. Every path to a wait or a
    /// barrier passes here first, or ranks could wait for each other's credits for ever.
    ///
    /// That it is not the end of those calls needs no fence where the slots lie in this GPU's memory:
    /// a kernel's stores are complete there before the next kernel of the stream begins. Stores
    /// to host memory are then on their way, and the credit may take another.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) unsafe fn return_credits(&mut self) {
        if self.books && !self.returned {
            self.returned = true;
            // SAFETY: a word of the peer's mailbox that only this rank writes.
            unsafe {
                let thread = self.lane.thread();
                let sent = self.sent(thread);
                let renews = sent.wrapping_sub(SEAL_STRETCH / 2) % SEAL_STRETCH < SEAL_RENEWAL;
                if renews || self.by_host(thread) {
                    self.lane.fence_system();
                }
                if renews && self.may_seal() {
                    self.lane.put_word(self.peer_word(thread, lane_words::SEALED), sent);
                }
                self.return_credit(thread, self.received(thread));
            }
        }
    }

    /// Ends the call, once this thread has taken all it needed. The thread whose number is a peer's
    /// rank says how many slots went to that peer and came from it; other threads' numbers are
    /// not looked at.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn end(mut self, sent: u32, received: u32) {
        let (lane, thread) = (self.lane, self.lane.thread());
        if self.is_checked() {
            // SAFETY: passed on to the caller.
            unsafe { self.compare_sums() };
        }
        if !self.ok() && self.failure != Failure::ELSEWHERE {
            // Waits that fail after the first do so at once, so the end of the kernel is soon enough to tell.
            // SAFETY: the status page and all mailboxes are alive as long as the communicator.
            unsafe {
                if self.failure.is_first() {
                    leave_record(lane, self.args, self.failure, [0; 2]);
                }
                // Whoever comes here first: the one who failed first may stand at a barrier.
                stop_all(lane, self.args);
            }
        }
        // SAFETY: the counters and the control block lie in this rank's mailbox, and this thread
        // is their only writer on this rank.
        unsafe {
            self.return_credits();
            // No thread reads the counters after this.
            lane.sync_threads();
            // Additions rather than stores: nothing waits for the old values.
            if self.books {
                let counter = |offset: usize| self.words + (offset + 4 * thread as usize) as u64;
                lane.add_word(counter(lane_words::SENT), sent);
                lane.add_word(counter(lane_words::RECEIVED), received);
            }
            if lane.block() == 0 && thread == 0 {
                lane.add_word(lane.peer(self.args.rank) + offset_of!(Control, epoch) as u64, 1);
            }
        }
    }

    /// The thread itself.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn lane(&self) -> L {
        self.lane
    }

    /// Whether this thread may still write results: no wait of it has failed.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn ok(&self) -> bool {
        self.failure == Failure::NONE
    }

    /// The number of the first slot that goes to `peer` in this call.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn sent(&self, peer: u32) -> u32 {
        // SAFETY: a counter of this rank's mailbox.
        unsafe { self.lane.load_u32(self.words + (lane_words::SENT + 4 * peer as usize) as u64) }
    }

    /// The number of the first slot that comes from `peer` in this call.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn received(&self, peer: u32) -> u32 {
        // SAFETY: a counter of this rank's mailbox.
        unsafe {
            self.lane.load_u32(self.words + (lane_words::RECEIVED + 4 * peer as usize) as u64)
        }
    }

    /// Whether `peer` writes into this rank's host mailbox.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) fn by_host(&self, peer: u32) -> bool {
        self.args.host_senders >> peer & 1 != 0
    }

    /// Address of this rank's mailbox that `peer` writes to.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) fn inbox(&self, peer: u32) -> u64 {
        if self.by_host(peer) { self.args.host_mailbox } else { self.lane.peer(self.args.rank) }
    }

    /// Address of `peer`'s word among this rank's words at `offset`, in this lane.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn inbox_word(&self, peer: u32, offset: usize) -> u64 {
        let lane = self.args.layout.words(self.number) as usize;
        self.inbox(peer) + (lane + offset + 4 * peer as usize) as u64
    }

    /// Whether every chunk of this call is sealed, so that one word tells of its arrival.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub fn seals_all(&self) -> bool {
        seals_all::<F>(self.args)
    }

    /// Tells every peer that all threads of this block have come here, by slot number `index` of this call, and waits until
    /// this block of every peer has. What it stored before is visible to this block after. False for all
    /// threads if one of them has waited in vain. `without` is the test-only switch that leaves it all out.
    ///
    /// The barrier orders the other threads' accesses before this thread's fence, the fence orders them before the
    /// packet; at the other end the same in reverse. Without the first, peers would see old data or have theirs
    /// overwritten while they are still read; without the second, this block would read ahead.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn meet(&mut self, index: u32, phase: u32, without: u32) -> bool {
        let (lane, thread) = (self.lane, self.lane.thread());
        if self.broken(without) {
            return true;
        }
        // SAFETY: passed on to the caller.
        unsafe {
            self.return_credits();
            if !self.broken(flags::BREAK_SYNC) {
                lane.sync_threads();
            }
            if self.books {
                let fences = !self.broken(flags::BREAK_FENCE);
                if fences {
                    lane.fence_system();
                }
                let number = self.sent(thread).wrapping_add(index);
                let room = self.reserve(thread, number);
                self.put_units(room, 0, number, [[0; 4]]);
                let number = self.received(thread).wrapping_add(index);
                self.take::<1>(thread, number, 0, phase);
                if fences {
                    lane.fence_system();
                }
            }
            !lane.sync_threads_or(!self.ok())
        }
    }

    /// Waits until `peer` has freed slot number `number`, and returns where that lies.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn reserve(&mut self, peer: u32, number: u32) -> Room {
        let (lane, args) = (self.lane, self.args);
        // SAFETY: the credit is a word of this rank's mailbox.
        unsafe {
            let credit = self.inbox_word(peer, lane_words::CREDIT);
            let mut patience = Patience::new();
            // Both wrap, so their distance counts. It may be negative: where this thread has no unit
            // in the chunk, the peer may have taken the others' and returned the slot already.
            while number.wrapping_sub(lane.poll_word(credit)) as i32 >= args.layout.slots as i32 {
                if self.broken(flags::BREAK_CREDIT)
                    || !self.keep_waiting(&mut patience, peer, phase::CREDIT)
                {
                    break;
                }
            }
        }
        Room { address: self.lane.peer(peer) + self.slot(peer, args.rank, number), peer }
    }

    /// Stores units of slot number `number`, in `room`: the `index`-th and those `threads` apart after it. Relaxed: only what each unit itself carries tells the receiver
    /// that it is there.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn put_units<const N: usize>(
        &self,
        room: Room,
        index: u32,
        number: u32,
        payloads: [Unit; N],
    ) {
        if !self.ok() {
            return;
        }
        unrolled!(N, |u| {
            let at =
                room.address + (index as u64 + u as u64 * self.lane.threads() as u64) * UNIT as u64;
            // SAFETY: `room` came from `reserve`, and a slot has more than `index` units.
            unsafe { self.lane.put_unit(at, F::encode(payloads[u], number)) };
        });
        if self.is_checked() {
            // SAFETY: passed on to the caller.
            unsafe { self.note(check_words::SENT, room.peer, number, index, payloads) };
        }
    }

    /// Ends the only turn of sending: as [`Call::turn`], but without a barrier where there is nothing
    /// to tell.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn seal(&mut self, to: u32, sent: u32, hidden: bool) {
        // SAFETY: passed on to the caller.
        unsafe {
            if F::FORMAT as u32 == Format::Packet as u32 {
                self.return_credits();
            } else {
                self.turn(to, sent, hidden, 0, 0);
            }
        }
    }

    /// Ends a turn of the block: all its threads come here after their last `put` and `take` of it.
    ///
    /// If any thread put a unit that looks free (`hidden`), or chunks are all sealed, tells each rank in `to` that the first
    /// `sent` slots of this call are complete. Returns to each rank in `from` the first `taken` slots
    /// of this call, a number that only the thread of that rank is asked for.
    ///
    /// The barrier orders the other threads' stores before this thread's fence, and the fence orders
    /// them before the words.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn turn(&mut self, to: u32, sent: u32, hidden: bool, from: u32, taken: u32) {
        let (lane, thread) = (self.lane, self.lane.thread());
        // SAFETY: words of the peers' mailboxes that only this rank writes.
        unsafe {
            self.return_credits();
            let hidden = if self.broken(flags::BREAK_SYNC) {
                hidden
            } else if F::FORMAT as u32 == Format::Packet as u32 {
                lane.sync_threads();
                false
            } else {
                lane.sync_threads_or(hidden)
            };
            let seals = self.books
                && (hidden || self.seals_all())
                && to >> thread & 1 != 0
                && !self.broken(flags::BREAK_SEAL);
            let releases = self.books && taken != 0 && from >> thread & 1 != 0;
            if seals || releases {
                if !self.broken(flags::BREAK_FENCE) {
                    lane.fence_system();
                }
                if seals && self.may_seal() {
                    let sealed = self.peer_word(thread, lane_words::SEALED);
                    lane.put_word(sealed, self.sent(thread).wrapping_add(sent));
                }
                if releases {
                    self.return_credit(thread, self.received(thread).wrapping_add(taken));
                }
            }
        }
    }

    /// Ends turn number `turn` of a reduction, which has sent chunk `turn` to each of `peers` and after
    /// which chunks before it have been taken, one a turn and rank. `needed` says whether a later
    /// chunk needs their slots.
    ///
    /// The last turns leave returning their slots to the next call: the fence waits for everything
    /// that was just sent. The barrier stays: warps that drift apart use up the slots unevenly, and
    /// 16 MiB took 66 us instead of 55.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn release_taken(&mut self, peers: u32, turn: u32, needed: bool) {
        // SAFETY: passed on to the caller.
        unsafe { self.turn(peers, turn + 1, false, peers, if needed { turn } else { 0 }) };
    }

    /// Waits for `N` units of slot number `number` from `peer`: the `index`-th and those `threads`
    /// apart after it. Cleans them if anybody polls such slots, and returns their payloads, which mean nothing once `ok` is
    /// false.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn take<const N: usize>(
        &mut self,
        peer: u32,
        number: u32,
        index: u32,
        phase: u32,
    ) -> [Unit; N] {
        let lane = self.lane;
        let slot = self.inbox(peer) + self.slot(self.args.rank, peer, number);
        let first = slot + index as u64 * UNIT as u64;
        let step = lane.threads() as u64 * UNIT as u64;
        let mut units = [[0; 4]; N];
        // SAFETY: the units lie in this rank's slots; nobody writes them between their arrival and
        // the next credit.
        unsafe {
            let mut patience = Patience::new();
            // Asking for a word until it is there costs PCIe less than asking for all the data.
            let awaits_seal = self.seals_all() && self.by_host(peer);
            loop {
                let looks = awaits_seal || patience.turns % TURNS_PER_SEAL == TURNS_PER_SEAL - 1;
                let sealed = looks && self.sealed(peer, number);
                if sealed || !awaits_seal {
                    // All loads before the first use, so that they are in flight together.
                    unrolled!(N, |u| {
                        units[u] = lane.poll_unit(first + u as u64 * step);
                    });
                    if sealed || self.all_arrived(&units, number) {
                        break;
                    }
                }
                if !self.keep_waiting(&mut patience, peer, phase) {
                    break;
                }
            }
            if !awaits_seal && !self.broken(flags::BREAK_CLEAN) {
                unrolled!(N, |u| {
                    lane.put_unit(first + u as u64 * step, [FREE; 4]);
                });
            }
        }
        unrolled!(N, |u| {
            units[u] = F::decode(units[u]);
        });
        if self.is_checked() {
            // SAFETY: passed on to the caller.
            unsafe { self.note(check_words::TAKEN, peer, number, index, units) };
        }
        units
    }

    /// Waits for the `index`-th unit of slot number `number` from `peer` and leaves it where it is. Only for
    /// payload that is never hidden.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub unsafe fn wait_unit(&mut self, peer: u32, number: u32, index: u32, phase: u32) {
        let slot = self.inbox(peer) + self.slot(self.args.rank, peer, number);
        let at = slot + index as u64 * UNIT as u64;
        let mut patience = Patience::new();
        // SAFETY: the unit lies in this rank's slots; nobody writes it between its arrival and
        // the next credit.
        unsafe {
            while !F::arrived(self.lane.poll_unit(at), number)
                && self.keep_waiting(&mut patience, peer, phase)
            {}
        }
    }

    /// Whether `peer` has sealed slot number `number`: what is there is all there, whatever it looks
    /// like.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn sealed(&self, peer: u32, number: u32) -> bool {
        if F::FORMAT as u32 == Format::Packet as u32 {
            return false;
        }
        let seal = self.inbox_word(peer, lane_words::SEALED);
        // Before the unit's load: pairs with the fence in `turn`.
        // SAFETY: a word of this rank's mailbox.
        let seal = unsafe { self.lane.poll_word_acquire(seal) };
        // The seal counts the slots before it; the distance wraps.
        (seal.wrapping_sub(number) as i32) > 0
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn all_arrived<const N: usize>(&self, units: &[Unit; N], number: u32) -> bool {
        let mut all = true;
        unrolled!(N, |u| {
            all &= if F::WORDS == 4 && self.broken(flags::BREAK_TEAR) {
                units[u][0] != FREE
            } else {
                F::arrived(units[u], number)
            };
        });
        all
    }

    /// Whether no wait of this rank has failed, in this call or before. A seal speaks for all slots before it, and who
    /// has failed has left some of them as they were.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn may_seal(&self) -> bool {
        let own = self.lane.peer(self.args.rank);
        // SAFETY: a word of this rank's mailbox.
        unsafe { self.lane.poll_word(own + offset_of!(Control, claim) as u64) == 0 }
    }

    /// Offset in `receiver`'s mailbox of slot number `number` of the pipe from `sender` to it.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn slot(&self, receiver: u32, sender: u32, number: u32) -> u64 {
        let source = Layout::source(sender, receiver, self.args.world);
        self.args.layout.slot(source, self.number, number) as u64
    }

    /// Address of this rank's word among `peer`'s words at `offset`, in the same lane.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) fn peer_word(&self, peer: u32, offset: usize) -> u64 {
        let lane = self.args.layout.words(self.number) as usize;
        let word = lane + offset + 4 * self.args.rank as usize;
        self.lane.peer(peer) + word as u64
    }

    /// Tells `peer` how many of its slots this rank has consumed and cleaned.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    unsafe fn return_credit(&self, peer: u32, consumed: u32) {
        // SAFETY: a word of the peer's mailbox that only this rank writes.
        unsafe { self.lane.put_word(self.peer_word(peer, lane_words::CREDIT), consumed) };
    }

    /// Whether the test-only switch `flag` is on. Never on a GPU.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn broken(&self, flag: u32) -> bool {
        L::BREAKABLE && self.args.flags & flag != 0
    }

    /// Another turn of a wait for `peer`; false once a wait has failed, this one or one before.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(crate) fn keep_waiting(&mut self, patience: &mut Patience, peer: u32, phase: u32) -> bool {
        // SAFETY: a word of the peer's mailbox that only this rank writes.
        unsafe { self.return_credits() };
        if self.by_host(peer) {
            self.lane.sleep(HOST_POLL_NS);
        } else {
            self.lane.pause();
        }
        patience.turns = patience.turns.wrapping_add(1);
        if L::BOUNDED && patience.turns.is_multiple_of(TURNS_PER_LOOK) && self.ok() {
            let state = self.look_up(patience);
            if state != state::OK {
                // Before the barrier behind which another thread might seal.
                // SAFETY: a word of this rank's mailbox.
                let first = unsafe { claim(self.lane, self.args) };
                self.failure = Failure::new(state, phase, peer).noted(first);
            }
        }
        self.ok()
    }

    /// The slow part of a wait: clock and abort words. Says how the wait fails, if it does.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn look_up(&self, patience: &mut Patience) -> u32 {
        let (lane, args) = (self.lane, self.args);
        // Never 0, which says that there was no look yet.
        let now = (lane.clock_ns() >> TICK_SHIFT) as u32 | 1;
        if patience.since == 0 {
            patience.since = now;
        }
        let waited = now.wrapping_sub(patience.since);
        // SAFETY: passed on to the caller.
        let is_first = || unsafe { epoch(lane, args) } == 0;
        if waited > args.deadline && (waited > args.first_deadline || !is_first()) {
            return state::TIMED_OUT;
        }
        let host = now % HOST_LOOK_PERIOD < HOST_LOOK_WINDOW || waited > HOST_LOOK_PATIENCE;
        // SAFETY: passed on to the caller.
        if unsafe { aborted(lane, args, host) } { state::ABORTED } else { state::OK }
    }
}

#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn seals_all<F: Form>(args: &Args) -> bool {
    F::FORMAT as u32 == Format::Full as u32 && args.flags & flags::SEAL_ALL != 0
}

/// Calls that this rank has completed.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn epoch<L: Lane>(lane: L, args: &Args) -> u32 {
    // SAFETY: a word of this rank's own.
    unsafe { lane.load_u32(lane.peer(args.rank) + offset_of!(Control, epoch) as u64) }
}

/// Whether somebody has stopped this rank: a peer in this GPU's memory or, if `host` asks for a look
/// over PCIe, a host or a peer that writes into the host mailbox.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn aborted<L: Lane>(lane: L, args: &Args, host: bool) -> bool {
    const ABORT: u64 = offset_of!(Control, abort) as u64;
    // SAFETY: the words are alive as long as the communicator.
    unsafe {
        lane.poll_word(lane.peer(args.rank) + ABORT) != 0
            || host
                && (lane.poll_word(args.status + offset_of!(Status, abort) as u64) != 0
                    || args.host_mailbox != 0 && lane.poll_word(args.host_mailbox + ABORT) != 0)
    }
}

/// Stops every rank, unless somebody in these GPUs' memory has.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn stop_all<L: Lane>(lane: L, args: &Args) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut rank = if aborted(lane, args, false) { args.world } else { 0 };
        while rank < args.world {
            stop(lane, rank);
            rank += 1;
        }
    }
}

/// Notes that a wait of this rank has failed; whether it is the first to do so.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn claim<L: Lane>(lane: L, args: &Args) -> bool {
    // SAFETY: a word of this rank's mailbox.
    unsafe { lane.claim_word(lane.peer(args.rank) + offset_of!(Control, claim) as u64) }
}

/// Stops the waits of `rank`.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn stop<L: Lane>(lane: L, rank: u32) {
    // SAFETY: all mailboxes are alive as long as the communicator.
    unsafe { lane.put_word(lane.peer(rank) + offset_of!(Control, abort) as u64, 1) };
}

/// Leaves the record of a failed wait; false if another thread of this rank has. `theirs` is what the peer
/// called, where that is what failed.
///
/// # Safety
/// `args` is what [`Args`] says it is.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub unsafe fn record<L: Lane>(lane: L, args: &Args, failure: Failure, theirs: [u64; 2]) -> bool {
    // SAFETY: passed on to the caller.
    unsafe {
        let first = claim(lane, args);
        if first {
            leave_record(lane, args, failure, theirs);
        }
        first
    }
}

/// Tells the host how the rank's first failed wait failed.
///
/// # Safety
/// As for [`record`], by the thread whose [`claim`] was the first.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
unsafe fn leave_record<L: Lane>(lane: L, args: &Args, failure: Failure, theirs: [u64; 2]) {
    // SAFETY: the status page and all mailboxes are alive as long as the communicator.
    unsafe {
        let epoch = epoch(lane, args);
        let record = |offset: usize, value: u32| lane.put_word(args.status + offset as u64, value);
        record(offset_of!(Status, operation), args.operation);
        record(offset_of!(Status, peer), failure.peer());
        record(offset_of!(Status, phase), failure.phase());
        record(offset_of!(Status, block), lane.block());
        record(offset_of!(Status, epoch), epoch);
        // What the wait exceeded, by little: the time itself would have taken a register through the kernel.
        let deadline =
            if epoch == 0 { args.deadline.max(args.first_deadline) } else { args.deadline };
        record(offset_of!(Status, waited), deadline);
        if L::CHECKED && failure.state() == state::MISMATCH {
            // One by one: an array that is indexed would lie in local memory.
            let word = |index: usize, value: u64| {
                let at = offset_of!(Status, signatures) + 8 * index;
                record(at, value as u32);
                record(at + 4, (value >> 32) as u32);
            };
            word(0, args.signature[0]);
            word(1, args.signature[1]);
            word(2, theirs[0]);
            word(3, theirs[1]);
        }
        // The host reads the record once it sees the state.
        lane.fence_system();
        record(offset_of!(Status, state), failure.state());
    }
}

/// A bit for every rank but `rank`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
pub fn everyone_else(world: u32, rank: u32) -> u32 {
    const { assert!(MAX_RANKS <= 16) };
    ((1 << world) - 1) & !(1 << rank)
}
