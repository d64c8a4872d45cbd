//! What rank 0 finds out about the group's links, for all ranks.
//!
//! Invariant: rank 0 alone asks, and every rank acts on its answer: all demote the same pairs to host memory, or
//! all refuse with the same error. A self-test that could not be made is a note and stops nobody.

use super::cause::{self, Symptom};
use super::facts::Facts;
use super::find::{Subject, find};
use super::{Identity, Report, SelfTest, Settings};
use crate::communicator::Config;
use crate::error::{Error, Result};
use crate::gpu::{Backend, GpuRef, cuda};
use crate::transport::{Pairs, Transport};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Most characters of a reason that travels: 240 pairs must fit into a message.
const LONGEST_REASON: usize = 400;
/// Pairs of which the likely cause is looked for.
const MOST_CAUSES: usize = 8;

/// What rank 0 asks about.
pub(crate) struct Consult<'a> {
    /// What the ranks want.
    pub(crate) config: &'a Config,
    /// The GPU of rank 0.
    pub(crate) gpu: &'a GpuRef,
    /// Every rank's GPU.
    pub(crate) gpus: Vec<Identity>,
    /// How long the others wait meanwhile, at least.
    pub(crate) patience: Option<Duration>,
}

/// What all ranks are told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdicts {
    failing: Vec<Failing>,
    /// What did not go as it should, in words.
    pub(crate) notes: Vec<String>,
}

/// An ordered pair of ranks that must not use its link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Failing {
    from: u32,
    to: u32,
    reason: String,
}

/// What came of self-tests in this process: another group of the same GPUs asks nobody again.
type Memory = Mutex<Option<HashMap<String, Arc<Verdict>>>>;
type Verdict = std::result::Result<(Report, Vec<String>), String>;

impl Consult<'_> {
    /// Whether anybody wants to know.
    fn is_wanted(&self) -> bool {
        let asked = match self.config.self_test {
            SelfTest::Auto => self.gpu.backend() == Backend::Cuda,
            SelfTest::Off => false,
            SelfTest::Always => true,
        };
        asked && self.config.transport != Transport::Host
    }

    /// Looks the verdict up, or lets a child find it.
    pub(crate) fn ask(&self) -> Verdicts {
        if !self.is_wanted() {
            return Verdicts::default();
        }
        let gpus = self.gpus.iter().cloned();
        let Some(subject) = Subject::new(gpus, self.gpu.simulation()) else {
            return Verdicts::default();
        };
        match &*self.remembered(&subject) {
            Ok((report, notes)) => self.translate(report, notes.clone()),
            Err(reason) => {
                let note = format!("self-test: not made: {reason}");
                Verdicts { failing: Vec::new(), notes: vec![note] }
            }
        }
    }

    fn remembered(&self, subject: &Subject) -> Arc<Verdict> {
        static MEMORY: Memory = Mutex::new(None);
        let always = self.config.self_test == SelfTest::Always;
        let name = format!("{always} {subject:?}");
        // Held meanwhile: two groups of one process need one self-test.
        let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = memory.get_or_insert_default();
        memory.entry(name).or_insert_with(|| Arc::new(self.find(subject, always))).clone()
    }

    fn find(&self, subject: &Subject, always: bool) -> Verdict {
        let settings = Settings::of(subject.backend());
        // The others' patience must outlast it, and what comes after it.
        let limit = self.patience.map_or(settings.limit, |patience| patience / 2);
        let settings = Settings { limit: settings.limit.min(limit), ..settings };
        let found = find(subject, &settings, always).map_err(|error| error.to_string())?;
        Ok((found.report, found.notes))
    }

    /// From GPUs to ranks.
    fn translate(&self, report: &Report, notes: Vec<String>) -> Verdicts {
        let mut verdicts = Verdicts { failing: Vec::new(), notes };
        if let (true, Some(reason)) = (report.passed(), &report.cut_short) {
            verdicts.notes.push(format!("self-test: not all of it was made: {reason}"));
        }
        let mut reasons: HashMap<(&str, &str), String> = HashMap::new();
        let ranks = || (0..).zip(&self.gpus);
        for ((from, sender), (to, receiver)) in
            ranks().flat_map(|from| ranks().map(move |to| (from, to)))
        {
            let pair = report.pair(&sender.uuid, &receiver.uuid).filter(|_| from != to);
            let Some((check, reason)) = pair.and_then(|pair| pair.failure()) else { continue };
            let ways = (sender.uuid.as_str(), receiver.uuid.as_str());
            let explained = reasons.len() < MOST_CAUSES;
            let reason = reasons.entry(ways).or_insert_with(|| {
                let text = format!("the self-test found that \"{check}\" fails: {reason}");
                let causes = if explained { self.causes(ways) } else { String::new() };
                (text + &causes).chars().take(LONGEST_REASON).collect()
            });
            verdicts.failing.push(Failing { from, to, reason: reason.clone() });
        }
        verdicts
    }

    fn causes(&self, ways: (&str, &str)) -> String {
        if self.gpu.backend() == Backend::Sim {
            return String::new();
        }
        let all = cuda::devices().unwrap_or_default();
        let find = |uuid: &str| all.iter().find(|gpu| gpu.properties().uuid == uuid).cloned();
        let Some((from, to)) = find(ways.0).zip(find(ways.1)) else { return String::new() };
        cause::sentence(&Facts::gather(&from, &to), Symptom::Wrong)
    }
}

impl Verdicts {
    /// That no pair has failed, if all of them must do without host memory.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: the first pair that has. `ordinals`: the ranks' GPUs.
    pub(crate) fn accept(&self, transport: Transport, ordinals: &[u32]) -> Result<()> {
        match self.failing.first() {
            Some(Failing { from, to, reason }) if transport == Transport::P2p => {
                let ordinal = |rank: u32| ordinals.get(rank as usize).copied().unwrap_or(rank);
                let (from, to) = (ordinal(*from), ordinal(*to));
                Err(Error::Unreachable { from, to, reason: reason.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Lets host memory carry what failing pairs send.
    pub(crate) fn demote(&self, mut pairs: Pairs) -> Pairs {
        self.failing.iter().for_each(|failing| pairs.demote(failing.from, failing.to));
        pairs
    }

    /// What a user should know: what went wrong, and which pairs take the long way for it.
    pub(crate) fn all_notes(&self) -> Vec<String> {
        let failing = self.failing.iter().map(|Failing { from, to, reason }| {
            format!("rank {from} reaches rank {to} through host memory: {reason}")
        });
        self.notes.iter().cloned().chain(failing).collect()
    }
}

/// An error that says why one GPU does not reach another, with what is likely behind it. Ordinals are this
/// process's.
pub(crate) fn explained(error: Error, backend: Backend, symptom: Symptom) -> Error {
    match error {
        Error::Unreachable { from, to, reason } if backend == Backend::Cuda => {
            let gpus = cuda::device(from).ok().zip(cuda::device(to).ok());
            let causes =
                gpus.map(|(from, to)| cause::sentence(&Facts::gather(&from, &to), symptom));
            Error::Unreachable { from, to, reason: reason + &causes.unwrap_or_default() }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{failing_report, two};
    use super::*;
    use crate::gpu::sim;

    fn verdicts(gpus: Vec<Identity>, report: &Report) -> Verdicts {
        let config = Config::default();
        let gpu = &sim::devices(&sim::Config { devices: 1, ..Default::default() })[0];
        Consult { config: &config, gpu, gpus, patience: None }.translate(report, Vec::new())
    }

    #[test]
    fn ranks_that_share_a_gpu_fail_together_and_not_with_each_other() {
        let [a, b] = two();
        let report = failing_report(&[a.clone(), b.clone()], (1, 0), "it smokes");
        let found = verdicts(vec![a.clone(), b.clone(), b, a], &report);
        let pairs: Vec<_> = found.failing.iter().map(|one| (one.from, one.to)).collect();
        assert_eq!(pairs, [(1, 0), (1, 3), (2, 0), (2, 3)]);
        let demoted = found.demote(Pairs::default());
        assert!(demoted.by_host(2, 3) && !demoted.by_host(3, 2) && !demoted.by_host(1, 2));
        assert!(found.accept(Transport::Auto, &[0, 1, 1, 0]).is_ok());
        let error = found.accept(Transport::P2p, &[4, 7, 7, 4]).unwrap_err().to_string();
        let expected =
            "GPU 7 cannot reach GPU 4: the self-test found that \"SM stores\" fails: it smokes";
        assert_eq!(error, expected);
    }

    #[test]
    fn a_long_reason_is_cut() {
        let gpus = two();
        let report = failing_report(&gpus, (0, 1), &"x".repeat(5000));
        let found = verdicts(gpus.to_vec(), &report);
        assert_eq!(found.failing[0].reason.chars().count(), LONGEST_REASON);
        assert!(found.all_notes()[0].starts_with("rank 0 reaches rank 1 through host memory: "));
    }

    #[test]
    fn nobody_asks_about_one_gpu_or_without_need() {
        let gpus = sim::devices(&sim::Config { devices: 2, ..Default::default() });
        let ask = |gpus: Vec<Identity>, self_test, transport| {
            let config = Config { self_test, transport, ..Config::default() };
            Consult {
                config: &config,
                gpu: &sim::devices(&sim::Config::default())[0],
                gpus,
                patience: None,
            }
            .ask()
        };
        let both: Vec<Identity> = gpus.iter().map(Identity::of).collect();
        let one = vec![both[0].clone(), both[0].clone()];
        // A unit test's program is not `peerlane`, and any attempt would be a note.
        for (gpus, mode, transport) in [
            (both.clone(), SelfTest::Auto, Transport::Auto),
            (both.clone(), SelfTest::Off, Transport::P2p),
            (both, SelfTest::Always, Transport::Host),
            (one, SelfTest::Always, Transport::Auto),
        ] {
            assert_eq!(ask(gpus, mode, transport), Verdicts::default());
        }
    }
}
