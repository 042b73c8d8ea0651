//! The prefills of a step: who is next, how much of it, and who gives way to whom.
//!
//! Running prefills and waiting requests stand in one order, by class, by their tenant's counter and by age (`policy.rs`). Each
//! takes what is left of the budget and of the time that the objectives of the decodes, and visitors (`visitors.rs`), leave;
//! the oldest prefill has its part whatever comes before it. Owner: the engine, for the time of one `plan`. Complexity:
//! O(prefills log prefills), and of `start.rs` for each request that is admitted.

use crate::cost::StepWork;
use crate::fault::planted;
use crate::queue::{Candidate, price};
use crate::request::{Arrival, RequestIndex};
use crate::scheduler::StepFiller;
use crate::start::Start;
use crate::tenants::{Demand, TenantSlot};
use crate::visitors::WAYS_MAX;
use crate::{ClassId, Engine, policy};

/// A running prefill and its place in the order of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefill {
    pub(crate) class: ClassId,
    /// Its tenant's counter without what the oldest prefill of its tenant and class was charged.
    pub(crate) counter: u64,
    pub(crate) tenant: TenantSlot,
    pub(crate) arrival: Arrival,
    pub(crate) index: RequestIndex,
}

impl StepFiller<'_> {
    /// Plans prefills and admits, in one order, until the budget is used up.
    pub(crate) fn fill_prefills(&mut self, has_kept_all: bool) {
        let mut may_admit = has_kept_all && self.has_place() && self.may_start();
        if !may_admit && self.engine.prefills.is_empty() {
            return;
        }
        let mut prefills = std::mem::take(&mut self.engine.prefills);
        self.order(&mut prefills);
        self.look_at(&prefills);
        self.is_overdue = self.worker().ways_given >= WAYS_MAX || planted!(self.engine, IgnoreVisitors);
        let Engine { requests, config, .. } = &*self.engine;
        let oldest = prefills.iter().min_by_key(|prefill| prefill.arrival).map(|prefill| prefill.index);
        self.reserve = oldest
            .map(|index| (index, policy::chunk(requests[index].remaining(), config.chunk_tokens_min.min(self.budget))));
        let mut next = 0;
        while self.budget_left() > 0 {
            let head = prefills.get(next).copied();
            let candidate = if may_admit { self.candidate() } else { None };
            if let Some(candidate) = candidate {
                self.look(candidate.tenant);
            }
            match (candidate, head) {
                (Some(candidate), head) if head.is_none_or(|head| self.goes_before(&candidate, &head)) => {
                    if self.gives_way(candidate.tenant) {
                        may_admit = false;
                        continue;
                    }
                    let kept = self.reserve;
                    self.keep_little(candidate.tenant);
                    let start = self.admit(&candidate);
                    if !matches!(start, Start::Started) {
                        self.reserve = kept;
                    }
                    match start {
                        Start::Started => may_admit = self.has_place() && self.may_start(),
                        Start::AtCeiling => {}
                        Start::Blocked => may_admit = false,
                        Start::Full if self.gives_way(candidate.tenant) => may_admit = false,
                        Start::Full => break,
                    }
                }
                (_, Some(head)) => {
                    next += 1;
                    self.keep_little(head.tenant);
                    let goes_on = self.gives_way(head.tenant) || self.push_prefill(head.index);
                    if !goes_on && !self.gives_way(head.tenant) {
                        break;
                    }
                }
                (_, None) => break,
            }
            if may_admit && candidate.is_none() {
                may_admit = false;
            }
        }
        let mut gave_way = false;
        if let Some((index, _)) = self.reserve {
            gave_way = self.gives_way(self.engine.requests[index].tenant);
            self.push_prefill(index);
        }
        self.worker().ways_given = if gave_way { self.worker().ways_given + 1 } else { 0 };
        let left = prefills.iter().map(|prefill| &self.engine.requests[prefill.index]).filter(|left| !left.in_flight);
        self.backlog += left.map(|left| u64::from(left.remaining())).sum::<u64>();
        prefills.clear();
        self.engine.prefills = prefills;
    }

    /// Puts the running prefills in the order in which they take tokens of the step: by class, by what their tenants have had
    /// besides the oldest prefill of each, and by age.
    fn order(&self, prefills: &mut [Prefill]) {
        let Engine { requests, waiting, tenants, .. } = &*self.engine;
        prefills.sort_unstable_by_key(|prefill| (prefill.class, prefill.tenant, prefill.arrival));
        let is_same = |a: &Prefill, b: &Prefill| (a.class, a.tenant) == (b.class, b.tenant);
        for own in prefills.chunk_by_mut(is_same) {
            let Prefill { class, tenant, index, .. } = own[0];
            let charge = price(tenants[tenant].weight(), u64::from(requests[index].num_charged()));
            let counter = waiting.counter(class, tenant).saturating_sub(charge);
            own.iter_mut().for_each(|prefill| prefill.counter = counter);
        }
        prefills.sort_unstable_by_key(|prefill| (prefill.class, prefill.counter, prefill.arrival));
    }

    /// Keeps no more than a token for the oldest prefill, if it is a busy tenant's and this one a visitor.
    fn keep_little(&mut self, tenant: TenantSlot) {
        let Some((oldest, tokens)) = self.reserve else { return };
        let is_visit = !self.is_busy(tenant) && self.is_busy(self.engine.requests[oldest].tenant);
        if is_visit && !self.is_overdue {
            self.reserve = Some((oldest, tokens.min(1)));
        }
    }

    /// Tokens of the budget that are not kept for the oldest prefill.
    fn budget_left(&self) -> u32 {
        self.budget.saturating_sub(self.reserve.map_or(0, |(_, tokens)| tokens))
    }

    fn work_with_reserve(&self) -> StepWork {
        let mut work = self.work;
        if let Some((oldest, tokens)) = self.reserve {
            work.add_prefill(self.engine.requests[oldest].num_computed, tokens);
        }
        work
    }

    /// Plans the next chunk of a prefill; `false` when the objectives, or visitors, leave none of it.
    fn push_prefill(&mut self, index: RequestIndex) -> bool {
        let kept = match self.reserve {
            Some((oldest, tokens)) if oldest == index => {
                self.reserve = None;
                tokens
            }
            _ => 0,
        };
        let request = &self.engine.requests[index];
        let (tenant, start, remaining) = (request.tenant, request.num_computed, request.remaining());
        let chunk = if self.gives_way(tenant) { kept } else { self.chunk(tenant, start, remaining).max(kept) };
        if chunk == 0 {
            self.close_to(tenant);
            return false;
        }
        self.push_chunk(index, chunk);
        true
    }

    /// Plans the next `chunk` tokens of a prefill.
    pub(crate) fn push_chunk(&mut self, index: RequestIndex, chunk: u32) {
        let request = &self.engine.requests[index];
        let (tenant, start, remaining) = (request.tenant, request.num_computed, request.remaining());
        if self.is_busy(tenant) {
            self.is_visited |= chunk < remaining;
            self.visit_us = if self.is_overdue { None } else { self.visit_us(tenant) };
        } else {
            self.is_visited = true;
            if self.engine.requests[index].cached_tokens == Some(start) {
                let mut prompt = StepWork::default();
                prompt.add_prefill(start, remaining);
                let prompt_us = self.engine.estimator.predict_us(&prompt);
                self.engine.visitors.note(tenant, self.engine.now, prompt_us);
            }
        }
        self.push_slice(index, chunk, false);
    }

    /// Whether a waiting request takes tokens of the step before a running prefill: also where both tenants had as much, as the
    /// other one's next is in line already, and a visitor's where a busy one had less, by a step at most.
    fn goes_before(&self, candidate: &Candidate, running: &Prefill) -> bool {
        if candidate.class != running.class || candidate.tenant == running.tenant {
            return (candidate.class, candidate.counter) < (running.class, running.counter);
        }
        let is_visit = !self.is_busy(candidate.tenant) && self.is_busy(running.tenant) && !self.is_overdue;
        let step = price(self.engine.tenants[candidate.tenant].weight(), u64::from(self.engine.config.step_tokens_max));
        candidate.counter <= running.counter.saturating_add(if is_visit { step } else { 0 })
    }

    /// Takes down what the tenants of the running prefills have to compute.
    fn look_at(&mut self, prefills: &[Prefill]) {
        for prefill in prefills {
            self.look(prefill.tenant);
            let remaining = self.engine.requests[prefill.index].remaining();
            self.engine.tenants[prefill.tenant].demand.running += u64::from(remaining);
        }
        for prefill in prefills {
            let all = self.engine.waiting.tokens_of(prefill.tenant);
            let Engine { tenants, config, .. } = &mut *self.engine;
            let demand = &mut tenants[prefill.tenant].demand;
            demand.is_busy = all + demand.running > u64::from(config.step_tokens_max);
        }
    }

    /// Takes down what a tenant has to compute, unless this plan did so before.
    fn look(&mut self, tenant: TenantSlot) {
        let Engine { waiting, tenants, config, num_plans, .. } = &mut *self.engine;
        let demand = &mut tenants[tenant].demand;
        if demand.plan != *num_plans {
            let is_busy = waiting.tokens_of(tenant) > u64::from(config.step_tokens_max);
            *demand = Demand { plan: *num_plans, running: 0, is_busy };
        }
    }

    /// Whether a tenant, that was looked at, has more to compute than fits into a step.
    fn is_busy(&self, tenant: TenantSlot) -> bool {
        self.engine.tenants[tenant].demand.is_busy
    }

    /// Whether a tenant's prefill comes later for visitors' sake.
    fn gives_way(&self, tenant: TenantSlot) -> bool {
        self.is_visited && self.is_busy(tenant) && !self.is_overdue
    }

    /// A tenant has all that the step takes of it. If it is busy, no other busy one gets more.
    pub(crate) fn close_to(&mut self, tenant: TenantSlot) {
        self.is_visited |= self.is_busy(tenant);
    }

    /// How long visitors that are expected back let a step with prefill of a busy tenant be.
    fn visit_us(&self, busy: TenantSlot) -> Option<u64> {
        let Engine { waiting, tenants, visitors, estimator, now, num_plans, .. } = &*self.engine;
        let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..self.work };
        let is_away = |tenant: TenantSlot| {
            let demand = tenants[tenant].demand;
            waiting.tokens_of(tenant) == 0 && (demand.plan != *num_plans || demand.running == 0)
        };
        visitors.step_us(busy, *now, estimator.predict_us(&decodes), is_away)
    }

    /// How many of a tenant's `remaining` tokens from position `start` the step takes.
    pub(crate) fn chunk(&self, tenant: TenantSlot, start: u32, remaining: u32) -> u32 {
        let chunk = policy::chunk(remaining, self.budget_left());
        let visit_us = if self.is_busy(tenant) && !self.is_overdue { self.visit_us(tenant) } else { None };
        let Some(limit_us) = [self.itl_us, visit_us].into_iter().flatten().min() else { return chunk };
        let work = self.work_with_reserve();
        let within = self.engine.estimator.prefill_within(&work, start, chunk, limit_us);
        let least = u64::from(self.engine.config.chunk_tokens_min).saturating_sub(work.prefill_tokens) as u32;
        let is_free = planted!(self.engine, IgnoreObjectives);
        if is_free { chunk } else { chunk.min(within.max(least)) }
    }
}
