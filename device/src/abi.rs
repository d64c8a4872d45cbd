//! What host and device agree on: kernel names and arguments, the mailbox layout, status codes.
//!
//! Invariant: nothing in here is spelled a second time anywhere else. The host fills [`Args`],
//! the kernels read it; both compute addresses in a mailbox with [`Layout`] only.

/// Most ranks in one communicator.
pub const MAX_RANKS: usize = 16;

/// A free slot of a pipe holds this value in every 32-bit word; a word that differs has arrived.
///
/// All ones is what `memset(0xff)` leaves, and as data it is a rare NaN for every float type.
/// Data that do contain it are announced with a flag (`pipe::Call::turn`).
pub const FREE: u32 = u32::MAX;

/// Bytes of one unit: the widest store a GPU thread makes, and what a thread polls at once.
pub const UNIT: usize = 16;

/// Units that one thread moves at once where a chunk is large enough.
pub const UNROLL: usize = 4;

/// Most threads in a block of any kernel; the entries carry it as their launch bound.
///
/// Two such blocks fit a multiprocessor, so that one sends while the other waits at its barrier.
pub const MAX_THREADS: u32 = 256;

/// Version of everything in this file. Ranks with different versions refuse each other.
pub const ABI_VERSION: u32 = 4;

/// Element type of a tensor, for reductions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DType {
    /// IEEE binary32.
    F32 = 0,
    /// IEEE binary16.
    F16 = 1,
    /// bfloat16: the upper half of a binary32.
    Bf16 = 2,
}

impl DType {
    /// All element types, in the order of their codes.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

    /// Bytes of one element in the tensor.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

/// How two values become one. Values are f32 while they are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ReduceOp {
    /// Addition, in rank order.
    Sum = 0,
    /// The larger value; a NaN loses against a number.
    Max = 1,
    /// The smaller value; a NaN loses against a number.
    Min = 2,
    /// The sum divided by the world size, before the one rounding.
    Avg = 3,
}

impl ReduceOp {
    /// All operators, in the order of their codes.
    pub const ALL: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg];

    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Max => "max",
            ReduceOp::Min => "min",
            ReduceOp::Avg => "avg",
        }
    }
}

/// How payload is laid out in a 16-byte unit on its way between two GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Format {
    /// Data and flag in one store: 8 bytes of payload and the sequence number twice, as in NCCL's
    /// LL protocol. Needs no other signal whatever the payload is; half the link is flags.
    Packet = 0,
    /// 16 bytes of payload. A receiver sees arrival by the word no longer being [`FREE`], as in
    /// TensorRT-LLM's Lamport all-reduce; payload that itself holds [`FREE`] is sealed with a flag.
    Full = 1,
}

impl Format {
    /// Both formats, in the order of their codes.
    pub const ALL: [Format; 2] = [Format::Packet, Format::Full];

    /// Bytes of payload in one unit.
    pub const fn payload(self) -> usize {
        match self {
            Format::Packet => 8,
            Format::Full => 16,
        }
    }

    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Packet => "packet",
            Format::Full => "full",
        }
    }
}

/// What a kernel does, for its name and for error records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Operation {
    /// All ranks end with the reduction of all ranks' tensors.
    AllReduce = 1,
    /// Rank r ends with the r-th part of the reduction.
    ReduceScatter = 2,
    /// All ranks end with the concatenation of all ranks' tensors.
    AllGather = 3,
    /// All ranks end with the root's tensor.
    Broadcast = 4,
    /// The root ends with the row-wise concatenation of the members' tensors.
    Gather = 5,
    /// No rank passes before all have come.
    Barrier = 6,
    /// A reduction of tensors on one GPU.
    LocalReduce = 7,
    /// Stores, loads and ordering between two GPUs.
    Probe = 8,
}

impl Operation {
    /// The operation whose code is `code`.
    pub const fn from_code(code: u32) -> Option<Operation> {
        Some(match code {
            1 => Operation::AllReduce,
            2 => Operation::ReduceScatter,
            3 => Operation::AllGather,
            4 => Operation::Broadcast,
            5 => Operation::Gather,
            6 => Operation::Barrier,
            7 => Operation::LocalReduce,
            8 => Operation::Probe,
            _ => return None,
        })
    }

    /// The name used on the command line, in errors and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::AllReduce => "all_reduce",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllGather => "all_gather",
            Operation::Broadcast => "broadcast",
            Operation::Gather => "gather",
            Operation::Barrier => "barrier",
            Operation::LocalReduce => "local_reduce",
            Operation::Probe => "probe",
        }
    }
}

/// Calls `$callback!` with one row per kernel: `Variant "symbol" body::<parameters> barriers;`.
///
/// `barriers` is the number of block-wide barriers written in the body, which the builder compares
/// with the PTX: rustc's jump threading and LLVM both know how to duplicate one (docs/memory-model.md).
#[macro_export]
macro_rules! for_each_kernel {
    ($callback:ident) => {
        $callback! {
            AllReduceOneShotF32Packet "peerlane_all_reduce_one_shot_f32_packet" one_shot::<F32, Packet> 4;
            AllReduceOneShotF32Full "peerlane_all_reduce_one_shot_f32_full" one_shot::<F32, Full> 4;
            AllReduceOneShotF16Packet "peerlane_all_reduce_one_shot_f16_packet" one_shot::<F16, Packet> 4;
            AllReduceOneShotF16Full "peerlane_all_reduce_one_shot_f16_full" one_shot::<F16, Full> 4;
            AllReduceOneShotBf16Packet "peerlane_all_reduce_one_shot_bf16_packet" one_shot::<Bf16, Packet> 4;
            AllReduceOneShotBf16Full "peerlane_all_reduce_one_shot_bf16_full" one_shot::<Bf16, Full> 4;
            AllReduceOneShotF32AsBf16Packet "peerlane_all_reduce_one_shot_f32_as_bf16_packet" one_shot::<F32AsBf16, Packet> 4;
            AllReduceOneShotF32AsBf16Full "peerlane_all_reduce_one_shot_f32_as_bf16_full" one_shot::<F32AsBf16, Full> 4;
            AllReduceTwoShotF32 "peerlane_all_reduce_two_shot_f32" two_shot::<F32> 2;
            AllReduceTwoShotF16 "peerlane_all_reduce_two_shot_f16" two_shot::<F16> 2;
            AllReduceTwoShotBf16 "peerlane_all_reduce_two_shot_bf16" two_shot::<Bf16> 2;
            AllReduceTwoShotF32AsBf16 "peerlane_all_reduce_two_shot_f32_as_bf16" two_shot::<F32AsBf16> 2;
            AllReduceStagedF32 "peerlane_all_reduce_staged_f32" staged::<F32> 2;
            AllReduceStagedF16 "peerlane_all_reduce_staged_f16" staged::<F16> 2;
            AllReduceStagedBf16 "peerlane_all_reduce_staged_bf16" staged::<Bf16> 2;
            AllReduceStagedF32AsBf16 "peerlane_all_reduce_staged_f32_as_bf16" staged::<F32AsBf16> 2;
            AllReduceRingF32 "peerlane_all_reduce_ring_f32" ring::<F32> 2;
            AllReduceRingF16 "peerlane_all_reduce_ring_f16" ring::<F16> 2;
            AllReduceRingBf16 "peerlane_all_reduce_ring_bf16" ring::<Bf16> 2;
            AllReduceRingF32AsBf16 "peerlane_all_reduce_ring_f32_as_bf16" ring::<F32AsBf16> 2;
            AllReduceTreeF32 "peerlane_all_reduce_tree_f32" tree::<F32> 2;
            AllReduceTreeF16 "peerlane_all_reduce_tree_f16" tree::<F16> 2;
            AllReduceTreeBf16 "peerlane_all_reduce_tree_bf16" tree::<Bf16> 2;
            AllReduceTreeF32AsBf16 "peerlane_all_reduce_tree_f32_as_bf16" tree::<F32AsBf16> 2;
            AllReduceDirectF32 "peerlane_all_reduce_direct_f32" direct::<F32> 5;
            AllReduceDirectF16 "peerlane_all_reduce_direct_f16" direct::<F16> 5;
            AllReduceDirectBf16 "peerlane_all_reduce_direct_bf16" direct::<Bf16> 5;
            AllReduceDirectF32AsBf16 "peerlane_all_reduce_direct_f32_as_bf16" direct::<F32AsBf16> 5;
            ReduceScatterF32 "peerlane_reduce_scatter_f32" reduce_scatter::<F32> 2;
            ReduceScatterF16 "peerlane_reduce_scatter_f16" reduce_scatter::<F16> 2;
            ReduceScatterBf16 "peerlane_reduce_scatter_bf16" reduce_scatter::<Bf16> 2;
            ReduceScatterF32AsBf16 "peerlane_reduce_scatter_f32_as_bf16" reduce_scatter::<F32AsBf16> 2;
            AllGatherPacket "peerlane_all_gather_packet" all_gather::<Packet> 2;
            AllGatherFull "peerlane_all_gather_full" all_gather::<Full> 3;
            BroadcastPacket "peerlane_broadcast_packet" broadcast::<Packet> 2;
            BroadcastFull "peerlane_broadcast_full" broadcast::<Full> 3;
            BroadcastTree "peerlane_broadcast_tree" tree_broadcast::<> 2;
            GatherPacket "peerlane_gather_packet" gather::<Packet> 3;
            GatherFull "peerlane_gather_full" gather::<Full> 4;
            LocalReduceF32 "peerlane_local_reduce_f32" local_reduce::<F32> 0;
            LocalReduceF16 "peerlane_local_reduce_f16" local_reduce::<F16> 0;
            LocalReduceBf16 "peerlane_local_reduce_bf16" local_reduce::<Bf16> 0;
            Barrier "peerlane_barrier" barrier::<> 1;
            Probe "peerlane_probe" probe::<> 2;
            Stream "peerlane_stream" stream::<> 0;
        }
    };
}

macro_rules! kernel_table {
    ($($variant:ident $symbol:literal $body:ident::<$($parameter:ident),*> $barriers:literal;)*) => {
        /// One compiled kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        #[allow(missing_docs, reason = "a variant is its operation, element type and format")]
        pub enum Kernel { $($variant),* }

        impl Kernel {
            /// Every kernel, in the order of their numbers.
            pub const ALL: &'static [Kernel] = &[$(Kernel::$variant),*];

            /// The symbol in the PTX.
            pub const fn symbol(self) -> &'static str {
                match self { $(Kernel::$variant => $symbol),* }
            }

            /// Block-wide barriers written in the body.
            pub const fn barriers(self) -> usize {
                match self { $(Kernel::$variant => $barriers),* }
            }
        }
    };
}
for_each_kernel!(kernel_table);

/// What travels: the tensor's element type, or f32 rounded to bf16 on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    /// Elements travel as they lie in the tensor.
    Native,
    /// f32 elements travel as bf16: half the bytes, 8 bits of precision.
    Bf16,
}

impl Kernel {
    /// The one-shot all-reduce for `dtype` tensors travelling as `wire` in `format`.
    pub const fn all_reduce_one_shot(dtype: DType, wire: Wire, format: Format) -> Kernel {
        let first = Kernel::AllReduceOneShotF32Packet as usize;
        Kernel::ALL[first + 2 * Self::element(dtype, wire) + format as usize]
    }

    /// The two-shot all-reduce for `dtype` tensors travelling as `wire`.
    pub const fn all_reduce_two_shot(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::AllReduceTwoShotF32 as usize + Self::element(dtype, wire)]
    }

    /// The staged all-reduce for `dtype` tensors travelling as `wire`.
    pub const fn all_reduce_staged(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::AllReduceStagedF32 as usize + Self::element(dtype, wire)]
    }

    /// The ring all-reduce for `dtype` tensors travelling as `wire`.
    pub const fn all_reduce_ring(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::AllReduceRingF32 as usize + Self::element(dtype, wire)]
    }

    /// The all-reduce over trees for `dtype` tensors travelling as `wire`.
    pub const fn all_reduce_tree(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::AllReduceTreeF32 as usize + Self::element(dtype, wire)]
    }

    /// The direct all-reduce for registered `dtype` tensors whose elements are rounded as if they travelled as `wire`.
    pub const fn all_reduce_direct(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::AllReduceDirectF32 as usize + Self::element(dtype, wire)]
    }

    /// The reduce-scatter for `dtype` tensors travelling as `wire`.
    pub const fn reduce_scatter(dtype: DType, wire: Wire) -> Kernel {
        Kernel::ALL[Kernel::ReduceScatterF32 as usize + Self::element(dtype, wire)]
    }

    /// The reduction of tensors on one GPU for `dtype`.
    pub const fn local_reduce(dtype: DType) -> Kernel {
        Kernel::ALL[Kernel::LocalReduceF32 as usize + dtype as usize]
    }

    /// Whether the kernel works with [`flags::SEAL_ALL`]: it seals every turn, and takes a chunk only after
    /// its own of that number was sealed.
    pub const fn can_seal_all(self) -> bool {
        use Kernel::*;
        matches!(
            self,
            AllReduceOneShotF32Full
                | AllReduceOneShotF16Full
                | AllReduceOneShotBf16Full
                | AllReduceOneShotF32AsBf16Full
                | AllReduceTwoShotF32
                | AllReduceTwoShotF16
                | AllReduceTwoShotBf16
                | AllReduceTwoShotF32AsBf16
                | ReduceScatterF32
                | ReduceScatterF16
                | ReduceScatterBf16
                | ReduceScatterF32AsBf16
                | AllGatherFull
                | BroadcastFull
                | GatherFull
        )
    }

    /// Places in the body where a call through pipes begins. Each has three barriers more where calls are
    /// checked.
    pub const fn calls(self) -> usize {
        use Kernel::*;
        match self {
            LocalReduceF32 | LocalReduceF16 | LocalReduceBf16 | Probe | Stream => 0,
            GatherPacket | GatherFull => 2,
            _ if (self as usize) < AllReduceTwoShotF32 as usize => 2,
            _ => 1,
        }
    }

    /// The all-gather in `format`.
    pub const fn all_gather(format: Format) -> Kernel {
        Kernel::ALL[Kernel::AllGatherPacket as usize + format as usize]
    }

    /// The broadcast in `format`.
    pub const fn broadcast(format: Format) -> Kernel {
        Kernel::ALL[Kernel::BroadcastPacket as usize + format as usize]
    }

    /// The gather in `format`.
    pub const fn gather(format: Format) -> Kernel {
        Kernel::ALL[Kernel::GatherPacket as usize + format as usize]
    }

    /// Rows of the table come as f32, f16, bf16, f32-as-bf16.
    const fn element(dtype: DType, wire: Wire) -> usize {
        match (dtype, wire) {
            (DType::F32, Wire::Bf16) => 3,
            _ => dtype as usize,
        }
    }
}

/// The argument of every kernel, by value.
///
/// What a small call touches comes first, in as few 64-byte lines of the constant bank as possible: a
/// kernel waits for each line it touches first. The device indexes `peers` and `table` at
/// run time through the parameter bank, by their offsets here.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Args {
    /// This rank.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// [`ReduceOp`] code.
    pub op: u32,
    /// [`flags`] bits.
    pub flags: u32,
    /// Units in one message: the whole tensor (all-reduce, broadcast), one shard (reduce-scatter,
    /// all-gather).
    pub units: u32,
    /// Tensor bytes in the last of these units.
    pub tail: u32,
    /// Units of every message that one block moves, the last blocks perhaps fewer.
    pub block_units: u32,
    /// Units in a full chunk: what one block sends to one peer at once. At most
    /// `layout.slot_units`.
    pub chunk_units: u32,
    /// Factor applied before the final rounding: 1, or 1/world for an average.
    pub scale: f32,
    /// Broadcast and gather: the root's rank.
    pub root: u32,
    /// The ranks, a bit each, that write into this rank's host mailbox instead of the one in its
    /// GPU's memory.
    pub host_senders: u32,
    /// Operations that cut their tensor in parts: units in every part but the last ones.
    pub part_units: u32,
    /// Tensor to read.
    pub src: u64,
    /// Tensor to write; may equal `src` where the operation allows it.
    pub dst: u64,
    /// Where things lie in every rank's mailbox.
    pub layout: Layout,
    /// Address of this rank's host mailbox as the device sees it; 0 if it has none.
    pub host_mailbox: u64,
    /// Address of the mailbox that this rank writes to for each rank: in the other GPU's memory, or
    /// that rank's host mailbox. At index `rank`: this rank's own in its GPU's memory.
    pub peers: [u64; MAX_RANKS],
    /// Address of this rank's [`Status`] page as the device sees it.
    pub status: u64,
    /// A wait that lasted longer than this many [`ticks`] ends the kernel with a record.
    pub deadline: u32,
    /// The same in this rank's first call, if that is longer.
    pub first_deadline: u32,
    /// What all ranks of the call must bring alike, for calls with [`flags::CHECKED`].
    pub signature: [u64; 2],
    /// Tensor bytes from one rank's shard to the next (reduce-scatter, all-gather).
    pub shard_bytes: u64,
    /// Gather: rows in every tensor. Probe: number of the first round.
    pub rows: u64,
    /// [`Operation`] code, for records.
    pub operation: u32,
    /// Probe: rounds.
    pub rounds: u32,
    /// Probe: the other rank.
    pub peer: u32,
    /// Probe: what to do, a [`probe`] code.
    pub mode: u32,
    /// Trees: number of parts, each of which has a tree.
    pub parts: u32,
    /// Unused; keeps the struct free of padding.
    pub reserved: u32,
    /// Gather: bytes per row that each rank brings; 0 for ranks that bring nothing. Trees: this
    /// rank's [`Role`] in each part. Direct all-reduces: every rank's tensor, as this rank reaches it.
    pub table: [u64; MAX_RANKS],
}

impl Args {
    /// The arguments of a call that moves nothing, for `rank` of `world` ranks.
    pub const fn new(rank: u32, world: u32, layout: Layout) -> Args {
        Args {
            rank,
            world,
            op: 0,
            flags: 0,
            units: 0,
            tail: 0,
            block_units: 1,
            chunk_units: 1,
            scale: 1.0,
            root: 0,
            host_senders: 0,
            part_units: 0,
            src: 0,
            dst: 0,
            layout,
            host_mailbox: 0,
            peers: [0; MAX_RANKS],
            status: 0,
            deadline: u32::MAX,
            first_deadline: 0,
            signature: [0; 2],
            shard_bytes: 0,
            rows: 0,
            operation: 0,
            rounds: 0,
            peer: 0,
            mode: 0,
            parts: 0,
            reserved: 0,
            table: [0; MAX_RANKS],
        }
    }
}

/// Binary logarithm of the nanoseconds in a tick, in which waits are measured: 16.4 us. So 19 hours fit a
/// register of 32 bits, of which kernels have few.
pub const TICK_SHIFT: u32 = 14;

/// A time as ticks, rounded up; the longest that there is for all that are longer.
pub const fn ticks(time: core::time::Duration) -> u32 {
    let ticks = time.as_nanos().div_ceil(1 << TICK_SHIFT);
    if ticks > u32::MAX as u128 { u32::MAX } else { ticks as u32 }
}

/// A rank's place in one tree: whom it sends sums to, and who sends sums to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role(u64);

impl Role {
    /// The place below `parent` (none: the root) and above `children`, a bit each.
    pub const fn new(parent: Option<u32>, children: u32) -> Role {
        match parent {
            Some(rank) => Role(1 << 40 | (rank as u64) << 32 | children as u64),
            None => Role(children as u64),
        }
    }

    /// What [`Args::table`] holds for it.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The place that `bits` holds.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn from_bits(bits: u64) -> Role {
        Role(bits)
    }

    /// The rank above; `None` for the root.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn parent(self) -> Option<u32> {
        if self.0 >> 40 != 0 { Some((self.0 >> 32) as u32 & 0xff) } else { None }
    }

    /// The ranks below, a bit each.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn children(self) -> u32 {
        self.0 as u32
    }

    /// The ranks above and below, a bit each.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn neighbours(self) -> u32 {
        match self.parent() {
            Some(rank) => self.children() | 1 << rank,
            None => self.children(),
        }
    }
}

/// Bits of [`Args::flags`].
pub mod flags {
    /// This rank contributes the neutral element instead of its tensor.
    pub const NO_CONTRIBUTION: u32 = 1;
    /// One chunk a block, one unit a thread, all of them whole and aligned.
    pub const SINGLE: u32 = 2;
    /// Every chunk is sealed, whatever it holds, and who takes one from host memory waits for its
    /// seal. Such calls use the upper half of the lanes. Full format only.
    pub const SEAL_ALL: u32 = 4;
    /// Ranks compare their signatures before a call and checksums of what travelled after it. Only in
    /// kernels that were compiled for it, with a [`Layout`](super::Layout) that has room for it.
    pub const CHECKED: u32 = 8;
    /// Test only: skip the wait for a credit before a slot is reused.
    pub const BREAK_CREDIT: u32 = 1 << 16;
    /// Test only: leave consumed slots dirty.
    pub const BREAK_CLEAN: u32 = 1 << 17;
    /// Test only: do not seal.
    pub const BREAK_SEAL: u32 = 1 << 18;
    /// Test only: publish a seal without the fence before it.
    pub const BREAK_FENCE: u32 = 1 << 19;
    /// Test only: publish a seal or a credit without the block barrier before it.
    pub const BREAK_SYNC: u32 = 1 << 20;
    /// Test only: look at one word of a unit instead of all four.
    pub const BREAK_TEAR: u32 = 1 << 21;
    /// Test only: read registered tensors without the flags that say that they are ready.
    pub const BREAK_READY: u32 = 1 << 22;
    /// Test only: end without the flags that say that registered tensors are written.
    pub const BREAK_DONE: u32 = 1 << 23;
}

/// Codes of [`Args::mode`] for the probe kernel.
pub mod probe {
    /// Store a pattern into the peer's probe area.
    pub const STORE: u32 = 0;
    /// Load the peer's probe area into `dst`.
    pub const LOAD: u32 = 1;
    /// Bounce a flagged message between both ranks `rounds` times, checking data behind each flag.
    pub const PING_PONG: u32 = 2;
}

/// Where things lie in a mailbox. The same on every rank of a communicator, and in mailboxes in GPU
/// and in host memory; of a host mailbox's control block only the abort word is used, and of its
/// counters only what peers write.
///
/// ```text
/// 0                 Control
/// CONTROL_BYTES     probe area
/// words             lane 0: sent[16] received[16] credit[16] sealed[16], lane 1: ...
/// checks            lane 0: see [`check_words`], lane 1: ...   (if there are any)
/// slots             source 0: lane 0: slot 0, slot 1, ...  lane 1: ...   source 1: ...
/// ```
///
/// The last three fields follow from the others; they are here so that kernels need not
/// multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Layout {
    /// Lanes per ordered pair: the most blocks that a call can use.
    pub lanes: u32,
    /// Slots per lane, a power of two.
    pub slots: u32,
    /// Units per slot.
    pub slot_units: u32,
    /// Offset of the first slot.
    pub first_slot: u32,
    /// Bytes of a lane's slots.
    pub lane_bytes: u32,
    /// Bytes of all slots that one peer writes.
    pub source_bytes: u32,
}

/// Bytes at the start of a mailbox that hold [`Control`].
pub const CONTROL_BYTES: usize = 4096;
/// Bytes of the probe area.
pub const PROBE_BYTES: usize = 4096;
/// Bytes of a lane's counters.
pub const LANE_WORD_BYTES: usize = 4 * 4 * MAX_RANKS;

/// The counters of one lane, by offset from the lane's first byte; each an array over ranks.
///
/// `SENT` and `RECEIVED` are written by this rank only, `CREDIT[p]` and `SEALED[p]` by rank p only.
pub mod lane_words {
    use super::MAX_RANKS;
    /// Slots that this rank has sent to each peer.
    pub const SENT: usize = 0;
    /// Slots that this rank has consumed from each peer.
    pub const RECEIVED: usize = 4 * MAX_RANKS;
    /// Slots that each peer says it has consumed and cleaned.
    pub const CREDIT: usize = 8 * MAX_RANKS;
    /// Slots of each peer that are known complete whatever they hold.
    pub const SEALED: usize = 12 * MAX_RANKS;
}

/// Bytes of a lane's part of the checks, where calls are checked.
pub const CHECK_LANE_BYTES: usize = 1280;

/// What a lane holds for checked calls, by offset from the first byte of its part; each an array over ranks.
///
/// `HEAD[p]`, `FOOT[p]` and `VERDICT[p]` are written by rank p only, as packets whose flag is the number of the call; the rest
/// by this rank only.
pub mod check_words {
    use super::{CHECK_LANE_BYTES, MAX_RANKS, UNIT};
    /// Two units: the signature of the call that the rank has begun.
    pub const HEAD: usize = 0;
    /// A unit: the checksum of all that the rank has ever sent to this one in this lane.
    pub const FOOT: usize = HEAD + 2 * UNIT * MAX_RANKS;
    /// A unit: that all that came to the rank was right.
    pub const VERDICT: usize = FOOT + UNIT * MAX_RANKS;
    /// A word: the checksum of all that this rank has ever sent to the rank.
    pub const SENT: usize = VERDICT + UNIT * MAX_RANKS;
    /// A word: the checksum of all that this rank has ever taken from the rank.
    pub const TAKEN: usize = SENT + 4 * MAX_RANKS;
    /// A word: calls made together with the rank.
    pub const CALLS: usize = TAKEN + 4 * MAX_RANKS;
    const _: () = assert!(CALLS + 4 * MAX_RANKS <= CHECK_LANE_BYTES);
}

impl Layout {
    /// The layout with these lanes, slots and units, or `None` if it is larger than 4 GiB.
    pub const fn new(lanes: u32, slots: u32, slot_units: u32) -> Option<Layout> {
        Layout::with(lanes, slots, slot_units, 0)
    }

    /// The same for checked calls.
    pub const fn checked(lanes: u32, slots: u32, slot_units: u32) -> Option<Layout> {
        Layout::with(lanes, slots, slot_units, CHECK_LANE_BYTES)
    }

    const fn with(lanes: u32, slots: u32, slot_units: u32, check_bytes: usize) -> Option<Layout> {
        let lane_words = LANE_WORD_BYTES as u64 + check_bytes as u64;
        let first_slot = CONTROL_BYTES as u64 + PROBE_BYTES as u64 + lanes as u64 * lane_words;
        let lane_bytes = slots as u64 * slot_units as u64 * UNIT as u64;
        let source_bytes = lanes as u64 * lane_bytes;
        if first_slot + MAX_RANKS as u64 * source_bytes > u32::MAX as u64 {
            return None;
        }
        Some(Layout {
            lanes,
            slots,
            slot_units,
            first_slot: first_slot as u32,
            lane_bytes: lane_bytes as u32,
            source_bytes: source_bytes as u32,
        })
    }

    /// Offset of the counters of `lane`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn words(self, lane: u32) -> u32 {
        (CONTROL_BYTES + PROBE_BYTES) as u32 + lane * LANE_WORD_BYTES as u32
    }

    /// Offset of the part of the checks that belongs to `lane`, in a layout for checked calls.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn checks(self, lane: u32) -> u32 {
        self.words(self.lanes) + lane * CHECK_LANE_BYTES as u32
    }

    /// Offset of slot number `number` of `lane` in the region where the `source`-th peer writes.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn slot(self, source: u32, lane: u32, number: u32) -> u32 {
        let slot = (number & (self.slots - 1)) * (self.slot_units * UNIT as u32);
        self.first_slot + source * self.source_bytes + lane * self.lane_bytes + slot
    }

    /// Bytes of a whole mailbox with `world` ranks.
    pub const fn mailbox_bytes(self, world: u32) -> usize {
        self.slot(world - 1, 0, 0) as usize
    }

    /// Which region of `receiver`'s mailbox `sender` writes: 0 for the rank after the receiver.
    /// A rank has no region for itself, so `world - 1` regions are enough.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub const fn source(sender: u32, receiver: u32, world: u32) -> u32 {
        let distance = sender + world - receiver - 1;
        if distance >= world { distance - world } else { distance }
    }
}

/// The first words of a mailbox.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Control {
    /// Calls that this rank has completed; counted by the kernels, for records.
    pub epoch: u32,
    /// Taken by the first lane that fails, so that there is one record.
    pub claim: u32,
    _local: [u32; 30],
    /// Set by any rank whose wait failed. Every writer stores 1, so several may.
    pub abort: u32,
    _remote: [u32; 31],
}

/// Phase of a wait, for records.
pub mod phase {
    /// Waiting for a peer to free a slot.
    pub const CREDIT: u32 = 1;
    /// Waiting for a peer's data.
    pub const DATA: u32 = 2;
    /// Waiting for a peer's result (second half of a two-shot all-reduce).
    pub const RESULT: u32 = 3;
    /// Waiting for a peer to reach the barrier.
    pub const BARRIER: u32 = 4;
    /// Waiting for the other side of a probe.
    pub const PROBE: u32 = 5;
    /// Waiting for what a peer says that it calls.
    pub const SIGNATURE: u32 = 6;
    /// Waiting for the checksum of what a peer has sent.
    pub const CHECKSUM: u32 = 7;
    /// Waiting for a peer to say that what it took was right.
    pub const VERDICT: u32 = 8;
}

/// States of [`Status::state`].
pub mod state {
    /// No wait has failed.
    pub const OK: u32 = 0;
    /// A wait reached its deadline.
    pub const TIMED_OUT: u32 = 1;
    /// A wait saw the abort word.
    pub const ABORTED: u32 = 2;
    /// A probe, or a checked call, read something other than what was written.
    pub const CORRUPT: u32 = 3;
    /// A peer called something else.
    pub const MISMATCH: u32 = 4;
}

/// One page in pinned host memory per rank: how the host stops kernels and learns why they stopped.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Status {
    /// Written by the host: a non-zero value ends every wait of this rank.
    pub abort: u32,
    _host: [u32; 31],
    /// Written last by the device, one of [`state`]; the other fields are valid once it is not 0.
    pub state: u32,
    /// [`Operation`] code.
    pub operation: u32,
    /// The rank waited for.
    pub peer: u32,
    /// The call's number on this rank.
    pub epoch: u32,
    /// One of [`phase`].
    pub phase: u32,
    /// Block of the lane that gave up.
    pub block: u32,
    /// How many [`ticks`] the wait had lasted, if it reached its deadline.
    pub waited: u32,
    _device: [u32; 5],
    /// Of a mismatch: this rank's signature and the peer's.
    pub signatures: [[u64; 2]; 2],
    _rest: [u32; 12],
    /// Written by the probe kernel: nanoseconds that its rounds took.
    pub probe_ns: u64,
}

const _: () = {
    assert!(size_of::<Control>() <= CONTROL_BYTES);
    assert!(core::mem::offset_of!(Control, abort) == 128);
    assert!(core::mem::offset_of!(Status, state) == 128);
    assert!(core::mem::offset_of!(Status, probe_ns) == 256);
    assert!(core::mem::offset_of!(Args, peers).is_multiple_of(8));
};
