//! What one GPU thread can do. `ptx.rs` implements it with instructions, the simulator with
//! coroutines; nothing else in this crate knows which of the two it runs on.
//!
//! Memory comes in three kinds, and each has its own accesses:
//! - *tensors* belong to the caller and are touched by the local kernel only: plain accesses; those that
//!   all ranks have registered are accessed as slots are, between two exchanges of flags (`kernels/direct.rs`);
//! - *slots* of a mailbox are written by one peer and polled by their owner: relaxed,
//!   system-scope accesses, single 16-byte instructions that the hardware may split into their two
//!   8-byte halves, but not further (NCCL's LL protocol rests on the same);
//! - *words* (counters, credits, seals) have one writer each: 32-bit relaxed accesses, ordered
//!   against slots by [`Lane::fence_system`] where docs/protocol.md says so.

/// 16 bytes, as four 32-bit words: what one slot access moves.
pub type Unit = [u32; 4];

/// One GPU thread.
///
/// Safety, for every `unsafe` method: the address must lie in memory that this GPU may access,
/// aligned to the access, and alive until the kernel ends. Block-wide methods must be reached by
/// every thread of the block.
#[allow(clippy::missing_safety_doc, reason = "one contract, stated on the trait")]
pub trait Lane: Copy {
    /// Whether the `abi::flags::BREAK_*` switches work: only in the simulator, so that the tests can
    /// show that they notice. On a GPU the switches do not exist.
    const BREAKABLE: bool;
    /// Whether the kernels can do what `abi::flags::CHECKED` asks for: in the simulator, and on a GPU in those
    /// that were compiled for it.
    const CHECKED: bool;
    /// Whether waits have a deadline and look at abort words: everywhere but in kernels compiled to measure
    /// what that costs.
    const BOUNDED: bool;

    /// Index of this thread in its block.
    fn thread(self) -> u32;
    /// Threads in the block.
    fn threads(self) -> u32;
    /// Index of this block in the grid.
    fn block(self) -> u32;
    /// Blocks in the grid.
    fn blocks(self) -> u32;

    /// Address of `rank`'s mailbox: `Args::peers[rank]`, read where a run-time index costs nothing.
    fn peer(self, rank: u32) -> u64;
    /// `Args::table[index]`, likewise.
    fn table(self, index: u32) -> u64;

    /// Waits until every thread of the block has come here. What they stored before is visible to
    /// all of them after.
    fn sync_threads(self);
    /// [`Lane::sync_threads`], and tells every thread whether any of them brought `true`.
    fn sync_threads_or(self, value: bool) -> bool;

    /// Plain loads from a tensor.
    unsafe fn load_u8(self, address: u64) -> u32;
    /// See [`Lane::load_u8`].
    unsafe fn load_u16(self, address: u64) -> u32;
    /// See [`Lane::load_u8`].
    unsafe fn load_u32(self, address: u64) -> u32;
    /// See [`Lane::load_u8`].
    unsafe fn load_u32x2(self, address: u64) -> [u32; 2];
    /// See [`Lane::load_u8`].
    unsafe fn load_u32x4(self, address: u64) -> Unit;
    /// Plain stores to a tensor.
    unsafe fn store_u8(self, address: u64, value: u32);
    /// See [`Lane::store_u8`].
    unsafe fn store_u16(self, address: u64, value: u32);
    /// See [`Lane::store_u8`].
    unsafe fn store_u32(self, address: u64, value: u32);
    /// See [`Lane::store_u8`].
    unsafe fn store_u32x2(self, address: u64, value: [u32; 2]);
    /// See [`Lane::store_u8`].
    unsafe fn store_u32x4(self, address: u64, value: Unit);

    /// Stores a unit into a slot, a peer's or (to clean it) this rank's own, or into a registered tensor. Relaxed, system scope:
    /// it orders nothing, and other lanes may see its two 8-byte halves one by one.
    unsafe fn put_unit(self, address: u64, value: Unit);
    /// Loads a unit of this rank's own slots, or of a registered tensor. Relaxed, system scope.
    unsafe fn poll_unit(self, address: u64) -> Unit;

    /// Stores a word. Relaxed, system scope.
    unsafe fn put_word(self, address: u64, value: u32);
    /// Loads a word. Relaxed, system scope.
    unsafe fn poll_word(self, address: u64) -> u32;
    /// Loads a word before every access after it. System scope. Unlike [`Lane::fence_system`] it does not
    /// wait for what this lane has stored.
    unsafe fn poll_word_acquire(self, address: u64) -> u32;
    /// Adds to a word of this rank's own that no other thread writes meanwhile, without waiting for its
    /// old value. GPU scope.
    unsafe fn add_word(self, address: u64, value: u32);
    /// Takes the word at `address` from 0 to 1; true for the one lane that did. GPU scope.
    unsafe fn claim_word(self, address: u64) -> bool;

    /// Orders every access of this lane before it, and every store that other lanes of the block
    /// made before a block barrier this lane has passed, before every access after it. System scope.
    fn fence_system(self);

    /// Nanoseconds on a clock that all lanes of this GPU share. May tick as coarsely as 1 us.
    fn clock_ns(self) -> u64;
    /// One turn of a wait loop is over without success.
    fn pause(self);
    /// Lets go of the issue slots for about `ns` nanoseconds.
    fn sleep(self, ns: u32);

    /// f32 to f16, to nearest even.
    fn f16_from_f32(self, value: f32) -> u32;
    /// f16, in the low half of `bits`, to f32.
    fn f16_to_f32(self, bits: u32) -> f32;
    /// Two f32 to bf16, to nearest even; `low` ends in the low half.
    fn bf16x2_from_f32(self, low: f32, high: f32) -> u32;
    /// The larger value; the number where one is NaN.
    fn max_f32(self, a: f32, b: f32) -> f32;
    /// The smaller value; the number where one is NaN.
    fn min_f32(self, a: f32, b: f32) -> f32;
}
