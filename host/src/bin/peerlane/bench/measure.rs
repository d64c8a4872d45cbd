//! Drives all ranks of a measurement: a thread each on real GPUs, one thread for all on simulated
//! ones.
//!
//! Invariant: a contender is verified at a size before it is timed at it; contenders take turns, two in
//! the order A B B A, so that drift of the machine hits all alike.

use super::job::Job;
use super::rank::{Fail, Rank, Timing};
use std::sync::Barrier;

/// All ranks.
pub(crate) struct Ranks {
    pub(crate) ranks: Vec<Rank>,
    /// A thread per rank. Without, one thread queues every rank's work before it waits for any.
    pub(crate) threads: bool,
}

impl Ranks {
    /// Does `f` on every rank.
    pub(crate) fn each<T: Send>(
        &mut self,
        f: impl Fn(&mut Rank) -> Result<T, Fail> + Sync,
    ) -> Result<Vec<T>, Fail> {
        if !self.threads {
            return self.ranks.iter_mut().map(f).collect();
        }
        let f = &f;
        std::thread::scope(|scope| {
            let start = |rank| scope.spawn(move || f(rank));
            let threads: Vec<_> = self.ranks.iter_mut().map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(PANIC.into()))).collect()
        })
    }

    /// Runs each contender once and compares its results. The inner error is a wrong result.
    pub(crate) fn verify(
        &mut self,
        job: &Job,
        inputs: &[Vec<u8>],
    ) -> Result<Result<(), String>, Fail> {
        for contender in 0..self.ranks[0].contenders.len() {
            let verdict = self.verify_one(contender, job, inputs)?;
            if verdict.is_err() {
                return Ok(verdict);
            }
        }
        Ok(Ok(()))
    }

    /// Runs one contender once and compares its results. The inner error is a wrong result.
    pub(crate) fn verify_one(
        &mut self,
        contender: usize,
        job: &Job,
        inputs: &[Vec<u8>],
    ) -> Result<Result<(), String>, Fail> {
        let outcome = self.settled(contender, job).outcome(inputs);
        self.each(|rank| {
            rank.load(contender, job, &inputs[rank.rank as usize])?;
            rank.call(contender, job)
        })?;
        let verdicts =
            self.each(|rank| Ok(rank.verify(contender, job, job.expected(rank.rank, &outcome))))?;
        Ok(verdicts.into_iter().find(Result::is_err).unwrap_or(Ok(())))
    }

    /// The job with what the contender takes where the job leaves it to it.
    pub(crate) fn settled(&self, contender: usize, job: &Job) -> Job {
        let contender = &self.ranks[0].contenders[contender];
        let algorithm = contender.algorithm(job).or(job.algorithm);
        let route = contender.route(job).or(job.route);
        Job { algorithm, route, ..*job }
    }

    /// Times every contender: `[contender][sample]`, the slowest rank's microseconds per call.
    pub(crate) fn time(&mut self, job: &Job, timing: &Timing) -> Result<Vec<Vec<f64>>, Fail> {
        let all: Vec<usize> = (0..self.ranks[0].contenders.len()).collect();
        if !timing.eager {
            self.capture(&all, job, timing)?;
        }
        self.sample(&all, job, timing)
    }

    /// Records the graphs that [`Ranks::sample`] replays.
    pub(crate) fn capture(
        &mut self,
        contenders: &[usize],
        job: &Job,
        timing: &Timing,
    ) -> Result<(), Fail> {
        self.each(|rank| rank.capture(contenders, job, timing.calls)).map(|_| ())
    }

    /// Times these contenders, which have graphs of the job: `[which][sample]`.
    pub(crate) fn sample(
        &mut self,
        contenders: &[usize],
        job: &Job,
        timing: &Timing,
    ) -> Result<Vec<Vec<f64>>, Fail> {
        let places = turns(contenders.len(), timing.replays);
        let turns: Vec<usize> = places.iter().map(|place| contenders[*place]).collect();
        let samples = if self.threads {
            self.sample_in_threads(job, timing, &turns)?
        } else {
            self.sample_together(job, timing, &turns)?
        };
        let mut times = vec![Vec::new(); contenders.len()];
        for (sample, place) in places.iter().enumerate() {
            let slowest = samples.iter().map(|rank| rank[sample]).fold(0.0, f64::max);
            times[*place].push(slowest);
        }
        Ok(times)
    }

    /// `[rank][turn]`.
    fn sample_together(
        &mut self,
        job: &Job,
        timing: &Timing,
        turns: &[usize],
    ) -> Result<Vec<Vec<f64>>, Fail> {
        let mut samples = vec![Vec::new(); self.ranks.len()];
        for contender in turns {
            self.each(|rank| rank.queue(*contender, job, timing))?;
            let times = self.each(|rank| rank.finish(*contender, timing))?;
            samples.iter_mut().zip(times).for_each(|(samples, time)| samples.push(time));
        }
        Ok(samples)
    }

    /// `[rank][turn]`. A rank that fails keeps coming to the barrier, or the others would wait
    /// for it forever.
    fn sample_in_threads(
        &mut self,
        job: &Job,
        timing: &Timing,
        turns: &[usize],
    ) -> Result<Vec<Vec<f64>>, Fail> {
        let gate = Barrier::new(self.ranks.len());
        self.each(|rank| {
            let mut samples = Ok(Vec::new());
            for contender in turns {
                gate.wait();
                samples = samples.and_then(|mut samples: Vec<f64>| {
                    rank.queue(*contender, job, timing)?;
                    samples.push(rank.finish(*contender, timing)?);
                    Ok(samples)
                });
            }
            samples
        })
    }
}

/// Said of a thread that did not come back.
const PANIC: &str = "a rank's thread panicked";

/// Whose turn it is, sample by sample: A; A B B A in quarters; or, with more, all in turn, there and back.
fn turns(contenders: usize, replays: usize) -> Vec<usize> {
    if contenders != 2 {
        let there = (0..contenders).collect::<Vec<_>>();
        let back = there.iter().rev().copied().collect::<Vec<_>>();
        return [there, back].into_iter().cycle().take(replays).flatten().collect();
    }
    let (early, late) = (replays / 2, replays - replays / 2);
    [(0, early), (1, early), (1, late), (0, late)]
        .into_iter()
        .flat_map(|(contender, samples)| std::iter::repeat_n(contender, samples))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::ours::Ours;
    use super::*;
    use peerlane::gpu::sim;
    use peerlane::{Communicator, Config, DType, Operation, ReduceOp, Wire};

    /// Three simulated ranks, on which two communicators compete.
    fn ranks(job: &Job, threads: bool) -> Ranks {
        let gpus = sim::devices(&sim::Config { devices: 3, ..Default::default() });
        let config = Config { mailbox_bytes: 1 << 20, ..Config::default() };
        let (src, dst) = (job.src_bytes(), job.dst_bytes());
        let new = |(rank, gpu): (usize, &_)| Rank::new(rank as u32, Clone::clone(gpu), src, dst);
        let mut ranks: Vec<_> = gpus.iter().enumerate().map(new).collect::<Result<_, _>>().unwrap();
        for _ in 0..2 {
            for (rank, communicator) in
                ranks.iter_mut().zip(Communicator::connect(&gpus, &config).unwrap())
            {
                rank.contenders.push(Box::new(Ours(communicator)));
            }
        }
        Ranks { ranks, threads }
    }

    fn job(op: Operation) -> Job {
        let (dtype, wire, reduce) = (DType::F32, Wire::Native, ReduceOp::Sum);
        Job { op, dtype, wire, reduce, algorithm: None, route: None, root: 1, world: 3, count: 0 }
            .sized(600)
    }

    #[test]
    fn one_thread_or_many_every_collective_is_verified_and_timed() {
        for op in crate::parse::OPERATIONS {
            for threads in [false, true] {
                for eager in [false, true] {
                    let job = job(op);
                    let mut ranks = ranks(&job, threads);
                    assert_eq!(ranks.verify(&job, &job.inputs(1)).unwrap(), Ok(()), "{op:?}");
                    let timing = Timing { calls: 2, replays: 3, eager };
                    let times = ranks.time(&job, &timing).unwrap();
                    assert_eq!(times.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
                    assert!(times.iter().flatten().all(|us| *us > 0.0), "{op:?}: {times:?}");
                }
            }
        }
    }

    #[test]
    fn contenders_take_turns() {
        assert_eq!(turns(1, 3), [0, 0, 0]);
        assert_eq!(turns(2, 2), [0, 1, 1, 0]);
        assert_eq!(turns(2, 3), [0, 1, 1, 1, 0, 0]);
        assert_eq!(turns(3, 3), [0, 1, 2, 2, 1, 0, 0, 1, 2]);
    }
}
