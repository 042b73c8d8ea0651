//! Fills one step of one worker.
//!
//! There is no prefill mode and no decode mode: each request's computed tokens chase its known tokens. A step is filled in
//! three straight passes:
//!
//! 1. decodes: the requests that lack one token; each gets the block that it may lack, and where the pool has none left,
//!    the youngest request loses its own and waits again;
//! 2. prefill: those that lack more, in chunks of what is left of the budget;
//! 3. admit: the oldest waiting requests, unless this step preempted: the oldest then is a victim, which cannot fit.
//!
//! An admitted request gets blocks for its whole known sequence, so only decodes ever need another block, a prefill is
//! never stuck half way, and a victim, being younger than whom it makes room for, is never in the step already. Owner: the
//! engine, for the time of one `plan`. Complexity: O(running + blocks copied), plus one lookup for each admitted request
//! and for the first one that does not fit.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::kv::NodeId;
use crate::request::{Phase, RequestIndex, Requests, Waiting};
use crate::worker::{PlannedSlice, Worker};
use crate::{CoreConfig, Effect, SeqSlice, Stats, StepPlan, WorkerId, policy};

/// The parts of the engine that a step touches.
pub(crate) struct StepFiller<'a> {
    pub(crate) config: &'a CoreConfig,
    pub(crate) id: WorkerId,
    pub(crate) worker: &'a mut Worker,
    pub(crate) requests: &'a mut Requests,
    pub(crate) waiting: &'a mut Waiting,
    pub(crate) totals: &'a mut Stats,
    pub(crate) plan: &'a mut StepPlan,
    pub(crate) effects: &'a mut Vec<Effect>,
    /// Tokens that the step may still take.
    pub(crate) budget: u32,
    #[cfg(test)]
    pub(crate) fault: Option<crate::fault::Fault>,
}

impl StepFiller<'_> {
    /// Fills the step; it stays empty when the worker has nothing to run.
    pub(crate) fn fill(&mut self) {
        let num_running = self.worker.num_running();
        let has_prefill = self.fill_decodes();
        if has_prefill {
            self.fill_prefills();
        }
        if self.worker.num_running() == num_running {
            self.admit();
        }
    }

    fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.config.block_size)
    }

    /// Takes the blocks of the victim and lets it wait again. Its tokens stay known and are computed again.
    fn preempt(&mut self) {
        let num_running = self.worker.num_running();
        assert!(num_running > 1, "SCH-5: a request that was accepted does not fit the pool alone");
        let victim = if planted!(self, PreemptOldest) { 0 } else { policy::victim(num_running) };
        let index = self.worker.running(victim);
        let request = &mut self.requests[index];
        assert!(!request.in_flight, "{}: {:?} is preempted although it is in the step", InvariantId::Sch2, request.id);
        self.worker.stop(request, self.config.block_size);
        self.worker.pool.release(&mut request.table);
        request.phase = Phase::Waiting;
        request.num_computed = 0;
        request.preemptions += 1;
        if planted!(self, RepeatOutput) {
            request.tokens.truncate(request.prompt_len as usize);
            request.hashes.truncate((request.prompt_len / self.config.block_size) as usize);
        }
        self.waiting.insert(request.arrival, index);
        self.totals.preemptions += 1;
        self.effects.push(Effect::Preempted { request: request.id });
    }

    fn grow(&mut self, index: RequestIndex, missing: u32) {
        let table = &mut self.requests[index].table;
        for _ in 0..missing {
            table.push(self.worker.pool.allocate().expect("free blocks were counted before"));
        }
    }

    /// Plans the requests that lack one token, oldest first; tells whether others lack more. Where the pool is short of a
    /// block, the youngest running request loses its own, and so on up to the one that lacks it.
    fn fill_decodes(&mut self) -> bool {
        let mut has_prefill = false;
        let mut at = 0;
        while at < self.worker.num_running() {
            let index = self.worker.running(at);
            let request = &self.requests[index];
            if request.remaining() > 1 {
                has_prefill = true;
            } else if self.make_room(index, self.blocks_for(request.num_tokens()) - request.table.len() as u32) {
                self.push_slice(index);
            }
            at += 1;
        }
        has_prefill
    }

    /// Gives a running request the blocks that it lacks; `false` when it was the youngest left, and had to go itself.
    fn make_room(&mut self, index: RequestIndex, missing: u32) -> bool {
        while self.worker.pool.num_free() < missing {
            self.preempt();
            if self.requests[index].phase == Phase::Waiting {
                return false;
            }
        }
        self.grow(index, missing);
        true
    }

    fn fill_prefills(&mut self) {
        for at in 0..self.worker.num_running() {
            let index = self.worker.running(at);
            if self.budget > 0 && self.requests[index].remaining() > 1 {
                self.push_slice(index);
            }
        }
    }

    /// Adds a request's next tokens to the step.
    fn push_slice(&mut self, index: RequestIndex) {
        let block_size = self.config.block_size;
        let request = &mut self.requests[index];
        let mut num_tokens = policy::chunk(request.remaining(), self.budget);
        if planted!(self, EmptySlice) && self.plan.slices.len() == 2 {
            num_tokens = 0;
        }
        if planted!(self, ExceedBudget) && request.remaining() > num_tokens {
            num_tokens += 1;
        }
        let (start, end) = (request.num_computed, request.num_computed + num_tokens);
        let covered = &request.table[..end.div_ceil(block_size) as usize];
        let plan = &mut *self.plan;
        let (first_token, first_block) = (plan.tokens.len() as u32, plan.block_tables.len() as u32);
        match request.tokens[start as usize..end as usize] {
            // A decode: not worth a call to copy four bytes.
            [token] => plan.tokens.push(token),
            ref tokens => plan.tokens.extend_from_slice(tokens),
        }
        plan.block_tables.extend_from_slice(covered);
        if planted!(self, RotateTable) {
            plan.block_tables[first_block as usize..].rotate_left(1);
        }
        if planted!(self, ShortTable) && covered.len() > 1 {
            plan.block_tables.pop();
        }
        let sample = end == request.num_tokens();
        plan.slices.push(SeqSlice {
            request: request.id,
            start: start + u32::from(planted!(self, SkipInputToken) && num_tokens == 3),
            tokens: first_token..plan.tokens.len() as u32,
            block_table: first_block..plan.block_tables.len() as u32,
            sample,
        });
        request.in_flight = true;
        self.worker.planned.push(PlannedSlice { index, num_tokens, sample });
        self.budget = self.budget.saturating_sub(num_tokens);
    }

    fn admit(&mut self) {
        while self.budget > 0 && self.worker.num_running() < policy::running_max(self.config) {
            let Some(index) = self.next_waiting() else { break };
            let Some((node, missing)) = self.find_room(index) else { break };
            self.start(index, node);
            self.grow(index, missing);
            self.push_slice(index);
        }
    }

    fn next_waiting(&self) -> Option<RequestIndex> {
        #[cfg(test)]
        match self.fault {
            Some(crate::fault::Fault::NeverAdmit) => return None,
            Some(crate::fault::Fault::AdmitYoungest) => return self.waiting.youngest(),
            _ => {}
        }
        self.waiting.oldest()
    }

    /// Fills the request's table with its cached prefix and gives that one's node and the number of blocks that lack;
    /// `None`, with an empty table, when the pool does not have them.
    fn find_room(&mut self, index: RequestIndex) -> Option<(NodeId, u32)> {
        let headroom = policy::admission_headroom(self.worker.num_running());
        let pool = &mut self.worker.pool;
        if pool.num_free() == 0 {
            // The last token is never cached, so at least one block will be needed: not worth a lookup.
            return None;
        }
        let request = &mut self.requests[index];
        let known = request.num_tokens().div_ceil(self.config.block_size);
        request.table.reserve(known as usize);
        let node = pool.lookup(request.salt, &request.tokens, &request.hashes, &mut request.table);
        let missing = known - request.table.len() as u32;
        let needed = missing + pool.count_free(&request.table) + headroom;
        if pool.num_free() < needed {
            request.table.clear();
            return None;
        }
        Some((node, missing))
    }

    /// Moves a request, whose table holds its cached prefix, from the queue to the running ones.
    fn start(&mut self, index: RequestIndex, node: NodeId) {
        let request = &mut self.requests[index];
        for block in &request.table {
            self.worker.pool.acquire(*block);
        }
        request.reserve(self.config);
        request.node = node;
        request.num_published = request.table.len() as u32;
        request.num_computed = request.num_published * self.config.block_size;
        request.phase = Phase::Running(self.id);
        self.waiting.remove(request.arrival);
        self.worker.start(index, request, self.config.block_size);
        let cached_tokens = request.num_computed;
        if request.cached_tokens.is_none() {
            request.cached_tokens = Some(cached_tokens);
            if self.config.prefix_caching {
                self.totals.prefix_queries += u64::from(request.num_tokens());
                self.totals.prefix_hits += u64::from(cached_tokens);
            }
        }
        self.effects.push(Effect::Scheduled { request: request.id, cached_tokens });
    }
}
