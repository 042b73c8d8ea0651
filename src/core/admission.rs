//! Whether a request would wait too long, and how long it would wait: the prediction of its time to the first token, and,
//! against its deadline, of its end.
//!
//! Two things hold a request up, and the prediction is the longer of the two. Computing: the rest of the steps in flight,
//! the prompts that run, those that start before it (`queue.rs` knows whose), and its own, at the rate that the decodes and
//! their objectives leave, on all workers that take prompts. Room: where all places are taken, as many ends of running requests
//! as there are requests before it that find none, at the rate of the last ends. Complexity: O(workers + tenants that wait).

use crate::cost::StepWork;
use crate::fault::planted;
use crate::kv::hash::prompt_hash;
use crate::queue::Load;
use crate::request::Request;
use crate::tenants::TenantSlot;
use crate::worker::Worker;
use crate::{Backoff, ClassId, Engine, Micros, Refusal, Role, TenantId, policy};

/// A request that is not there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Probe {
    /// An unknown one counts as tenant 0.
    pub tenant: TenantId,
    /// One that does not exist counts as the last.
    pub class: ClassId,
    /// Prompt tokens that are cached, and those that are not.
    pub cached_tokens: u32,
    pub uncached_tokens: u32,
}

impl Engine {
    /// The predicted time to the first token of a request that is submitted now.
    #[must_use]
    pub fn predict_ttft(&self, probe: &Probe) -> Micros {
        let tenant = self.tenants.find(probe.tenant).unwrap_or(TenantSlot::FIRST);
        let class = ClassId(probe.class.0.min(self.config.classes.len() as u8 - 1));
        let own = Load::of(probe.cached_tokens, probe.cached_tokens.saturating_add(probe.uncached_tokens));
        self.predict(class, tenant, own)
    }

    fn predict(&self, class: ClassId, tenant: TenantSlot, own: Load) -> Micros {
        let before = self.waiting.load_before(class, tenant, own.tokens, &self.tenants);
        let room_us = self.room_us(tenant, before.requests);
        let mut all = before;
        all.add(own);
        all.tokens += self.backlog();
        let compute_us = self.step_rest_us().saturating_add(self.prefill_us(all));
        let own_us = self.prefill_us(own);
        Micros(compute_us.max(room_us.saturating_add(own_us)))
    }

    /// Prompt tokens of running requests that are not in a step yet.
    pub(crate) fn backlog(&self) -> u64 {
        self.workers.iter().map(|worker| worker.backlog).sum()
    }

    /// Until the first worker that takes prompts has finished its step.
    fn step_rest_us(&self) -> u64 {
        let rest =
            self.workers.iter().filter(|worker| worker.is_alive && worker.spec.role != Role::Decode).map(|worker| {
                let end = worker.planned_at.0.saturating_add(worker.predicted_us);
                let ahead_us = if worker.ahead.step.is_some() { worker.ahead.predicted_us } else { 0 };
                let end = end.saturating_add(ahead_us);
                if worker.step.is_some() { end.saturating_sub(self.now.0) } else { 0 }
            });
        rest.min().unwrap_or(0)
    }

    /// What prompts take, on all workers that take prompts and beside the decodes that run there, as they leave room.
    pub(crate) fn prefill_us(&self, load: Load) -> u64 {
        let takes = |role: Role| role != Role::Decode;
        let has_prefill = self.workers.iter().any(|worker| worker.is_alive && takes(worker.spec.role));
        let takers = self.workers.iter().filter(|worker| worker.is_alive && (!has_prefill || takes(worker.spec.role)));
        let itl = self.config.classes.iter().filter_map(|class| class.itl).min();
        let (mut lanes, mut step_tokens, mut steps_us) = (0, 0, 0);
        for worker in takers {
            let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..worker.work };
            let is_free = worker.num_running() == 0 || decodes.decode_sequences == 0;
            let budget = self.config.step_tokens_max;
            let within = match [itl.map(|itl| itl.0), worker.limit_us].into_iter().flatten().min() {
                Some(limit_us) if !is_free => self.estimator.prefill_within(&decodes, 0, budget, limit_us),
                _ => budget.saturating_sub(decodes.decode_sequences as u32),
            };
            lanes += 1;
            step_tokens += u64::from(within.max(self.config.chunk_tokens_min).min(budget));
            let decodes = if is_free { StepWork::default() } else { decodes };
            steps_us += self.estimator.predict_us(&decodes);
        }
        if lanes == 0 {
            return u64::MAX;
        }
        let steps = load.tokens.div_ceil(step_tokens);
        let work = StepWork { prefill_tokens: load.tokens, prefill_context: load.context, ..StepWork::default() };
        let fixed_us = self.estimator.predict_us(&StepWork::default());
        let prefill_us = self.estimator.predict_us(&work).saturating_sub(fixed_us) / lanes;
        prefill_us.saturating_add(steps.saturating_mul(steps_us / lanes))
    }

    /// Until there is a place for a request with this many before it. Where others hold all places, a tenant that has nothing
    /// here takes one (`claim.rs`).
    fn room_us(&self, tenant: TenantSlot, num_before: u64) -> u64 {
        let running_max = policy::running_max(&self.config);
        let alive = || self.workers.iter().filter(|worker| worker.is_alive);
        let is_full = alive().all(|worker| worker.blocked_at == Some(self.changes));
        let places: usize = alive().map(|worker| running_max.saturating_sub(worker.num_taken())).sum();
        if places == 0 && self.tenants[tenant].requests == 0 && alive().any(Worker::is_crowded) {
            return 0;
        }
        let places = if is_full && !self.waiting.is_empty() { 0 } else { places as u64 };
        (num_before + 1).saturating_sub(places).saturating_mul(self.finish_interval_us)
    }

    /// A request has made all its tokens.
    pub(crate) fn note_output(&mut self, tokens: u32) {
        let tokens = u64::from(tokens) * 256;
        self.output_tokens = match self.output_tokens {
            0 => tokens,
            average => average - average / 16 + tokens / 16,
        };
    }

    /// What a request's tokens after the first will take: as many as it may make, but not more than twice as many as others
    /// made lately, each a step as they are on average, and at least twice what the decodes take alone, so that there is room for
    /// the prompts of those who come later.
    fn decode_us(&self, max_new_tokens: u32) -> u64 {
        let usual = if self.output_tokens > 0 { self.output_tokens / 128 } else { u64::MAX };
        let tokens = u64::from(max_new_tokens).min(usual).saturating_sub(1);
        let step_us = |worker: &Worker| {
            let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..worker.work };
            worker.mean_us.max(2 * self.estimator.predict_us(&decodes))
        };
        let busy = self.workers.iter().filter(|worker| worker.is_alive && worker.num_running() > 0);
        tokens.saturating_mul(busy.map(step_us).max().unwrap_or(0))
    }

    /// Time between tokens with which a running request ends before its deadline, if it makes as many as it may, but not more
    /// than four times as many as others made lately.
    pub(crate) fn pace_us(&self, request: &Request) -> Option<u64> {
        let until = request.deadline?.0.saturating_sub(self.now.0);
        let made = u64::from(request.num_tokens() - request.prompt_len);
        let left = u64::from(request.max_new_tokens).saturating_sub(made);
        let usual = (self.output_tokens / 64).saturating_sub(made);
        Some(policy::pace_us(until, if self.output_tokens > 0 { left.min(usual.max(1)) } else { left }))
    }

    /// A running request has ended: its place is free.
    pub(crate) fn note_finish(&mut self) {
        if let Some(last) = self.last_finish.filter(|_| !self.waiting.is_empty()) {
            let interval = self.now.0 - last.0;
            self.finish_interval_us = match self.finish_interval_us {
                0 => interval,
                average => average - average / 16 + interval / 16,
            };
        }
        // Only the time between two ends that somebody waited for says how fast places become free.
        self.last_finish = (!self.waiting.is_empty()).then_some(self.now);
    }

    /// Refuses a request that would wait too long or crowd the queue.
    pub(crate) fn check_wait(&self, request: &Request) -> Result<(), Refusal> {
        if !self.quarantine.is_empty() {
            let hash = prompt_hash(request.audience.salt, &request.tokens);
            if let Some(until) = self.quarantine.until(hash, self.now) {
                return Err(Refusal::Quarantined(self.backoff(until.0 - self.now.0)));
            }
        }
        let start = request.cached_blocks * self.config.block_size;
        let own = Load::of(start, request.num_tokens());
        let queued = self.waiting.total_load();
        if self.waiting.len() >= self.config.waiting_max as usize && !planted!(self, QueueForever) {
            let one = queued.part(queued.tokens / queued.requests.max(1));
            return Err(Refusal::QueueFull(self.backoff(self.prefill_us(one).max(self.finish_interval_us))));
        }
        let excess = (queued.tokens + own.tokens).saturating_sub(self.config.queue_tokens_max);
        if excess > 0 && queued.requests > 0 && !planted!(self, QueueForever) {
            return Err(Refusal::QueueTokens(self.backoff(self.prefill_us(queued.part(excess)))));
        }
        let promised = self.config.classes[usize::from(request.class.0)].ttft;
        if request.deadline.is_none() && promised.is_none() {
            return Ok(());
        }
        let predicted = self.predict(request.class, request.tenant, own).0;
        let until_deadline = request.deadline.map_or(u64::MAX, |deadline| deadline.0.saturating_sub(self.now.0));
        // What nobody is ahead of is as fast as it will ever be.
        let is_behind = queued.requests > 0 || self.backlog() > 0;
        let promised = promised.filter(|_| is_behind).map_or(u64::MAX, |promised| promised.0);
        let beyond_promise = predicted.saturating_sub(promised);
        // A little early: who is stopped at its deadline has cost more than who is refused.
        let decode_us = self.decode_us(request.max_new_tokens);
        let end = predicted.saturating_add(decode_us);
        let end = end.saturating_add(end / 16);
        let excess = beyond_promise.max(end.saturating_sub(until_deadline));
        if excess == 0 && until_deadline > 0 {
            return Ok(());
        }
        // Where an empty queue would not be enough, steps must get shorter: the prompts before it are computed first, and half of
        // those that decode end.
        let is_crowded = self.prefill_us(own).saturating_add(decode_us) > until_deadline;
        let retry_us = if is_crowded { excess.max(predicted.saturating_add(decode_us / 2)) } else { excess };
        Err(Refusal::Deadline(self.backoff(retry_us)))
    }

    fn backoff(&self, retry_in_us: u64) -> Backoff {
        Backoff { retry_in: Micros(retry_in_us), queue_depth: self.waiting.len() as u32 }
    }
}
