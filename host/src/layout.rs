//! How large a mailbox is and how it is divided.
//!
//! Pure: a function of the world size and a byte limit that all ranks agreed on, so all ranks get
//! the same layout.

use peerlane_device::abi::Layout;

/// Units in the largest slot: 16 KiB, four units for each of 256 threads.
const SLOT_UNITS: u32 = 1024;
/// Units in the smallest slot worth having.
const LEAST_SLOT_UNITS: u32 = 64;
/// Lanes per pair, at most: two for each multiprocessor of an H100.
const LANES: u32 = 256;

/// The layout for `world` ranks whose mailboxes take at most `limit` bytes each, or `None` if the
/// limit is too small for any.
///
/// Slots shrink before lanes do: lanes are what fills a fast link, and a chunk smaller than a slot
/// costs little.
pub fn choose(world: u32, limit: usize) -> Option<Layout> {
    fit(world, limit, Layout::new)
}

/// The same for checked calls, which need a little more room.
pub fn choose_checked(world: u32, limit: usize) -> Option<Layout> {
    fit(world, limit, Layout::checked)
}

fn fit(world: u32, limit: usize, make: fn(u32, u32, u32) -> Option<Layout>) -> Option<Layout> {
    // Two ranks keep few chunks in flight; from three on, a two-shot call has two per turn.
    let slots = if world <= 2 { 4 } else { 8 };
    let (mut lanes, mut units) = (LANES, SLOT_UNITS);
    loop {
        let layout = make(lanes, slots, units);
        if layout.is_some_and(|layout| layout.mailbox_bytes(world) <= limit) {
            return layout;
        }
        if units > 512 {
            units /= 2;
        } else if lanes > 32 {
            lanes /= 2;
        } else if units > LEAST_SLOT_UNITS {
            units /= 2;
        } else if lanes > 1 {
            lanes /= 2;
        } else {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn default_limit_gives_every_world_many_lanes() {
        for world in 1..=16 {
            let layout = choose(world, 32 << 20).unwrap();
            assert!(layout.mailbox_bytes(world) <= 32 << 20, "{world} ranks: {layout:?}");
            assert!(layout.lanes >= 32, "{world} ranks: {layout:?}");
        }
    }

    #[test]
    fn a_limit_below_one_lane_is_refused() {
        assert_eq!(choose(2, 8192), None);
    }

    proptest! {
        #[test]
        fn regions_never_overlap(world in 2u32..=16, limit in 20_000usize..64 << 20) {
            let Some(layout) = choose(world, limit) else { return Ok(()) };
            prop_assert!(layout.mailbox_bytes(world) <= limit);
            prop_assert!(layout.slots.is_power_of_two());
            let lane = layout.lane_bytes;
            prop_assert!(layout.slot(0, 0, 0) >= layout.words(layout.lanes - 1) + 256);
            prop_assert_eq!(layout.slot(0, 0, 1) - layout.slot(0, 0, 0), 16 * layout.slot_units);
            for source in 0..world - 1 {
                prop_assert_eq!(layout.slot(source, 1, 0) - layout.slot(source, 0, 0), lane);
                let last = layout.slot(source, layout.lanes - 1, 0);
                prop_assert_eq!(layout.slot(source + 1, 0, 0), last + lane);
            }
        }

        #[test]
        fn every_sender_has_its_own_region(world in 2u32..=16, receiver in 0u32..16) {
            let receiver = receiver % world;
            let mut sources: Vec<u32> =
                (0..world).filter(|r| *r != receiver).map(|r| Layout::source(r, receiver, world)).collect();
            sources.sort_unstable();
            prop_assert_eq!(sources, (0..world - 1).collect::<Vec<_>>());
        }
    }
}
