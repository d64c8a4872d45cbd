//! Runs one case on a group of ranks that one thread drives.
//!
//! Invariant: nothing waits for a rank's stream before every rank's calls are queued. After an
//! error the group is not used again: ranks may be left in the middle of a call.

use super::case::{Call, Case, Style};
use super::memory::{Arena, Region};
use super::round::{Part, Place, ROWS, Round, is_shared, widths};
use crate::output;
use peerlane::choice::Choice;
use peerlane::gpu::{DevicePtr, GpuRef, Graph, Stream};
use peerlane::plan::steps::LEAST_QUEUES;
use peerlane::{
    AllGather, AllReduce, AllReduceRegistered, Broadcast, Communicator, Config, Error, Gather,
    ReduceScatter, Registration, Result, Transport,
};
use std::time::Duration;

/// What became of a case.
pub(crate) enum Verdict {
    /// Right; the largest error of the exact result against the sum in f64.
    Right(f64),
    /// Wrong, and why.
    Wrong(String),
    /// Not run: the ranks said that they do not do this, before anything was queued.
    Refused(Error),
}

/// One rank.
struct Rank {
    communicator: Communicator,
    gpu: GpuRef,
    stream: Stream,
    arena: Arena,
    /// All of its arena, while a case needs it.
    registration: Option<Registration>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        // A failed rank is dropped too; what fails here has been reported where it failed first.
        let _ = self.gpu.stream_synchronize(self.stream);
        // SAFETY: `Group::connect` made the stream, and the rank is the only one to use it.
        let _ = unsafe { self.gpu.stream_destroy(self.stream) };
    }
}

/// All ranks of a communicator.
pub(crate) struct Group {
    ranks: Vec<Rank>,
    /// Calls of the current case that a rank has taken.
    taken: usize,
}

impl Group {
    /// Connects one rank per GPU reference.
    pub(crate) fn connect(gpus: &[GpuRef], config: &Config) -> Result<Group> {
        let mut ranks = Vec::new();
        for communicator in Communicator::connect(gpus, config)? {
            let gpu = communicator.gpu().clone();
            let (stream, arena) = (gpu.stream_create()?, Arena::new(gpu.clone()));
            ranks.push(Rank { communicator, gpu, stream, arena, registration: None });
        }
        Ok(Group { ranks, taken: 0 })
    }

    /// Ends the group.
    pub(crate) fn close(mut self) -> Result<()> {
        self.ranks.iter_mut().try_for_each(|rank| rank.communicator.close())
    }

    /// What calls take that do not choose for themselves.
    pub(crate) fn choice(&self) -> &Choice {
        self.ranks[0].communicator.choice()
    }

    /// Whether every rank reaches every other's memory and has the hardware queues that copies need.
    pub(crate) fn is_able(&self) -> bool {
        let world = self.ranks.len() as u32;
        let mut pairs = (0..world).flat_map(|from| (0..world).map(move |to| (from, to)));
        let first = &self.ranks[0].communicator;
        let by_host = |(from, to)| from != to && first.transport(from, to) != Ok(Transport::P2p);
        let has_queues = |rank: &Rank| {
            let ordinal = rank.gpu.properties().ordinal;
            let on_it = |other: &&Rank| other.gpu.properties().ordinal == ordinal;
            let sharers = self.ranks.iter().filter(on_it).count();
            rank.gpu.hardware_queues() / sharers >= LEAST_QUEUES
        };
        !pairs.any(by_host) && self.ranks.iter().all(has_queues)
    }

    /// Lets all ranks reach each other's arenas, which are alike.
    fn register(&mut self) -> Result<()> {
        let tensors: Vec<_> = self.ranks.iter().map(|rank| rank.arena.given()).collect();
        let mut ranks: Vec<_> = self.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        // SAFETY: `run` deregisters them before it ends, or the group is not used again.
        let all = unsafe { Communicator::register_all(&mut ranks, &tensors)? };
        for (rank, registration) in self.ranks.iter_mut().zip(all) {
            rank.registration = Some(registration);
        }
        Ok(())
    }

    /// Ends that.
    fn deregister(&mut self) -> Result<()> {
        let all: Vec<_> =
            self.ranks.iter_mut().filter_map(|rank| rank.registration.take()).collect();
        if all.is_empty() {
            return Ok(());
        }
        let mut ranks: Vec<_> = self.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        Communicator::deregister_all(&mut ranks, &all)
    }

    /// Runs a case. `Err` and `Wrong` alike fail it; after `Err` the group is unusable.
    pub(crate) fn run(&mut self, case: &Case, seed: u64) -> Result<Verdict> {
        if case.call == Call::Barrier {
            return self.run_barrier();
        }
        self.taken = 0;
        let verdict = match self.run_rounds(case, seed) {
            Err(error) if self.taken == 0 && output::refuses(&error) => Verdict::Refused(error),
            verdict => verdict?,
        };
        self.deregister()?;
        Ok(verdict)
    }

    fn run_rounds(&mut self, case: &Case, seed: u64) -> Result<Verdict> {
        let (calls, replays) = (case.style.calls(), case.style.replays());
        let mut regions = Vec::new();
        let mut graphs = Vec::new();
        let mut error = 0.0f64;
        let mut first_bits: Option<Vec<Vec<u8>>> = None;
        for replay in 0..replays {
            // A rerun brings the same inputs again, a replayed graph new ones.
            let base = if case.style == Style::Once { 0 } else { replay * calls };
            let rounds: std::result::Result<Vec<_>, _> =
                (base..base + calls).map(|index| Round::new(case, seed, index)).collect();
            let rounds = match rounds {
                Ok(rounds) => rounds,
                Err(reason) => return Ok(Verdict::Wrong(reason)),
            };
            if replay == 0 {
                regions = self.place(&rounds)?;
                if matches!(case.call, Call::Registered { .. }) {
                    self.register()?;
                }
            }
            self.upload(&rounds, &regions)?;
            if case.style == Style::Graph {
                if replay == 0 {
                    graphs = self.capture(case, &rounds, &regions)?;
                }
                self.launch(&graphs)?;
            } else {
                self.issue(case, &rounds, &regions)?;
            }
            let found = match self.verify(case, &rounds, &regions)? {
                Ok(found) => found,
                Err(reason) => {
                    return Ok(Verdict::Wrong(format!(
                        "pass {} of {replays}: {reason}",
                        replay + 1
                    )));
                }
            };
            error = rounds.iter().map(|round| round.error).fold(error, f64::max);
            if case.style == Style::Once
                && *first_bits.get_or_insert_with(|| found.clone()) != found
            {
                return Ok(Verdict::Wrong("a rerun gave other bits".into()));
            }
        }
        for (rank, graph) in self.ranks.iter().zip(graphs) {
            // SAFETY: `verify` waited for the stream that ran the graph.
            unsafe { rank.gpu.graph_destroy(graph)? };
        }
        Ok(Verdict::Right(error))
    }

    /// Gives every tensor of every call a place: `[call][rank][tensor]`.
    fn place(&mut self, rounds: &[Round]) -> Result<Vec<Vec<Vec<Region>>>> {
        for (r, rank) in self.ranks.iter_mut().enumerate() {
            let tensors = rounds.iter().flat_map(|round| &round.parts[r]).flat_map(|p| &p.tensors);
            // SAFETY: the case before has waited for all its work.
            unsafe { rank.arena.reserve(tensors.map(|t| (t.before.len(), t.shift)))? };
        }
        let ranks = &mut self.ranks;
        let mut of_part = |r: usize, part: &Option<Part>| {
            let tensors = part.iter().flat_map(|part| &part.tensors);
            tensors.map(|tensor| ranks[r].arena.place(tensor)).collect()
        };
        let mut of_round = |round: &Round| {
            round.parts.iter().enumerate().map(|(r, part)| of_part(r, part)).collect()
        };
        Ok(rounds.iter().map(&mut of_round).collect())
    }

    fn upload(&self, rounds: &[Round], regions: &[Vec<Vec<Region>>]) -> Result<()> {
        for (round, regions) in rounds.iter().zip(regions) {
            for ((part, regions), rank) in round.parts.iter().zip(regions).zip(&self.ranks) {
                for (tensor, region) in part.iter().flat_map(|part| &part.tensors).zip(regions) {
                    rank.arena.upload(*region, tensor, rank.stream)?;
                }
            }
        }
        Ok(())
    }

    /// Queues all calls, call by call, each on all ranks that take part.
    fn issue(&mut self, case: &Case, rounds: &[Round], places: &[Vec<Vec<Region>>]) -> Result<()> {
        for (round, places) in rounds.iter().zip(places) {
            for (r, rank) in self.ranks.iter_mut().enumerate() {
                if let Some(part) = &round.parts[r] {
                    rank.issue(case, part, &places[r])?;
                    self.taken += 1;
                }
            }
        }
        Ok(())
    }

    /// Records all calls, rank by rank.
    fn capture(
        &mut self,
        case: &Case,
        rounds: &[Round],
        places: &[Vec<Vec<Region>>],
    ) -> Result<Vec<Graph>> {
        let mut graphs = Vec::new();
        for (r, rank) in self.ranks.iter_mut().enumerate() {
            rank.gpu.capture_begin(rank.stream)?;
            let queued: Result<()> = rounds.iter().zip(places).try_for_each(|(round, places)| {
                let Some(part) = &round.parts[r] else { return Ok(()) };
                rank.issue(case, part, &places[r])?;
                self.taken += 1;
                Ok(())
            });
            // A stream must not be left capturing.
            let graph = rank.gpu.capture_end(rank.stream);
            queued?;
            graphs.push(graph?);
        }
        Ok(graphs)
    }

    fn launch(&self, graphs: &[Graph]) -> Result<()> {
        let mut pairs = self.ranks.iter().zip(graphs);
        pairs.try_for_each(|(rank, graph)| rank.gpu.graph_launch(*graph, rank.stream))
    }

    /// Waits for all ranks, then compares every byte. Returns what was found, or what is wrong.
    fn verify(
        &self,
        case: &Case,
        rounds: &[Round],
        places: &[Vec<Vec<Region>>],
    ) -> Result<std::result::Result<Vec<Vec<u8>>, String>> {
        for rank in &self.ranks {
            rank.gpu.stream_synchronize(rank.stream)?;
        }
        self.ranks.iter().try_for_each(|rank| rank.communicator.health())?;
        let mut all = Vec::new();
        for (call, (round, places)) in rounds.iter().zip(places).enumerate() {
            let mut shared: Option<Vec<u8>> = None;
            for (r, part) in round.parts.iter().enumerate() {
                for (t, tensor) in part.iter().flat_map(|part| &part.tensors).enumerate() {
                    let at =
                        |reason: String| format!("call {call}, rank {r}, tensor {t}: {reason}");
                    let rank = &self.ranks[r];
                    let (found, damage) = rank.arena.download(places[r][t], rank.stream)?;
                    let verdict = damage.map_or(Ok(()), Err).and_then(|()| tensor.verify(&found));
                    if let Err(reason) = verdict {
                        return Ok(Err(at(reason)));
                    }
                    if let Some(bits) = tensor.computed(&found).filter(|_| is_shared(&case.call))
                        && *shared.get_or_insert_with(|| bits.to_vec()) != bits
                    {
                        return Ok(Err(at("other bits than on rank 0".into())));
                    }
                    all.push(found);
                }
            }
        }
        Ok(Ok(all))
    }

    /// No rank may pass a barrier that the last one has not reached.
    fn run_barrier(&mut self) -> Result<Verdict> {
        for _ in 0..3 {
            let Some((last, others)) = self.ranks.split_last_mut() else { break };
            for rank in others.iter_mut() {
                rank.communicator.barrier(rank.stream)?;
            }
            std::thread::sleep(Duration::from_millis(2));
            let mut early = None;
            for rank in others.iter() {
                if rank.gpu.stream_query(rank.stream)? {
                    early = Some(rank.communicator.rank());
                }
            }
            last.communicator.barrier(last.stream)?;
            for rank in &self.ranks {
                rank.gpu.stream_synchronize(rank.stream)?;
                rank.communicator.health()?;
            }
            if let Some(rank) = early {
                return Ok(Verdict::Wrong(format!("rank {rank} did not wait for the last rank")));
            }
        }
        Ok(Verdict::Right(0.0))
    }
}

impl Rank {
    /// Queues one call.
    fn issue(&mut self, case: &Case, part: &Part, regions: &[Region]) -> Result<()> {
        let address =
            |place: Place| -> DevicePtr { regions[place.tensor].data().offset(place.offset) };
        let (src, dst, count) = (address(part.src), address(part.dst), case.count);
        let (me, stream) = (self.communicator.rank(), self.stream);
        let communicator = &mut self.communicator;
        // SAFETY: `Round` sized the tensors for the call, `Group::place` gave them memory that
        // nothing else uses, and `verify` waits for the stream before that memory is used again.
        unsafe {
            match case.call {
                Call::Reduce { all: true, dtype, wire, algorithm, op, absent, .. } => {
                    let contribution = absent != Some(me);
                    let call =
                        AllReduce { src, dst, count, dtype, op, wire, contribution, algorithm };
                    communicator.all_reduce(&call, stream)
                }
                Call::Reduce { dtype, wire, op, absent, .. } => {
                    let contribution = absent != Some(me);
                    let call = ReduceScatter { src, dst, count, dtype, op, wire, contribution };
                    communicator.reduce_scatter(&call, stream)
                }
                Call::Registered { dtype, wire, op, absent } => {
                    // Registered before it was issued.
                    let Some(registration) = &self.registration else { return Ok(()) };
                    let offset = (dst.0 - registration.tensor().0) as usize;
                    let contribution = absent != Some(me);
                    let call = AllReduceRegistered { offset, count, dtype, op, wire, contribution };
                    communicator.all_reduce_registered(registration, &call, stream)
                }
                Call::AllGather { .. } => {
                    communicator.all_gather(&AllGather { src, dst, bytes: count }, stream)
                }
                Call::Broadcast { root, route } => {
                    let call = Broadcast { route, ..Broadcast::new(src, count, root) };
                    communicator.broadcast(&call, stream)
                }
                Call::Gather { root, .. } => {
                    let widths = &widths(case)[..];
                    communicator.gather(&Gather { src, dst, rows: ROWS, widths, root }, stream)
                }
                Call::Barrier => communicator.barrier(stream),
            }
        }
    }
}
