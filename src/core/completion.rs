//! What the engine does with a `StepDone`, and how a request ends.
//!
//! For each slice of the step, in order: count what is computed, publish the blocks that became full, take the sampled
//! token, and finish the request where that is due. O(slices), plus the blocks that are published or released.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::kv::{FullBlock, KvPool};
use crate::queue::Waiting;
use crate::request::{Arriving, Phase, Request, RequestIndex};
use crate::tenants::{TenantSlot, Tenants};
use crate::worker::PlannedSlice;
use crate::{ClassId, Effect, Engine, FinishReason, RequestId, Sampled, StepId, WorkerId};

/// Output tokens of one class and tenant that are to be charged: neighbours in a step mostly share both.
struct Due {
    class: ClassId,
    tenant: TenantSlot,
    tokens: u64,
}

impl Due {
    const NOTHING: Due = Due { class: ClassId(0), tenant: TenantSlot::FIRST, tokens: 0 };

    fn charge(&mut self, tenants: &mut Tenants, waiting: &mut Waiting) {
        if self.tokens > 0 {
            let tenant = &mut tenants[self.tenant];
            tenant.charged += self.tokens;
            waiting.charge(self.class, self.tenant, tenant.weight(), self.tokens);
            self.tokens = 0;
        }
    }
}

impl Engine {
    /// Takes the result of the step in flight.
    pub(crate) fn step_done(
        &mut self,
        worker: WorkerId,
        step: StepId,
        device_us: u64,
        mut sampled: Vec<(RequestId, Sampled)>,
        effects: &mut Vec<Effect>,
    ) {
        if self.workers[usize::from(worker.0)].has_failed {
            self.step_failed(worker, step, &sampled, effects);
            sampled.clear();
            self.keep_spare(sampled);
            return;
        }
        let mut planned = self.take_planned(worker, step);
        let state = &self.workers[usize::from(worker.0)];
        let pool = state.pool();
        if device_us > 0 && self.teaches(worker) {
            self.estimator.correct(&state.work, device_us);
        }
        let hands_off = self.duty(worker).hands_off;
        let mut results = sampled.drain(..);
        let mut due = Due::NOTHING;
        for slice in planned.drain(..) {
            let result = slice.sample.then(|| {
                let (request, result) = results.next().expect("a step reports one result for each slice that samples");
                let expected = self.requests[slice.index].id;
                assert!(request == expected, "{worker:?} reports {request:?} where {expected:?} was planned");
                result
            });
            if self.requests[slice.index].is_over {
                if planted!(self, TellOfOver)
                    && let Some(Sampled::Token(token)) = result
                {
                    let request = &self.requests[slice.index];
                    effects.push(Effect::Token { request: request.id, index: request.num_new(), token });
                }
                self.land_over(slice.index, result == Some(Sampled::Failed));
                continue;
            }
            let reason = self.slice_done(pool, slice, result, &mut due, effects);
            let request = &self.requests[slice.index];
            let goes = reason.is_some() || (request.yields && !request.in_flight);
            if goes {
                // Who waits again does so behind what it was charged, and blocks are published before they are given back.
                due.charge(&mut self.tenants, &mut self.waiting);
                if self.filled.pop_if(|last| *last == slice.index).is_some() {
                    publish(&mut self.requests[slice.index], &mut self.pools[pool], self.config.block_size);
                }
            }
            let request = &self.requests[slice.index];
            match reason {
                Some(reason) => {
                    if reason == FinishReason::Error {
                        self.quarantine_prompt(slice.index);
                    }
                    self.finish(slice.index, reason, effects);
                }
                None if goes => self.preempt(slice.index, effects),
                // It is in the step ahead, too, and goes where it must after that.
                None if request.in_flight => {}
                None if hands_off && slice.sample && !request.stays => self.make_ready(worker, slice.index),
                None => {}
            }
        }
        due.charge(&mut self.tenants, &mut self.waiting);
        self.publish_filled(pool);
        assert!(results.next().is_none(), "{worker:?} reports more results than {step:?} has slices that sample");
        drop(results);
        let state = &mut self.workers[usize::from(worker.0)];
        state.planned = planned;
        state.advance(self.now);
        self.keep_spare(sampled);
    }

    /// Keeps an emptied vector for a `StepDone` to come.
    fn keep_spare(&mut self, sampled: Vec<(RequestId, Sampled)>) {
        if self.spare.len() < self.workers.len() {
            self.spare.push(sampled);
        }
    }

    /// The slices of the step in flight, which it no longer is.
    pub(crate) fn take_planned(&mut self, worker: WorkerId, step: StepId) -> Vec<PlannedSlice> {
        let state = &mut self.workers[usize::from(worker.0)];
        assert!(state.step == Some(step), "{worker:?} reports {step:?} but is at {:?}", state.step);
        state.step = None;
        self.changes += u64::from(std::mem::take(&mut self.claim_waits));
        std::mem::take(&mut state.planned)
    }

    /// Takes one slice's result; gives the reason when the request ends with it.
    fn slice_done(
        &mut self,
        pool: usize,
        slice: PlannedSlice,
        result: Option<Sampled>,
        due: &mut Due,
        effects: &mut Vec<Effect>,
    ) -> Option<FinishReason> {
        let publishes_failed = planted!(self, PublishFailed);
        let request = &mut self.requests[slice.index];
        let pool = &mut self.pools[pool];
        request.in_flight = std::mem::take(&mut request.is_ahead);
        request.is_suspect = false;
        request.num_computed += slice.num_tokens;
        let known = request.num_tokens();
        assert!(request.num_computed <= known, "{}: {} of {known}", InvariantId::Sch3, request.num_computed);
        let early = u32::from(planted!(pool, PublishPartial));
        let has_failed = result == Some(Sampled::Failed) && !publishes_failed;
        if has_failed {
            // Its K/V may be what failed: nobody may find them again.
            request.table.iter().for_each(|block| pool.forget(*block));
        } else if self.config.prefix_caching && has_full_block(request, early, self.config.block_size) {
            self.filled.push(slice.index);
        }
        if let Some(reason) = request.ending {
            return Some(reason);
        }
        let token = match result? {
            Sampled::Token(token) => token,
            Sampled::Failed => return Some(FinishReason::Error),
        };
        if !planted!(self, DropToken) || !request.num_tokens().is_multiple_of(16) {
            effects.push(Effect::Token { request: request.id, index: request.num_new(), token });
        }
        if (due.class, due.tenant) != (request.class, request.tenant) {
            due.charge(&mut self.tenants, &mut self.waiting);
            *due = Due { class: request.class, tenant: request.tenant, tokens: 0 };
        }
        due.tokens += 1;
        request.push(token);
        let next_full = (request.hashes.len() as u64 + 1) * u64::from(self.config.block_size);
        if u64::from(request.num_tokens()) == next_full {
            request.hash_blocks(&self.config);
        }
        let may_stop = request.num_new() >= request.min_new_tokens || planted!(self, IgnoreMinNewTokens);
        if may_stop && request.stops_at(token) {
            return Some(FinishReason::Stop);
        }
        (request.num_new() >= request.max_new_tokens).then_some(FinishReason::Length)
    }

    /// Publishes what the step has filled. A first pass asks for the places in the index, so that their cache misses overlap.
    fn publish_filled(&mut self, pool: usize) {
        let pool = &mut self.pools[pool];
        let places = self.filled.iter().map(|index| {
            let request = &self.requests[*index];
            pool.touch(request.hashes[request.num_published as usize])
        });
        std::hint::black_box(places.fold(0, |sum, place| sum ^ place));
        for index in self.filled.drain(..) {
            publish(&mut self.requests[index], pool, self.config.block_size);
        }
    }

    /// Forgets a request, wherever it is, and says its last word. One that is in flight is in a step that was planned ahead of
    /// its end: its blocks and its place stay until that is reported.
    pub(crate) fn finish(&mut self, index: RequestIndex, reason: FinishReason, effects: &mut Vec<Effect>) {
        let request = &mut self.requests[index];
        let stays = request.in_flight && !planted!(self, FreeAhead);
        if request.phase == Phase::Waiting {
            self.waiting.remove(request);
            self.tenants[request.tenant].waiting -= 1;
            self.changes += 1;
        } else if !stays {
            if planted!(self, LeakOnCancel) && matches!(reason, FinishReason::Cancelled(_)) {
                request.table.clear();
            }
            self.detach(index);
            self.note_finish();
        }
        let request = &self.requests[index];
        let Request { id, class, tenant, deadline, .. } = *request;
        let (usage, num_new, num_uncharged) = (request.usage(), request.num_new(), request.num_uncharged());
        self.refund(class, tenant, num_uncharged);
        if matches!(reason, FinishReason::Stop | FinishReason::Length) {
            self.note_output(num_new);
        }
        self.tenants[tenant].requests -= 1;
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, index));
        }
        if stays {
            self.requests.retire(index);
        } else {
            self.requests.remove(index);
        }
        let request = id;
        if planted!(self, FinishTwice) {
            effects.push(Effect::Finish { request, reason, usage });
        }
        effects.push(Effect::Finish { request, reason, usage });
    }

    /// Gives a tenant back what it was charged for prompt tokens that were never computed.
    fn refund(&mut self, class: ClassId, tenant: TenantSlot, tokens: u32) {
        if tokens > 0 && !planted!(self, KeepCharge) {
            let (tokens, settings) = (u64::from(tokens), &mut self.tenants[tenant]);
            settings.refunded += tokens;
            self.waiting.refund(class, tenant, settings.weight(), tokens);
        }
    }

    /// Takes a request that is not in flight from the worker that it runs on, or between two workers, with its blocks.
    pub(crate) fn detach(&mut self, index: RequestIndex) {
        let releases_twice = planted!(self, ReleaseTwice);
        let request = &mut self.requests[index];
        let is_at_rest = !request.in_flight || planted!(self, FreeAhead);
        assert!(is_at_rest, "{}: {:?} goes while the device is at it", InvariantId::Kv3, request.id);
        let worker = match request.phase {
            Phase::Waiting => unreachable!("SCH-2: a waiting request is on no worker"),
            Phase::Running(worker) => {
                self.workers[usize::from(worker.0)].stop(request);
                worker
            }
            Phase::Ready(worker) => {
                self.ready.remove(&(request.class, request.arrival));
                worker
            }
            Phase::Moving { from, to, transfer } => {
                self.transfers.remove(&transfer);
                let target = &mut self.workers[usize::from(to.0)];
                target.num_arriving -= 1;
                let mut arriving = std::mem::replace(&mut request.arriving, Arriving::NONE);
                self.pools[target.pool()].release(&mut arriving.table);
                self.pools[target.pool()].close_table(request.tenant);
                from
            }
        };
        let worker = &mut self.workers[usize::from(worker.0)];
        if request.is_suspect {
            request.is_suspect = false;
            worker.acquit(index);
        }
        let pool = &mut self.pools[worker.pool()];
        if releases_twice {
            pool.release(&mut request.table.clone());
        }
        pool.release(&mut request.table);
        pool.close_table(request.tenant);
        self.changes += 1;
    }
}

/// Whether a block of the request is full, or lacks `early` tokens at most, and is not published.
fn has_full_block(request: &Request, early: u32, block_size: u32) -> bool {
    (request.num_published + 1) * block_size <= (request.num_computed + early).min(request.num_tokens())
}

/// Publishes the blocks of a request that its last slice filled.
fn publish(request: &mut Request, pool: &mut KvPool, block_size: u32) {
    let early = u32::from(planted!(pool, PublishPartial));
    while has_full_block(request, early, block_size) {
        let at = request.num_published as usize;
        let first = at * block_size as usize;
        request.node = pool.publish(FullBlock {
            block: request.table[at],
            hash: request.hashes[at],
            at,
            node: request.node,
            audience: request.audience,
            before: at.checked_sub(1).map(|before| request.table[before]),
            hits: request.found,
            tokens: &request.tokens[first..first + block_size as usize],
        });
        request.num_published += 1;
    }
}
