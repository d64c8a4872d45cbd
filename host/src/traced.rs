//! A communicator's calls while somebody traces them: a span on the host, and the time on the GPU.
//!
//! Invariant: a call does what it does untraced, whatever becomes of its trace.

use crate::call_log::Signature;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::gpu::Stream;
use crate::group::Group;
use crate::trace::{self, Subject, Timer};
use crate::usage::Family;
use peerlane_device::abi::Operation;
use tracing::span::EnteredSpan;

/// What a communicator times its calls with.
#[derive(Default)]
pub(crate) enum Timing {
    /// None was traced yet.
    #[default]
    Unasked,
    On(Box<Timer>),
    /// The driver would not.
    Failed,
}

/// A call under way.
pub(crate) struct Traced {
    subject: Subject,
    /// The thread that makes it, and when.
    by: (u32, u64),
    /// Closed when the call has been queued, or has failed.
    _span: EnteredSpan,
}

impl Communicator {
    /// Begins to trace a call.
    #[cold]
    #[inline(never)]
    pub(crate) fn trace(&mut self, signature: &Signature) -> Box<Traced> {
        let (operation, bytes, rank) = (signature.operation, signature.bytes as u64, self.rank());
        let subject = Subject {
            name: operation.name(),
            bytes,
            rank,
            world: self.world_size(),
            group: self.group(operation.name()).map_or(0, Group::number),
            call: 0,
        };
        macro_rules! span {
            ($name:literal) => {
                trace::span!($name, bytes, rank, variant = u64::from(signature.algorithm))
            };
        }
        let span = match operation {
            Operation::AllReduce => span!("all_reduce"),
            Operation::ReduceScatter => span!("reduce_scatter"),
            Operation::AllGather => span!("all_gather"),
            Operation::Broadcast => span!("broadcast"),
            Operation::Gather => span!("gather"),
            Operation::Barrier => span!("barrier"),
            Operation::LocalReduce | Operation::Probe => span!("other"),
        };
        Box::new(Traced { subject, by: trace::here(), _span: span })
    }

    /// Marks where it begins on the stream, now that it is certain to be queued next.
    #[cold]
    #[inline(never)]
    pub(crate) fn trace_begin(&mut self, stream: Stream) {
        if let (Timing::Unasked, true) = (&self.timing, trace::is_recording()) {
            self.timing = match Timer::new(self.gpu(), stream) {
                Ok(Some(timer)) => Timing::On(Box::new(timer)),
                // The stream is captured: later.
                Ok(None) => Timing::Unasked,
                Err(_) => Timing::Failed,
            };
        }
        if matches!(self.timing, Timing::Failed) {
            trace::lose();
        }
        self.time(|timer| timer.begin(stream));
    }

    /// Ends it, now that the call is queued and counted.
    #[cold]
    #[inline(never)]
    pub(crate) fn trace_end(&mut self, traced: Traced, family: Family, stream: Stream) {
        let Traced { mut subject, by, _span } = traced;
        subject.call = self.tally.number(family);
        // Counted anew in each family and after each recovery.
        let mix = self.generation << 4 | family as u64;
        subject.group = subject.group.wrapping_add(mix.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        self.time(|timer| timer.end(subject, by, stream));
    }

    /// Does something with the timer. The first error is its end.
    fn time(&mut self, action: impl FnOnce(&mut Timer) -> Result<()>) {
        if let Timing::On(timer) = &mut self.timing
            && action(timer).is_err()
        {
            self.timing = Timing::Failed;
        }
    }
}
