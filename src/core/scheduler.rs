//! Fills one step of one worker.
//!
//! There is no prefill mode and no decode mode: each request's computed tokens chase its known tokens. A step is filled in
//! straight passes:
//!
//! 1. room: where the pool may be short of blocks for the decodes, `preempt.rs` makes some; where others keep a tenant out
//!    that has a right to start, `claim.rs` starts it;
//! 2. decodes: the requests that lack one token;
//! 3. prefill: those that lack more, and waiting ones, in the order that `policy.rs` states, in chunks of what is left of
//!    the budget and of the time that the decodes' objectives and other tenants' visits (`visitors.rs`) leave. Nobody is
//!    admitted where room had to be made.
//!
//! After a step that failed, its parts are repeated alone and nothing else runs (`suspects.rs`).
//!
//! An admitted request gets blocks for its whole known sequence, so only decodes ever need another block and a prefill is
//! never stuck half way. Owner: the engine, for the time of one `plan`. Complexity: O(running + prefills log prefills + blocks
//! that are new), one lookup for each admitted request, and one for the first that does not fit, once until something changes.

use crate::cost::StepWork;
use crate::fault::planted;
use crate::queue::{Candidate, price};
use crate::request::{Arrival, Request, RequestIndex};
use crate::start::Start;
use crate::tenants::TenantSlot;
use crate::worker::{PlannedSlice, Worker};
use crate::{ClassId, Effect, Engine, SeqSlice, StepPlan, WorkerId, policy};

/// A running prefill and its place in the order of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefill {
    class: ClassId,
    /// Its tenant's counter without what the oldest prefill of its tenant and class was charged.
    counter: u64,
    tenant: TenantSlot,
    arrival: Arrival,
    index: RequestIndex,
}

pub(crate) struct StepFiller<'a> {
    pub(crate) engine: &'a mut Engine,
    pub(crate) id: WorkerId,
    pub(crate) pool: usize,
    plan: &'a mut StepPlan,
    pub(crate) effects: &'a mut Vec<Effect>,
    /// Tokens that the step may still take.
    budget: u32,
    work: StepWork,
    /// The strictest objective for the inter-token latency of the step's decodes, or pace that their deadlines ask for.
    itl_us: Option<u64>,
    /// The oldest prefill and the tokens of the budget that are kept for it.
    reserve: Option<(RequestIndex, u32)>,
    /// Busy tenants' prefill comes later: the step has a visitor's, or all that visitors leave.
    is_visited: bool,
    /// The step has a visitor's prefill.
    has_visitor: bool,
    /// What kept busy tenants' prefill small.
    visit_us: Option<u64>,
    /// Prefill tokens that the step leaves.
    backlog: u64,
    /// Who has just started in others' place.
    pub(crate) claimed: Option<RequestIndex>,
}

impl<'a> StepFiller<'a> {
    pub(crate) fn new(
        engine: &'a mut Engine,
        id: WorkerId,
        plan: &'a mut StepPlan,
        effects: &'a mut Vec<Effect>,
    ) -> Self {
        let budget = engine.config.step_tokens_max + u32::from(planted!(engine, ExceedBudget));
        let pool = engine.workers[usize::from(id.0)].pool();
        StepFiller {
            engine,
            id,
            pool,
            plan,
            effects,
            budget,
            work: StepWork::default(),
            itl_us: None,
            reserve: None,
            is_visited: false,
            has_visitor: false,
            visit_us: None,
            backlog: 0,
            claimed: None,
        }
    }

    pub(crate) fn worker(&mut self) -> &mut Worker {
        &mut self.engine.workers[usize::from(self.id.0)]
    }

    /// Fills the step; it stays empty when the worker has nothing to run.
    pub(crate) fn fill(&mut self) {
        if let Some(group) = self.worker().suspects.pop() {
            self.repeat(&group);
        } else {
            let has_kept_all = self.make_room() && self.claim();
            self.fill_decodes();
            self.fill_prefills(has_kept_all);
        }
        let predicted_us = self.engine.estimator.predict_us(&self.work);
        let (work, planned_at, backlog) = (self.work, self.engine.now, self.backlog);
        let limit_us = [self.itl_us, self.visit_us].into_iter().flatten().min();
        let worker = self.worker();
        worker.limit_us = limit_us;
        if !worker.planned.is_empty() {
            (worker.work, worker.predicted_us, worker.planned_at) = (work, predicted_us, planned_at);
        }
        worker.backlog = backlog;
    }

    /// Plans a part of a failed step again, as it was.
    fn repeat(&mut self, group: &[PlannedSlice]) {
        for slice in group {
            self.push_slice(slice.index, slice.num_tokens, slice.num_tokens == 1 && slice.sample);
        }
    }

    pub(crate) fn grow(&mut self, index: RequestIndex, missing: u32) {
        let Engine { requests, pools, tenants, .. } = &mut *self.engine;
        let request = &mut requests[index];
        for _ in 0..missing {
            let block = pools[self.pool].allocate(request.tenant, tenants);
            request.table.push(block.expect("free blocks were counted before"));
        }
    }

    /// Plans the requests that lack one token, and lists those that lack more. A decode whose block another worker's step
    /// must give up first waits.
    fn fill_decodes(&mut self) {
        let mut prefills = std::mem::take(&mut self.engine.prefills);
        let mut is_stalled = false;
        // The last step's decodes: what no step can be shorter than.
        let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..self.worker().work };
        let least_us = self.engine.estimator.predict_us(&decodes);
        for at in 0..self.worker().num_running() {
            let index = self.worker().running(at);
            let request = &self.engine.requests[index];
            if request.remaining() > 1 || self.claimed == Some(index) {
                let Request { class, tenant, arrival, .. } = *request;
                prefills.push(Prefill { class, counter: 0, tenant, arrival, index });
                continue;
            }
            let block_size = self.engine.config.block_size;
            let missing = if request.is_told(block_size) { 0 } else { request.blocks_missing(block_size) };
            if missing > 0 && !self.may_grow(index) {
                is_stalled = true;
                continue;
            }
            let objective = self.engine.config.classes[usize::from(request.class.0)].itl.map(|itl| itl.0);
            // One that will be late whatever the step does slows nobody down.
            let pace =
                self.engine.pace_us(request).filter(|pace| *pace >= least_us && !planted!(self.engine, IgnorePace));
            self.itl_us = [self.itl_us, objective, pace].into_iter().flatten().min();
            if missing > 0 {
                self.grow(index, missing);
            }
            self.push_slice(index, 1, true);
        }
        self.worker().is_stalled = is_stalled;
        self.engine.prefills = prefills;
    }

    /// Plans prefills and admits, in one order, until the budget is used up.
    fn fill_prefills(&mut self, has_kept_all: bool) {
        let mut may_admit = has_kept_all && self.has_place() && self.may_start();
        if !may_admit && self.engine.prefills.is_empty() {
            return;
        }
        let mut prefills = std::mem::take(&mut self.engine.prefills);
        self.order(&mut prefills);
        let Engine { requests, config, tenants, .. } = &mut *self.engine;
        for prefill in &prefills {
            tenants[prefill.tenant].prefilling += u64::from(requests[prefill.index].remaining());
        }
        let oldest = prefills.iter().min_by_key(|prefill| prefill.arrival).map(|prefill| prefill.index);
        self.reserve = oldest
            .map(|index| (index, policy::chunk(requests[index].remaining(), config.chunk_tokens_min.min(self.budget))));
        let mut next = 0;
        while self.budget_left() > 0 {
            let head = prefills.get(next).copied();
            let candidate = if may_admit { self.candidate() } else { None };
            match (candidate, head) {
                (Some(candidate), head) if head.is_none_or(|head| self.goes_before(&candidate, &head)) => {
                    if self.gives_way(candidate.tenant) {
                        may_admit = false;
                        continue;
                    }
                    match self.admit(&candidate) {
                        Start::Started => may_admit = self.has_place() && self.may_start(),
                        Start::AtCeiling => {}
                        Start::Blocked => may_admit = false,
                        Start::Full if self.gives_way(candidate.tenant) => may_admit = false,
                        Start::Full => break,
                    }
                }
                (_, Some(head)) => {
                    next += 1;
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
        if let Some((index, _)) = self.reserve {
            self.push_prefill(index);
        }
        let left = prefills.iter().map(|prefill| &self.engine.requests[prefill.index]).filter(|left| !left.in_flight);
        self.backlog += left.map(|left| u64::from(left.remaining())).sum::<u64>();
        let Engine { requests, tenants, workers, .. } = &mut *self.engine;
        let planned = workers[usize::from(self.id.0)].planned.iter().map(|slice| requests[slice.index].tenant);
        prefills.iter().map(|prefill| prefill.tenant).chain(planned).for_each(|slot| tenants[slot].prefilling = 0);
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
        let chunk = if !self.gives_way(tenant) {
            self.chunk(tenant, start, remaining).max(kept)
        } else if self.has_visitor {
            kept.min(1)
        } else {
            kept
        };
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
            self.visit_us = self.visit_us(tenant);
        } else {
            (self.is_visited, self.has_visitor) = (true, true);
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
        let is_visit =
            !self.is_busy(candidate.tenant) && self.is_busy(running.tenant) && !planted!(self.engine, IgnoreVisitors);
        let step = price(self.engine.tenants[candidate.tenant].weight(), u64::from(self.engine.config.step_tokens_max));
        candidate.counter <= running.counter.saturating_add(if is_visit { step } else { 0 })
    }

    /// Whether a tenant has more to compute than fits into a step.
    fn is_busy(&self, tenant: TenantSlot) -> bool {
        let Engine { waiting, tenants, config, .. } = &*self.engine;
        waiting.tokens_of(tenant) + tenants[tenant].prefilling > u64::from(config.step_tokens_max)
    }

    /// Whether a tenant's prefill comes later for visitors' sake.
    fn gives_way(&self, tenant: TenantSlot) -> bool {
        self.is_visited && self.is_busy(tenant) && !planted!(self.engine, IgnoreVisitors)
    }

    /// A tenant has all that the step takes of it. If it is busy, no other busy one gets more.
    pub(crate) fn close_to(&mut self, tenant: TenantSlot) {
        self.is_visited |= self.is_busy(tenant);
    }

    /// How long visitors that are expected back let a step with prefill of a busy tenant be.
    fn visit_us(&self, busy: TenantSlot) -> Option<u64> {
        let Engine { waiting, tenants, visitors, estimator, now, .. } = &*self.engine;
        let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..self.work };
        let is_away = |tenant: TenantSlot| waiting.tokens_of(tenant) + tenants[tenant].prefilling == 0;
        visitors.step_us(busy, *now, estimator.predict_us(&decodes), is_away)
    }

    /// How many of a tenant's `remaining` tokens from position `start` the step takes.
    pub(crate) fn chunk(&self, tenant: TenantSlot, start: u32, remaining: u32) -> u32 {
        let chunk = policy::chunk(remaining, self.budget_left());
        let ignores_visitors = planted!(self.engine, IgnoreVisitors);
        let visit_us = if self.is_busy(tenant) && !ignores_visitors { self.visit_us(tenant) } else { None };
        let Some(limit_us) = [self.itl_us, visit_us].into_iter().flatten().min() else { return chunk };
        let work = self.work_with_reserve();
        let within = self.engine.estimator.prefill_within(&work, start, chunk, limit_us);
        let least = u64::from(self.engine.config.chunk_tokens_min).saturating_sub(work.prefill_tokens) as u32;
        let is_free = planted!(self.engine, IgnoreObjectives);
        if is_free { chunk } else { chunk.min(within.max(least)) }
    }

    /// Adds at most `tokens_max` of a request's next tokens to the step.
    fn push_slice(&mut self, index: RequestIndex, tokens_max: u32, is_decode: bool) {
        let engine = &mut *self.engine;
        let block_size = engine.config.block_size;
        let request = &mut engine.requests[index];
        let mut num_tokens = policy::chunk(request.remaining(), tokens_max);
        if planted!(engine, EmptySlice) && self.plan.slices.len() == 2 {
            num_tokens = 0;
        }
        if planted!(engine, ExceedBudget) && request.remaining() > num_tokens {
            num_tokens += 1;
        }
        let (start, end) = (request.num_computed, request.num_computed + num_tokens);
        let plan = &mut *self.plan;
        let (first_token, first_block) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
        if num_tokens == 1 && end == request.num_tokens() {
            plan.tokens.push(request.last_token);
        } else {
            plan.tokens.extend_from_slice(&request.tokens[start as usize..end as usize]);
        }
        let table_len = request.num_told;
        if !request.is_told(block_size) {
            // All blocks that it has: those of a prompt come with its first chunk.
            plan.blocks.extend_from_slice(&request.table[table_len as usize..]);
            request.num_told = request.table.len() as u32;
            if planted!(engine, RotateTable) {
                plan.blocks[first_block as usize..].rotate_left(1);
            }
            if planted!(engine, ShortTable) && request.num_told > 1 {
                plan.blocks.pop();
            }
        }
        let sample = end == request.num_tokens();
        plan.slices.push(SeqSlice {
            request: request.id,
            start: start + u32::from(planted!(engine, SkipInputToken) && num_tokens == 3),
            tokens: first_token..plan.tokens.len() as u32,
            table_len,
            blocks: first_block..plan.blocks.len() as u32,
            sample,
        });
        if is_decode {
            self.work.add_decode(end);
        } else {
            self.work.add_prefill(start, num_tokens);
            self.backlog += u64::from(request.num_tokens() - end);
        }
        request.in_flight = true;
        engine.workers[usize::from(self.id.0)].planned.push(PlannedSlice { index, num_tokens, sample });
        self.budget = self.budget.saturating_sub(num_tokens);
    }
}
