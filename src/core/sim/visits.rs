//! Whether busy tenants' prefill gives way to visitors', told from the outside: by what each tenant had to compute before and
//! has after a plan.

use super::{Failure, check};
use crate::request::Request;
use crate::tenants::TenantSlot;
use crate::{Effect, Engine, StepPlan, WorkerId};

/// Each tenant's uncomputed tokens, waiting and on this worker, without its decodes.
pub(crate) struct Visits(Vec<u64>);

fn uncomputed(engine: &Engine, worker: WorkerId, is_prefill: impl Fn(&Request) -> bool) -> Vec<u64> {
    let running = engine.workers[usize::from(worker.0)].iter_running();
    let running: Vec<_> = running.map(|(_, _, index)| &engine.requests[index]).collect();
    let of = |slot: TenantSlot| {
        let own = running.iter().filter(|request| request.tenant == slot && is_prefill(request));
        engine.waiting.tokens_of(slot) + own.map(|request| u64::from(request.remaining())).sum::<u64>()
    };
    engine.tenants.iter().map(|(slot, _)| of(slot)).collect()
}

impl Visits {
    pub(crate) fn new(engine: &Engine, worker: WorkerId) -> Self {
        Visits(uncomputed(engine, worker, |request| request.remaining() > 1))
    }

    /// Whether a running request's tenant had, or has, more to compute than fits into a step: what it does not get may be for
    /// another's sake. What waited may find less cached than when it came.
    pub(crate) fn may_be_busy(&self, engine: &Engine, request: &Request) -> bool {
        let now = engine.waiting.tokens_of(request.tenant) + u64::from(request.remaining());
        self.0[request.tenant.0 as usize].max(now) > u64::from(engine.config.step_tokens_max)
    }

    /// Behind a visitor's prompt there is no prefill of a tenant that is busy, but for one token of the oldest.
    pub(crate) fn check(&self, engine: &Engine, plan: &StepPlan, effects: &[Effect]) -> Result<(), Failure> {
        let is_new =
            |id| effects.iter().any(|effect| matches!(effect, Effect::Scheduled { request, .. } if *request == id));
        let is_prefill = |request: &Request| request.remaining() > 1 || is_new(request.id);
        let after = uncomputed(engine, plan.worker, is_prefill);
        let budget = u64::from(engine.config.step_tokens_max);
        // What is found cached may be less than when it came: a tenant on the edge counts as neither.
        let is = |slot: TenantSlot, is: fn(u64, u64) -> bool| {
            is(self.0[slot.0 as usize], budget) && is(after[slot.0 as usize], budget)
        };
        let mut has_visitor = false;
        for slice in &plan.slices {
            let Some(index) = engine.requests.find(slice.request) else { continue };
            let request = &engine.requests[index];
            if !is_prefill(request) {
                continue;
            }
            let is_late = has_visitor && is(request.tenant, |tokens, budget| tokens > budget);
            let is_least = slice.tokens.len() == 1;
            check(!is_late || is_least, "visitors", || {
                format!("{slice:?} of a busy tenant behind a visitor's prompt")
            })?;
            has_visitor |= is(request.tenant, |tokens, budget| tokens <= budget);
        }
        Ok(())
    }
}
