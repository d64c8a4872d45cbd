//! The side that imports.
//!
//! Invariant: a view's segment stays mapped while the view lives, and the exporter leaves the payload alone until it ends (`lease`).

use super::descriptor::corrupt;
use super::segment::{Owner, Segment};
use super::{Descriptor, Element, Fault, MAX_DIMS, MAX_IMPORTERS, Shape, lease};
use crate::channel::Process;
use crate::collectives::invalid;
use crate::error::{Result, clipped};
use crate::trace;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

const OP: &str = "transfer import";

/// Imports the tensors of one exporter.
pub struct Importer {
    owner: Owner,
    index: u32,
    process: Process,
    segments: Mutex<HashMap<u32, Arc<Segment>>>,
}

impl Importer {
    /// Opens the arena of `handle` as importer `index`, which no other process is.
    pub fn open(handle: &str, index: u32) -> Result<Importer> {
        const OP: &str = "transfer open";
        trace::start_from_environment();
        let owner = handle.parse().map_err(|()| {
            let shown: String = clipped(handle).chars().take(80).collect();
            invalid(OP, "handle", "the text of an exporter".into(), shown)
        })?;
        if index >= MAX_IMPORTERS {
            return Err(invalid(OP, "index", format!("below {MAX_IMPORTERS}"), index));
        }
        let process = Process::this().map_err(Fault::NoMemory)?;
        Ok(Importer { owner, index, process, segments: Mutex::default() })
    }

    /// The tensor of `descriptor`, where it is.
    pub fn import(&self, descriptor: &Descriptor) -> Result<View> {
        let _span = trace::span!("import", bytes = descriptor.bytes);
        let segment = self.segment(descriptor)?;
        let Descriptor { element, shape, offset, bytes, generation, checksum, .. } = *descriptor;
        if bytes > segment.capacity() || offset > segment.capacity() - bytes {
            let expected = format!("a payload inside {} bytes", segment.capacity());
            return Err(
                corrupt("descriptor", expected, format_args!("{bytes} bytes at {offset}")).into()
            );
        }
        let address = segment.payload(offset);
        let mut strides = [0; MAX_DIMS];
        let mut step: u64 = 1;
        for (stride, size) in strides[..shape.sizes().len()].iter_mut().zip(shape.sizes()).rev() {
            *stride = step;
            // Beside a dimension of no elements the others may have any size.
            step = step.saturating_mul(*size);
        }
        lease::take(segment.borrows(self.index), segment.generation(), generation)
            .map_err(|now| Fault::Stale { exported: generation, now })?;
        // From here on dropping it ends the look.
        let view = View { segment, importer: self.index, address, element, shape, strides };
        if let Some(expected) = checksum {
            view.verify(expected)?;
        }
        Ok(view)
    }

    fn segment(&self, descriptor: &Descriptor) -> Result<Arc<Segment>> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = segments.get(&descriptor.segment) {
            return Ok(found.clone());
        }
        // What the exporter has retired, and nobody here looks at, is not asked for again.
        segments.retain(|_, segment| {
            Arc::strong_count(segment) > 1 || segment.retired().load(Ordering::Acquire) == 0
        });
        let opened = Segment::open(self.owner, descriptor.segment, descriptor.file)?;
        self.sign(&opened)?;
        let opened = Arc::new(opened);
        segments.insert(descriptor.segment, opened.clone());
        Ok(opened)
    }

    /// Says in a segment which process borrows under this index.
    fn sign(&self, segment: &Segment) -> Result<()> {
        let (own, slot) = (self.process.pack(), segment.process(self.index));
        let before = slot.load(Ordering::Acquire);
        if before == own {
            return Ok(());
        }
        let taken = || {
            let expected = "an index that no other process has".into();
            invalid(OP, "index", expected, self.index)
        };
        let other = Process::unpack(before);
        if other.is_some_and(Process::is_running) {
            return Err(taken());
        }
        // What it held when it ended; nobody else counts under this index before it is signed.
        let left = segment.borrows(self.index).load(Ordering::Relaxed);
        match slot.compare_exchange(before, own, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => lease::forget(segment.borrows(self.index), left),
            Err(now) if now == own => {}
            Err(_) => return Err(taken()),
        }
        Ok(())
    }
}

/// A tensor in the exporter's memory. It stays as it is until the view is dropped.
pub struct View {
    segment: Arc<Segment>,
    importer: u32,
    address: *mut u8,
    element: Element,
    shape: Shape,
    strides: [u64; MAX_DIMS],
}

// SAFETY: what it points to is memory that nobody writes while it lives, and its count is atomic.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// The type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Its sizes, outermost first.
    pub fn shape(&self) -> &[u64] {
        self.shape.sizes()
    }

    /// For each dimension, how many elements lie between two neighbours.
    pub fn strides(&self) -> &[u64] {
        &self.strides[..self.shape().len()]
    }

    /// Its first element; for a tensor without elements, a place that is not to be read.
    pub fn as_ptr(&self) -> *const u8 {
        self.address
    }

    /// Its size, without gaps.
    pub fn bytes(&self) -> u64 {
        self.shape.count().unwrap_or_default() * u64::from(self.element.bytes)
    }

    /// Whether its elements lie one behind the other.
    pub fn is_contiguous(&self) -> bool {
        let mut step = 1;
        self.bytes() == 0
            || self.shape().iter().zip(self.strides()).rev().all(|(size, stride)| {
                let fits = *size == 1 || *stride == step;
                step *= size;
                fits
            })
    }

    /// The part of it with these indices in dimension `dim`.
    pub fn narrow(mut self, dim: usize, indices: Range<u64>) -> Result<View> {
        let Some(size) = self.shape().get(dim).copied() else {
            let expected = format!("below {}, the number of dimensions", self.shape().len());
            return Err(invalid("transfer narrow", "dim", expected, dim));
        };
        if indices.start > indices.end || indices.end > size {
            let expected = format!("a part of 0..{size}");
            return Err(invalid("transfer narrow", "indices", expected, format!("{indices:?}")));
        }
        self.shape.set(dim, indices.end - indices.start);
        if self.bytes() != 0 {
            let step = indices.start * self.strides[dim] * u64::from(self.element.bytes);
            // SAFETY: there is an element at that index, inside the payload.
            self.address = unsafe { self.address.add(step as usize) };
        }
        Ok(self)
    }

    /// Copies its elements to `bytes`, one behind the other.
    pub fn copy_to(&self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 != self.bytes() {
            let expected = format!("{} bytes, as the tensor has", self.bytes());
            return Err(invalid("transfer copy", "bytes", expected, bytes.len()));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        // The innermost dimensions that lie in a row are copied at once.
        let mut inner = self.shape().len();
        let mut run = u64::from(self.element.bytes);
        while inner > 0 && self.strides[inner - 1] * u64::from(self.element.bytes) == run {
            run *= self.shape()[inner - 1];
            inner -= 1;
        }
        for (part, to) in bytes.chunks_exact_mut(run as usize).enumerate() {
            let (mut rest, mut at) = (part as u64, 0);
            for dim in (0..inner).rev() {
                at += rest % self.shape()[dim] * self.strides[dim];
                rest /= self.shape()[dim];
            }
            let at = (at * u64::from(self.element.bytes)) as usize;
            // SAFETY: a run of elements of this view, which nobody writes; `to` is as long and not in the segment.
            unsafe {
                std::ptr::copy_nonoverlapping(self.address.add(at), to.as_mut_ptr(), to.len())
            };
        }
        Ok(())
    }

    /// Its elements, one behind the other.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes() as usize];
        self.copy_to(&mut bytes).expect("as many bytes as the tensor has");
        bytes
    }

    fn verify(&self, expected: u32) -> Result<()> {
        // SAFETY: contiguous payload that nobody writes; another process that writes it all the same changes a sum.
        let payload = unsafe { std::slice::from_raw_parts(self.address, self.bytes() as usize) };
        let got = crc32fast::hash(payload);
        if got == expected {
            return Ok(());
        }
        Err(corrupt("checksum", format_args!("{expected:#x}"), format_args!("{got:#x}")).into())
    }
}

impl Clone for View {
    fn clone(&self) -> View {
        let View { importer, address, element, shape, strides, .. } = *self;
        let segment = self.segment.clone();
        lease::again(segment.borrows(importer));
        View { segment, importer, address, element, shape, strides }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if !self.segment.is_own() {
            return;
        }
        lease::end(self.segment.borrows(self.importer));
    }
}
