//! What the engine does with a `StepDone`, and how a request ends.
//!
//! For each slice of the step, in order: count what is computed, publish the blocks that became full, take the sampled
//! token, and finish the request where that is due. O(slices), plus the blocks that are published or released.

use crate::fault::planted;
use crate::intake::cancelled;
use crate::invariants::InvariantId;
use crate::kv::{FullBlock, KvPool};
use crate::request::{Phase, Request, RequestIndex};
use crate::worker::PlannedSlice;
use crate::{Effect, Engine, FinishReason, RequestId, Sampled, StepId, WorkerId};

impl Engine {
    /// Takes the result of the step in flight.
    pub(crate) fn step_done(
        &mut self,
        worker: WorkerId,
        step: StepId,
        mut sampled: Vec<(RequestId, Sampled)>,
        effects: &mut Vec<Effect>,
    ) {
        let mut planned = self.take_planned(worker, step);
        let mut results = sampled.drain(..);
        for slice in planned.drain(..) {
            let result = slice.sample.then(|| {
                let (request, result) = results.next().expect("a step reports one result for each slice that samples");
                let expected = self.requests[slice.index].id;
                assert!(request == expected, "{worker:?} reports {request:?} where {expected:?} was planned");
                result
            });
            if let Some(reason) = self.slice_done(worker, slice, result, effects) {
                self.finish(slice.index, reason, effects);
            }
        }
        assert!(results.next().is_none(), "{worker:?} reports more results than {step:?} has slices that sample");
        drop(results);
        self.workers[usize::from(worker.0)].planned = planned;
        if self.spare.len() < self.workers.len() {
            self.spare.push(sampled);
        }
    }

    /// Ends every request of the step in flight: whatever it was to compute is doubted.
    pub(crate) fn step_failed(&mut self, worker: WorkerId, step: StepId, effects: &mut Vec<Effect>) {
        let mut planned = self.take_planned(worker, step);
        for slice in planned.drain(..) {
            let reason = self.slice_done(worker, slice, Some(Sampled::Failed), effects);
            self.finish(slice.index, reason.expect("a failed slice ends its request"), effects);
        }
        self.workers[usize::from(worker.0)].planned = planned;
    }

    /// The slices of the step in flight, which it no longer is.
    fn take_planned(&mut self, worker: WorkerId, step: StepId) -> Vec<PlannedSlice> {
        let state = &mut self.workers[usize::from(worker.0)];
        assert!(state.step == Some(step), "{worker:?} reports {step:?} but is at {:?}", state.step);
        state.step = None;
        std::mem::take(&mut state.planned)
    }

    /// Takes one slice's result; gives the reason when the request ends with it.
    fn slice_done(
        &mut self,
        worker: WorkerId,
        slice: PlannedSlice,
        result: Option<Sampled>,
        effects: &mut Vec<Effect>,
    ) -> Option<FinishReason> {
        let request = &mut self.requests[slice.index];
        let pool = &mut self.workers[usize::from(worker.0)].pool;
        request.in_flight = false;
        request.num_computed += slice.num_tokens;
        let known = request.num_tokens();
        assert!(request.num_computed <= known, "{}: {} of {known}", InvariantId::Sch3, request.num_computed);
        if result == Some(Sampled::Failed) {
            // Its K/V may be what failed: nobody may find them again.
            let doubted: &[_] = if planted!(self, PublishFailed) { &[] } else { &request.table };
            doubted.iter().for_each(|block| pool.forget(*block));
        }
        if self.config.prefix_caching && (result != Some(Sampled::Failed) || planted!(self, PublishFailed)) {
            publish(request, pool, self.config.block_size);
        }
        if let Some(reason) = request.cancelled {
            return Some(cancelled(reason));
        }
        let token = match result? {
            Sampled::Token(token) => token,
            Sampled::Failed => return Some(FinishReason::Error),
        };
        if !planted!(self, DropToken) || !request.num_tokens().is_multiple_of(16) {
            effects.push(Effect::Token { request: request.id, index: request.num_new(), token });
        }
        request.tokens.push(token);
        if request.num_tokens().is_multiple_of(self.config.block_size) {
            request.hash_blocks(&self.config);
        }
        let may_stop = request.num_new() >= request.min_new_tokens || planted!(self, IgnoreMinNewTokens);
        if may_stop && request.stop_tokens.binary_search(&token).is_ok() {
            return Some(FinishReason::Stop);
        }
        (request.num_new() >= request.max_new_tokens).then_some(FinishReason::Length)
    }

    /// Forgets a request that is not in flight, wherever it is, and says its last word.
    pub(crate) fn finish(&mut self, index: RequestIndex, reason: FinishReason, effects: &mut Vec<Effect>) {
        let mut request = self.requests.remove(index);
        assert!(!request.in_flight, "{}: {:?} ends while the device is at it", InvariantId::Kv3, request.id);
        match request.phase {
            Phase::Waiting => self.waiting.remove(request.arrival),
            Phase::Running(worker) => {
                let worker = &mut self.workers[usize::from(worker.0)];
                worker.stop(&request, self.config.block_size);
                if planted!(self, ReleaseTwice) {
                    worker.pool.release(&mut request.table.clone());
                }
                if !planted!(self, LeakOnCancel) || !matches!(reason, FinishReason::Cancelled(_)) {
                    worker.pool.release(&mut request.table);
                }
            }
        }
        let (request, usage) = (request.id, request.usage());
        if planted!(self, FinishTwice) {
            effects.push(Effect::Finish { request, reason, usage });
        }
        effects.push(Effect::Finish { request, reason, usage });
    }
}

/// Publishes the blocks of a request that its last slice filled.
fn publish(request: &mut Request, pool: &mut KvPool, block_size: u32) {
    let early = u32::from(planted!(pool, PublishPartial));
    while (request.num_published + 1) * block_size <= (request.num_computed + early).min(request.num_tokens()) {
        let at = request.num_published as usize;
        let first = at * block_size as usize;
        request.node = pool.publish(FullBlock {
            block: request.table[at],
            hash: request.hashes[at],
            parent: request.node,
            salt: request.salt,
            tokens: &request.tokens[first..first + block_size as usize],
        });
        request.num_published += 1;
    }
}
