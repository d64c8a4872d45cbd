//! A communicator's calls while somebody traces them: a span on the host, and the time on the GPU.
//!
//! Invariant: a call does what it does untraced, whatever becomes of its trace.

use crate::call_log::Signature;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::gpu::Stream;
use crate::group::Group;
use crate::trace::{self, Subject, Timer};
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
    /// Begins to trace a call that is queued on `stream` next.
    #[cold]
    #[inline(never)]
    pub(crate) fn trace(&mut self, signature: &Signature, stream: Stream) -> Box<Traced> {
        let (operation, bytes, rank) = (signature.operation, signature.bytes as u64, self.rank());
        let subject = Subject {
            name: operation.name(),
            bytes,
            rank,
            world: self.world_size(),
            group: self.group(operation.name()).map_or(0, Group::number),
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
        let by = trace::here();
        self.time(|timer| timer.begin(stream));
        Box::new(Traced { subject, by, _span: span })
    }

    /// Ends it, now that the call is queued.
    #[cold]
    #[inline(never)]
    pub(crate) fn trace_end(&mut self, traced: Traced, stream: Stream) {
        let Traced { subject, by, _span } = traced;
        self.time(|timer| timer.end(subject, by, stream));
    }

    /// Does something with the timer. The first error is its end.
    fn time(&mut self, action: impl FnOnce(&mut Timer) -> Result<()>) {
        if let (Timing::Unasked, true) = (&self.timing, trace::is_recording()) {
            let made = Timer::new(self.gpu());
            self.timing = made.map_or(Timing::Failed, |timer| Timing::On(Box::new(timer)));
        }
        let Timing::On(timer) = &mut self.timing else { return };
        if action(timer).is_err() {
            self.timing = Timing::Failed;
        }
    }
}
