//! Finds the request that makes a step fail, and keeps its prompt away for a while.
//!
//! A failed step computed nothing: its requests are where they were before it. They repeat it in halves, and a half that
//! fails in its halves, until the request that fails alone ends with an error. All others have then repeated their part of the
//! step once, and as a slice depends on nothing but its own request they have what they would have had. A step of n
//! requests of which k are guilty is repeated in at most 2 k (1 + log2 n) parts. A failure that does not come back blames
//! nobody, unless the request was alone in the step: then it ends at once.

use crate::fault::planted;
use crate::kv::hash::prompt_hash;
use crate::request::RequestIndex;
use crate::worker::PlannedSlice;
use crate::{Effect, Engine, FinishReason, Micros, RequestId, Sampled, StepId, WorkerId};
use std::collections::BTreeMap;

/// Most prompts in quarantine; beyond it the one that would leave first does.
const PROMPTS_MAX: usize = 1024;

/// Hashes of prompts that made a step fail, and until when they are refused.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quarantine {
    until: BTreeMap<u128, Micros>,
}

impl Quarantine {
    pub(crate) fn is_empty(&self) -> bool {
        self.until.is_empty()
    }

    /// Until when a prompt is refused, if it is.
    pub(crate) fn until(&self, hash: u128, now: Micros) -> Option<Micros> {
        self.until.get(&hash).copied().filter(|until| *until > now)
    }

    /// O(prompts in quarantine).
    fn add(&mut self, hash: u128, until: Micros, now: Micros) {
        self.until.retain(|_, until| *until > now);
        self.until.insert(hash, until);
        if self.until.len() > PROMPTS_MAX {
            let first = self.until.iter().min_by_key(|(_, until)| **until).map(|(hash, _)| *hash);
            first.and_then(|hash| self.until.remove(&hash));
        }
    }
}

impl Engine {
    /// Puts the requests of the step in flight under suspicion, or ends the only one, once no step is ahead of it. `results` are
    /// of such a step, behind one that failed.
    pub(crate) fn step_failed(
        &mut self,
        worker: WorkerId,
        step: StepId,
        results: &[(RequestId, Sampled)],
        effects: &mut Vec<Effect>,
    ) {
        let state = &mut self.workers[usize::from(worker.0)];
        if state.has_failed {
            self.drop_ahead(worker, results, effects);
        } else if let Some(ahead) = state.ahead.step {
            assert!(state.step == Some(step), "{worker:?} reports {step:?} but is at {:?}", state.step);
            (state.step, state.ahead.step, state.has_failed) = (Some(ahead), None, true);
            return;
        }
        let mut planned = self.take_planned(worker, step);
        // Where others of the step have ended in the meantime, the one that is left was not alone in it.
        let was_alone = planned.len() == 1 || planted!(self, BlameAll);
        let mut group = Vec::with_capacity(planned.len());
        for slice in planned.drain(..) {
            let request = &mut self.requests[slice.index];
            if request.is_over {
                self.land_over(slice.index, was_alone);
                continue;
            }
            request.in_flight = false;
            request.is_suspect = false;
            // A step that failed may have failed before the worker kept its blocks.
            if !planted!(self, TrustFailedStep) {
                request.num_told = 0;
            }
            match request.ending {
                Some(reason) => self.finish(slice.index, reason, effects),
                None if request.yields && !was_alone => self.preempt(slice.index, effects),
                None => group.push(slice),
            }
        }
        if planted!(self, AdvanceFailed) {
            group.iter().for_each(|slice| self.requests[slice.index].num_computed += slice.num_tokens - 1);
        }
        let state = &mut self.workers[usize::from(worker.0)];
        state.planned = planned;
        let pool = state.pool();
        if was_alone {
            for PlannedSlice { index, .. } in group {
                // Its K/V may be what failed: nobody may find them again.
                let table = &self.requests[index].table;
                table.iter().for_each(|block| self.pools[pool].forget(*block));
                self.quarantine_prompt(index);
                self.finish(index, FinishReason::Error, effects);
            }
            return;
        }
        group.iter().for_each(|slice| self.requests[slice.index].is_suspect = true);
        let second = group.split_off(group.len() / 2);
        let halves = [second, group].into_iter().filter(|half| !half.is_empty());
        state.suspects.extend(halves);
    }

    /// Refuses the prompt of a request that failed, for a while.
    pub(crate) fn quarantine_prompt(&mut self, index: RequestIndex) {
        let request = &self.requests[index];
        let hash = prompt_hash(request.audience.salt, &request.tokens[..request.prompt_len as usize]);
        let until = Micros(self.now.0.saturating_add(self.config.quarantine.0));
        if !planted!(self, ForgetQuarantine) {
            self.quarantine.add(hash, until, self.now);
        }
    }
}
