//! The enums and structs of the C interface, and what they mean in Rust.
//!
//! Invariant: a struct that may grow begins with its size. An enum that C passes is a
//! [`MaybeUninit`] until [`choose`] has found its number, since C may pass any number.

use super::arguments::{check_size, choose, sized, text};
use super::status::{guard, peerlane_status};
use crate::algorithm::{Algorithm, Pattern, Route, Spread};
use crate::collectives::invalid;
use crate::communicator::Config;
use crate::error::Result;
use crate::sizing::Sizing;
use crate::transport::Transport;
use peerlane_device::abi::{DType, Format, ReduceOp, Wire};
use std::ffi::{c_char, c_int};
use std::mem::MaybeUninit;
use std::time::Duration;

/// The type of a tensor's elements, where values are reduced.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_dtype {
    /// IEEE binary32.
    PEERLANE_F32 = 0,
    /// IEEE binary16.
    PEERLANE_F16 = 1,
    /// bfloat16.
    PEERLANE_BF16 = 2,
}

/// How values are combined, in f32 and in rank order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_op {
    /// Their sum.
    PEERLANE_SUM = 0,
    /// The largest; a NaN loses against a number.
    PEERLANE_MAX = 1,
    /// The smallest; a NaN loses against a number.
    PEERLANE_MIN = 2,
    /// Their sum divided by the world size.
    PEERLANE_AVG = 3,
}

/// How f32 elements travel between GPUs; other types always travel as they are.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_wire {
    /// As they are.
    PEERLANE_WIRE_NATIVE = 0,
    /// Rounded to bfloat16: half the traffic.
    PEERLANE_WIRE_BF16 = 1,
}

/// How an all-reduce is carried out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_algorithm {
    /// By size: what is expected to be fastest.
    PEERLANE_ALGORITHM_AUTO = 0,
    /// Every rank sends its tensor to every other, 8 bytes and their flag at a time.
    PEERLANE_ALGORITHM_ONE_SHOT_PACKET = 1,
    /// Every rank sends its tensor to every other, 16 bytes at a time.
    PEERLANE_ALGORITHM_ONE_SHOT_FULL = 2,
    /// Reduce-scatter and all-gather in one kernel.
    PEERLANE_ALGORITHM_TWO_SHOT = 3,
    /// The same, each rank sending to one other at a time.
    PEERLANE_ALGORITHM_STAGED = 4,
    /// Round the ring; rounded at each step.
    PEERLANE_ALGORITHM_RING = 5,
    /// Up and down one binomial tree; rounded at each inner rank.
    PEERLANE_ALGORITHM_TREE = 6,
    /// Up and down two binary trees with half the tensor each; rounded at each inner rank.
    PEERLANE_ALGORITHM_DOUBLE_TREE = 7,
    /// Inside islands, between them, inside them; rounded once per island.
    PEERLANE_ALGORITHM_HIERARCHICAL = 8,
    /// The steps of TWO_SHOT as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_TWO_SHOT = 9,
    /// The steps of RING as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_RING = 10,
    /// The steps of TREE as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_TREE = 11,
    /// The steps of DOUBLE_TREE as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_DOUBLE_TREE = 12,
    /// The steps of HIERARCHICAL as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_HIERARCHICAL = 13,
    /// The steps of ONE_SHOT_FULL as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_ONE_SHOT = 14,
}

/// How a broadcast is carried out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_route {
    /// By size: what is expected to be fastest.
    PEERLANE_ROUTE_AUTO = 0,
    /// The root sends to every other rank.
    PEERLANE_ROUTE_DIRECT = 1,
    /// The root sends to one rank, which sends to all others.
    PEERLANE_ROUTE_HUB = 2,
    /// Rank by rank.
    PEERLANE_ROUTE_CHAIN = 3,
    /// A binomial tree.
    PEERLANE_ROUTE_TREE = 4,
    /// Two binary trees with half the tensor each.
    PEERLANE_ROUTE_DOUBLE_TREE = 5,
    /// DIRECT as copies by the copy engines.
    PEERLANE_ROUTE_COPY_DIRECT = 6,
    /// HUB as copies by the copy engines.
    PEERLANE_ROUTE_COPY_HUB = 7,
    /// CHAIN as copies by the copy engines.
    PEERLANE_ROUTE_COPY_CHAIN = 8,
    /// TREE as copies by the copy engines.
    PEERLANE_ROUTE_COPY_TREE = 9,
    /// DOUBLE_TREE as copies by the copy engines.
    PEERLANE_ROUTE_COPY_DOUBLE_TREE = 10,
}

/// What carries data from rank to rank.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum peerlane_transport {
    /// For each ordered pair of ranks, peer-to-peer where that works, else host memory.
    PEERLANE_TRANSPORT_AUTO = 0,
    /// The sender's GPU writes into the receiver's; a pair that cannot do that is an error.
    PEERLANE_TRANSPORT_P2P = 1,
    /// The sender's GPU writes into pinned host memory, which the receiver's reads.
    PEERLANE_TRANSPORT_HOST = 2,
}

/// What all ranks of a group agree on when they meet. `peerlane_config_init` fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct peerlane_config {
    /// sizeof(peerlane_config).
    pub size: usize,
    /// A wait on the GPU that lasts longer than this many milliseconds ends with
    /// PEERLANE_TIMEOUT.
    pub deadline_ms: u64,
    /// Most bytes of device memory for one rank's mailbox.
    pub mailbox_bytes: usize,
    /// Most blocks that one call may use; 0 for as many as the smallest GPU holds.
    pub max_blocks: u32,
    /// How every all-reduce is carried out that does not choose for itself.
    pub algorithm: MaybeUninit<peerlane_algorithm>,
    /// How every broadcast is carried out.
    pub route: MaybeUninit<peerlane_route>,
    /// If not 0, one algorithm and one route for all sizes.
    pub fixed: c_int,
    /// If not 0, algorithms that round more than once may be chosen by size too.
    pub inexact: c_int,
    /// The table of measured choices: "auto" or NULL for the one in the user's cache, "off" for
    /// none, or the name of a file.
    pub tuning: *const c_char,
    /// What carries data from rank to rank.
    pub transport: MaybeUninit<peerlane_transport>,
    /// If not 0, `peerlane_comm_adapt` may change `mailbox_bytes`, which is then what the ranks begin with.
    pub adaptive: c_int,
    /// Mailboxes do not shrink below this.
    pub least_mailbox_bytes: usize,
    /// Mailboxes do not grow above this.
    pub most_mailbox_bytes: usize,
    /// Bytes of device memory for one rank's staging area, which algorithms and routes named COPY need.
    /// 0: some 64 MiB if `algorithm` or `route` is one of those, none otherwise.
    pub staging_bytes: usize,
    /// The deadline of waits in a rank's first call, if that is longer; 0 for six times `deadline_ms`.
    pub first_deadline_ms: u64,
    /// If not 0, the ranks compare on the GPU what they call, and checksums of all that travels.
    pub checked: c_int,
}

/// What a reduction may be asked for beside its arguments. `peerlane_reduce_options_init` fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct peerlane_reduce_options {
    /// sizeof(peerlane_reduce_options).
    pub size: usize,
    /// How f32 elements travel.
    pub wire: MaybeUninit<peerlane_wire>,
    /// How the reduction is carried out; a reduce-scatter has PEERLANE_ALGORITHM_AUTO only.
    pub algorithm: MaybeUninit<peerlane_algorithm>,
    /// If not 0, this rank adds nothing: its `src` is not read, and it still receives the result.
    /// The only field in which ranks may differ.
    pub no_contribution: c_int,
}

/// What a broadcast may be asked for beside its arguments. `peerlane_broadcast_options_init` fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct peerlane_broadcast_options {
    /// sizeof(peerlane_broadcast_options).
    pub size: usize,
    /// How the broadcast is carried out.
    pub route: MaybeUninit<peerlane_route>,
}

/// Fills a configuration with defaults: a deadline of 10 seconds, mailboxes of 32 MiB, as many
/// blocks as fit, and algorithms by size and the transport that suits each pair unless the
/// environment says otherwise (PEERLANE_ALGORITHM, PEERLANE_ROUTE, PEERLANE_FIXED, PEERLANE_EXACT,
/// PEERLANE_TRANSPORT: auto, p2p or host; PEERLANE_CHECKED; PEERLANE_SELF_TEST: auto, off or always, which is
/// read again in any case; PEERLANE_TUNING, which is read again where `tuning` stays
/// NULL). `size` is sizeof(peerlane_config).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_config_init(
    config: *mut peerlane_config,
    size: usize,
) -> peerlane_status {
    guard("config_init", |op| {
        check_size::<peerlane_config>(op, "size", size)?;
        let before = peerlane_config::new(&Config::from_environment()?);
        // SAFETY: the header asks for room for one.
        unsafe { super::arguments::place(op, "config", config, before)? };
        Ok(())
    })
}

/// Fills options with defaults: the native wire, an algorithm by size, a rank that contributes.
/// `size` is sizeof(peerlane_reduce_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_reduce_options_init(
    options: *mut peerlane_reduce_options,
    size: usize,
) -> peerlane_status {
    guard("reduce_options_init", |op| {
        check_size::<peerlane_reduce_options>(op, "size", size)?;
        // SAFETY: the header asks for room for one.
        unsafe { super::arguments::place(op, "options", options, peerlane_reduce_options::new())? };
        Ok(())
    })
}

/// Fills options with defaults: a route by size. `size` is sizeof(peerlane_broadcast_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerlane_broadcast_options_init(
    options: *mut peerlane_broadcast_options,
    size: usize,
) -> peerlane_status {
    guard("broadcast_options_init", |op| {
        check_size::<peerlane_broadcast_options>(op, "size", size)?;
        let before = peerlane_broadcast_options::new();
        // SAFETY: the header asks for room for one.
        unsafe { super::arguments::place(op, "options", options, before)? };
        Ok(())
    })
}

const DTYPES: [(peerlane_dtype, DType); 3] = [
    (peerlane_dtype::PEERLANE_F32, DType::F32),
    (peerlane_dtype::PEERLANE_F16, DType::F16),
    (peerlane_dtype::PEERLANE_BF16, DType::Bf16),
];

const OPS: [(peerlane_op, ReduceOp); 4] = [
    (peerlane_op::PEERLANE_SUM, ReduceOp::Sum),
    (peerlane_op::PEERLANE_MAX, ReduceOp::Max),
    (peerlane_op::PEERLANE_MIN, ReduceOp::Min),
    (peerlane_op::PEERLANE_AVG, ReduceOp::Avg),
];

const WIRES: [(peerlane_wire, Wire); 2] = [
    (peerlane_wire::PEERLANE_WIRE_NATIVE, Wire::Native),
    (peerlane_wire::PEERLANE_WIRE_BF16, Wire::Bf16),
];

const ALGORITHMS: [(peerlane_algorithm, Option<Algorithm>); 15] = {
    use peerlane_algorithm::*;
    [
        (PEERLANE_ALGORITHM_AUTO, None),
        (PEERLANE_ALGORITHM_ONE_SHOT_PACKET, Some(Algorithm::OneShot(Format::Packet))),
        (PEERLANE_ALGORITHM_ONE_SHOT_FULL, Some(Algorithm::OneShot(Format::Full))),
        (PEERLANE_ALGORITHM_TWO_SHOT, Some(Algorithm::TwoShot)),
        (PEERLANE_ALGORITHM_STAGED, Some(Algorithm::Staged)),
        (PEERLANE_ALGORITHM_RING, Some(Algorithm::Ring)),
        (PEERLANE_ALGORITHM_TREE, Some(Algorithm::Tree)),
        (PEERLANE_ALGORITHM_DOUBLE_TREE, Some(Algorithm::DoubleTree)),
        (PEERLANE_ALGORITHM_HIERARCHICAL, Some(Algorithm::Hierarchical)),
        (PEERLANE_ALGORITHM_COPY_TWO_SHOT, Some(Algorithm::Scheduled(Pattern::TwoShot))),
        (PEERLANE_ALGORITHM_COPY_RING, Some(Algorithm::Scheduled(Pattern::Ring))),
        (PEERLANE_ALGORITHM_COPY_TREE, Some(Algorithm::Scheduled(Pattern::Tree))),
        (PEERLANE_ALGORITHM_COPY_DOUBLE_TREE, Some(Algorithm::Scheduled(Pattern::DoubleTree))),
        (PEERLANE_ALGORITHM_COPY_HIERARCHICAL, Some(Algorithm::Scheduled(Pattern::Hierarchical))),
        (PEERLANE_ALGORITHM_COPY_ONE_SHOT, Some(Algorithm::Scheduled(Pattern::OneShot))),
    ]
};

const ROUTES: [(peerlane_route, Option<Route>); 11] = {
    use peerlane_route::*;
    [
        (PEERLANE_ROUTE_AUTO, None),
        (PEERLANE_ROUTE_DIRECT, Some(Route::Direct)),
        (PEERLANE_ROUTE_HUB, Some(Route::Hub)),
        (PEERLANE_ROUTE_CHAIN, Some(Route::Chain)),
        (PEERLANE_ROUTE_TREE, Some(Route::Tree)),
        (PEERLANE_ROUTE_DOUBLE_TREE, Some(Route::DoubleTree)),
        (PEERLANE_ROUTE_COPY_DIRECT, Some(Route::Scheduled(Spread::Direct))),
        (PEERLANE_ROUTE_COPY_HUB, Some(Route::Scheduled(Spread::Hub))),
        (PEERLANE_ROUTE_COPY_CHAIN, Some(Route::Scheduled(Spread::Chain))),
        (PEERLANE_ROUTE_COPY_TREE, Some(Route::Scheduled(Spread::Tree))),
        (PEERLANE_ROUTE_COPY_DOUBLE_TREE, Some(Route::Scheduled(Spread::DoubleTree))),
    ]
};

// What has no row here would be spelled as automatic.
const _: () =
    assert!(ALGORITHMS.len() == Algorithm::ALL.len() + 1 && ROUTES.len() == Route::ALL.len() + 1);

/// How C spells one of `choices`; the first of them if it does not.
fn found<E: Copy, T: PartialEq>(choices: &[(E, T)], wanted: &T) -> E {
    choices.iter().find(|(_, choice)| choice == wanted).unwrap_or(&choices[0]).0
}

/// The same, where C may write any number later.
fn spelled<E: Copy, T: PartialEq>(choices: &[(E, T)], wanted: &T) -> MaybeUninit<E> {
    MaybeUninit::new(found(choices, wanted))
}

const TRANSPORTS: [(peerlane_transport, Transport); 3] = [
    (peerlane_transport::PEERLANE_TRANSPORT_AUTO, Transport::Auto),
    (peerlane_transport::PEERLANE_TRANSPORT_P2P, Transport::P2p),
    (peerlane_transport::PEERLANE_TRANSPORT_HOST, Transport::Host),
];

impl From<Transport> for peerlane_transport {
    fn from(transport: Transport) -> peerlane_transport {
        found(&TRANSPORTS, &transport)
    }
}

/// The element type that C means.
pub(super) fn dtype(op: &'static str, value: MaybeUninit<peerlane_dtype>) -> Result<DType> {
    choose(op, "dtype", value, &DTYPES)
}

/// The operator that C means.
pub(super) fn reduce_op(op: &'static str, value: MaybeUninit<peerlane_op>) -> Result<ReduceOp> {
    choose(op, "op", value, &OPS)
}

impl peerlane_config {
    fn new(config: &Config) -> peerlane_config {
        peerlane_config {
            size: size_of::<peerlane_config>(),
            deadline_ms: config.deadline.as_millis() as u64,
            mailbox_bytes: config.mailbox_bytes,
            max_blocks: config.max_blocks.unwrap_or(0),
            algorithm: spelled(&ALGORITHMS, &config.algorithm),
            route: spelled(&ROUTES, &config.route),
            fixed: c_int::from(config.fixed),
            inexact: c_int::from(!config.exact),
            tuning: std::ptr::null(),
            transport: MaybeUninit::new(config.transport.into()),
            adaptive: c_int::from(config.sizing.is_some()),
            least_mailbox_bytes: config.sizing.unwrap_or_default().least_mailbox_bytes,
            most_mailbox_bytes: config.sizing.unwrap_or_default().most_mailbox_bytes,
            staging_bytes: config.staging_bytes.unwrap_or(0),
            first_deadline_ms: config.first_deadline.map_or(0, |time| time.as_millis() as u64),
            checked: c_int::from(config.checked),
        }
    }

    /// The configuration behind `pointer`; the environment's behind NULL.
    ///
    /// # Safety
    /// `pointer` is NULL or leads to a configuration as large as it says, whose text is as `text` asks.
    pub(super) unsafe fn read(op: &'static str, pointer: *const peerlane_config) -> Result<Config> {
        // SAFETY: the caller's contract.
        let Some(config) = (unsafe { sized(op, "config.size", pointer)? }) else {
            return Config::from_environment();
        };
        let tuning = if config.tuning.is_null() {
            Config::from_environment()?.tuning
        } else {
            // SAFETY: the caller's contract.
            let name = unsafe { text(op, "config.tuning", config.tuning)? };
            let known = |_| invalid(op, "config.tuning", "auto, off or a file's name".into(), name);
            name.parse().map_err(known)?
        };
        let sizing = Sizing {
            least_mailbox_bytes: config.least_mailbox_bytes,
            most_mailbox_bytes: config.most_mailbox_bytes,
            ..Sizing::default()
        };
        Ok(Config {
            deadline: Duration::from_millis(config.deadline_ms),
            mailbox_bytes: config.mailbox_bytes,
            max_blocks: Some(config.max_blocks).filter(|blocks| *blocks != 0),
            algorithm: choose(op, "config.algorithm", config.algorithm, &ALGORITHMS)?,
            route: choose(op, "config.route", config.route, &ROUTES)?,
            fixed: config.fixed != 0,
            exact: config.inexact == 0,
            tuning,
            transport: choose(op, "config.transport", config.transport, &TRANSPORTS)?,
            self_test: Config::from_environment()?.self_test,
            sizing: Some(sizing).filter(|_| config.adaptive != 0),
            staging_bytes: Some(config.staging_bytes).filter(|bytes| *bytes != 0),
            first_deadline: Some(config.first_deadline_ms)
                .filter(|time| *time != 0)
                .map(Duration::from_millis),
            checked: config.checked != 0,
            ..Config::default()
        })
    }
}

/// A reduction's options, looked up.
#[derive(Clone, Copy)]
pub(super) struct ReduceOptions {
    pub(super) wire: Wire,
    pub(super) algorithm: Option<Algorithm>,
    pub(super) contribution: bool,
}

impl peerlane_reduce_options {
    fn new() -> peerlane_reduce_options {
        peerlane_reduce_options {
            size: size_of::<peerlane_reduce_options>(),
            wire: MaybeUninit::new(peerlane_wire::PEERLANE_WIRE_NATIVE),
            algorithm: MaybeUninit::new(peerlane_algorithm::PEERLANE_ALGORITHM_AUTO),
            no_contribution: 0,
        }
    }

    /// The options behind `pointer`; the default ones behind NULL.
    ///
    /// # Safety
    /// `pointer` is NULL or leads to options as large as they say.
    pub(super) unsafe fn read(
        op: &'static str,
        pointer: *const peerlane_reduce_options,
    ) -> Result<ReduceOptions> {
        // SAFETY: the caller's contract.
        let options = unsafe { sized(op, "options.size", pointer)? };
        let options = options.unwrap_or_else(peerlane_reduce_options::new);
        Ok(ReduceOptions {
            wire: choose(op, "options.wire", options.wire, &WIRES)?,
            algorithm: choose(op, "options.algorithm", options.algorithm, &ALGORITHMS)?,
            contribution: options.no_contribution == 0,
        })
    }
}

impl peerlane_broadcast_options {
    fn new() -> peerlane_broadcast_options {
        peerlane_broadcast_options {
            size: size_of::<peerlane_broadcast_options>(),
            route: MaybeUninit::new(peerlane_route::PEERLANE_ROUTE_AUTO),
        }
    }

    /// The route that the options behind `pointer` ask for; none behind NULL.
    ///
    /// # Safety
    /// `pointer` is NULL or leads to options as large as they say.
    pub(super) unsafe fn read(
        op: &'static str,
        pointer: *const peerlane_broadcast_options,
    ) -> Result<Option<Route>> {
        // SAFETY: the caller's contract.
        let options = unsafe { sized(op, "options.size", pointer)? };
        let options = options.unwrap_or_else(peerlane_broadcast_options::new);
        choose(op, "options.route", options.route, &ROUTES)
    }
}

impl ReduceOptions {
    /// Refuses a choice of algorithm where there is only one.
    pub(super) fn without_algorithm(self, op: &'static str) -> Result<ReduceOptions> {
        let Some(algorithm) = self.algorithm else { return Ok(self) };
        let expected = "PEERLANE_ALGORITHM_AUTO, there is one way only".into();
        Err(invalid(op, "options.algorithm", expected, format!("{algorithm:?}")))
    }
}
