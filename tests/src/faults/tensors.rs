//! Registered tensors and the direct all-reduces of them that a scene makes, with what must come out.

use crate::group::{Group, Memory};
use peerlane::cases::{Rng, Values, elements};
use peerlane::reference::{Order, Reduction};
use peerlane::{AllReduceRegistered, Communicator, DType, Error, ReduceOp, Registration};

/// One tensor of f32 a rank, and the calls on it.
#[derive(Clone, Debug)]
pub struct Tensors {
    calls: Vec<AllReduceRegistered>,
    before: Vec<Vec<u8>>,
    after: Vec<Vec<u8>>,
}

/// The ranks' memory for [`Tensors`].
pub struct Registered {
    registrations: Vec<Registration>,
    tensors: Vec<Memory>,
    /// What a rank finds as soon as its own calls have ended.
    copies: Vec<Memory>,
}

impl Tensors {
    /// Random calls for `world` ranks.
    pub fn random(world: u32, rng: &mut Rng) -> Tensors {
        let elements_in_all = 1 + rng.below(2000) as usize;
        let before: Vec<Vec<u8>> = (0..world)
            .map(|_| elements(DType::F32, elements_in_all, Values::Ordinary, rng))
            .collect();
        let (mut after, mut calls) = (before.clone(), Vec::new());
        for _ in 0..1 + rng.below(5) {
            let offset = 16 * rng.below(1 + elements_in_all as u64 / 8) as usize;
            let count = 1 + rng.below((elements_in_all - offset / 4) as u64) as usize;
            let op = ReduceOp::ALL[rng.below(4) as usize];
            calls.push(AllReduceRegistered {
                offset,
                op,
                ..AllReduceRegistered::new(count, DType::F32)
            });
            apply(&calls[calls.len() - 1], &mut after);
        }
        Tensors { calls, before, after }
    }

    /// Registers the tensors of all ranks and queues what they hold first.
    pub fn load(&self, group: &mut Group) -> Result<Registered, Error> {
        let image = |rank: usize| {
            let at = &group.ranks[rank];
            Memory::with_image(&at.gpu, at.stream, &self.before[rank])
        };
        let all = || (0..group.ranks.len()).map(image).collect::<Result<Vec<_>, _>>();
        let (tensors, copies) = (all()?, all()?);
        let sizes: Vec<_> =
            tensors.iter().map(|memory| (memory.base, self.before[0].len())).collect();
        let mut ranks: Vec<_> = group.ranks.iter_mut().map(|rank| &mut rank.communicator).collect();
        // SAFETY: `Registered` is dropped behind the group's communicators.
        let registrations = unsafe { Communicator::register_all(&mut ranks, &sizes)? };
        Ok(Registered { registrations, tensors, copies })
    }

    /// How many calls there are.
    pub fn calls(&self) -> usize {
        self.calls.len()
    }

    /// Queues call `index` on `rank`, and behind the last one a copy of what it left.
    pub fn issue(
        &self,
        group: &mut Group,
        memory: &Registered,
        (rank, index): (usize, usize),
    ) -> Result<(), Error> {
        let at = &mut group.ranks[rank];
        let (registration, call) = (&memory.registrations[rank], &self.calls[index]);
        // SAFETY: the call lies in the registered tensor, which outlives the group.
        unsafe { at.communicator.all_reduce_registered(registration, call, at.stream)? };
        if index + 1 < self.calls.len() {
            return Ok(());
        }
        let (copy, tensor) = (memory.copies[rank].base, memory.tensors[rank].base);
        // SAFETY: both are as large as the image.
        unsafe { at.gpu.copy(copy, tensor, self.before[rank].len(), at.stream) }
    }

    /// What is wrong with what `rank` holds at the end, if anything.
    pub fn verify(&self, rank: usize, memory: &Registered) -> Result<Option<String>, Error> {
        let found = memory.copies[rank].read(self.before[rank].len())?;
        let wrong = found.iter().zip(&self.after[rank]).position(|(found, wanted)| found != wanted);
        Ok(wrong
            .map(|at| format!("rank {rank}, byte {at} of the registered tensor: {:?}", self.calls)))
    }
}

fn apply(call: &AllReduceRegistered, images: &mut [Vec<u8>]) {
    let AllReduceRegistered { offset, count, dtype, op, wire, .. } = *call;
    let range = offset..offset + count * dtype.bytes();
    let inputs: Vec<_> = images.iter().map(|image| image[range.clone()].to_vec()).collect();
    let inputs: Vec<_> = inputs.iter().map(|input| Some(input.as_slice())).collect();
    let result = Reduction { inputs: &inputs, dtype, op, wire, order: Order::Ranks }.exact(count);
    images.iter_mut().for_each(|image| image[range.clone()].copy_from_slice(&result));
}
