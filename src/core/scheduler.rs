//! Fills one step of one worker.
//!
//! There is no prefill mode and no decode mode: each request's computed tokens chase its known tokens. A step is filled in
//! straight passes:
//!
//! 1. room: where the pool may be short of blocks for the decodes, `preempt.rs` makes some; where others keep a tenant out
//!    that has a right to start, `claim.rs` starts it;
//! 2. decodes: the requests that lack one token;
//! 3. prefill: those that lack more, and waiting ones, in the order that `policy.rs` states, in chunks of what is left of
//!    the budget and of the time that the decodes' objectives and other tenants' visits leave (`prefill.rs`). Nobody is
//!    admitted where room had to be made.
//!
//! After a step that failed, its parts are repeated alone and nothing else runs (`suspects.rs`).
//!
//! An admitted request gets blocks for its whole known sequence, so only decodes ever need another block and a prefill is
//! never stuck half way. Owner: the engine, for the time of one `plan`. Complexity: O(running + prefills log prefills + blocks
//! that are new), one lookup for each admitted request, and one for the first that does not fit, once until something changes.

use crate::cost::StepWork;
use crate::fault::planted;
use crate::prefill::Prefill;
use crate::request::{Request, RequestIndex};
use crate::worker::{PlannedSlice, Worker};
use crate::{Effect, Engine, SeqSlice, StepPlan, WorkerId, policy};

pub(crate) struct StepFiller<'a> {
    pub(crate) engine: &'a mut Engine,
    pub(crate) id: WorkerId,
    pub(crate) pool: usize,
    plan: &'a mut StepPlan,
    pub(crate) effects: &'a mut Vec<Effect>,
    /// Tokens that the step may still take.
    pub(crate) budget: u32,
    pub(crate) work: StepWork,
    /// The strictest objective for the inter-token latency of the step's decodes, or pace that their deadlines ask for.
    pub(crate) itl_us: Option<u64>,
    /// The oldest prefill and the tokens of the budget that are kept for it.
    pub(crate) reserve: Option<(RequestIndex, u32)>,
    /// Busy tenants' prefill comes later: the step has a visitor's, or all that visitors leave.
    pub(crate) is_visited: bool,
    /// Nobody gives way in this step: the oldest prefill has done so too often.
    pub(crate) is_overdue: bool,
    /// What kept busy tenants' prefill small.
    pub(crate) visit_us: Option<u64>,
    /// Prefill tokens that the step leaves.
    pub(crate) backlog: u64,
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
            is_overdue: false,
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
            worker.note_step(work, predicted_us, planned_at);
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

    /// Adds at most `tokens_max` of a request's next tokens to the step.
    pub(crate) fn push_slice(&mut self, index: RequestIndex, tokens_max: u32, is_decode: bool) {
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
            last_sampled: false,
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
