//! Plans a decode step while the one before it is in flight, so that a device need not wait for the host between the two.
//!
//! ```text
//!   host     plan N   plan N+1 ahead   |      N is reported: N+1 is the step in flight   plan N+2 ahead
//!   device            [ step N ................. ][ step N+1 ................................. ][ step N+2
//! ```
//!
//! The step ahead takes, for each request that does not surely end with step N, the token that N samples for it, whose id is
//! not known yet: [`LAST_SAMPLED`] stands in its place. There is one only where the host would have decided nothing else: N
//! samples a token for each of its requests, which decode or are at the end of their prompts, they are all that runs on the
//! worker, nobody could start, nobody must lose a block, and nobody is about to end.
//! It is never more than one.
//!
//! A request that ends with N although it is in N+1 ends for its client at once. It is *over*: its id is free, its blocks and
//! its place are not until N+1 is reported, and what N+1 sampled for it is dropped. Where N fails, N+1 has run on rubbish: N
//! counts as failed when N+1 is reported, whose results are dropped.
//!
//! Owner: the engine. O(running) a call; where others wait also O(tenants) if all places are taken, else a lookup.

use crate::cost::StepWork;
use crate::fault::planted;
use crate::request::{Phase, Request, RequestIndex};
use crate::scheduler::StepFiller;
use crate::start::Start;
use crate::worker::{PlannedSlice, Worker};
use crate::{
    DeviceShare, Effect, Engine, LAST_SAMPLED, Micros, RequestId, Sampled, SeqSlice, StepId, StepPlan, WorkerId, policy,
};

/// The step ahead of the one in flight.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ahead {
    /// `None` when there is none, and once it is the step in flight.
    pub(crate) step: Option<StepId>,
    pub(crate) share: DeviceShare,
    /// Its slices, of requests that are in the step before it, too, in the same order.
    pub(crate) planned: Vec<PlannedSlice>,
    pub(crate) work: StepWork,
    pub(crate) predicted_us: u64,
}

impl Worker {
    /// The step in flight was reported: the one ahead of it, if any, is in flight now.
    pub(crate) fn advance(&mut self, now: Micros) {
        if let Some(step) = self.ahead.step.take() {
            (self.step, self.share) = (Some(step), self.ahead.share);
            // What was planned before is done, and its vector empty.
            std::mem::swap(&mut self.planned, &mut self.ahead.planned);
            self.note_step(self.ahead.work, self.ahead.predicted_us, now);
        }
    }

    /// Nothing is planned any more, nor in flight.
    pub(crate) fn drop_steps(&mut self) {
        self.step = None;
        self.has_failed = false;
        self.planned.clear();
        self.ahead.step = None;
        self.ahead.planned.clear();
        self.suspects.clear();
    }
}

impl Engine {
    /// Whether steps may be planned ahead at all.
    #[must_use]
    pub fn plans_ahead(&self) -> bool {
        self.config.plan_ahead
    }

    /// Fills `plan` with the step that follows the one in flight on this worker; `false`, with an empty plan and nothing
    /// decided, where that is not foreseeable. The worker takes steps in the order in which they were planned, and reports them
    /// in this order. Admits and preempts nobody, so it has no effects.
    ///
    /// # Panics
    /// When there is no such worker.
    pub fn plan_ahead(&mut self, worker: WorkerId, plan: &mut StepPlan) -> bool {
        plan.clear();
        let Some(missing) = self.foresee(worker) else { return false };
        if self.could_start(worker, plan) && !planted!(self, AheadOfWaiting) {
            return false;
        }
        self.fill_ahead(worker, missing, plan);
        (plan.worker, plan.share) = (worker, self.share(worker));
        plan.step = self.new_step();
        let ahead = &mut self.workers[usize::from(worker.0)].ahead;
        (ahead.step, ahead.share) = (Some(plan.step), plan.share);
        true
    }

    /// Blocks that the next step of the requests in flight lacks; nothing where they are not all that it would have, or lack
    /// more than is free.
    fn foresee(&self, id: WorkerId) -> Option<u32> {
        let worker = &self.workers[usize::from(id.0)];
        let is_at_step = self.config.plan_ahead && worker.step.is_some() && !worker.has_failed;
        let is_first = worker.ahead.step.is_none() || planted!(self, AheadTwice);
        let is_all = worker.num_running() == worker.planned.len() && worker.suspects.is_empty();
        if !is_at_step || !is_first || !is_all || self.duty(id).hands_off {
            return None;
        }
        let pool = &self.pools[worker.pool()];
        let (mut num_slices, mut missing) = (0, 0);
        for slice in &worker.planned {
            let request = &self.requests[slice.index];
            if request.is_over {
                continue;
            }
            let needs_host = request.needs_tokens && !planted!(self, AheadOfTokens);
            let is_leaving = request.ending.is_some() || request.yields || request.is_suspect;
            let has_rest = !slice.sample && !planted!(self, AheadOfPrompt);
            if has_rest || needs_host || is_leaving {
                return None;
            }
            if !request.goes_on() {
                continue;
            }
            num_slices += 1;
            let lacks = request.blocks_ahead(self.config.block_size);
            missing += lacks;
            // As if all of them were its tenant's.
            let is_within = pool.num_live_of(request.tenant) + missing <= self.tenants[request.tenant].ceiling();
            if lacks > 0 && !is_within {
                return None;
            }
        }
        let fits = missing == 0 || (missing <= pool.num_free() && !self.is_short(worker.pool()));
        (num_slices > 0 && fits).then_some(missing)
    }

    /// Whether a waiting request might start on the worker if it were idle. Looks once at whose turn it is, until something
    /// changes, as a plan does. `plan` stays empty.
    fn could_start(&mut self, id: WorkerId, plan: &mut StepPlan) -> bool {
        let worker = &self.workers[usize::from(id.0)];
        if self.waiting.is_empty() || self.is_short_by_others(id) || worker.blocked_at == Some(self.changes) {
            return false;
        }
        if worker.num_taken() < policy::running_max(&self.config) {
            return self.tenants.has_floors() || self.has_room(id, plan);
        }
        // In the place of others.
        if self.duty(id).admits_max < u32::MAX || !worker.is_crowded() {
            return false;
        }
        let candidate = self.candidate(id);
        candidate.is_some_and(|candidate| self.workers[usize::from(id.0)].places_of(candidate.tenant) == 0)
    }

    /// Whether there is room for the request whose turn it is, where there is a place.
    fn has_room(&mut self, id: WorkerId, plan: &mut StepPlan) -> bool {
        let mut none = Vec::new();
        let mut filler = StepFiller::new(self, id, plan, &mut none);
        let Some(candidate) = filler.candidate() else { return false };
        match filler.find_room(candidate.index) {
            Ok(_) => {
                self.requests[candidate.index].table.clear();
                true
            }
            Err(Start::Blocked) => {
                filler.block();
                false
            }
            // Then it is another's turn.
            Err(_) => true,
        }
    }

    fn fill_ahead(&mut self, id: WorkerId, missing: u32, plan: &mut StepPlan) {
        let is_late = planted!(self, AheadAtLastToken);
        let Engine { requests, pools, workers, tenants, config, .. } = self;
        let worker = &mut workers[usize::from(id.0)];
        let pool = &mut pools[worker.pool()];
        // All of them may fill a block at once, and not before a long time.
        plan.blocks.reserve(worker.planned.len());
        if missing > 0 {
            pool.choose_anew();
        }
        let ahead = &mut worker.ahead;
        ahead.work = StepWork::default();
        for slice in &worker.planned {
            let request = &mut requests[slice.index];
            if request.is_over || !request.goes_on() {
                continue;
            }
            for _ in 0..request.blocks_ahead(config.block_size) {
                let block = pool.allocate(request.tenant, tenants);
                request.table.push(block.expect("free blocks were counted before"));
            }
            let (at, first_block, table_len) = (plan.tokens.len() as u32, plan.blocks.len() as u32, request.num_told);
            plan.tokens.push(LAST_SAMPLED);
            plan.blocks.extend_from_slice(&request.table[table_len as usize..]);
            request.num_told = request.table.len() as u32;
            plan.slices.push(SeqSlice {
                request: request.id,
                start: request.num_tokens() - u32::from(is_late),
                tokens: at..at + 1,
                table_len,
                blocks: first_block..plan.blocks.len() as u32,
                sample: true,
                last_sampled: true,
            });
            request.is_ahead = true;
            ahead.work.add_decode(request.num_tokens() + 1);
            ahead.planned.push(PlannedSlice { index: slice.index, num_tokens: 1, sample: true });
        }
        ahead.predicted_us = self.estimator.predict_us(&ahead.work);
    }

    /// A request that is over is in no step any more.
    pub(crate) fn land_over(&mut self, index: RequestIndex, has_failed: bool) {
        let request = &mut self.requests[index];
        request.in_flight = false;
        if has_failed && let Phase::Running(worker) = request.phase {
            // Its K/V may be what failed: nobody may find them again.
            let pool = &mut self.pools[self.workers[usize::from(worker.0)].pool()];
            request.table.iter().for_each(|block| pool.forget(*block));
        }
        self.detach(index);
        self.note_finish();
        self.requests.remove(index);
    }

    /// The step behind a failed one is reported: what it made is dropped, and the failed one is dealt with.
    pub(crate) fn drop_ahead(&mut self, worker: WorkerId, results: &[(RequestId, Sampled)], effects: &mut Vec<Effect>) {
        let state = &mut self.workers[usize::from(worker.0)];
        state.has_failed = false;
        let mut dropped = std::mem::take(&mut state.ahead.planned);
        for (at, slice) in dropped.drain(..).enumerate() {
            let request = &mut self.requests[slice.index];
            request.is_ahead = false;
            if planted!(self, KeepAheadOfFailed)
                && request.ending.is_none()
                && let Some((_, Sampled::Token(token))) = results.get(at)
            {
                effects.push(Effect::Token { request: request.id, index: request.num_new(), token: *token });
                request.num_computed += 1;
                request.push(*token);
                request.hash_blocks(&self.config);
            }
        }
        self.workers[usize::from(worker.0)].ahead.planned = dropped;
    }
}

impl Request {
    /// Whether a request that decodes may have a step after the one in flight.
    fn goes_on(&self) -> bool {
        self.num_new() + 1 < self.max_new_tokens
    }

    /// Blocks that the table lacks for one more token than are known.
    fn blocks_ahead(&self, block_size: u32) -> u32 {
        let num_blocks = self.table.len() as u32;
        let covered = u64::from(num_blocks) * u64::from(block_size);
        let needed = self.num_tokens() + 1;
        if covered >= u64::from(needed) { 0 } else { needed.div_ceil(block_size) - num_blocks }
    }
}
