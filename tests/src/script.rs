//! What a list of calls finds in every rank's memory and must leave there.
//!
//! Invariant: all tensors of a rank lie in one image, each between guards, and every byte of the
//! image has an expected content: guards, sources and what a call does not write must stay.

use crate::job::{Call, Job};
use peerlane::cases::{Rng, bytes, elements};
use peerlane::plan;
use peerlane::plan::forest::Forest;
use peerlane::reference::{Order, Reduction, first_difference};
use peerlane::{Algorithm, DType, ReduceOp, Wire};
use std::ops::Range;

/// What guards hold: neither 0 nor the protocol's mark of a free slot.
const GUARD: u8 = 0x5c;
/// What lies where a call is to write.
const POISON: u8 = 0xa5;
/// Fewest bytes of a guard.
const GUARD_BYTES: usize = 64;
/// Tensors begin this aligned, plus their shift.
const ALIGNMENT: usize = 256;

/// Bytes that a reduction computes, where NaN and zeros have some freedom.
#[derive(Clone, Debug)]
struct Computed {
    range: Range<usize>,
    dtype: DType,
    op: ReduceOp,
    job: usize,
}

/// One rank's memory.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Before the calls.
    pub before: Vec<u8>,
    after: Vec<u8>,
    computed: Vec<Computed>,
    /// Where each job's tensors begin; a job's bytes reach to the next entry.
    jobs: Vec<usize>,
}

/// Where a rank's tensors of one call lie in its image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Offset of the source; `None` for one that must not be read.
    pub src: Option<usize>,
    /// Offset of the destination.
    pub dst: usize,
    /// Whether the rank makes the call.
    pub calls: bool,
}

/// Calls with inputs and expected outputs.
#[derive(Clone, Debug)]
pub struct Script {
    /// The calls, in order.
    pub jobs: Vec<Job>,
    /// Each rank's memory.
    pub images: Vec<Image>,
    /// `[job][rank]`.
    pub places: Vec<Vec<Place>>,
}

impl Image {
    fn place(&mut self, before: &[u8], after: &[u8], shift: usize) -> usize {
        let start = (self.before.len() + GUARD_BYTES).next_multiple_of(ALIGNMENT) + shift;
        for (image, tensor) in [(&mut self.before, before), (&mut self.after, after)] {
            image.resize(start, GUARD);
            image.extend(tensor);
            image.resize(start + tensor.len() + GUARD_BYTES, GUARD);
        }
        start
    }

    /// Which job went wrong according to `found`, and how, if any did.
    fn verify(&self, found: &[u8]) -> Result<(), (usize, String)> {
        let mut patched = found.to_vec();
        for Computed { range, dtype, op, job } in &self.computed {
            let (wanted, got) = (&self.after[range.clone()], &found[range.clone()]);
            if let Some(index) = first_difference(*dtype, *op, wanted, got) {
                let at = index * dtype.bytes()..(index + 1) * dtype.bytes();
                let (wanted, got) = (&wanted[at.clone()], &got[at]);
                let reason = format!("element {index}: expected {wanted:02x?}, got {got:02x?}");
                return Err((*job, reason));
            }
            patched[range.clone()].copy_from_slice(wanted);
        }
        let Some(at) = (0..found.len()).find(|at| patched[*at] != self.after[*at]) else {
            return Ok(());
        };
        let job = self.jobs.partition_point(|start| *start <= at).saturating_sub(1);
        let (wanted, got) = (self.after[at], found[at]);
        let at = at - self.jobs[job];
        Err((job, format!("byte {at}: expected {wanted:02x}, got {got:02x}")))
    }
}

impl Script {
    /// The script of `jobs` for `world` ranks, with inputs from `seed`.
    pub fn new(world: u32, jobs: &[Job], seed: u64) -> Script {
        let images = vec![Image::default(); world as usize];
        let mut script = Script { jobs: jobs.to_vec(), images, places: Vec::new() };
        let mut rng = Rng::new(seed, "script");
        for job in jobs {
            for image in &mut script.images {
                image.jobs.push(image.before.len());
            }
            let places = script.add(job, &mut rng);
            script.places.push(places);
        }
        script
    }

    /// The same calls on the same places with other inputs.
    pub fn with_inputs(&self, seed: u64) -> Script {
        Script::new(self.images.len() as u32, &self.jobs, seed)
    }

    /// What every rank's memory must hold after the calls; a NaN may be any NaN.
    pub fn expected(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.after.clone()).collect()
    }

    /// Whether the byte at `at` of a rank's memory is the result of a reduction.
    pub fn is_computed(&self, rank: usize, at: usize) -> bool {
        self.images[rank].computed.iter().any(|computed| computed.range.contains(&at))
    }

    /// What is wrong with the ranks' memory after the calls, if anything.
    pub fn verify(&self, found: &[Vec<u8>]) -> Result<(), String> {
        for (rank, (image, found)) in self.images.iter().zip(found).enumerate() {
            image.verify(found).map_err(|(job, reason)| self.blame(rank, job, &reason))?;
        }
        self.verify_agreement(found)
    }

    /// What is wrong with one rank's memory after the calls, if anything.
    pub fn verify_rank(&self, rank: usize, found: &[u8]) -> Result<(), String> {
        self.images[rank].verify(found).map_err(|(job, reason)| self.blame(rank, job, &reason))
    }

    /// Where the results of the reductions that `chosen` picks lie in a rank's memory.
    pub fn computed(
        &self,
        rank: usize,
        chosen: impl Fn(&Call) -> bool,
    ) -> impl Iterator<Item = Range<usize>> {
        let results = self.images[rank].computed.iter();
        results.filter(move |c| chosen(&self.jobs[c.job].call)).map(|c| c.range.clone())
    }

    /// All ranks must end an all-reduce with the same bits, NaN and zeros included.
    fn verify_agreement(&self, found: &[Vec<u8>]) -> Result<(), String> {
        for rank in 1..found.len() {
            for (mine, first) in self.images[rank].computed.iter().zip(&self.images[0].computed) {
                let shared = matches!(self.jobs[mine.job].call, Call::AllReduce { .. });
                let bits = &found[rank][mine.range.clone()];
                if shared && bits != &found[0][first.range.clone()] {
                    return Err(self.blame(rank, mine.job, "other bits than on rank 0"));
                }
            }
        }
        Ok(())
    }

    fn blame(&self, rank: usize, job: usize, reason: &str) -> String {
        format!("rank {rank}, call {job} of {}: {reason}: {:?}", self.jobs.len(), self.jobs[job])
    }

    fn world(&self) -> usize {
        self.images.len()
    }

    fn add(&mut self, job: &Job, rng: &mut Rng) -> Vec<Place> {
        match &job.call {
            Call::AllReduce { count, .. } => self.add_reduction(job, *count, false, rng),
            Call::ReduceScatter { count, .. } => self.add_reduction(job, *count, true, rng),
            Call::AllGather { bytes, in_place } => self.add_all_gather(job, *bytes, *in_place, rng),
            Call::Broadcast { bytes, root, .. } => self.add_broadcast(job, *bytes, *root, rng),
            Call::Gather { rows, widths, root, outsiders_call } => {
                self.add_gather(job, *rows, widths, (*root, *outsiders_call), rng)
            }
            Call::Barrier => vec![Place { calls: true, ..Place::default() }; self.world()],
        }
    }

    fn add_reduction(
        &mut self,
        job: &Job,
        count: usize,
        scatters: bool,
        rng: &mut Rng,
    ) -> Vec<Place> {
        let (Call::AllReduce { dtype, wire, op, in_place, absent, .. }
        | Call::ReduceScatter { dtype, wire, op, in_place, absent, .. }) = job.call
        else {
            return Vec::new();
        };
        let total = if scatters { count * self.world() } else { count };
        let sources: Vec<Vec<u8>> =
            (0..self.world()).map(|_| elements(dtype, total, job.values, rng)).collect();
        let trees = match job.call {
            Call::AllReduce { algorithm, .. } => self.trees(algorithm, (count, dtype, wire)),
            _ => None,
        };
        let result = reduce(&sources, (dtype, wire, op), absent, total, trees);
        let (size, index) = (dtype.bytes(), self.places.len());
        let place = |(rank, image): (usize, &mut Image)| {
            let part = if scatters { rank * count * size } else { 0 };
            let (source, result) = (&sources[rank], &result[part..part + count * size]);
            let shift = |tensor: usize| shift(job, rank, tensor) * size % ALIGNMENT;
            let (src, dst) = if in_place {
                let mut after = source.clone();
                after[part..part + count * size].copy_from_slice(result);
                let start = image.place(source, &after, shift(0));
                (Some(start), start + part)
            } else {
                let present = absent >> rank & 1 == 0;
                let src = present.then(|| image.place(source, source, shift(0)));
                (src, image.place(&vec![POISON; count * size], result, shift(1)))
            };
            let range = dst..dst + count * size;
            image.computed.push(Computed { range, dtype, op, job: index });
            Place { src, dst, calls: true }
        };
        self.images.iter_mut().enumerate().map(place).collect()
    }

    /// Along which trees an all-reduce adds up.
    fn trees(
        &self,
        algorithm: Option<Algorithm>,
        tensor: (usize, DType, Wire),
    ) -> Option<(Forest, usize)> {
        let world = self.world();
        plan::trees(&plan::halves(world as u32)[..world], algorithm?, tensor)
    }

    fn add_all_gather(
        &mut self,
        job: &Job,
        count: usize,
        in_place: bool,
        rng: &mut Rng,
    ) -> Vec<Place> {
        let sources: Vec<Vec<u8>> =
            (0..self.world()).map(|_| bytes(count, job.values, rng)).collect();
        let joined = sources.concat();
        let place = |(rank, image): (usize, &mut Image)| {
            let mut before = vec![POISON; joined.len()];
            if in_place {
                before[rank * count..(rank + 1) * count].copy_from_slice(&sources[rank]);
                let dst = image.place(&before, &joined, shift(job, rank, 0));
                return Place { src: Some(dst + rank * count), dst, calls: true };
            }
            let src = image.place(&sources[rank], &sources[rank], shift(job, rank, 0));
            let dst = image.place(&before, &joined, shift(job, rank, 1));
            Place { src: Some(src), dst, calls: true }
        };
        self.images.iter_mut().enumerate().map(place).collect()
    }

    fn add_broadcast(&mut self, job: &Job, count: usize, root: u32, rng: &mut Rng) -> Vec<Place> {
        let data = bytes(count, job.values, rng);
        let poison = vec![POISON; count];
        let place = |(rank, image): (usize, &mut Image)| {
            let before = if rank == root as usize { &data } else { &poison };
            let at = image.place(before, &data, shift(job, rank, 0));
            Place { src: Some(at), dst: at, calls: true }
        };
        self.images.iter_mut().enumerate().map(place).collect()
    }

    fn add_gather(
        &mut self,
        job: &Job,
        rows: usize,
        widths: &[usize],
        (root, outsiders_call): (u32, bool),
        rng: &mut Rng,
    ) -> Vec<Place> {
        let sources: Vec<Vec<u8>> =
            widths.iter().map(|width| bytes(rows * width, job.values, rng)).collect();
        let joined = join_rows(&sources, widths, rows);
        let place = |(rank, image): (usize, &mut Image)| {
            let is_root = rank == root as usize;
            let source = &sources[rank];
            let src = (widths[rank] != 0).then(|| image.place(source, source, shift(job, rank, 0)));
            let poison = vec![POISON; joined.len()];
            let dst = if is_root { image.place(&poison, &joined, shift(job, rank, 1)) } else { 0 };
            Place { src, dst, calls: is_root || widths[rank] != 0 || outsiders_call }
        };
        self.images.iter_mut().enumerate().map(place).collect()
    }
}

/// Ranks and tensors of a shifted job begin at different offsets.
fn shift(job: &Job, rank: usize, tensor: usize) -> usize {
    if job.shift == 0 { 0 } else { (job.shift + 3 * rank + 5 * tensor) % 64 }
}

fn reduce(
    sources: &[Vec<u8>],
    (dtype, wire, op): (DType, Wire, ReduceOp),
    absent: u32,
    count: usize,
    trees: Option<(Forest, usize)>,
) -> Vec<u8> {
    let contributes = |rank: usize| absent >> rank & 1 == 0;
    let input = |(rank, source): (usize, _)| contributes(rank).then_some(source);
    let inputs: Vec<Option<&[u8]>> =
        sources.iter().map(Vec::as_slice).enumerate().map(input).collect();
    Reduction { inputs: &inputs, dtype, op, wire, order: Order::along(&trees) }.exact(count)
}

/// Members' rows joined along their last dimension.
pub fn join_rows(sources: &[Vec<u8>], widths: &[usize], rows: usize) -> Vec<u8> {
    let row = |row: usize| {
        let cut = |(source, width): (&Vec<u8>, &usize)| source[row * width..][..*width].to_vec();
        sources.iter().zip(widths).flat_map(cut).collect::<Vec<u8>>()
    };
    (0..rows).flat_map(row).collect()
}
