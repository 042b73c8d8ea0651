//! Starts waiting requests on a worker: whose turn it is, whether the pool has room, and what a start moves.
//!
//! Owner: the engine, for the time of one `plan`. Complexity: one lookup for each attempt, and none where nothing has changed
//! since the last one failed.

use crate::fault::planted;
use crate::kv::NodeId;
use crate::queue::Candidate;
use crate::request::{Phase, RequestIndex};
use crate::scheduler::StepFiller;
use crate::worker::Worker;
use crate::{Effect, Engine, WorkerId, policy};

/// What became of the attempt to start a waiting request.
pub(crate) enum Start {
    Started,
    /// Its tenant has no room, others may.
    AtCeiling,
    /// Nobody starts before it does.
    Blocked,
    /// The step takes none of it.
    Full,
}

impl StepFiller<'_> {
    pub(crate) fn has_place(&mut self) -> bool {
        let running_max = policy::running_max(&self.engine.config);
        self.worker().num_taken() < running_max
    }

    /// Whether a waiting request could start where there is a place, as far as that is known without looking at one.
    pub(crate) fn may_start(&mut self) -> bool {
        let (pool, changes) = (self.pool, self.engine.changes);
        let is_open =
            !self.engine.waiting.is_empty() && !self.engine.is_short(pool) && !planted!(self.engine, NeverAdmit);
        is_open && self.worker().blocked_at != Some(changes)
    }

    /// Whose turn it is, tenants at their ceiling passed over.
    pub(crate) fn candidate(&mut self) -> Option<Candidate> {
        let candidate = self.engine.candidate(self.id);
        if candidate.is_none() {
            self.block();
        }
        candidate
    }

    /// Nobody can start here until something changes.
    pub(crate) fn block(&mut self) {
        let changes = self.engine.changes;
        self.worker().blocked_at = Some(changes);
    }

    /// Starts a waiting request and plans its first chunk, if the pool has room.
    pub(crate) fn admit(&mut self, candidate: &Candidate) -> Start {
        let index = candidate.index;
        match self.find_room(index) {
            Ok((node, missing)) => {
                let request = &mut self.engine.requests[index];
                let cached = request.table.len() as u32 * self.engine.config.block_size;
                let uncached = request.num_tokens() - cached;
                let chunk = self.chunk(candidate.tenant, cached, uncached);
                if chunk == 0 {
                    self.engine.requests[index].table.clear();
                    self.close_to(candidate.tenant);
                    return Start::Full;
                }
                self.start(index, node);
                self.grow(index, missing);
                self.engine.tenants[candidate.tenant].demand.running += u64::from(uncached);
                self.push_chunk(index, chunk);
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
    pub(crate) fn find_room(&mut self, index: RequestIndex) -> Result<(NodeId, u32), Start> {
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
        let node = pool.lookup(request.audience, &request.tokens, &request.hashes, &mut request.table);
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
        if outcome.is_err() {
            request.table.clear();
        }
        outcome
    }

    /// Moves a request, whose table holds its cached prefix, from the queue to the running ones.
    pub(crate) fn start(&mut self, index: RequestIndex, node: NodeId) {
        let id = self.id;
        let keeps_table = planted!(self.engine, KeepTable);
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
        let told = request.num_told;
        workers[usize::from(id.0)].start(index, request);
        if keeps_table {
            request.num_told = told;
        }
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

impl Engine {
    /// Whose turn it is on a worker, tenants at their ceiling passed over.
    pub(crate) fn candidate(&mut self, id: WorkerId) -> Option<Candidate> {
        let ignores_ceilings = planted!(self, IgnoreCeiling);
        let Engine { requests, waiting, tenants, pools, workers, .. } = self;
        let worker = &workers[usize::from(id.0)];
        let (pool, pool_id) = (&pools[worker.pool()], worker.spec.pool);
        waiting.next(|tenant, index| {
            let live = pool.num_live_of(tenant);
            let lacking = requests[index].lacking.filter(|(pool, _)| *pool == pool_id).map_or(1, |(_, blocks)| blocks);
            ignores_ceilings
                || pool.num_tables_of(tenant) == 0
                || u64::from(live) + u64::from(lacking) <= u64::from(tenants[tenant].ceiling())
        })
    }
}
