//! What is said of an exported tensor: where it lies, and what it is.
//!
//! Invariant: a descriptor that was read is one that an exporter could have written: its sizes agree, and none overflows.
//! That it leads into a segment is checked by who opens that.

use super::Fault;

/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 8;
/// Bytes of a descriptor before the sizes of its dimensions.
pub const HEADER: usize = 64;
/// Payloads begin at multiples of this.
pub(super) const ALIGNMENT: u64 = 64;

const VERSION: u16 = 1;
const CHECKSUM: u16 = 1;

/// Sizes of dimensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    sizes: [u64; MAX_DIMS],
    dims: usize,
}

impl Shape {
    /// A shape of these sizes; none if they are more than [`MAX_DIMS`].
    pub fn new(sizes: &[u64]) -> Option<Shape> {
        let mut shape = Shape { dims: sizes.len(), ..Shape::default() };
        shape.sizes.get_mut(..sizes.len())?.copy_from_slice(sizes);
        Some(shape)
    }

    /// The sizes, outermost first.
    pub fn sizes(&self) -> &[u64] {
        &self.sizes[..self.dims]
    }

    /// Number of elements; none if it is no number of 64 bits.
    pub fn count(&self) -> Option<u64> {
        if self.sizes().contains(&0) {
            return Some(0);
        }
        self.sizes().iter().try_fold(1_u64, |count, size| count.checked_mul(*size))
    }

    pub(super) fn set(&mut self, dim: usize, size: u64) {
        self.sizes[..self.dims][dim] = size;
    }
}

/// The type of elements: a code that the two sides understand, and their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    /// What both sides call the type; DLPack's code in Python.
    pub code: u8,
    /// Bytes of one element, 1 to 16.
    pub bytes: u8,
}

/// An exported tensor, contiguous, outermost dimension first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The type of its elements.
    pub element: Element,
    /// Its sizes.
    pub shape: Shape,
    pub(super) segment: u32,
    pub(super) file: u32,
    pub(super) generation: u64,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) checksum: Option<u32>,
}

impl Descriptor {
    /// Bytes of its payload.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes it: 64 bytes, and 8 for each dimension.
    pub fn write(&self, to: &mut Vec<u8>) {
        let Descriptor { element, shape, segment, file, generation, offset, bytes, checksum } =
            self;
        to.extend(VERSION.to_le_bytes());
        to.extend([shape.dims as u8, element.bytes, element.code, 0]);
        to.extend(checksum.map_or(0, |_| CHECKSUM).to_le_bytes());
        to.extend(segment.to_le_bytes());
        to.extend(file.to_le_bytes());
        [generation, offset, bytes].iter().for_each(|word| to.extend(word.to_le_bytes()));
        to.extend(checksum.unwrap_or(0).to_le_bytes());
        to.extend([0; 20]);
        shape.sizes().iter().for_each(|size| to.extend(size.to_le_bytes()));
    }

    /// Reads what [`write`](Descriptor::write) has written, and nothing else.
    pub fn read(from: &[u8]) -> Result<Descriptor, Fault> {
        let header = from.first_chunk::<HEADER>().ok_or_else(|| {
            corrupt("descriptor", format_args!("{HEADER} bytes and more"), from.len())
        })?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        expect("descriptor's version", VERSION.into(), short(0).into())?;
        let dims = usize::from(header[2]);
        if dims > MAX_DIMS {
            return Err(corrupt("dimensions", format_args!("{MAX_DIMS} at most"), dims));
        }
        expect("descriptor's bytes", (HEADER + 8 * dims) as u64, from.len() as u64)?;
        let element = Element { code: header[4], bytes: header[3] };
        if !(1..=16).contains(&element.bytes) {
            return Err(corrupt("bytes of an element", "1 to 16", element.bytes));
        }
        expect("compression", 0, header[5].into())?;
        let flags = short(6);
        expect("flags", 0, (flags & !CHECKSUM).into())?;
        if header[44..].iter().any(|byte| *byte != 0) || flags == 0 && half(40) != 0 {
            return Err(corrupt("reserved bytes", "zeros", "others"));
        }
        let mut shape = Shape { dims, ..Shape::default() };
        for (size, bytes) in shape.sizes.iter_mut().zip(from[HEADER..].as_chunks::<8>().0) {
            *size = u64::from_le_bytes(*bytes);
        }
        let bytes = shape.count().and_then(|count| count.checked_mul(element.bytes.into()));
        let bytes = bytes.ok_or_else(|| corrupt("shape", "a size of 64 bits", "a larger one"))?;
        expect("payload's bytes", bytes, word(32))?;
        let (offset, checksum) = (word(24), (flags & CHECKSUM != 0).then_some(half(40)));
        if !offset.is_multiple_of(ALIGNMENT) || offset.checked_add(bytes).is_none() {
            return Err(corrupt("offset", format_args!("a multiple of {ALIGNMENT}"), offset));
        }
        let (segment, file, generation) = (half(8), half(12), word(16));
        Ok(Descriptor { element, shape, segment, file, generation, offset, bytes, checksum })
    }
}

fn expect(what: &'static str, expected: u64, got: u64) -> Result<(), Fault> {
    if expected == got { Ok(()) } else { Err(corrupt(what, expected, got)) }
}

pub(super) fn corrupt(what: &'static str, expected: impl ToString, got: impl ToString) -> Fault {
    Fault::Corrupt { what, expected: expected.to_string(), got: got.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(descriptor: &Descriptor) -> Vec<u8> {
        let mut bytes = Vec::new();
        descriptor.write(&mut bytes);
        bytes
    }

    prop_compose! {
        fn any_descriptor()(
            sizes in prop::collection::vec(0_u64..1000, 0..=MAX_DIMS).prop_filter(
                "a size of 64 bits", |sizes| Shape::new(sizes).unwrap().count().is_some_and(|n| n < 1 << 50)),
            (code, item, segment, file) in (any::<u8>(), 1_u8..=16, any::<u32>(), any::<u32>()),
            generation in any::<u64>(),
            lines in 0_u64..1 << 40,
            checksum in any::<Option<u32>>(),
        ) -> Descriptor {
            let (shape, element) = (Shape::new(&sizes).unwrap(), Element { code, bytes: item });
            let bytes = shape.count().unwrap() * u64::from(item);
            let offset = lines * ALIGNMENT;
            Descriptor { element, shape, segment, file, generation, offset, bytes, checksum }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(descriptor in any_descriptor()) {
            prop_assert_eq!(Descriptor::read(&written(&descriptor)), Ok(descriptor));
        }

        #[test]
        fn other_bytes_are_refused_or_agree(
            descriptor in any_descriptor(),
            changes in prop::collection::vec((0_usize..HEADER + 8 * MAX_DIMS, any::<u8>()), 1..4),
            cut in any::<Option<u8>>(),
        ) {
            let mut bytes = written(&descriptor);
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            bytes.truncate(cut.map_or(usize::MAX, usize::from));
            if let Ok(read) = Descriptor::read(&bytes) {
                let count = read.shape.count().unwrap();
                prop_assert_eq!(count * u64::from(read.element.bytes), read.bytes());
                prop_assert!(read.offset.checked_add(read.bytes).is_some());
                prop_assert_eq!(written(&read), bytes);
            }
        }
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let shape = Shape::new(&[1 << 32, 1 << 32]).unwrap();
        assert_eq!(shape.count(), None);
        assert_eq!(Shape::new(&[1 << 32, 1 << 32, 0]).unwrap().count(), Some(0));
        assert_eq!(Shape::new(&[2; MAX_DIMS + 1]), None);
        assert_eq!(Shape::new(&[]).unwrap().count(), Some(1));
        let element = Element { code: 0, bytes: 16 };
        let (segment, file, generation, offset) = (0, 0, 0, 0);
        let shape = Shape::new(&[1 << 61]).unwrap();
        let huge = Descriptor {
            element,
            shape,
            segment,
            file,
            generation,
            offset,
            bytes: 0,
            checksum: None,
        };
        let refused = Descriptor::read(&written(&huge)).unwrap_err();
        assert_eq!(refused.to_string(), "shape: expected a size of 64 bits, got a larger one");
    }
}
