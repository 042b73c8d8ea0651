//! What the engine does with a `Submit`, with a `Cancel`, and with a deadline that passes.
//!
//! Nothing that a client controls can panic here: a submission is checked once, on arrival, in arithmetic that cannot
//! overflow, and what is queued fits the limits and, alone, every pool. Whether it would wait too long is `admission.rs`.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::kv::{Audience, NodeId};
use crate::request::{Arrival, Arriving, Phase, Request, RequestIndex, stop_bit};
use crate::tenants::TenantSlot;
use crate::{CancelReason, ClassId, Effect, Engine, FinishReason, Refusal, RequestId, Submission, Usage};

impl Engine {
    /// Queues a request, or refuses it.
    pub(crate) fn submit(&mut self, submission: Submission, effects: &mut Vec<Effect>) {
        let request = submission.request;
        let is_new = self.requests.find(request).is_none();
        assert!(is_new, "{}: {request:?} is submitted twice", InvariantId::Sch2);
        let prompt_tokens = u32::try_from(submission.prompt.len()).unwrap_or(u32::MAX);
        let outcome = self.check_limits(&submission).and_then(|tenant| {
            let request = self.admitted(submission, tenant);
            self.check_wait(&request).map(|()| request)
        });
        match outcome {
            Ok(request) => self.enqueue(request),
            Err(refusal) => {
                let usage = Usage { prompt_tokens, uncomputed_tokens: prompt_tokens, ..Usage::default() };
                effects.push(Effect::Finish { request, reason: FinishReason::Refused(refusal), usage });
            }
        }
    }

    fn enqueue(&mut self, request: Request) {
        let (tenant, deadline) = (request.tenant, request.deadline);
        let index = self.requests.insert(request);
        self.waiting.insert(&self.requests[index], index, self.config.block_size);
        self.tenants[tenant].requests += 1;
        self.tenants[tenant].waiting += 1;
        self.deadlines.extend(deadline.map(|deadline| (deadline, index)));
        self.changes += 1;
    }

    /// The tenant of a submission that keeps all limits but those of the queue.
    fn check_limits(&self, submission: &Submission) -> Result<TenantSlot, Refusal> {
        if submission.prompt.is_empty() || submission.max_new_tokens == 0 {
            return Err(Refusal::Empty);
        }
        let tenant = self.tenants.find_listed(submission.tenant).ok_or(Refusal::UnknownTenant)?;
        let num_tokens = submission.prompt.len() as u64 + u64::from(submission.max_new_tokens);
        // The last token made is never computed. Any pool may be the one that takes the request.
        let num_blocks = (num_tokens - 1).div_ceil(u64::from(self.config.block_size));
        let room = self.config.pools.iter().copied().min().unwrap_or(0).min(self.tenants[tenant].ceiling());
        let fits = num_blocks <= u64::from(room) && num_tokens <= u64::from(self.config.request_tokens_max);
        if fits { Ok(tenant) } else { Err(Refusal::TooLong) }
    }

    /// The request of a submission, as it comes into the queue.
    fn admitted(&mut self, submission: Submission, tenant: TenantSlot) -> Request {
        let arrival = Arrival(self.next_arrival);
        self.next_arrival += 1;
        let mut stop_tokens = submission.stop_tokens;
        stop_tokens.sort_unstable();
        let block_size = self.config.block_size;
        let prompt_len = submission.prompt.len() as u32;
        let shared_tokens = submission.shared_tokens.min(prompt_len);
        let is_rounded_up = planted!(self, ShareLastBlock);
        let num_public = if is_rounded_up { shared_tokens.div_ceil(block_size) } else { shared_tokens / block_size };
        let mut request = Request {
            id: submission.request,
            arrival,
            phase: Phase::Waiting,
            in_flight: false,
            ending: None,
            yields: false,
            is_suspect: false,
            stays: false,
            is_ahead: false,
            is_over: false,
            needs_tokens: submission.needs_tokens,
            tenant,
            class: ClassId(submission.class.0.min(self.config.classes.len() as u8 - 1)),
            deadline: submission.deadline,
            cached_blocks: 0,
            lacking: None,
            num_computed: 0,
            num_told: 0,
            num_published: 0,
            num_reached: 0,
            node: NodeId::ROOT,
            found: 0,
            prompt_len,
            last_token: submission.prompt[prompt_len as usize - 1],
            tokens: submission.prompt,
            hashes: Vec::new(),
            table: Vec::new(),
            arriving: Arriving::NONE,
            audience: Audience { salt: submission.salt, num_public },
            max_new_tokens: submission.max_new_tokens,
            min_new_tokens: submission.min_new_tokens,
            stop_mask: stop_tokens.iter().fold(0, |mask, token| mask | stop_bit(*token)),
            stop_tokens,
            cached_tokens: None,
            preemptions: 0,
        };
        request.hash_blocks(&self.config);
        for pool in &mut self.pools {
            pool.lookup(request.audience, &request.tokens, &request.hashes, &mut request.table);
            request.cached_blocks = request.cached_blocks.max(request.table.len() as u32);
            request.table.clear();
        }
        request
    }

    /// Withdraws a request. An unknown id is ignored: the request may have finished in the meantime.
    pub(crate) fn cancel(&mut self, request: RequestId, reason: CancelReason, effects: &mut Vec<Effect>) {
        let Some(index) = self.requests.find(request) else { return };
        self.end(index, cancelled(reason), effects);
        if planted!(self, FreeInFlight)
            && let Some(request) = self.requests.get_mut(index)
            && let Phase::Running(worker) = request.phase
        {
            let pool = self.workers[usize::from(worker.0)].pool();
            self.pools[pool].release(&mut request.table);
        }
    }

    /// Ends the requests whose deadline has passed.
    pub(crate) fn expire(&mut self, effects: &mut Vec<Effect>) {
        while let Some((deadline, index)) = self.deadlines.first().copied()
            && deadline <= self.now
            && !planted!(self, IgnoreDeadlines)
        {
            self.deadlines.remove(&(deadline, index));
            self.requests[index].deadline = None;
            self.end(index, FinishReason::Deadline, effects);
        }
    }

    /// Ends a request now, or, when a device is at it, as soon as its step or its transfer is reported back, because until
    /// then its blocks are read and written.
    fn end(&mut self, index: RequestIndex, reason: FinishReason, effects: &mut Vec<Effect>) {
        let request = &mut self.requests[index];
        if request.in_flight || matches!(request.phase, Phase::Moving { .. }) {
            request.ending.get_or_insert(reason);
        } else {
            self.finish(index, reason, effects);
        }
    }
}

/// How a withdrawn request ends.
fn cancelled(reason: CancelReason) -> FinishReason {
    match reason {
        CancelReason::StopString => FinishReason::Stop,
        other => FinishReason::Cancelled(other),
    }
}
