//! NCCL as a contender, loaded at run time.
//!
//! Invariant: Peerlane neither links nor needs NCCL; without the library `--compare nccl` ends with
//! an error that says where it was looked for.

use super::job::Job;
use super::rank::{Contender, Fail};
use libloading::Library;
use peerlane::gpu::{DevicePtr, Stream};
use peerlane::{DType, Operation, ReduceOp};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::process::Command;
use std::ptr;
use std::sync::Arc;

/// An `ncclComm_t`.
type Comm = *mut c_void;
/// `ncclAllReduce` and `ncclReduceScatter`.
type Reduce = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, u64) -> c_int;
/// `ncclAllGather`.
type Collect = unsafe extern "C" fn(u64, u64, usize, c_int, Comm, u64) -> c_int;
/// `ncclBroadcast`.
type Rooted = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, u64) -> c_int;
/// `ncclSend` and `ncclRecv`.
type Point = unsafe extern "C" fn(u64, usize, c_int, c_int, Comm, u64) -> c_int;

/// The functions used here, as `nccl.h` declares them; buffers and streams are addresses.
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    init_all: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int,
    destroy: unsafe extern "C" fn(Comm) -> c_int,
    async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: Collect,
    broadcast: Rooted,
    send: Point,
    recv: Point,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
}

/// The loaded library.
pub(crate) struct Nccl {
    functions: Functions,
    /// Keeps the functions alive, and is never unloaded: threads of NCCL outlive its communicators.
    _library: ManuallyDrop<Library>,
}

impl Nccl {
    /// Finds and loads `libnccl.so.2`.
    pub(crate) fn load() -> Result<Arc<Nccl>, Fail> {
        let mut tried = Vec::new();
        for path in candidates() {
            // SAFETY: loading runs NCCL's initialisers, which expect nothing of the caller.
            match unsafe { Library::new(&path) } {
                Ok(library) => {
                    let functions = functions(&library)?;
                    return Ok(Arc::new(Nccl { functions, _library: ManuallyDrop::new(library) }));
                }
                Err(error) => tried.push(format!("{path} ({error})")),
            }
        }
        Err(format!(
            "--compare nccl: expected NCCL as libnccl.so.2, in a Python package nvidia/nccl, or at \
             PEERLANE_NCCL, got none: {}",
            tried.join("; ")
        )
        .into())
    }

    /// The library's version, as `2.28.9`.
    pub(crate) fn version(&self) -> Result<String, Fail> {
        let mut code = 0;
        // SAFETY: the function writes one int.
        self.check("ncclGetVersion", unsafe { (self.functions.get_version)(&mut code) })?;
        Ok(format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100))
    }

    /// One contender for each GPU, which must all differ.
    pub(crate) fn connect(self: &Arc<Nccl>, ordinals: &[u32]) -> Result<Vec<Rank>, Fail> {
        let devices: Vec<c_int> = ordinals.iter().map(|n| *n as c_int).collect();
        let mut comms = vec![ptr::null_mut(); devices.len()];
        let (pointer, count) = (comms.as_mut_ptr(), devices.len() as c_int);
        // SAFETY: both arrays have `count` entries.
        let code = unsafe { (self.functions.init_all)(pointer, count, devices.as_ptr()) };
        self.check("ncclCommInitAll", code)?;
        let rank =
            |(rank, comm): (usize, Comm)| Rank { nccl: self.clone(), comm, rank: rank as u32 };
        Ok(comms.into_iter().enumerate().map(rank).collect())
    }

    fn check(&self, call: &str, code: c_int) -> Result<(), Fail> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL returns a static string for every code.
        let text = unsafe { CStr::from_ptr((self.functions.error_string)(code)) };
        Err(format!("{call}: {} ({code})", text.to_string_lossy()).into())
    }
}

/// Where the library may be, best first.
fn candidates() -> Vec<String> {
    if let Ok(path) = std::env::var("PEERLANE_NCCL") {
        return vec![path];
    }
    const LIST: &str = "import sys, os\n\
        for p in sys.path: print(os.path.join(p, 'nvidia', 'nccl', 'lib', 'libnccl.so.2'))";
    let mut paths = vec!["libnccl.so.2".to_string()];
    if let Ok(listed) = Command::new("python3").args(["-c", LIST]).output() {
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        paths.extend(listed.lines().filter(|p| std::path::Path::new(p).exists()).map(String::from));
    }
    paths
}

fn functions(library: &Library) -> Result<Functions, libloading::Error> {
    // SAFETY: the types are those of nccl.h, unchanged since NCCL 2.7.
    unsafe {
        Ok(Functions {
            get_version: *library.get(b"ncclGetVersion")?,
            error_string: *library.get(b"ncclGetErrorString")?,
            init_all: *library.get(b"ncclCommInitAll")?,
            destroy: *library.get(b"ncclCommDestroy")?,
            async_error: *library.get(b"ncclCommGetAsyncError")?,
            all_reduce: *library.get(b"ncclAllReduce")?,
            reduce_scatter: *library.get(b"ncclReduceScatter")?,
            all_gather: *library.get(b"ncclAllGather")?,
            broadcast: *library.get(b"ncclBroadcast")?,
            send: *library.get(b"ncclSend")?,
            recv: *library.get(b"ncclRecv")?,
            group_start: *library.get(b"ncclGroupStart")?,
            group_end: *library.get(b"ncclGroupEnd")?,
        })
    }
}

/// `ncclDataType_t`.
const fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::Bf16 => 9,
    }
}

/// `ncclRedOp_t`.
const fn reduction(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Avg => 4,
    }
}

/// One rank of an NCCL communicator.
pub(crate) struct Rank {
    nccl: Arc<Nccl>,
    comm: Comm,
    rank: u32,
}

// SAFETY: NCCL lets any thread use a communicator, as long as only one does at a time.
unsafe impl Send for Rank {}

impl Rank {
    /// NCCL has no gather: its documentation builds one of grouped sends and receives.
    ///
    /// # Safety
    /// As [`Contender::call`].
    unsafe fn gather(&self, job: &Job, src: u64, dst: u64, stream: u64) -> Result<(), Fail> {
        let (f, dtype, root) = (&self.nccl.functions, data_type(job.dtype), job.root as c_int);
        // SAFETY: the caller vouches for both buffers; the root's holds a part per rank.
        unsafe {
            self.nccl.check("ncclGroupStart", (f.group_start)())?;
            let code = (f.send)(src, job.count, dtype, root, self.comm, stream);
            self.nccl.check("ncclSend", code)?;
            if self.rank == job.root {
                for peer in 0..job.world {
                    let part = dst + (peer as usize * job.part_bytes()) as u64;
                    let code = (f.recv)(part, job.count, dtype, peer as c_int, self.comm, stream);
                    self.nccl.check("ncclRecv", code)?;
                }
            }
            self.nccl.check("ncclGroupEnd", (f.group_end)())
        }
    }
}

impl Contender for Rank {
    unsafe fn call(
        &mut self,
        job: &Job,
        src: DevicePtr,
        dst: DevicePtr,
        stream: Stream,
    ) -> Result<(), Fail> {
        let (f, comm, count) = (&self.nccl.functions, self.comm, job.count);
        let (dtype, op) = (data_type(job.dtype), reduction(job.reduce));
        let (DevicePtr(src), DevicePtr(dst), Stream(stream)) = (src, dst, stream);
        // SAFETY: the caller vouches for both buffers, and `comm` is alive.
        let code = unsafe {
            match job.op {
                Operation::AllReduce => (f.all_reduce)(src, dst, count, dtype, op, comm, stream),
                Operation::ReduceScatter => {
                    (f.reduce_scatter)(src, dst, count, dtype, op, comm, stream)
                }
                Operation::AllGather => (f.all_gather)(src, dst, count, dtype, comm, stream),
                Operation::Broadcast => {
                    (f.broadcast)(dst, dst, count, dtype, job.root as c_int, comm, stream)
                }
                Operation::Gather => return self.gather(job, src, dst, stream),
                // NCCL has no barrier either: its users all-reduce a word, here of a byte's type
                // and no larger than the buffers of a barrier.
                _ => (f.all_reduce)(src, dst, 1, 1, 0, comm, stream),
            }
        };
        self.nccl.check(job.op.name(), code)
    }

    fn health(&self) -> Result<(), Fail> {
        let mut state = 0;
        // SAFETY: the function writes one int.
        let code = unsafe { (self.nccl.functions.async_error)(self.comm, &mut state) };
        self.nccl.check("ncclCommGetAsyncError", code)?;
        self.nccl.check("an asynchronous call", state)
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn name(&self) -> &'static str {
        "nccl"
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // SAFETY: the communicator came from `connect` and is not used again. It reports nothing
        // that an earlier call has not reported.
        let _ = unsafe { (self.nccl.functions.destroy)(self.comm) };
    }
}
