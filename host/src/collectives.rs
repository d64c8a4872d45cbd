//! The collectives: what each call checks and which kernel it queues.
//!
//! Every method is `unsafe` for one reason: it takes addresses of tensors that a kernel will read
//! and write after it has returned.

use crate::algorithm::{Algorithm, Pattern, Route};
use crate::call_log::Signature;
use crate::communicator::{Communicator, call_flags};
use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Stream};
use crate::plan::roles::Roles;
use crate::plan::{self, Grid};
use crate::registration::Registration;
use crate::request::{AllGather, AllReduce, AllReduceRegistered, Broadcast, Gather, ReduceScatter};
use crate::scheduled::{self, Scheme};
use crate::trace;
use crate::usage::Family;
use peerlane_device::abi::{
    Args, DType, Format, Kernel, MAX_RANKS, Operation, ReduceOp, UNIT, Wire, flags,
};

/// # Safety
/// Every tensor named in a request has the size that the request says, lies in memory of this
/// rank's GPU, and stays alive and untouched by others until `stream` has passed the call. `stream`
/// lives until the next call has been made.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the impl")]
impl Communicator {
    /// Reduces `call.count` elements of all ranks into every rank's `dst`.
    pub unsafe fn all_reduce(&mut self, call: &AllReduce, stream: Stream) -> Result<()> {
        let operation = Operation::AllReduce;
        let op = operation.name();
        let shape = self.ready(operation)?;
        let tensor_bytes = tensors(op, call)?;
        if tensor_bytes == 0 {
            return Ok(());
        }
        let expansion = plan::expansion(call.dtype, call.wire);
        let wire_bytes = tensor_bytes / expansion;
        let algorithm = self.algorithm(call, wire_bytes);
        let Fused { kernel, format, parts, roles } =
            match self.carried(algorithm, call.dtype, call.wire) {
                Carried::Kernel(fused) => fused,
                Carried::Steps(pattern) => {
                    // SAFETY: passed on to the caller.
                    return unsafe { self.all_reduce_scheduled(call, pattern, stream) };
                }
            };
        let (units, tail) = units(tensor_bytes, format, expansion);
        let part_units = plan::part_units(parts, units);
        let grid = plan::grid(&shape, part_units);
        let whole = tail as usize == format.payload() * expansion;
        let aligned = (call.src.0 | call.dst.0).is_multiple_of(UNIT as u64);
        let one_each = grid.chunk_units == grid.block_units && grid.block_units <= grid.threads;
        let single = if whole && aligned && one_each { flags::SINGLE } else { 0 };
        let variant = 1 + algorithm.index() as u8;
        let signature = reduction(operation, call.dtype, call.wire, call.op, variant, tensor_bytes);
        let (parts, table) = roles.map_or((0, [0; MAX_RANKS]), |roles| (roles.parts, roles.table));
        let args = Args {
            src: call.src.0,
            dst: call.dst.0,
            units: units as u32,
            tail,
            part_units: part_units as u32,
            parts,
            table,
            op: call.op as u32,
            scale: scale(call.op, shape.world),
            flags: self.args(operation).flags | call_flags(call.contribution) | single,
            ..self.args(operation)
        };
        // SAFETY: passed on to the caller.
        unsafe { self.start(kernel, grid, args, self.everyone(), signature, stream) }
    }

    /// Reduces a part of all ranks' registered tensors, in place. Other ranks' kernels read and write that part
    /// between the call's turn on `stream` and its end there, and nothing else may.
    pub unsafe fn all_reduce_registered(
        &mut self,
        registration: &Registration,
        call: &AllReduceRegistered,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::AllReduce;
        const OP: &str = "all_reduce_registered";
        let shape = self.ready(operation)?;
        self.uses(OP, registration)?;
        let bytes = sized(OP, "count", call.count, call.dtype.bytes())?;
        let room = registration.bytes().saturating_sub(call.offset);
        if !call.offset.is_multiple_of(UNIT) || call.offset > registration.bytes() {
            let all = registration.bytes();
            let expected = format!("a multiple of {UNIT} up to {all}");
            return Err(invalid(OP, "offset", expected, call.offset));
        }
        if bytes > room {
            let expected = format!("at most {room} bytes, where the registration ends");
            return Err(invalid(OP, "count", expected, format!("{bytes} bytes")));
        }
        if bytes == 0 {
            return Ok(());
        }
        if self.config().checked {
            // Peers would read and write the tensor itself, which no checksum covers.
            let place = registration.tensor().offset(call.offset);
            let checked = AllReduce {
                wire: call.wire,
                op: call.op,
                contribution: call.contribution,
                algorithm: Some(Algorithm::TwoShot),
                ..AllReduce::in_place(place, call.count, call.dtype)
            };
            // SAFETY: the registration covers that part; the rest is passed on to the caller.
            return unsafe { self.all_reduce(&checked, stream) };
        }
        let (units, tail) = units(bytes, Format::Full, plan::expansion(call.dtype, call.wire));
        let part_units = plan::part_units(shape.world, units);
        let grid = plan::grid(&shape, part_units);
        // No slot limits what a block moves at once, and no mailbox carries any of it.
        let grid = Grid { units: 0, chunk_units: grid.block_units, ..grid };
        let place = registration.number() << 40 ^ (call.offset / UNIT) as u64;
        let signature = Signature {
            shape: hash(place),
            ..reduction(operation, call.dtype, call.wire, call.op, DIRECT, bytes)
        };
        let args = Args {
            units: units as u32,
            tail,
            part_units: part_units as u32,
            table: registration.table(shape.world, call.offset),
            op: call.op as u32,
            scale: scale(call.op, shape.world),
            flags: self.args(operation).flags | call_flags(call.contribution),
            ..self.args(operation)
        };
        let kernel = Kernel::all_reduce_direct(call.dtype, call.wire);
        // SAFETY: passed on to the caller.
        unsafe { self.start(kernel, grid, args, self.everyone(), signature, stream) }
    }

    /// An all-reduce in copies and local reductions.
    unsafe fn all_reduce_scheduled(
        &mut self,
        call: &AllReduce,
        pattern: Pattern,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::AllReduce;
        let (op, algorithm) = (operation.name(), Algorithm::Scheduled(pattern));
        self.can_copy(op, "algorithm", algorithm.name())?;
        if plan::expansion(call.dtype, call.wire) != 1 {
            let expected = format!("native: {algorithm} copies elements as they are");
            return Err(invalid(op, "wire", expected, "bf16"));
        }
        let bytes = call.count * call.dtype.bytes();
        let scheme = Scheme::AllReduce(pattern);
        let cut = self.scheduled(op)?.cut(op, scheme, units(bytes, Format::Full, 1))?;
        let variant = 1 + algorithm.index() as u8;
        let (op_code, scale) = (call.op as u32, scale(call.op, self.world_size()));
        let job = scheduled::Job {
            src: call.src,
            dst: call.dst,
            dtype: call.dtype,
            contribution: call.contribution,
            cut,
            args: Args { op: op_code, scale, ..self.args(operation) },
            signature: reduction(operation, call.dtype, call.wire, call.op, variant, bytes),
        };
        // SAFETY: passed on to the caller.
        unsafe { self.run_scheduled(scheme, &job, stream) }
    }

    /// A broadcast in copies.
    unsafe fn broadcast_scheduled(
        &mut self,
        call: &Broadcast,
        route: Route,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::Broadcast;
        let op = operation.name();
        self.can_copy(op, "route", route.name())?;
        let scheme = Scheme::Broadcast(route.spread(), call.root);
        let cut = self.scheduled(op)?.cut(op, scheme, units(call.bytes, Format::Full, 1))?;
        let signature = Signature {
            algorithm: 1 + route.index() as u8,
            ..movement(operation, call.root, call.bytes, 0)
        };
        let job = scheduled::Job {
            src: call.data,
            dst: call.data,
            dtype: DType::F32,
            contribution: true,
            cut,
            args: self.args(operation),
            signature,
        };
        // SAFETY: passed on to the caller.
        unsafe { self.run_scheduled(scheme, &job, stream) }
    }

    /// Whether calls can be copies here; `name` is what asks for them.
    fn can_copy(&self, op: &'static str, argument: &'static str, name: &str) -> Result<()> {
        let expected = if self.group(op)?.shape.host {
            "one that is one kernel, where ranks meet in host memory"
        } else if self.config().staging() == 0 {
            "one that is one kernel, or a Config with staging_bytes"
        } else {
            return Ok(());
        };
        Err(invalid(op, argument, expected.to_owned(), name))
    }

    /// The last steps of every scheduled call.
    unsafe fn run_scheduled(
        &mut self,
        scheme: Scheme,
        job: &scheduled::Job,
        stream: Stream,
    ) -> Result<()> {
        let traced = trace::is_on().then(|| self.trace(&job.signature));
        let op = job.signature.operation.name();
        let wants = self.scheduled(op)?.staging_bytes(scheme, job.cut.units());
        let captured = self.is_captured(stream)?;
        self.follow(op, stream)?;
        self.announce(self.everyone(), job.signature)?;
        if traced.is_some() {
            self.trace_begin(stream);
        }
        let mut begun = false;
        // SAFETY: passed on to the caller.
        let queued = unsafe { self.scheduled(op)?.run(scheme, job, stream, &mut begun) };
        if queued.is_err() && begun {
            // Peers wait for what will not come, and so would this rank's own streams.
            self.abort();
        }
        queued?;
        self.tally.scheduled(job.signature.bytes, wants, self.config().staging());
        self.tally.captured += u64::from(captured);
        if let Some(traced) = traced {
            self.trace_end(*traced, Family::Scheduled, stream);
        }
        Ok(())
    }

    /// Reduces `world x call.count` elements of all ranks; rank r's `dst` gets the r-th part.
    pub unsafe fn reduce_scatter(&mut self, call: &ReduceScatter, stream: Stream) -> Result<()> {
        let operation = Operation::ReduceScatter;
        let op = operation.name();
        let shape = self.ready(operation)?;
        let bytes = sized(op, "count", call.count, call.dtype.bytes())?;
        sized(op, "count", bytes, shape.world as usize)?;
        if bytes == 0 {
            return Ok(());
        }
        aligned(op, "dst", call.dst, call.dtype)?;
        if call.contribution {
            aligned(op, "src", call.src, call.dtype)?;
        }
        let (units, tail) = units(bytes, Format::Full, plan::expansion(call.dtype, call.wire));
        let grid = plan::grid(&shape, units);
        let signature = reduction(operation, call.dtype, call.wire, call.op, 0, bytes);
        let args = Args {
            src: call.src.0,
            dst: call.dst.0,
            units: units as u32,
            tail,
            shard_bytes: bytes as u64,
            op: call.op as u32,
            scale: scale(call.op, shape.world),
            flags: self.args(operation).flags | call_flags(call.contribution),
            ..self.args(operation)
        };
        let kernel = Kernel::reduce_scatter(call.dtype, call.wire);
        // SAFETY: passed on to the caller.
        unsafe { self.start(kernel, grid, args, self.everyone(), signature, stream) }
    }

    /// Copies every rank's `call.bytes` bytes to every rank's `dst`, in rank order.
    pub unsafe fn all_gather(&mut self, call: &AllGather, stream: Stream) -> Result<()> {
        let operation = Operation::AllGather;
        let shape = self.ready(operation)?;
        sized(operation.name(), "bytes", call.bytes, shape.world as usize)?;
        if call.bytes == 0 {
            return Ok(());
        }
        present(operation.name(), "src", call.src)?;
        present(operation.name(), "dst", call.dst)?;
        let format = plan::format(call.bytes);
        let (units, tail) = units(call.bytes, format, 1);
        let grid = plan::grid(&shape, units);
        let args = Args {
            src: call.src.0,
            dst: call.dst.0,
            units: units as u32,
            tail,
            shard_bytes: call.bytes as u64,
            ..self.args(operation)
        };
        let signature = movement(operation, 0, call.bytes, 0);
        // SAFETY: passed on to the caller.
        unsafe {
            self.start(Kernel::all_gather(format), grid, args, self.everyone(), signature, stream)
        }
    }

    /// Copies the root's `call.bytes` bytes to every rank.
    pub unsafe fn broadcast(&mut self, call: &Broadcast, stream: Stream) -> Result<()> {
        let operation = Operation::Broadcast;
        let shape = self.ready(operation)?;
        self.exists(operation.name(), call.root)?;
        sized(operation.name(), "bytes", call.bytes, 1)?;
        if call.bytes == 0 || shape.world == 1 {
            return Ok(());
        }
        present(operation.name(), "data", call.data)?;
        let route = self.route_for(call);
        if route.is_scheduled() {
            // SAFETY: passed on to the caller.
            return unsafe { self.broadcast_scheduled(call, route, stream) };
        }
        let roles = *self.places().spread(route.spread(), call.root);
        let (kernel, format) = match route {
            Route::Direct => {
                let format = plan::format(call.bytes);
                (Kernel::broadcast(format), format)
            }
            _ => (Kernel::BroadcastTree, Format::Full),
        };
        let (units, tail) = units(call.bytes, format, 1);
        let part_units = plan::part_units(roles.parts, units);
        let grid = plan::grid(&shape, part_units);
        let args = Args {
            src: call.data.0,
            dst: call.data.0,
            units: units as u32,
            tail,
            part_units: part_units as u32,
            parts: roles.parts,
            table: roles.table,
            root: call.root,
            ..self.args(operation)
        };
        let signature = Signature {
            algorithm: 1 + route.index() as u8,
            ..movement(operation, call.root, call.bytes, 0)
        };
        // SAFETY: passed on to the caller.
        unsafe { self.start(kernel, grid, args, self.everyone(), signature, stream) }
    }

    /// Joins the members' rows in the root's `dst`. Does nothing on a rank that is neither the root
    /// nor brings anything.
    pub unsafe fn gather(&mut self, call: &Gather<'_>, stream: Stream) -> Result<()> {
        let operation = Operation::Gather;
        let op = operation.name();
        let shape = self.ready(operation)?;
        self.exists(op, call.root)?;
        if call.widths.len() != shape.world as usize {
            return Err(invalid(
                op,
                "widths",
                format!("{} widths, one a rank", shape.world),
                call.widths.len(),
            ));
        }
        let widest = call.widths.iter().copied().max().unwrap_or(0);
        let total = call.widths.iter().try_fold(0usize, |sum, width| sum.checked_add(*width));
        sized(op, "widths", total.unwrap_or(usize::MAX), call.rows.max(1))?;
        let (is_root, width) = (self.rank() == call.root, call.widths[self.rank() as usize]);
        if call.rows == 0 || widest == 0 || !is_root && width == 0 {
            return Ok(());
        }
        if width != 0 {
            present(op, "src", call.src)?;
        }
        if is_root {
            present(op, "dst", call.dst)?;
        }
        let format = plan::format(call.rows * widest);
        let grid = plan::grid(&shape, units(call.rows * widest, format, 1).0);
        let mut args = Args {
            src: call.src.0,
            dst: call.dst.0,
            rows: call.rows as u64,
            root: call.root,
            ..self.args(operation)
        };
        let (mut members, mut hash) = (0u32, call.rows as u64);
        for (rank, &width) in call.widths.iter().enumerate() {
            args.table[rank] = width as u64;
            members |= ((width != 0) as u32) << rank;
            hash = (hash ^ width as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
        }
        let peers = if is_root { members & !(1 << call.root) } else { 1 << call.root };
        let signature =
            movement(operation, call.root, call.rows * widest, hash as u32 & 0x0fff_ffff);
        // SAFETY: passed on to the caller.
        unsafe { self.start(Kernel::gather(format), grid, args, peers, signature, stream) }
    }

    /// Holds `stream` until every rank has queued its barrier and reached it.
    pub fn barrier(&mut self, stream: Stream) -> Result<()> {
        let operation = Operation::Barrier;
        let shape = self.ready(operation)?;
        if shape.world == 1 {
            return Ok(());
        }
        let grid = Grid { units: 0, blocks: 1, threads: 32, block_units: 1, chunk_units: 1 };
        let signature = movement(operation, 0, 0, 0);
        // SAFETY: the kernel touches no tensor.
        unsafe {
            self.start(
                Kernel::Barrier,
                grid,
                self.args(operation),
                self.everyone(),
                signature,
                stream,
            )
        }
    }

    /// The last steps of every call.
    unsafe fn start(
        &mut self,
        kernel: Kernel,
        grid: Grid,
        mut args: Args,
        peers: u32,
        signature: Signature,
        stream: Stream,
    ) -> Result<()> {
        let traced = trace::is_on().then(|| self.trace(&signature));
        let captured = self.is_captured(stream)?;
        self.follow(signature.operation.name(), stream)?;
        self.announce(peers, signature)?;
        if traced.is_some() {
            self.trace_begin(stream);
        }
        args.block_units = grid.block_units;
        args.chunk_units = grid.chunk_units;
        args.signature = signature.words();
        if kernel.can_seal_all() && plan::seals_all(&self.group("start")?.shape, &grid) {
            args.flags |= flags::SEAL_ALL;
        }
        // SAFETY: passed on to the caller.
        unsafe { self.queue(kernel, grid.blocks, grid.threads, &args)? };
        let sent = (self.world_size() > 1).then_some(&grid);
        self.tally.kernel(signature.operation, signature.bytes, sent);
        self.tally.captured += u64::from(captured);
        if let Some(traced) = traced {
            self.trace_end(*traced, Family::of(signature.operation), stream);
        }
        Ok(())
    }

    /// How an all-reduce that sends `wire_bytes` bytes is carried out.
    #[inline]
    fn algorithm(&self, call: &AllReduce, wire_bytes: usize) -> Algorithm {
        match call.algorithm.unwrap_or_else(|| self.choice().all_reduce(wire_bytes)) {
            Algorithm::OneShot(format) => Algorithm::OneShot(format),
            _ if self.world_size() == 1 => Algorithm::OneShot(Format::Full),
            Algorithm::Scheduled(pattern) if self.config().checked => pattern.fused(),
            algorithm => algorithm,
        }
    }

    /// How `call` would be carried out.
    pub fn algorithm_for(&self, call: &AllReduce) -> Algorithm {
        let bytes = call.count.saturating_mul(call.dtype.bytes());
        self.algorithm(call, bytes / plan::expansion(call.dtype, call.wire))
    }

    /// How `call` would be carried out.
    #[inline]
    pub fn route_for(&self, call: &Broadcast) -> Route {
        let route = call.route.unwrap_or_else(|| self.choice().broadcast(call.bytes));
        if self.config().checked { route.fused() } else { route }
    }

    /// What carries out `algorithm`.
    fn carried(&self, algorithm: Algorithm, dtype: DType, wire: Wire) -> Carried {
        let world = self.world_size();
        let whole = |kernel, format| Fused { kernel, format, parts: 1, roles: None };
        let parts = |kernel| Fused { parts: world, ..whole(kernel, Format::Full) };
        Carried::Kernel(match algorithm {
            Algorithm::OneShot(format) => {
                whole(Kernel::all_reduce_one_shot(dtype, wire, format), format)
            }
            Algorithm::TwoShot => parts(Kernel::all_reduce_two_shot(dtype, wire)),
            Algorithm::Staged => parts(Kernel::all_reduce_staged(dtype, wire)),
            Algorithm::Ring => parts(Kernel::all_reduce_ring(dtype, wire)),
            Algorithm::Tree | Algorithm::DoubleTree | Algorithm::Hierarchical => {
                let roles = self.places().pattern(algorithm.pattern()).copied();
                let parts = roles.map_or(1, |roles| roles.parts);
                let kernel = Kernel::all_reduce_tree(dtype, wire);
                Fused { parts, roles, ..whole(kernel, Format::Full) }
            }
            Algorithm::Scheduled(pattern) => return Carried::Steps(pattern),
        })
    }

    /// A bit for every rank but this one.
    fn everyone(&self) -> u32 {
        ((1u32 << self.world_size()) - 1) & !(1 << self.rank())
    }

    fn exists(&self, op: &'static str, root: u32) -> Result<()> {
        if root < self.world_size() {
            return Ok(());
        }
        Err(invalid(op, "root", format!("a rank from 0 to {}", self.world_size() - 1), root))
    }
}

/// How an all-reduce is carried out.
enum Carried {
    Kernel(Fused),
    Steps(Pattern),
}

/// An all-reduce that is one kernel.
struct Fused {
    kernel: Kernel,
    format: Format,
    /// Parts that it cuts its tensor in.
    parts: u32,
    /// This rank's places, if each part has a tree.
    roles: Option<Roles>,
}

/// How many units `bytes` tensor bytes make, and how many bytes the last one has.
fn units(bytes: usize, format: Format, expansion: usize) -> (usize, u32) {
    let stride = format.payload() * expansion;
    let units = bytes.div_ceil(stride);
    (units, (bytes - units.saturating_sub(1) * stride) as u32)
}

fn scale(op: ReduceOp, world: u32) -> f32 {
    if op == ReduceOp::Avg { 1.0 / world as f32 } else { 1.0 }
}

/// What a call log knows direct all-reduces by: no other algorithm has it.
const DIRECT: u8 = 15;
const _: () = assert!(Algorithm::ALL.len() < DIRECT as usize);

/// 28 bits that differ where `value` does, but for bad luck.
fn hash(value: u64) -> u32 {
    (value.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 36) as u32
}

fn reduction(
    operation: Operation,
    dtype: DType,
    wire: Wire,
    op: ReduceOp,
    algorithm: u8,
    bytes: usize,
) -> Signature {
    let element = Some((dtype, if dtype == DType::F32 { wire } else { Wire::Native }));
    Signature { operation, element, op, algorithm, root: 0, bytes, shape: 0 }
}

fn movement(operation: Operation, root: u32, bytes: usize, shape: u32) -> Signature {
    Signature { operation, element: None, op: ReduceOp::Sum, algorithm: 0, root, bytes, shape }
}

pub(crate) fn invalid(
    op: &'static str,
    argument: &'static str,
    expected: String,
    got: impl std::fmt::Display,
) -> Error {
    Error::InvalidArgument { op, argument, expected, got: got.to_string() }
}

/// The bytes of an all-reduce's tensors, which are where the kernels can take them. Tensors of none are anywhere.
pub(crate) fn tensors(op: &'static str, call: &AllReduce) -> Result<usize> {
    let bytes = sized(op, "count", call.count, call.dtype.bytes())?;
    if bytes != 0 {
        aligned(op, "dst", call.dst, call.dtype)?;
        if call.contribution {
            aligned(op, "src", call.src, call.dtype)?;
        }
    }
    Ok(bytes)
}

/// `count` items of `item` bytes, in bytes, if that is a size a tensor can have.
fn sized(op: &'static str, argument: &'static str, count: usize, item: usize) -> Result<usize> {
    // The kernels count units of 8 bytes or more in 31 bits.
    match count.checked_mul(item) {
        Some(bytes) if bytes <= 1 << 34 => Ok(bytes),
        _ => Err(invalid(
            op,
            argument,
            "at most 2^34 bytes".into(),
            format!("{count} x {item} bytes"),
        )),
    }
}

fn present(op: &'static str, argument: &'static str, address: DevicePtr) -> Result<()> {
    if address.0 != 0 {
        return Ok(());
    }
    Err(invalid(op, argument, "a device address".into(), "null"))
}

fn aligned(
    op: &'static str,
    argument: &'static str,
    address: DevicePtr,
    dtype: DType,
) -> Result<()> {
    present(op, argument, address)?;
    if address.0.is_multiple_of(dtype.bytes() as u64) {
        return Ok(());
    }
    let expected = format!("an address aligned to {} bytes for {}", dtype.bytes(), dtype.name());
    Err(invalid(op, argument, expected, format!("{:#x}", address.0)))
}
