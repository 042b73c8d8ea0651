//! What the engine does with a `Submit` and with a `Cancel`.
//!
//! Nothing that a client controls can panic here: a submission is checked once, on arrival, in arithmetic that cannot
//! overflow, and what is queued fits the limits and, alone, every pool.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::kv::NodeId;
use crate::request::{Arrival, Phase, Request};
use crate::{CancelReason, Effect, Engine, FinishReason, Refusal, RequestId, Submission, Usage};

impl Engine {
    /// Queues a request, or refuses it.
    pub(crate) fn submit(&mut self, submission: Submission, effects: &mut Vec<Effect>) {
        let request = submission.request;
        let is_new = self.requests.find(request).is_none();
        assert!(is_new, "{}: {request:?} is submitted twice", InvariantId::Sch2);
        if let Some(refusal) = self.refusal(&submission) {
            let prompt_tokens = u32::try_from(submission.prompt.len()).unwrap_or(u32::MAX);
            let usage = Usage { prompt_tokens, ..Usage::default() };
            effects.push(Effect::Finish { request, reason: FinishReason::Refused(refusal), usage });
            return;
        }
        let request = self.admitted(submission);
        let arrival = request.arrival;
        let index = self.requests.insert(request);
        self.waiting.insert(arrival, index);
    }

    /// Why a submission cannot be taken, if it cannot.
    fn refusal(&self, submission: &Submission) -> Option<Refusal> {
        if submission.prompt.is_empty() || submission.max_new_tokens == 0 {
            return Some(Refusal::Empty);
        }
        let num_tokens = submission.prompt.len() as u64 + u64::from(submission.max_new_tokens);
        // The last token made is never computed. Any worker may be the one that runs the request.
        let num_blocks = (num_tokens - 1).div_ceil(u64::from(self.config.block_size));
        let fits = self.config.workers.iter().all(|worker| num_blocks <= u64::from(worker.num_blocks));
        if num_tokens > u64::from(self.config.request_tokens_max) || !fits {
            return Some(Refusal::TooLong);
        }
        (self.waiting.len() >= self.config.waiting_max as usize).then_some(Refusal::QueueFull)
    }

    fn admitted(&mut self, submission: Submission) -> Request {
        let arrival = Arrival(self.next_arrival);
        self.next_arrival += 1;
        let mut stop_tokens = submission.stop_tokens;
        stop_tokens.sort_unstable();
        let mut request = Request {
            id: submission.request,
            arrival,
            phase: Phase::Waiting,
            in_flight: false,
            cancelled: None,
            num_computed: 0,
            num_published: 0,
            node: NodeId::ROOT,
            prompt_len: submission.prompt.len() as u32,
            tokens: submission.prompt,
            hashes: Vec::new(),
            table: Vec::new(),
            salt: submission.salt,
            max_new_tokens: submission.max_new_tokens,
            min_new_tokens: submission.min_new_tokens,
            stop_tokens,
            cached_tokens: None,
            preemptions: 0,
        };
        request.hash_blocks(&self.config);
        request
    }

    /// Withdraws a request: now, or, when the device is at it, as soon as its step is reported back, because until then the
    /// device reads and writes its blocks. An unknown id is ignored: the request may have finished in the meantime.
    pub(crate) fn cancel(&mut self, request: RequestId, reason: CancelReason, effects: &mut Vec<Effect>) {
        let Some(index) = self.requests.find(request) else { return };
        let request = &mut self.requests[index];
        if !request.in_flight {
            self.finish(index, cancelled(reason), effects);
            return;
        }
        request.cancelled.get_or_insert(reason);
        if planted!(self, FreeInFlight)
            && let Phase::Running(worker) = request.phase
        {
            self.workers[usize::from(worker.0)].pool.release(&mut request.table);
        }
    }
}

/// How a withdrawn request ends.
pub(crate) fn cancelled(reason: CancelReason) -> FinishReason {
    match reason {
        CancelReason::StopString => FinishReason::Stop,
        other => FinishReason::Cancelled(other),
    }
}
