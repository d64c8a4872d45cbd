//! When the next message is to be expected, from how long the last ones took.
//!
//! A process that sleeps is woken tens of microseconds after its message has come; one that spins takes a core. Who
//! receives a message every few milliseconds can have both: sleep until shortly before the next one, and then spin.
//!
//! Invariant: waits without a message in between are one wait. However they are sliced, they spin once.

use std::time::Duration;

/// Spinning of less than this is over before a sleep can end in time.
const WORTH_A_NAP: Duration = Duration::from_micros(200);
/// Waits that are remembered. The shortest of them counts: to be awake early costs little, to be late costs the wake-up.
const WAITS: usize = 4;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Spin,
    /// Sleep for this long at most.
    Sleep(Duration),
}

/// The last waits of a reader.
#[derive(Default)]
pub(super) struct Rhythm {
    waits: [Duration; WAITS],
    /// For how long the wait that has not ended yet has lasted in earlier calls.
    idle: Duration,
    /// The last message, which may be looked at more than once.
    message: u64,
}

impl Rhythm {
    /// How a wait goes that may spin for `spin`.
    pub(super) fn plan(&self, spin: Duration) -> Plan {
        let usual = self.waits.into_iter().min().unwrap_or_default();
        let nap =
            if spin < WORTH_A_NAP { Duration::ZERO } else { usual - (spin / 2).min(usual / 4) };
        Plan { nap: if nap < WORTH_A_NAP { Duration::ZERO } else { nap }, spin, idle: self.idle }
    }

    /// The message of this number was found after `waited`.
    pub(super) fn came(&mut self, message: u64, waited: Duration) {
        if message == self.message {
            return;
        }
        self.message = message;
        self.waits.rotate_right(1);
        self.waits[0] = self.idle + waited;
        self.idle = Duration::ZERO;
    }

    /// None came.
    pub(super) fn missed(&mut self, waited: Duration) {
        self.idle += waited;
    }
}

/// When a wait sleeps, and when it spins.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    nap: Duration,
    spin: Duration,
    idle: Duration,
}

impl Plan {
    /// Spins for `spin`, and then sleeps.
    pub(super) fn spin(spin: Duration) -> Plan {
        Plan { nap: Duration::ZERO, spin, idle: Duration::ZERO }
    }

    /// What to do after `waited` of this call.
    pub(super) fn phase(&self, waited: Duration) -> Phase {
        let waited = self.idle + waited;
        match self.nap.checked_sub(waited) {
            Some(nap) if !nap.is_zero() => Phase::Sleep(nap),
            _ if waited < self.nap + self.spin => Phase::Spin,
            _ => Phase::Sleep(Duration::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const FOREVER: Phase = Phase::Sleep(Duration::MAX);

    fn after(waits: &[Duration]) -> Rhythm {
        let mut rhythm = Rhythm::default();
        (1..).zip(waits).for_each(|(message, wait)| rhythm.came(message, *wait));
        rhythm
    }

    #[test]
    fn waits_of_one_length_are_slept_through_but_for_their_end() {
        let plan = after(&[8 * MS; 4]).plan(4 * MS);
        assert_eq!(plan.phase(Duration::ZERO), Phase::Sleep(6 * MS));
        assert_eq!(plan.phase(5 * MS), Phase::Sleep(MS));
        assert_eq!(plan.phase(6 * MS), Phase::Spin);
        assert_eq!(plan.phase(8 * MS), Phase::Spin);
        assert_eq!(plan.phase(10 * MS), FOREVER);
        // A long wait and a little spinning: in the middle of that the message comes.
        let plan = after(&[80 * MS; 4]).plan(MS);
        assert_eq!(plan.phase(79 * MS), Phase::Sleep(MS / 2));
        assert_eq!(plan.phase(80 * MS), Phase::Spin);
        assert_eq!(plan.phase(81 * MS), FOREVER);
    }

    #[test]
    fn one_short_wait_is_reason_to_stay_awake() {
        let spins_at_once = |rhythm: Rhythm, spin| {
            let plan = rhythm.plan(spin);
            plan.phase(Duration::ZERO) == Phase::Spin && plan.phase(spin) == FOREVER
        };
        assert!(spins_at_once(after(&[]), 4 * MS));
        assert!(spins_at_once(after(&[8 * MS, MS / 10, 8 * MS, 8 * MS]), 4 * MS));
        assert!(!spins_at_once(after(&[MS / 10, 8 * MS, 8 * MS, 8 * MS, 8 * MS]), 4 * MS));
        // Too little to be awake in time.
        assert!(spins_at_once(after(&[8 * MS; 4]), MS / 50));
        assert_eq!(after(&[8 * MS; 4]).plan(Duration::ZERO).phase(Duration::ZERO), FOREVER);
    }

    #[test]
    fn calls_without_a_message_are_one_wait() {
        let mut rhythm = after(&[MS / 10; 4]);
        rhythm.missed(3 * MS);
        assert_eq!(rhythm.plan(4 * MS).phase(Duration::ZERO), Phase::Spin);
        assert_eq!(rhythm.plan(4 * MS).phase(MS), FOREVER);
        rhythm.missed(3 * MS);
        assert_eq!(rhythm.plan(4 * MS).phase(Duration::ZERO), FOREVER);
        rhythm.came(5, 2 * MS);
        // Looked at, and then received.
        rhythm.came(5, Duration::ZERO);
        assert_eq!(rhythm.waits[0], 8 * MS);
        assert_eq!(rhythm.plan(4 * MS).phase(Duration::ZERO), Phase::Spin);
    }
}
