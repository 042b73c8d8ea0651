//! Takes blocks from running requests: for decodes that lack one, and where a tenant outgrows its ceiling.
//!
//! Who loses its blocks is the request of the greatest [`VictimRank`] of the pool. Where that one is at a step of another
//! worker it yields as soon as the step is reported, and until then the decode waits, and nobody is admitted to the pool.
//! Blocks that a transfer reads or writes are never taken. Complexity: O(1) while more blocks are free than requests run and
//! no tenant has a ceiling; else O(running), again for each decode that lacks a block near its tenant's ceiling, and
//! O(running + tenants) for each victim.

use crate::fault::planted;
use crate::policy::{Standing, VictimRank, standing};
use crate::request::{Phase, Request, RequestIndex};
use crate::scheduler::StepFiller;
use crate::tenants::TenantSlot;
use crate::{Effect, Engine};

impl StepFiller<'_> {
    /// Makes room for the decodes of the step; `false` when a request lost its blocks for it, or will.
    pub(crate) fn make_room(&mut self) -> bool {
        let mut has_kept_all = !self.engine.tenants.has_ceilings() || self.keep_ceilings();
        if self.engine.pools[self.pool].num_free() as usize > self.worker().num_running() {
            return has_kept_all;
        }
        while self.missing(None) > self.engine.pools[self.pool].num_free() {
            has_kept_all = false;
            if !self.take_one(None) {
                break;
            }
        }
        has_kept_all
    }

    /// Takes blocks from the requests of tenants whose decodes would outgrow a ceiling; `false` when there were any.
    fn keep_ceilings(&mut self) -> bool {
        let mut has_kept_all = true;
        let mut at = 0;
        while at < self.worker().num_running() {
            let num_running = self.worker().num_running();
            let index = self.worker().running(at);
            let request = &self.engine.requests[index];
            let lacks = request.remaining() == 1 && request.blocks_missing(self.engine.config.block_size) > 0;
            has_kept_all &= !lacks || self.keep_ceiling(request.tenant);
            // Who was preempted is gone from the list.
            at = if self.worker().num_running() == num_running { at + 1 } else { 0 };
        }
        has_kept_all
    }

    /// Takes blocks from a tenant's requests until what its decodes lack is within its ceiling, or one is left.
    fn keep_ceiling(&mut self, tenant: TenantSlot) -> bool {
        let ceiling = self.engine.tenants[tenant].ceiling();
        let mut has_kept_all = true;
        loop {
            let live = self.engine.pools[self.pool].num_live_of(tenant);
            if live as usize + self.worker().num_running() <= ceiling as usize {
                return has_kept_all;
            }
            let missing = self.missing(Some(tenant));
            let fits = missing == 0 || live + missing <= ceiling || planted!(self.engine, IgnoreCeiling);
            if fits || self.engine.pools[self.pool].num_tables_of(tenant) == 1 {
                return has_kept_all;
            }
            has_kept_all = false;
            if !self.take_one(Some(tenant)) {
                return false;
            }
        }
    }

    /// Blocks that the decodes of this worker, of one tenant or of all, lack for the step.
    fn missing(&self, tenant: Option<TenantSlot>) -> u32 {
        let worker = &self.engine.workers[usize::from(self.id.0)];
        let decodes = worker.iter_running().map(|(_, _, index)| &self.engine.requests[index]);
        let own = decodes.filter(|request| request.remaining() == 1 && tenant.is_none_or(|own| own == request.tenant));
        own.map(|request| request.blocks_missing(self.engine.config.block_size)).sum()
    }

    /// Takes the blocks of the pool's victim, of one tenant or of all; `false` when that has to wait.
    fn take_one(&mut self, tenant: Option<TenantSlot>) -> bool {
        let Some(victim) = self.engine.victim(self.pool, tenant) else { return false };
        let request = &mut self.engine.requests[victim];
        if request.in_flight {
            request.yields = true;
            return false;
        }
        self.engine.preempt(victim, self.effects);
        true
    }

    /// Whether a decode that lacks a block can have one: `make_room` saw to it, unless it has to wait.
    pub(crate) fn may_grow(&self, index: RequestIndex) -> bool {
        let tenant = self.engine.requests[index].tenant;
        let pool = &self.engine.pools[self.pool];
        let is_within = pool.num_live_of(tenant) < self.engine.tenants[tenant].ceiling()
            || self.engine.pools[self.pool].num_tables_of(tenant) == 1
            || planted!(self.engine, IgnoreCeiling);
        pool.num_free() > 0 && is_within
    }
}

impl Engine {
    /// The requests that hold blocks of a pool and may lose them, unless one tenant's are asked for. The best of all is
    /// not among them: whatever happens, it goes on.
    fn victim(&self, pool: usize, tenant: Option<TenantSlot>) -> Option<RequestIndex> {
        let weights = self.pools[pool].total_weight(&self.tenants);
        let rank = |index: &RequestIndex| self.victim_rank(pool, weights, &self.requests[*index]);
        let own = |index: &RequestIndex| tenant.is_none_or(|own| own == self.requests[*index].tenant);
        let holders = || self.holders(pool).filter(own);
        let best = holders().min_by_key(rank)?;
        if planted!(self, PreemptBest) {
            return Some(best).filter(|best| !self.requests[*best].in_flight);
        }
        let takeable = |index: &RequestIndex| !matches!(self.requests[*index].phase, Phase::Moving { .. });
        holders().filter(|index| *index != best && takeable(index)).max_by_key(rank)
    }

    pub(crate) fn victim_rank(&self, pool: usize, weights: u64, request: &Request) -> VictimRank {
        let live = self.pools[pool].num_live_of(request.tenant);
        let share = self.pools[pool].share(&self.tenants, request.tenant, weights);
        let mut standing = standing(live, self.tenants[request.tenant].spec.floor_blocks, share);
        if planted!(self, IgnoreFloors) && standing == Standing::BelowFloor {
            standing = Standing::AboveShare;
        }
        (standing, request.class, request.arrival)
    }

    /// The requests that hold blocks of a pool, those that move to or from it too, but not those that are over.
    pub(crate) fn holders(&self, pool: usize) -> impl Iterator<Item = RequestIndex> + '_ {
        let on_pool = self.workers.iter().filter(move |worker| worker.pool() == pool);
        let running = on_pool.flat_map(|worker| worker.iter_running().map(|(_, _, index)| index));
        let running = running.filter(|index| !self.requests[*index].is_over);
        let handed = self.ready.values().chain(self.transfers.values()).copied();
        let handed = handed.filter(move |index| match self.requests[*index].phase {
            Phase::Ready(at) => self.workers[usize::from(at.0)].pool() == pool,
            Phase::Moving { from, to, .. } => {
                [from, to].iter().any(|worker| self.workers[usize::from(worker.0)].pool() == pool)
            }
            Phase::Waiting | Phase::Running(_) => false,
        });
        running.chain(handed)
    }

    /// Takes a request's blocks and lets it wait again. Its tokens stay known and are computed again.
    pub(crate) fn preempt(&mut self, index: RequestIndex, effects: &mut Vec<Effect>) {
        self.detach(index);
        self.requeue(index, effects);
    }

    /// Lets a request wait again that was detached.
    pub(crate) fn requeue(&mut self, index: RequestIndex, effects: &mut Vec<Effect>) {
        let request = &mut self.requests[index];
        request.phase = Phase::Waiting;
        request.num_reached = request.num_reached.max(request.num_computed);
        request.num_computed = 0;
        request.yields = false;
        request.preemptions += 1;
        if planted!(self, RepeatOutput) {
            request.tokens.truncate(request.prompt_len as usize);
            request.last_token = request.tokens[request.prompt_len as usize - 1];
            request.hashes.truncate((request.prompt_len / self.config.block_size) as usize);
        }
        // What it computed is cached, most likely: nobody's prefix is longer.
        request.cached_blocks = u32::MAX;
        request.lacking = None;
        self.waiting.insert(request, index, self.config.block_size);
        self.tenants[request.tenant].waiting += 1;
        self.totals.preemptions += 1;
        effects.push(Effect::Preempted { request: request.id });
    }
}
