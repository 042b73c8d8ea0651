//! What of its device each step has, where devices are divided: the whole only where nobody else is at work there when
//! it is planned, and then always. So of two steps that are in flight on one device, of different workers, the later
//! one is on its part.

use super::run::Run;
use super::{Failure, check};
use crate::request::Phase;
use crate::{DeviceShare, Engine, StepPlan, WorkerId};

/// Who else was at work on a worker's device before a plan.
pub(super) struct Others {
    /// There is another worker.
    exist: bool,
    /// Requests run on one.
    run: bool,
}

impl Others {
    /// By all requests there are.
    pub(super) fn new(engine: &Engine, worker: WorkerId) -> Self {
        let specs = &engine.config.workers;
        let is_beside =
            |other: WorkerId| other != worker && specs[usize::from(other.0)].pool == specs[usize::from(worker.0)].pool;
        let runs_beside = |phase| matches!(phase, Phase::Running(at) if is_beside(at));
        Others {
            exist: (0..specs.len()).any(|at| is_beside(WorkerId(at as u8))),
            run: engine.requests.iter().any(|(_, request)| runs_beside(request.phase)),
        }
    }
}

impl Run {
    pub(super) fn check_share(&mut self, plan: &StepPlan, others: &Others) -> Result<(), Failure> {
        let pool = self.pool(plan.worker);
        let is_beside = |other: &StepPlan| other.worker != plan.worker && self.pool(other.worker) == pool;
        let is_shared = self.in_flight.iter().any(|step| is_beside(&step.plan));
        let is_divided = self.config().device_parts;
        let is_part = is_divided && (others.run || is_shared);
        let expected = if is_part { DeviceShare::Part } else { DeviceShare::Whole };
        check(plan.share == expected, "device share", || {
            format!("{:?} of {:?}, others run: {}, have a step: {is_shared}", plan.share, plan.step, others.run)
        })?;
        self.coverage.on_parts += u64::from(is_part);
        self.coverage.on_wholes += u64::from(is_divided && !is_part && others.exist);
        Ok(())
    }
}
