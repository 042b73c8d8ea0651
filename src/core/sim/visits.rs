//! Whether busy tenants' prefill gives way to visitors', told from the outside: by what each tenant had to compute before a plan.

use super::{Failure, check};
use crate::tenants::TenantSlot;
use crate::visitors::WAYS_MAX;
use crate::{Effect, Engine, StepPlan, WorkerId};

/// Each tenant's uncomputed tokens, waiting and on this worker, without its decodes.
pub(crate) struct Visits {
    tokens: Vec<u64>,
    /// Steps in a row, up to this one, in which the oldest prefill gave way.
    ways_given: u32,
}

impl Visits {
    pub(crate) fn new(engine: &Engine, worker: WorkerId) -> Self {
        let running = engine.workers[usize::from(worker.0)].iter_running();
        let running: Vec<_> = running.map(|(_, _, index)| &engine.requests[index]).collect();
        let of = |slot: TenantSlot| {
            let own = running.iter().filter(|request| request.tenant == slot && request.remaining() > 1);
            engine.waiting.tokens_of(slot) + own.map(|request| u64::from(request.remaining())).sum::<u64>()
        };
        let tokens = engine.tenants.iter().map(|(slot, _)| of(slot)).collect();
        Visits { tokens, ways_given: engine.workers[usize::from(worker.0)].ways_given }
    }

    /// Whether a tenant had, or has by `now`, more to compute than fits into a step: what it does not get may be for another's
    /// sake. What waited may find less cached than when it came.
    pub(crate) fn may_be_busy(&self, now: &Visits, engine: &Engine, tenant: TenantSlot) -> bool {
        self.tokens[tenant.0 as usize].max(now.tokens[tenant.0 as usize]) > u64::from(engine.config.step_tokens_max)
    }

    /// Behind a visitor's prompt there is no prefill of a tenant that is busy, but for one token of the oldest.
    pub(crate) fn check(&self, engine: &Engine, plan: &StepPlan, effects: &[Effect]) -> Result<(), Failure> {
        let now = engine.workers[usize::from(plan.worker.0)].ways_given;
        check(now <= self.ways_given + 1 && now <= WAYS_MAX, "visitors", || format!("{now} ways given in a row"))?;
        // Who starts in others' place changes its tenant's demand before the plan looks at it.
        let has_claims = effects.iter().any(|effect| matches!(effect, Effect::Preempted { .. }));
        if has_claims || self.ways_given >= WAYS_MAX {
            return Ok(());
        }
        let is_new =
            |id| effects.iter().any(|effect| matches!(effect, Effect::Scheduled { request, .. } if *request == id));
        let is_busy = |slot: TenantSlot| self.tokens[slot.0 as usize] > u64::from(engine.config.step_tokens_max);
        let mut has_visitor = false;
        for slice in &plan.slices {
            let Some(index) = engine.requests.find(slice.request) else { continue };
            let request = &engine.requests[index];
            if request.remaining() <= 1 && !is_new(request.id) {
                continue;
            }
            let is_late = has_visitor && is_busy(request.tenant);
            let is_least = slice.tokens.len() == 1;
            check(!is_late || is_least, "visitors", || {
                format!("{slice:?} of a busy tenant behind a visitor's prompt")
            })?;
            has_visitor |= !is_busy(request.tenant);
        }
        Ok(())
    }
}
