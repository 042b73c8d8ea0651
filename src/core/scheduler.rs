//! Fills one step of one worker.
//!
//! There is no prefill mode and no decode mode: each request's computed tokens chase its known tokens. A step is filled in
//! straight passes:
//!
//! 1. room: where the pool may be short of blocks for the decodes, `preempt.rs` makes some;
//! 2. decodes: the requests that lack one token;
//! 3. prefill: those that lack more, and waiting ones, in the order that `policy.rs` states, in chunks of what is left of
//!    the budget and of the time that the decodes' objectives leave. Nobody is admitted where room had to be made.
//!
//! After a step that failed, its parts are repeated alone and nothing else runs (`suspects.rs`).
//!
//! An admitted request gets blocks for its whole known sequence, so only decodes ever need another block and a prefill is
//! never stuck half way. Owner: the engine, for the time of one `plan`. Complexity: O(running + blocks copied), one
//! lookup for each admitted request, and one for the first that does not fit, once until something changes.

use crate::cost::StepWork;
use crate::fault::planted;
use crate::kv::NodeId;
use crate::queue::Candidate;
use crate::request::{Phase, RequestIndex};
use crate::worker::{PlannedSlice, Worker};
use crate::{Effect, Engine, SeqSlice, StepPlan, WorkerId, policy};

pub(crate) struct StepFiller<'a> {
    pub(crate) engine: &'a mut Engine,
    pub(crate) id: WorkerId,
    pub(crate) pool: usize,
    plan: &'a mut StepPlan,
    pub(crate) effects: &'a mut Vec<Effect>,
    /// Tokens that the step may still take.
    budget: u32,
    work: StepWork,
    /// The strictest objective for the inter-token latency of the step's decodes.
    itl_us: Option<u64>,
    /// The oldest prefill and the tokens of the budget that are kept for it.
    reserve: Option<(RequestIndex, u32)>,
    /// Prefill tokens that the step leaves.
    backlog: u64,
}

/// What became of the attempt to start a waiting request.
enum Start {
    Started,
    /// Its tenant has no room, others may.
    AtCeiling,
    /// Nobody starts before it does.
    Blocked,
    /// The step takes none of it.
    Full,
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
        let (work, itl_us, reserve) = (StepWork::default(), None, None);
        StepFiller { engine, id, pool, plan, effects, budget, work, itl_us, reserve, backlog: 0 }
    }

    pub(crate) fn worker(&mut self) -> &mut Worker {
        &mut self.engine.workers[usize::from(self.id.0)]
    }

    /// Fills the step; it stays empty when the worker has nothing to run.
    pub(crate) fn fill(&mut self) {
        if let Some(group) = self.worker().suspects.pop() {
            self.repeat(&group);
        } else {
            let has_kept_all = self.make_room();
            self.fill_decodes();
            self.fill_prefills(has_kept_all);
        }
        let predicted_us = self.engine.estimator.predict_us(&self.work);
        let (work, planned_at, backlog) = (self.work, self.engine.now, self.backlog);
        let worker = self.worker();
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

    fn grow(&mut self, index: RequestIndex, missing: u32) {
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
        for at in 0..self.worker().num_running() {
            let index = self.worker().running(at);
            let request = &self.engine.requests[index];
            if request.remaining() > 1 {
                prefills.push(index);
                continue;
            }
            let missing = request.blocks_missing(self.engine.config.block_size);
            if missing > 0 && !self.may_grow(index) {
                is_stalled = true;
                continue;
            }
            let objective = self.engine.config.classes[usize::from(request.class.0)].itl;
            if let Some(itl) = objective {
                self.itl_us = Some(self.itl_us.map_or(itl.0, |strictest| strictest.min(itl.0)));
            }
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
        let mut may_admit = has_kept_all && self.may_admit();
        if !may_admit && self.engine.prefills.is_empty() {
            return;
        }
        let mut prefills = std::mem::take(&mut self.engine.prefills);
        let Engine { requests, waiting, config, .. } = &*self.engine;
        let rank = |index: &RequestIndex| {
            let request = &requests[*index];
            (request.class, waiting.counter(request.class, request.tenant), request.arrival)
        };
        prefills.sort_unstable_by_key(rank);
        let oldest = prefills.iter().copied().min_by_key(|index| requests[*index].arrival);
        self.reserve = oldest
            .map(|index| (index, policy::chunk(requests[index].remaining(), config.chunk_tokens_min.min(self.budget))));
        let mut next = 0;
        while self.budget_left() > 0 {
            let head = prefills.get(next).copied();
            let candidate = if may_admit { self.candidate() } else { None };
            match (candidate, head) {
                (Some(candidate), head) if head.is_none_or(|head| self.goes_before(&candidate, head)) => {
                    match self.admit(&candidate) {
                        Start::Started => may_admit = self.may_admit(),
                        Start::AtCeiling => {}
                        Start::Blocked => may_admit = false,
                        Start::Full => break,
                    }
                }
                (_, Some(head)) => {
                    next += 1;
                    if !self.push_prefill(head) {
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
        let left = prefills.iter().filter(|index| !self.engine.requests[**index].in_flight);
        self.backlog += left.map(|index| u64::from(self.engine.requests[*index].remaining())).sum::<u64>();
        prefills.clear();
        self.engine.prefills = prefills;
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

    fn goes_before(&self, candidate: &Candidate, running: RequestIndex) -> bool {
        let request = &self.engine.requests[running];
        let counter = self.engine.waiting.counter(request.class, request.tenant);
        (candidate.class, candidate.counter) < (request.class, counter)
    }

    /// Plans the next chunk of a prefill; `false` when the objectives leave none of it.
    fn push_prefill(&mut self, index: RequestIndex) -> bool {
        let kept = match self.reserve {
            Some((oldest, tokens)) if oldest == index => {
                self.reserve = None;
                tokens
            }
            _ => 0,
        };
        let request = &self.engine.requests[index];
        let chunk = self.chunk(request.num_computed, request.remaining()).max(kept);
        if chunk > 0 {
            self.push_slice(index, chunk, false);
        }
        chunk > 0
    }

    /// How many of `remaining` tokens from position `start` the step takes.
    fn chunk(&self, start: u32, remaining: u32) -> u32 {
        let chunk = policy::chunk(remaining, self.budget_left());
        let Some(itl_us) = self.itl_us else { return chunk };
        let work = self.work_with_reserve();
        let within = self.engine.estimator.prefill_within(&work, start, chunk, itl_us);
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
        // A decode has grown its table to just what it needs.
        let num_blocks = if is_decode { request.table.len() } else { end.div_ceil(block_size) as usize };
        let covered = &request.table[..num_blocks];
        let plan = &mut *self.plan;
        let (first_token, first_block) = (plan.tokens.len() as u32, plan.block_tables.len() as u32);
        match request.tokens[start as usize..end as usize] {
            // A decode: not worth a call to copy four bytes.
            [token] => plan.tokens.push(token),
            ref tokens => plan.tokens.extend_from_slice(tokens),
        }
        plan.block_tables.extend_from_slice(covered);
        if planted!(engine, RotateTable) {
            plan.block_tables[first_block as usize..].rotate_left(1);
        }
        if planted!(engine, ShortTable) && covered.len() > 1 {
            plan.block_tables.pop();
        }
        let sample = end == request.num_tokens();
        plan.slices.push(SeqSlice {
            request: request.id,
            start: start + u32::from(planted!(engine, SkipInputToken) && num_tokens == 3),
            tokens: first_token..plan.tokens.len() as u32,
            block_table: first_block..plan.block_tables.len() as u32,
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

    /// Whether a waiting request could start, as far as that is known without looking at one.
    fn may_admit(&mut self) -> bool {
        let (running_max, pool, changes) = (policy::running_max(&self.engine.config), self.pool, self.engine.changes);
        let is_open =
            !self.engine.waiting.is_empty() && !self.engine.is_short(pool) && !planted!(self.engine, NeverAdmit);
        let worker = self.worker();
        is_open && worker.num_taken() < running_max && worker.blocked_at != Some(changes)
    }

    /// Whose turn it is, tenants at their ceiling passed over.
    fn candidate(&mut self) -> Option<Candidate> {
        let ignores_ceilings = planted!(self.engine, IgnoreCeiling);
        let Engine { requests, waiting, tenants, pools, workers, .. } = &mut *self.engine;
        let worker = &workers[usize::from(self.id.0)];
        let (pool, pool_id) = (&pools[self.pool], worker.spec.pool);
        let candidate = waiting.next(|tenant, index| {
            let live = pool.num_live_of(tenant);
            let lacking = requests[index].lacking.filter(|(pool, _)| *pool == pool_id).map_or(1, |(_, blocks)| blocks);
            ignores_ceilings
                || pool.num_tables_of(tenant) == 0
                || u64::from(live) + u64::from(lacking) <= u64::from(tenants[tenant].ceiling())
        });
        if candidate.is_none() {
            self.block();
        }
        candidate
    }

    /// Nobody can start here until something changes.
    fn block(&mut self) {
        let changes = self.engine.changes;
        self.worker().blocked_at = Some(changes);
    }

    /// Starts a waiting request and plans its first chunk, if the pool has room.
    fn admit(&mut self, candidate: &Candidate) -> Start {
        let index = candidate.index;
        match self.find_room(index) {
            Ok((node, missing)) => {
                self.start(index, node);
                self.grow(index, missing);
                self.push_prefill(index);
                Start::Started
            }
            Err(Start::Blocked) => {
                self.block();
                Start::Blocked
            }
            Err(start) => start,
        }
    }

    /// Fills the request's table with its cached prefix and gives that one's node and the number of blocks that lack; an
    /// empty table, when it cannot start here.
    fn find_room(&mut self, index: RequestIndex) -> Result<(NodeId, u32), Start> {
        let admits_max = self.engine.duty(self.id).admits_max;
        let ignores_ceilings = planted!(self.engine, IgnoreCeiling);
        let Engine { requests, tenants, pools, workers, config, .. } = &mut *self.engine;
        let pool_id = workers[usize::from(self.id.0)].spec.pool;
        let on_pool = workers.iter().filter(|worker| worker.spec.pool == pool_id);
        let headroom = policy::admission_headroom(on_pool.map(Worker::num_taken).sum());
        let pool = &mut pools[self.pool];
        let request = &mut requests[index];
        let lacking = request.lacking.filter(|(pool, _)| *pool == pool_id).map_or(1, |(_, blocks)| blocks);
        if pool.num_free() < lacking.saturating_add(headroom) {
            // As when it was last looked up; and the last token is never cached, so at least one block is needed.
            return Err(Start::Blocked);
        }
        let known = request.num_tokens().div_ceil(config.block_size);
        request.table.reserve(known as usize);
        let node = pool.lookup(request.salt, &request.tokens, &request.hashes, &mut request.table);
        let missing = known - request.table.len() as u32;
        let taken = missing + pool.count_free(&request.table);
        let live = pool.num_live_of(request.tenant);
        let is_alone = pool.num_tables_of(request.tenant) == 0;
        let is_above = !is_alone && live + taken > tenants[request.tenant].ceiling() && !ignores_ceilings;
        let uncached = request.num_tokens() - request.table.len() as u32 * config.block_size;
        let outcome = if uncached > admits_max {
            Err(Start::Blocked)
        } else if is_above {
            request.lacking = Some((pool_id, taken));
            Err(Start::AtCeiling)
        } else if pool.num_free() < taken + headroom {
            request.lacking = Some((pool_id, taken));
            Err(Start::Blocked)
        } else {
            Ok((node, missing))
        };
        let cached = request.table.len() as u32 * config.block_size;
        let takes_none = self.chunk(cached, uncached) == 0;
        let outcome = if outcome.is_ok() && takes_none { Err(Start::Full) } else { outcome };
        if outcome.is_err() {
            self.engine.requests[index].table.clear();
        }
        outcome
    }

    /// Moves a request, whose table holds its cached prefix, from the queue to the running ones.
    fn start(&mut self, index: RequestIndex, node: NodeId) {
        let id = self.id;
        let Engine { requests, waiting, tenants, pools, workers, config, totals, .. } = &mut *self.engine;
        let request = &mut requests[index];
        request.found = pools[self.pool].found(&request.table);
        pools[self.pool].open_table(request.tenant);
        request.table.iter().for_each(|block| pools[self.pool].acquire(*block, request.tenant));
        request.reserve(config);
        request.node = node;
        request.num_published = request.table.len() as u32;
        request.num_computed = request.num_published * config.block_size;
        waiting.start(request);
        request.phase = Phase::Running(id);
        workers[usize::from(id.0)].start(index, request, config.block_size);
        let tenant = &mut tenants[request.tenant];
        tenant.waiting -= 1;
        let cached_tokens = request.num_computed;
        if request.cached_tokens.is_none() {
            request.cached_tokens = Some(cached_tokens);
            let charged = u64::from(request.num_tokens() - cached_tokens);
            waiting.charge(request.class, request.tenant, tenant.weight(), charged);
            tenant.charged += charged;
            if config.prefix_caching {
                totals.prefix_queries += u64::from(request.num_tokens());
                totals.prefix_hits += u64::from(cached_tokens);
            }
        }
        self.effects.push(Effect::Scheduled { request: request.id, worker: id, cached_tokens });
    }
}
