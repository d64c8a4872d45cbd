//! The memory that tensors are exported in: a sealed memory file of the exporter, which importers open by number.
//!
//! Invariant: a segment is of one size for as long as it lives, and its first page says whose it is. The exporter writes payload
//! and generation, an importer its own count of borrows, and nobody else any of them; `lease` has the order.

use super::descriptor::corrupt;
use super::{Fault, MAX_IMPORTERS, lease};
use crate::channel::Process;
use crate::sealed::{self, Mapping};
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

/// "PLTENSOR".
const MAGIC: u64 = 0x524f_534e_4554_4c50;
const VERSION: u64 = 1;
pub(super) const PAGE: usize = 4096;
const GENERATION: usize = 64;
const RETIRED: usize = 128;
const BORROWS: usize = 1024;
const LINE: usize = 64;
const _: () = assert!(BORROWS + LINE * MAX_IMPORTERS as usize <= PAGE);

/// Who exports: what an importer is given as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) process: Process,
    pub(super) token: u64,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peerlane-tensors:{VERSION}:{:x}:{:016x}", self.process.pack(), self.token)
    }
}

impl FromStr for Owner {
    type Err = ();

    fn from_str(text: &str) -> Result<Owner, ()> {
        let begin = format!("peerlane-tensors:{VERSION}:");
        let (process, token) = text.strip_prefix(&begin).ok_or(())?.split_once(':').ok_or(())?;
        let number = |text| u64::from_str_radix(text, 16).map_err(drop);
        let process = Process::unpack(number(process)?).ok_or(())?;
        let owner = Owner { process, token: number(token)? };
        // Only the text that was made: no signs, no leading zeros.
        if owner.to_string() == text { Ok(owner) } else { Err(()) }
    }
}

pub(super) struct Segment {
    /// The exporter's. Importers need none once it is mapped.
    file: Option<OwnedFd>,
    memory: Mapping,
    pub(super) number: u32,
    /// The process that has mapped it, which is not a child that was forked later.
    pid: u32,
}

impl Segment {
    /// Room for `bytes` of payload, which the kernel may refuse.
    pub(super) fn create(owner: Owner, number: u32, bytes: u64) -> Result<Segment, String> {
        let size =
            bytes.checked_add(PAGE as u64).and_then(|n| n.checked_next_multiple_of(PAGE as u64));
        let size = size.and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or_else(|| format!("{bytes} bytes are more than there can be"))?;
        let file = sealed::create("peerlane-tensors", size).map_err(|error| error.to_string())?;
        sealed::back(&file, size)?;
        let mut segment = Segment::map(&file, size, number)?;
        segment.file = Some(file);
        for (index, word) in first_line(owner, number).into_iter().enumerate() {
            segment.memory.wide(8 * index).store(word, Ordering::Relaxed);
        }
        Ok(segment)
    }

    /// Opens the one that a descriptor of `owner` names.
    pub(super) fn open(owner: Owner, number: u32, file: u32) -> Result<Segment, Fault> {
        let gone = |reason| Fault::Gone { pid: owner.process.pid(), reason };
        let file = sealed::open_of(owner.process.pid(), file).map_err(gone)?;
        let size = sealed::size_of(&file).map_err(gone)?;
        if size <= PAGE || !size.is_multiple_of(PAGE) {
            return Err(corrupt("segment", "pages of payload", format_args!("{size} bytes")));
        }
        let segment = Segment::map(&file, size, number).map_err(gone)?;
        let found: Vec<u64> =
            (0..4).map(|i| segment.memory.wide(8 * i).load(Ordering::Relaxed)).collect();
        if found != first_line(owner, number) {
            // The exporter has closed it, and its number is another file's now.
            return Err(gone("its file is not the exporter's any more".into()));
        }
        Ok(segment)
    }

    fn map(file: &OwnedFd, size: usize, number: u32) -> Result<Segment, String> {
        let memory = Mapping::new(file, size)?;
        Ok(Segment { file: None, memory, number, pid: std::process::id() })
    }

    /// Whether this is the process that has mapped it: what a forked child drops is its parent's.
    pub(super) fn is_own(&self) -> bool {
        self.pid == std::process::id()
    }

    /// Bytes of payload.
    pub(super) fn capacity(&self) -> u64 {
        (self.memory.bytes() - PAGE) as u64
    }

    /// The number of its file in the exporter.
    pub(super) fn file(&self) -> u32 {
        self.file.as_ref().map_or(u32::MAX, |file| file.as_raw_fd() as u32)
    }

    /// Where the payload at `offset` lies.
    pub(super) fn payload(&self, offset: u64) -> *mut u8 {
        assert!(offset <= self.capacity(), "an offset into the segment");
        self.memory.at(PAGE + offset as usize)
    }

    /// Counts the times that payload was given up.
    pub(super) fn generation(&self) -> &AtomicU64 {
        self.memory.wide(GENERATION)
    }

    /// Not 0 once nothing new will be exported in it.
    pub(super) fn retired(&self) -> &AtomicU64 {
        self.memory.wide(RETIRED)
    }

    /// How many views `importer` has.
    pub(super) fn borrows(&self, importer: u32) -> &AtomicU64 {
        assert!(importer < MAX_IMPORTERS);
        self.memory.wide(BORROWS + LINE * importer as usize)
    }

    /// The process that borrows as `importer`.
    pub(super) fn process(&self, importer: u32) -> &AtomicU64 {
        assert!(importer < MAX_IMPORTERS);
        self.memory.wide(BORROWS + LINE * importer as usize + 8)
    }

    /// An importer that has views, and how many. Who has ended has none.
    pub(super) fn borrower(&self) -> Option<(u32, u64)> {
        (0..MAX_IMPORTERS).find_map(|importer| {
            let borrows = self.borrows(importer);
            if lease::is_free(borrows) {
                return None;
            }
            let lives = || {
                let process = Process::unpack(self.process(importer).load(Ordering::Relaxed));
                process.is_some_and(Process::is_running)
            };
            lives().then(|| (importer, borrows.load(Ordering::Relaxed)))
        })
    }
}

fn first_line(owner: Owner, number: u32) -> [u64; 4] {
    [MAGIC, VERSION | u64::from(number) << 32, owner.token, owner.process.pack()]
}
