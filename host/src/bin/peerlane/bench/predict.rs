//! What the model says of a job, for runs on simulated GPUs.
//!
//! Invariant: it is asked for what the communicator would do: the same choice of algorithm, the same
//! bytes on the wire.

use super::job::Job;
use super::results::Predicted;
use peerlane::model::{self, Costs, Prediction, Preset};
use peerlane::{DType, Operation, Route, Wire};

/// Whether the model knows the job's collective.
pub(crate) const fn knows(job: &Job) -> bool {
    matches!(job.op, Operation::AllReduce | Operation::Broadcast)
}

/// The model's answer for a machine with a GPU for each rank.
pub(crate) fn predict(job: &Job, preset: Preset) -> Option<Predicted> {
    let fabric = preset.fabric(job.world);
    let halves = job.dtype == DType::F32 && job.wire == Wire::Bf16;
    let Prediction { time_us, steps, sent_bytes, .. } = match job.op {
        Operation::AllReduce => {
            let bytes = if halves { job.bytes() / 2 } else { job.bytes() };
            let algorithm = job.algorithm.unwrap_or_else(|| model::usual(job.world, bytes));
            model::predict_on(algorithm, &fabric, &Costs::H200, bytes)
        }
        Operation::Broadcast => {
            let (route, bytes) = (Route::Direct, job.bytes());
            model::predict_broadcast(route, &fabric, &Costs::H200, job.root, bytes)
        }
        _ => return None,
    };
    Some(Predicted { time_us, steps, sent_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerlane::{Algorithm, ReduceOp};

    #[test]
    fn the_wire_and_the_choice_are_those_of_the_communicator() {
        let job = Job {
            op: Operation::AllReduce,
            dtype: DType::F32,
            wire: Wire::Native,
            reduce: ReduceOp::Sum,
            algorithm: None,
            root: 0,
            world: 8,
            count: 0,
        };
        let sent = |job: Job| predict(&job, Preset::NvSwitch).unwrap().sent_bytes;
        let large = job.sized(8 << 20);
        assert_eq!(sent(large), 14 << 20);
        assert_eq!(sent(Job { wire: Wire::Bf16, ..large }), 7 << 20);
        let ring = Job { algorithm: Some(Algorithm::Ring), ..large };
        assert_eq!(predict(&ring, Preset::NvSwitch).unwrap().steps, 14);
        for op in [Operation::AllGather, Operation::Barrier] {
            assert!(
                !knows(&Job { op, ..job }) && predict(&Job { op, ..job }, Preset::Pcie).is_none()
            );
        }
    }
}
