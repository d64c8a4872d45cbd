//! How large mailboxes and staging areas are to be, from what the calls needed.
//!
//! Pure: a function of what all ranks have in common, so all ranks come to the same sizes. Sizes grow at
//! once, since a call that does not fit pays every time; they shrink only after the calls have needed less
//! than a quarter several times in a row, since changing them takes a meeting of all ranks.

use crate::collectives::invalid;
use crate::communicator::Config;
use crate::error::Result;
use crate::layout;
use crate::plan::staging::LEAST_STAGING_BYTES;
use crate::plan::{self, Shape};
use serde::{Deserialize, Serialize};

/// Between which limits [`Communicator::adapt`](crate::Communicator::adapt) may change sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Mailboxes do not shrink below this.
    pub least_mailbox_bytes: usize,
    /// Mailboxes do not grow above this.
    pub most_mailbox_bytes: usize,
    /// Staging areas do not shrink below this. A communicator without one gets none.
    pub least_staging_bytes: usize,
    /// Staging areas do not grow above this.
    pub most_staging_bytes: usize,
    /// How many times in a row the calls since the time before must have needed less than a quarter of what
    /// there is before it shrinks, to the most that they needed. At least 1.
    pub patience: u32,
}

impl Default for Sizing {
    /// Mailboxes of 1 to 128 MiB, staging areas of 8 to 128 MiB, shrunk the third time.
    fn default() -> Sizing {
        Sizing {
            least_mailbox_bytes: 1 << 20,
            most_mailbox_bytes: 128 << 20,
            least_staging_bytes: 8 << 20,
            most_staging_bytes: 128 << 20,
            patience: 3,
        }
    }
}

/// Bytes of device memory that a rank may use, as in [`Config`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// For its mailbox: a limit, of which the layout takes what it has a use for.
    pub mailbox_bytes: usize,
    /// For its staging area; 0 for none.
    pub staging_bytes: usize,
}

impl Sizes {
    /// What a configuration asks for.
    pub(crate) fn of(config: &Config) -> Sizes {
        Sizes { mailbox_bytes: config.mailbox_bytes, staging_bytes: config.staging() }
    }
}

/// The most that a call has needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Need {
    /// Units of a message to one peer; 0 if there was none.
    pub(crate) units: usize,
    /// Bytes of a staging area.
    pub(crate) staging_bytes: usize,
}

impl Need {
    /// What both need.
    pub(crate) fn max(self, other: Need) -> Need {
        Need {
            units: self.units.max(other.units),
            staging_bytes: self.staging_bytes.max(other.staging_bytes),
        }
    }
}

/// How long one size has been larger than needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Idle {
    times: u32,
    /// The most that was needed meanwhile.
    peak: usize,
}

impl Idle {
    /// The next size after `current`: `needed` is one that is enough, `fits` says whether `current` is too.
    fn next(&mut self, (current, fits): (usize, bool), needed: usize, patience: u32) -> usize {
        if !fits || needed.saturating_mul(4) > current {
            *self = Idle::default();
            return if fits { current } else { needed };
        }
        self.times += 1;
        self.peak = self.peak.max(needed);
        if self.times < patience {
            return current;
        }
        std::mem::take(self).peak
    }
}

/// The sizes in force, and what has been seen under them. The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) sizes: Sizes,
    mailbox: Idle,
    staging: Idle,
}

impl State {
    pub(crate) fn new(sizes: Sizes) -> State {
        State { sizes, mailbox: Idle::default(), staging: Idle::default() }
    }

    /// What follows when calls have needed `need` since the last time. `may_shrink_staging` is false where
    /// chunks have a fixed size, for which another pattern may need more room than those that were called.
    pub(crate) fn next(
        mut self,
        need: Need,
        sizing: &Sizing,
        shape: &Shape,
        may_shrink_staging: bool,
    ) -> State {
        let current = self.sizes.mailbox_bytes;
        let best = service(sizing.most_mailbox_bytes, need.units, shape);
        let fits = need.units == 0 || service(current, need.units, shape) == best;
        let needed = mailbox_bytes(need.units, sizing, shape);
        let next = self.mailbox.next((current, fits), needed, sizing.patience);
        // A limit that changes nothing is not worth a meeting.
        if layout::choose(shape.world, next) != layout::choose(shape.world, current) {
            self.sizes.mailbox_bytes = next;
        }
        let current = self.sizes.staging_bytes;
        if current != 0 {
            let (least, most) = (sizing.least_staging_bytes, sizing.most_staging_bytes);
            let needed = need.staging_bytes.next_power_of_two().clamp(least, most);
            let fits = need.staging_bytes.min(most) <= current;
            let next = self.staging.next((current, fits), needed, sizing.patience);
            if next > current || may_shrink_staging {
                self.sizes.staging_bytes = next;
            }
        }
        self
    }
}

/// Blocks and turns of a message of `units` units in a mailbox of at most `bytes` bytes.
fn service(bytes: usize, units: usize, shape: &Shape) -> Option<(u32, u32)> {
    let layout = layout::choose(shape.world, bytes)?;
    let grid = plan::grid(&Shape { layout, ..*shape }, units);
    Some((grid.blocks, grid.turns()))
}

/// The smallest power of two within the limits, or limit, that serves a message as well as the upper limit.
fn mailbox_bytes(units: usize, sizing: &Sizing, shape: &Shape) -> usize {
    let most = sizing.most_mailbox_bytes;
    let best = service(most, units, shape);
    let mut bytes = sizing.least_mailbox_bytes;
    while bytes < most && units != 0 && service(bytes, units, shape) != best {
        bytes = (bytes + 1).next_power_of_two().min(most);
    }
    bytes
}

/// That the limits can be kept, and that the sizes to begin with keep them.
pub(crate) fn check(config: &Config, world: u32) -> Result<()> {
    let Some(sizing) = config.sizing else { return Ok(()) };
    let wrong = |argument, expected, got: String| Err(invalid("connect", argument, expected, got));
    let Sizing { least_mailbox_bytes: least, most_mailbox_bytes: most, patience, .. } = sizing;
    let given = config.mailbox_bytes;
    if layout::choose(world, least).is_none() {
        let expected = format!("at least a few hundred KiB for {world} ranks");
        return wrong("sizing.least_mailbox_bytes", expected, least.to_string());
    }
    if !(least..=most).contains(&given) {
        let expected = "sizing.least_mailbox_bytes to sizing.most_mailbox_bytes".into();
        return wrong("mailbox_bytes", expected, format!("{given}, limits of {least} and {most}"));
    }
    let Sizing { least_staging_bytes: least, most_staging_bytes: most, .. } = sizing;
    if least < LEAST_STAGING_BYTES {
        let expected = format!("at least {LEAST_STAGING_BYTES}");
        return wrong("sizing.least_staging_bytes", expected, least.to_string());
    }
    let given = config.staging();
    if least > most || given != 0 && !(least..=most).contains(&given) {
        let expected = "sizing.least_staging_bytes to sizing.most_staging_bytes".into();
        return wrong("staging_bytes", expected, format!("{given}, limits of {least} and {most}"));
    }
    if patience == 0 {
        return wrong("sizing.patience", "1 or more".into(), patience.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;

    fn shape(world: u32, max_blocks: u32, host: bool) -> Shape {
        let layout = layout::choose(world, 32 * MIB).unwrap();
        Shape { host, ..Shape::new(world, layout, max_blocks) }
    }

    fn state(mailbox_bytes: usize, staging_bytes: usize) -> State {
        State::new(Sizes { mailbox_bytes, staging_bytes })
    }

    #[test]
    fn a_message_that_does_not_fit_makes_mailboxes_grow_at_once() {
        let (sizing, shape) = (Sizing::default(), shape(8, 132, false));
        let need = Need { units: 32 * KIB, ..Need::default() };
        let small = state(MIB, 0);
        let grown = small.next(need, &sizing, &shape, true);
        assert!(grown.sizes.mailbox_bytes > small.sizes.mailbox_bytes, "{grown:?}");
        let best = service(sizing.most_mailbox_bytes, need.units, &shape);
        assert_eq!(service(grown.sizes.mailbox_bytes, need.units, &shape), best);
        assert_ne!(service(grown.sizes.mailbox_bytes / 2, need.units, &shape), best);
        assert_eq!(grown.next(need, &sizing, &shape, true), grown, "that was enough");
    }

    #[test]
    fn mailboxes_shrink_the_third_time_to_the_most_that_was_needed() {
        let (sizing, shape) = (Sizing::default(), shape(8, 132, false));
        let (small, middle) = (Need { units: 10, ..Need::default() }, 8 * KIB);
        let middle = Need { units: middle, ..Need::default() };
        let first = state(128 * MIB, 0).next(small, &sizing, &shape, true);
        let second = first.next(middle, &sizing, &shape, true);
        assert_eq!([first, second].map(|s| s.sizes.mailbox_bytes), [128 * MIB; 2]);
        let third = second.next(Need::default(), &sizing, &shape, true);
        assert_eq!(third.sizes.mailbox_bytes, mailbox_bytes(middle.units, &sizing, &shape));
        assert!(third.sizes.mailbox_bytes <= 32 * MIB);
        // A call in between that needs much starts the count again.
        let large = Need { units: 1 << 20, ..Need::default() };
        let busy = second.next(large, &sizing, &shape, true);
        assert_eq!(busy, state(128 * MIB, 0));
    }

    #[test]
    fn staging_areas_follow_scheduled_calls() {
        let (sizing, shape) = (Sizing { patience: 2, ..Sizing::default() }, shape(2, 132, false));
        let need = |staging_bytes| Need { staging_bytes, ..Need::default() };
        let begin = state(32 * MIB, 32 * MIB);
        let grown = begin.next(need(40 * MIB), &sizing, &shape, true).sizes.staging_bytes;
        assert_eq!(grown, 64 * MIB);
        let most = begin.next(need(4000 * MIB), &sizing, &shape, true);
        assert_eq!(most.sizes.staging_bytes, 128 * MIB);
        let same = most.next(need(4000 * MIB), &sizing, &shape, true);
        assert_eq!(same.sizes.staging_bytes, 128 * MIB);
        let idle = |may_shrink| {
            let once = most.next(need(0), &sizing, &shape, may_shrink);
            assert_eq!(once.sizes.staging_bytes, 128 * MIB);
            once.next(need(9 * MIB), &sizing, &shape, may_shrink).sizes.staging_bytes
        };
        assert_eq!((idle(true), idle(false)), (16 * MIB, 128 * MIB));
        let none = state(32 * MIB, 0).next(need(0), &sizing, &shape, true);
        assert_eq!(none.sizes.staging_bytes, 0, "none comes from nothing");
    }

    #[test]
    fn limits_that_cannot_be_kept_are_refused() {
        type Change = fn(&mut Config, &mut Sizing);
        let refused = |change: Change| {
            let (mut config, mut sizing) = (Config::default(), Sizing::default());
            change(&mut config, &mut sizing);
            config.sizing = Some(sizing);
            check(&config, 4).unwrap_err().to_string()
        };
        let changes: [(&str, Change); 8] = [
            ("mailbox_bytes", |config, _| config.mailbox_bytes = 1),
            ("mailbox_bytes", |config, _| config.mailbox_bytes = 1 << 40),
            ("sizing.least_mailbox_bytes", |_, sizing| sizing.least_mailbox_bytes = 0),
            ("mailbox_bytes", |_, sizing| sizing.least_mailbox_bytes = 1 << 40),
            ("staging_bytes", |config, _| config.staging_bytes = Some(1 << 40)),
            ("sizing.least_staging_bytes", |_, sizing| sizing.least_staging_bytes = 5),
            ("staging_bytes", |_, sizing| sizing.most_staging_bytes = 1 << 20),
            ("sizing.patience", |_, sizing| sizing.patience = 0),
        ];
        for (text, change) in changes {
            let error = refused(change);
            assert!(error.starts_with(&format!("connect: {text}: expected ")), "{error}");
        }
        assert_eq!(
            check(&Config { sizing: Some(Sizing::default()), ..Config::default() }, 4),
            Ok(())
        );
    }

    proptest! {
        #[test]
        fn sizes_keep_the_limits_and_come_to_rest(
            world in 1u32..=16, max_blocks in 1u32..=264, host: bool, patience in 1u32..5,
            start in 20u32..28, units in proptest::collection::vec(0usize..1 << 22, 1..12),
            staging in 0usize..1 << 28,
        ) {
            let (sizing, shape) = (Sizing { patience, ..Sizing::default() }, shape(world, max_blocks, host));
            let mut state = state(1 << start, 32 * MIB);
            for units in units {
                let need = Need { units, staging_bytes: staging };
                let next = state.next(need, &sizing, &shape, true);
                let Sizes { mailbox_bytes, staging_bytes } = next.sizes;
                prop_assert!((sizing.least_mailbox_bytes..=sizing.most_mailbox_bytes).contains(&mailbox_bytes));
                prop_assert!((sizing.least_staging_bytes..=sizing.most_staging_bytes).contains(&staging_bytes));
                // Whatever it changes to, and whatever it keeps, serves these calls as well as can be.
                let best = service(sizing.most_mailbox_bytes, units, &shape);
                if units != 0 {
                    prop_assert_eq!(service(mailbox_bytes, units, &shape), best);
                }
                prop_assert!(staging_bytes >= staging.min(sizing.most_staging_bytes));
                state = next;
            }
            // The same calls again and again change nothing any more, at the latest after they were patient.
            let need = Need { units: 5, staging_bytes: 5 };
            let mut rest = state;
            (0..=2 * patience).for_each(|_| rest = rest.next(need, &sizing, &shape, true));
            let later = (0..=2 * patience).fold(rest, |s, _| s.next(need, &sizing, &shape, true));
            prop_assert_eq!(later.sizes, rest.sizes);
        }

        #[test]
        fn ranks_agree_in_whatever_order_they_are_asked(
            units in proptest::collection::vec(0usize..1 << 22, 1..16), turn in 0usize..16,
        ) {
            let need = |units: &[usize]| {
                let each = units.iter().map(|units| Need { units: *units, staging_bytes: 3 * units });
                each.reduce(Need::max).unwrap()
            };
            let mut turned = units.clone();
            turned.rotate_left(turn % units.len());
            prop_assert_eq!(need(&units), need(&turned));
        }
    }
}
