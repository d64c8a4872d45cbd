//! Scenes for every part of the protocol, each with the part left out as its negative control.
//!
//! Most scenes have a bound of two preemptions, at which every part that is left out shows. Scenes of more threads have
//! one or none (then threads change where they wait), or they would take minutes; each negative control
//! shows that its bound is enough for what it leaves out.
//!
//! `PEERLANE_LOOM_FULL=1` adds a preemption to every bound. docs/protocol.md, "Model checking", says what which
//! scene shows; each prints the executions that it took.

mod abort;
mod exchanges;
mod streams;
mod threads;
mod wrap;

use peerlane_device::abi::{Args, FREE, Format, Operation};
use peerlane_device::kernels::broadcast;
use peerlane_device::pipe::{Full, Packet};
use peerlane_loom::{Host, Seat, Threads, dst, src};

/// Two ranks, one thread each: the one that keeps the books of the other.
const PAIR: &[Threads] =
    &[Threads { numbers: &[1], count: 1 }, Threads { numbers: &[0], count: 1 }];

/// A program of all ranks.
trait Program: Fn(Seat<'_>) + Copy + Send + Sync + 'static {}
impl<T: Fn(Seat<'_>) + Copy + Send + Sync + 'static> Program for T {}

/// A host that does nothing but wait.
fn join(host: Host) {
    host.join();
}

/// What the tensors of a call hold.
#[derive(Clone, Copy, PartialEq)]
enum Payload {
    /// Numbers.
    Ordinary,
    /// A number and words that look like a free slot.
    Hidden,
    /// Words that look free only.
    Free,
}

impl Payload {
    /// Word `word` of what rank `rank` brings to call `call`.
    fn word(self, rank: u32, call: u32, word: u32) -> u32 {
        match self {
            Payload::Ordinary => 1000 * (rank + 1) + 100 * call + word,
            Payload::Hidden if word.is_multiple_of(4) => 1000 * (rank + 1) + 100 * call + word,
            _ => FREE,
        }
    }
}

/// A broadcast, several times over.
#[derive(Clone, Copy)]
struct Stream {
    format: Format,
    root: u32,
    calls: u32,
    chunks: u32,
    chunk_units: u32,
    payload: Payload,
}

impl Stream {
    /// Calls of one chunk of two units, the first of which is nobody's: rank 1 sends it, and the one thread of rank 0
    /// takes the second.
    const fn new(format: Format, calls: u32) -> Stream {
        Stream { format, root: 1, calls, chunks: 1, chunk_units: 2, payload: Payload::Ordinary }
    }

    fn args(self, seat: Seat<'_>) -> Args {
        let mut args =
            seat.args(Operation::Broadcast, self.chunks * self.chunk_units, self.chunk_units);
        args.tail = self.format.payload() as u32;
        args.root = self.root;
        args
    }

    fn program(self) -> impl Program {
        move |seat: Seat<'_>| {
            for call in 0..self.calls {
                let args = self.args(seat);
                let words = self.format.payload() as u32 / 4;
                let mine = seat.thread()..;
                let units = mine.step_by(seat.threads() as usize);
                // A chunk's units are divided among the threads, chunk by chunk.
                let units = units.take_while(|unit| *unit < self.chunk_units);
                let units = (0..self.chunks).flat_map(|chunk| {
                    units.clone().map(move |unit| chunk * self.chunk_units + unit)
                });
                let words = units.flat_map(|unit| unit * words..(unit + 1) * words);
                let expected = |word: u32| self.payload.word(self.root, call, word);
                if seat.rank() == self.root {
                    for word in words.clone() {
                        seat.world().store(src(self.root) + 4 * u64::from(word), &[expected(word)]);
                    }
                }
                // SAFETY: the addresses are those of the scene's world, which panics at any other.
                seat.kernel(&args, |lane, args| unsafe {
                    match self.format {
                        Format::Packet => broadcast::<_, Packet>(lane, args),
                        Format::Full => broadcast::<_, Full>(lane, args),
                    }
                });
                seat.assert_ok();
                if seat.rank() != self.root {
                    for word in words {
                        let [got] = seat.world().load(dst(seat.rank()) + 4 * u64::from(word));
                        assert_eq!(got, expected(word), "call {call}, word {word}");
                    }
                }
            }
        }
    }
}
