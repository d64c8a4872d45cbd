//! How the ranks of one process meet when each has a thread of its own.
//!
//! A [`Meeting`] carries rounds of an exchange: every rank brings a value and leaves with all of
//! them. A rank that gives up takes the others with it, by name; so does one that never comes, unless the
//! ranks have agreed to meet without it.
//! What was brought is dropped once all have it: a meeting keeps no group alive.

use crate::error::{Error, Result};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Where the threads of a group of ranks meet. Clone it into each of them.
#[derive(Clone)]
pub struct Meeting {
    shared: Arc<Shared>,
}

struct Shared {
    world: u32,
    /// Ranks that are not waited for, a bit each.
    without: u32,
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

/// Values, a rank each; any type, the same in one round.
type Values = Vec<Option<Box<dyn std::any::Any + Send>>>;

#[derive(Default)]
struct Round {
    values: Values,
    /// All came before the meeting failed. What is wrong with what they brought, each sees for itself.
    complete: bool,
    /// Ranks that have left with them.
    taken: u32,
}

#[derive(Default)]
struct State {
    /// One round after the other.
    rounds: Vec<Round>,
    joined: Vec<bool>,
    failed: Option<String>,
}

impl Meeting {
    /// A meeting of `world` ranks that wait `patience` for each other.
    pub fn new(world: u32, patience: Duration) -> Meeting {
        Meeting::without(world, 0, patience)
    }

    /// One that the ranks in `without` do not come to, a bit each.
    pub(super) fn without(world: u32, without: u32, patience: Duration) -> Meeting {
        let joined = (0..world).map(|rank| without >> rank & 1 != 0).collect();
        let state = State { joined, ..State::default() };
        Meeting {
            shared: Arc::new(Shared {
                world,
                without,
                patience,
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
        }
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.shared.world
    }

    /// How long the ranks wait for each other.
    pub(crate) fn patience(&self) -> Duration {
        self.shared.patience
    }

    /// Enters the meeting as `rank`, which nobody else may do.
    pub(crate) fn enter(&self, rank: u32) -> Result<()> {
        let world = self.shared.world;
        let mut state = self.lock();
        match state.joined.get_mut(rank as usize) {
            None => {
                Err(self
                    .error(format!("rank {rank} does not exist; ranks go from 0 to {}", world - 1)))
            }
            Some(true) => Err(self.error(format!("rank {rank} is used twice"))),
            Some(joined) => {
                *joined = true;
                Ok(())
            }
        }
    }

    /// Brings `value` to round number `round` and waits for everybody else's, in rank order.
    pub(crate) fn exchange<T: Clone + Send + 'static>(
        &self,
        rank: u32,
        round: usize,
        value: T,
    ) -> Result<Vec<T>> {
        let deadline = Instant::now() + self.shared.patience;
        let mut state = self.lock();
        while state.rounds.len() <= round {
            let values = (0..self.shared.world).map(|_| None).collect();
            state.rounds.push(Round { values, complete: false, taken: 0 });
        }
        let failed = state.failed.is_some();
        let at = &mut state.rounds[round];
        at.values[rank as usize] = Some(Box::new(value));
        let expected = self.shared.world - self.shared.without.count_ones();
        at.complete |= !failed && at.values.iter().flatten().count() == expected as usize;
        self.shared.changed.notify_all();
        loop {
            let at = &mut state.rounds[round];
            if at.complete {
                let values = at.values.iter();
                let values = values
                    .filter_map(|value| value.as_ref()?.downcast_ref::<T>().cloned())
                    .collect();
                at.taken += 1;
                if at.taken == expected {
                    at.values.clear();
                }
                return Ok(values);
            }
            if let Some(reason) = &state.failed {
                return Err(self.error(reason.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = missing(&state.rounds[round].values, self.shared.without);
                let reason =
                    format!("rank {rank} waited {:?} in vain for {missing}", self.shared.patience);
                state.failed = Some(reason.clone());
                self.shared.changed.notify_all();
                return Err(self.error(reason));
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(|poison| poison.into_inner())
                .0;
        }
    }

    /// Ends the meeting for everybody because `rank` failed with `error`.
    pub(crate) fn give_up(&self, rank: u32, error: &Error) {
        self.fail(format!("rank {rank} failed: {error}"));
    }

    /// Ends the meeting for everybody; returns the error that all get.
    pub(super) fn fail(&self, reason: String) -> Error {
        let mut state = self.lock();
        let reason = state.failed.get_or_insert(reason).clone();
        self.shared.changed.notify_all();
        self.error(reason)
    }

    /// The ranks that are not waited for, and the first of the others that has come.
    pub(super) fn party(&self) -> (u32, Option<u32>) {
        let without = self.shared.without;
        let state = self.lock();
        let came =
            (0..).zip(&state.joined).filter(|(rank, joined)| **joined && without >> rank & 1 == 0);
        (without, came.map(|(rank, _)| rank).next())
    }

    /// Whether `rank` has not entered.
    pub(super) fn awaits(&self, rank: u32) -> bool {
        self.lock().joined.get(rank as usize) == Some(&false)
    }

    /// Whether every rank has entered.
    pub(super) fn is_complete(&self) -> bool {
        self.lock().joined.iter().all(|joined| *joined)
    }

    /// Whether nothing can come of it any more.
    pub(super) fn has_failed(&self) -> bool {
        self.lock().failed.is_some()
    }

    fn error(&self, reason: String) -> Error {
        Error::Rendezvous { world: self.shared.world, reason }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A thread that panicked in here left no half-made change: every update is one assignment.
        self.shared.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// The ranks that have not brought a value, as text.
fn missing(values: &Values, without: u32) -> String {
    let missing = (0..).zip(values).filter(|(_, value)| value.is_none()).map(|(rank, _)| rank);
    super::ranks(missing.filter(|rank| without >> rank & 1 == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_leaves_with_everything() {
        let meeting = Meeting::new(4, Duration::from_secs(10));
        std::thread::scope(|scope| {
            for rank in 0..4 {
                let meeting = meeting.clone();
                scope.spawn(move || {
                    assert_eq!(meeting.exchange(rank, 0, rank * 10).unwrap(), [0, 10, 20, 30]);
                    assert_eq!(
                        meeting.exchange(rank, 1, format!("{rank}")).unwrap(),
                        ["0", "1", "2", "3"]
                    );
                });
            }
        });
    }

    #[test]
    fn a_rank_that_never_comes_is_named() {
        let meeting = Meeting::new(3, Duration::from_millis(20));
        let other = meeting.clone();
        let first = std::thread::spawn(move || other.exchange(0, 0, ()));
        let error = meeting.exchange(2, 0, ()).unwrap_err().to_string();
        assert!(error.contains("rank 1"), "{error}");
        assert!(first.join().unwrap().is_err());
    }

    #[test]
    fn a_round_that_was_complete_is_handed_out_after_a_failure() {
        let meeting = Meeting::new(2, Duration::from_secs(10));
        let other = meeting.clone();
        let late = std::thread::spawn(move || other.exchange(1, 0, "b"));
        assert_eq!(meeting.exchange(0, 0, "a").unwrap(), ["a", "b"]);
        // The other may still be on its way out of that round.
        meeting.give_up(0, &Error::Stopped { rank: 0 });
        assert_eq!(late.join().unwrap().unwrap(), ["a", "b"]);
        let reason = meeting.exchange(1, 1, "c").unwrap_err().to_string();
        assert!(reason.contains("rank 0 failed"), "{reason}");
    }

    #[test]
    fn what_all_have_taken_is_dropped() {
        let meeting = Meeting::new(2, Duration::from_secs(10));
        let value = Arc::new(());
        let (other, theirs) = (meeting.clone(), value.clone());
        let first = std::thread::spawn(move || other.exchange(0, 0, theirs).map(drop));
        meeting.exchange(1, 0, value.clone()).map(drop).unwrap();
        first.join().unwrap().unwrap();
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn a_rank_used_twice_is_named() {
        let meeting = Meeting::new(2, Duration::from_secs(1));
        meeting.enter(1).unwrap();
        assert!(meeting.enter(1).unwrap_err().to_string().contains("rank 1 is used twice"));
        assert!(meeting.enter(2).unwrap_err().to_string().contains("rank 2 does not exist"));
    }
}
