//! What the model says of a job, for runs on simulated GPUs.
//!
//! Invariant: it is asked for what the communicator would do: the algorithm or route that it takes, the
//! same bytes on the wire.

use super::job::Job;
use super::results::Predicted;
use peerlane::model::{self, Costs, Prediction, Preset};
use peerlane::{DType, Operation, Wire};

/// Whether the model knows the job's collective.
pub(crate) const fn knows(job: &Job) -> bool {
    matches!(job.op, Operation::AllReduce | Operation::Broadcast)
}

/// The model's answer for a machine with a GPU for each rank, of a job whose algorithm or route is settled.
pub(crate) fn predict(job: &Job, preset: Preset) -> Option<Predicted> {
    let fabric = preset.fabric(job.world);
    let halves = job.dtype == DType::F32 && job.wire == Wire::Bf16;
    let Prediction { time_us, steps, sent_bytes, .. } = match job.op {
        Operation::AllReduce => {
            let bytes = if halves { job.bytes() / 2 } else { job.bytes() };
            model::predict_on(job.algorithm?, &fabric, &Costs::H200, bytes)
        }
        Operation::Broadcast => {
            model::predict_broadcast(job.route?, &fabric, &Costs::H200, job.root, job.bytes())
        }
        _ => return None,
    };
    Some(Predicted { time_us, steps, sent_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerlane::{Algorithm, ReduceOp, Route};

    #[test]
    fn the_wire_and_the_way_are_those_of_the_job() {
        let job = Job {
            op: Operation::AllReduce,
            dtype: DType::F32,
            wire: Wire::Native,
            reduce: ReduceOp::Sum,
            algorithm: Some(Algorithm::TwoShot),
            route: Some(Route::Direct),
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
        assert_eq!(predict(&Job { algorithm: None, ..large }, Preset::NvSwitch), None);
        let broadcast = |route| Job { op: Operation::Broadcast, route: Some(route), ..large };
        assert_eq!(predict(&broadcast(Route::Direct), Preset::NvSwitch).unwrap().steps, 1);
        assert_eq!(predict(&broadcast(Route::Chain), Preset::NvSwitch).unwrap().steps, 7);
        for op in [Operation::AllGather, Operation::Barrier] {
            assert!(
                !knows(&Job { op, ..job }) && predict(&Job { op, ..job }, Preset::Pcie).is_none()
            );
        }
    }
}
