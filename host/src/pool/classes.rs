//! Size classes: the sizes that blocks have.
//!
//! Four classes for each doubling: 1, 1.25, 1.5 and 1.75 times a power of two. A block is at most a quarter
//! larger than what was asked for, 9% on average over sizes spread evenly; powers of two alone would
//! be up to twice as large, 39% on average. More classes would waste less in a block and more in idle
//! blocks that fit nothing: tensors of an inference server come in few sizes, but many nearby ones while
//! batches grow.
//!
//! Invariant: a class holds what it is for, and equal or smaller requests never get a larger class.

use super::Kind;

/// The smallest class. Drivers hand out no less, and it keeps every class a multiple of 256 bytes.
const LEAST: usize = 1024;

/// What drivers round memory up to that other processes can map (`gpu/cuda/shared.rs`). Smaller classes
/// would hold more than the books say.
const SHARED: usize = 2 << 20;

/// The class for `bytes` bytes of memory of this kind; `None` for none, and for sizes beyond half the
/// address space.
pub(super) fn class_of(kind: Kind, bytes: usize) -> Option<usize> {
    let class = class(bytes)?;
    Some(if kind == Kind::Shared { class.next_multiple_of(SHARED) } else { class })
}

fn class(bytes: usize) -> Option<usize> {
    if bytes == 0 || bytes > isize::MAX as usize / 2 {
        return None;
    }
    let bytes = bytes.max(LEAST);
    let quarter = (1 << bytes.ilog2()) / 4;
    Some(bytes.next_multiple_of(quarter))
}

/// The largest class of this kind that is not above `room`; 0 if there is none.
pub(super) fn largest_within(kind: Kind, room: usize) -> usize {
    let room = if kind == Kind::Shared { room / SHARED * SHARED } else { room };
    if room < LEAST {
        return 0;
    }
    let quarter = (1 << room.ilog2()) / 4;
    room / quarter * quarter
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn four_classes_a_doubling() {
        let classes = [1, 1024, 1025, 1280, 1281, 1700, 1793, 2048, 2049].map(class);
        let expected = [1024, 1024, 1280, 1280, 1536, 1792, 2048, 2048, 2560];
        assert_eq!(classes, expected.map(Some));
        assert_eq!(class(0), None);
        let shared = [1, 3 << 20, 5 << 20, 9 << 20].map(|bytes| class_of(Kind::Shared, bytes));
        assert_eq!(shared, [2 << 20, 4 << 20, 6 << 20, 10 << 20].map(Some));
        assert_eq!(class(usize::MAX), None);
    }

    proptest! {
        #[test]
        fn a_class_holds_its_requests_and_wastes_at_most_a_fifth_of_itself(bytes in 1024usize..1 << 40) {
            let class = class(bytes).unwrap();
            prop_assert!(class >= bytes && (class - bytes) * 5 <= class);
            prop_assert_eq!(class % 256, 0);
            prop_assert_eq!(super::class(class), Some(class));
            prop_assert!(super::class(bytes - 1).unwrap() <= class);
            let shared = class_of(Kind::Shared, bytes).unwrap();
            prop_assert!(shared >= class && class_of(Kind::Shared, shared) == Some(shared));
            for kind in [Kind::Device, Kind::Shared] {
                let fits = largest_within(kind, bytes);
                prop_assert!(fits <= bytes && class_of(kind, fits).is_none_or(|c| c <= bytes));
                prop_assert!(class_of(kind, fits + 1).unwrap() > bytes);
            }
        }
    }
}
