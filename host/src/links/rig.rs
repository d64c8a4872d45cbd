//! What measuring and testing links needs on every GPU: memory, streams, events, and a small mailbox per pair.
//!
//! Invariant: everything is allocated before the first measurement and given back after the last work
//! on any of the GPUs. Nothing here reaches memory that is not its own.

use crate::error::{Error, Result};
use crate::gpu::{DevicePtr, Event, GpuRef, HostMemory, Stream};
use crate::mailbox::OwnStream;
use peerlane_device::abi::{Args, CONTROL_BYTES, Layout, PROBE_BYTES, Status, UNIT, state};

/// What a pair's probe needs of a mailbox: the control words and the probe area.
const AREA_BYTES: usize = CONTROL_BYTES + PROBE_BYTES;
/// A status page takes this much of a GPU's host memory.
const STATUS_BYTES: usize = 512;
const _: () = assert!(size_of::<Status>() <= STATUS_BYTES);
/// The probe never looks at slots.
const LAYOUT: Layout = Layout::new(1, 1, 1).expect("one slot fits");
/// Bytes per GPU below which measuring says nothing.
const LEAST_BYTES: usize = 2 * UNIT * 1024;

/// Device memory, freed in the end.
pub(crate) struct Memory<'a> {
    gpu: &'a GpuRef,
    /// Its first byte.
    pub(crate) at: DevicePtr,
}

impl<'a> Memory<'a> {
    pub(crate) fn new(gpu: &'a GpuRef, bytes: usize) -> Result<Memory<'a>> {
        Ok(Memory { gpu, at: gpu.alloc(bytes)? })
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // SAFETY: the rig has waited for all GPUs, or nothing has used the memory yet.
        let _ = unsafe { self.gpu.free(self.at) };
    }
}

/// Pinned host memory, freed in the end.
struct Pinned<'a> {
    gpu: &'a GpuRef,
    memory: HostMemory,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // SAFETY: as for `Memory`.
        let _ = unsafe { self.gpu.free_host(self.memory) };
    }
}

/// One GPU.
struct Site<'a> {
    gpu: &'a GpuRef,
    /// The first half is read, the second written.
    buffer: Memory<'a>,
    /// A mailbox for each peer, by its position.
    areas: Memory<'a>,
    /// A status page for each peer, likewise.
    statuses: Pinned<'a>,
    /// What probes run on; the paths' streams may be busy.
    stream: OwnStream,
}

/// One ordered pair: what the first does to the second.
struct Path<'a> {
    gpu: &'a GpuRef,
    stream: OwnStream,
    start: Event,
    end: Event,
}

impl<'a> Path<'a> {
    fn new(gpu: &'a GpuRef) -> Result<Path<'a>> {
        let stream = OwnStream::new(gpu)?;
        let start = gpu.event_create_timed()?;
        match gpu.event_create_timed() {
            Ok(end) => Ok(Path { gpu, stream, start, end }),
            Err(error) => {
                // SAFETY: made above and used by nobody.
                let _ = unsafe { gpu.event_destroy(start) };
                Err(error)
            }
        }
    }
}

impl Drop for Path<'_> {
    fn drop(&mut self) {
        // SAFETY: made in `Rig::new`; nothing uses them any more.
        unsafe {
            let _ = self.gpu.event_destroy(self.start);
            let _ = self.gpu.event_destroy(self.end);
        }
    }
}

/// All GPUs and all ordered pairs of them.
pub(crate) struct Rig<'a> {
    sites: Vec<Site<'a>>,
    /// `[from * world + to]`; none on the diagonal.
    paths: Vec<Option<Path<'a>>>,
    /// Bytes of one message: half a buffer.
    pub(crate) message: usize,
}

impl<'a> Rig<'a> {
    /// Allocates `bytes` bytes on each GPU; if not all have room, half of that, and so on.
    pub(crate) fn new(gpus: &'a [GpuRef], bytes: usize) -> Result<Rig<'a>> {
        let mut bytes = (bytes / (2 * UNIT) * (2 * UNIT)).max(LEAST_BYTES);
        let buffers = loop {
            let buffers: Result<Vec<Memory<'a>>> =
                gpus.iter().map(|gpu| Memory::new(gpu, bytes)).collect();
            match buffers {
                Err(_) if bytes >= 2 * LEAST_BYTES => bytes /= 2,
                buffers => break buffers?,
            }
        };
        let message = bytes / 2 / UNIT * UNIT;
        let sites = gpus.iter().zip(buffers).map(|(gpu, buffer)| {
            let areas = Memory::new(gpu, gpus.len() * AREA_BYTES)?;
            let memory = gpu.alloc_host(gpus.len() * STATUS_BYTES)?;
            let statuses = Pinned { gpu, memory };
            let stream = OwnStream::new(gpu)?;
            Ok(Site { gpu, buffer, areas, statuses, stream })
        });
        let sites = sites.collect::<Result<Vec<_>>>()?;
        let pairs = (0..gpus.len()).flat_map(|from| (0..gpus.len()).map(move |to| (from, to)));
        let paths = pairs.map(
            |(from, to)| {
                if from == to { Ok(None) } else { Path::new(&gpus[from]).map(Some) }
            },
        );
        let rig = Rig { paths: paths.collect::<Result<_>>()?, sites, message };
        rig.clear(bytes)?;
        Ok(rig)
    }

    /// Gives all memory a content: a first touch is not to be measured, and flags begin at 0.
    fn clear(&self, bytes: usize) -> Result<()> {
        for site in &self.sites {
            let stream = site.stream.stream;
            // SAFETY: both were allocated with these sizes.
            unsafe {
                site.gpu.fill(site.buffer.at, 0, bytes, stream)?;
                site.gpu.fill(site.areas.at, 0, self.sites.len() * AREA_BYTES, stream)?;
            }
        }
        self.sites.iter().try_for_each(|site| site.gpu.stream_synchronize(site.stream.stream))
    }

    pub(crate) fn world(&self) -> usize {
        self.sites.len()
    }

    pub(crate) fn gpu(&self, position: usize) -> &'a GpuRef {
        self.sites[position].gpu
    }

    fn path(&self, (from, to): (usize, usize)) -> Result<&Path<'a>> {
        let path = self.paths.get(from * self.world() + to).and_then(Option::as_ref);
        path.ok_or_else(|| Error::InvalidArgument {
            op: "measure",
            argument: "pair",
            expected: "two different positions".into(),
            got: format!("{from} and {to}"),
        })
    }

    /// The stream of an ordered pair.
    pub(crate) fn stream(&self, pair: (usize, usize)) -> Result<Stream> {
        Ok(self.path(pair)?.stream.stream)
    }

    /// What `position` reads when it sends, and what is written when it is sent to. Senders share
    /// the latter: what ends up there means nothing.
    pub(crate) fn halves(&self, position: usize) -> (DevicePtr, DevicePtr) {
        let at = self.sites[position].buffer.at;
        (at, at.offset(self.message))
    }

    /// Notes on the pair's stream that a measurement begins.
    pub(crate) fn begin(&self, pair: (usize, usize)) -> Result<()> {
        let path = self.path(pair)?;
        path.gpu.event_record(path.start, path.stream.stream)
    }

    /// Notes that it ends.
    pub(crate) fn end(&self, pair: (usize, usize)) -> Result<()> {
        let path = self.path(pair)?;
        path.gpu.event_record(path.end, path.stream.stream)
    }

    /// Waits for the end; the milliseconds between both. The clock of events may stand still for as
    /// long as half a microsecond, so there is no 0.
    pub(crate) fn elapsed_ms(&self, pair: (usize, usize)) -> Result<f64> {
        let path = self.path(pair)?;
        path.gpu.stream_synchronize(path.stream.stream)?;
        Ok(f64::from(path.gpu.event_elapsed_ms(path.start, path.end)?).max(1e-6))
    }

    /// Where `mine` finds the status page of its probes with `other`.
    pub(crate) fn status(&self, mine: usize, other: usize) -> *const Status {
        let pages = self.sites[mine].statuses.memory.host;
        // SAFETY: there is a page for each position.
        unsafe { pages.add(other * STATUS_BYTES) }.cast()
    }

    /// Where `other` writes into the memory of `mine`: control words, then the probe area. `mine` has one for itself
    /// too, which no probe of a pair uses.
    pub(crate) fn area(&self, mine: usize, other: usize) -> DevicePtr {
        self.sites[mine].areas.at.offset(other * AREA_BYTES)
    }

    /// What `position` runs single steps on.
    pub(crate) fn own_stream(&self, position: usize) -> Stream {
        self.sites[position].stream.stream
    }

    /// Takes back what a failed probe of the pair has left, on both sides. Only while none runs.
    pub(crate) fn forget_failures(&self, (a, b): (usize, usize)) -> Result<()> {
        for (mine, other) in [(a, b), (b, a)] {
            let (gpu, stream) = (self.gpu(mine), self.own_stream(mine));
            // SAFETY: the area lies in this GPU's memory.
            unsafe { gpu.fill(self.area(mine, other), 0, CONTROL_BYTES, stream)? };
            gpu.stream_synchronize(stream)?;
            let page = self.status(mine, other).cast_mut();
            // SAFETY: the page lives as long as the rig, and no kernel that writes to it runs.
            unsafe { (&raw mut (*page).state).write_volatile(state::OK) };
        }
        Ok(())
    }

    /// What the probe between `mine` and `other` runs on, and its arguments: ranks 0 and 1 of a
    /// world of two, the lower position first.
    pub(crate) fn probe(&self, mine: usize, other: usize) -> (Stream, Args) {
        let rank = u32::from(mine > other);
        let mut args = Args::new(rank, 2, LAYOUT);
        args.peer = 1 - rank;
        args.peers[rank as usize] = self.area(mine, other).0;
        args.peers[args.peer as usize] = self.area(other, mine).0;
        let page = self.sites[mine].statuses.memory.device.offset(other * STATUS_BYTES);
        args.status = page.0;
        (self.sites[mine].stream.stream, args)
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        // Peers write into each other's memory, so all GPUs come to rest before any of it goes. One
        // that fails has lost its context and writes nothing more.
        for site in &self.sites {
            let _ = site.gpu.synchronize();
        }
    }
}
