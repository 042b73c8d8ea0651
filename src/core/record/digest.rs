//! A fingerprint of what the core decided: plans and effects, without the tokens in them. Two runs that decide alike have
//! equal digests; two that do not have different ones but for a chance of 2^-64 at each.
//!
//! The mixing step is the folded multiply of `kv/hash.rs`. Complexity: O(slices + new blocks), a few nanoseconds for a slice;
//! nothing allocates.

use crate::{Backoff, CancelReason, Effect, FinishReason, Refusal, StepPlan};

/// What was decided on one input or one call of `plan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

/// Fractional digits of the golden ratio and of pi, the latter odd.
const START: u64 = 0x9e37_79b9_7f4a_7c15;
const FACTOR: u64 = 0xa409_3822_299f_31d1;

impl Default for Digest {
    fn default() -> Self {
        Digest(START)
    }
}

impl Digest {
    /// That nothing was decided yet.
    #[must_use]
    pub fn new() -> Self {
        Digest::default()
    }

    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }

    fn word(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * u128::from(FACTOR);
        self.0 = (product as u64 ^ (product >> 64) as u64).wrapping_add(START);
    }

    fn words<const N: usize>(&mut self, words: [u64; N]) {
        words.into_iter().for_each(|word| self.word(word));
    }

    /// Adds a step that was planned: its slices without their tokens.
    pub fn plan(&mut self, plan: &StepPlan) {
        self.words([1, plan.step.0, plan.worker.0.into(), plan.share as u64, plan.slices.len() as u64]);
        for slice in &plan.slices {
            let blocks = plan.slice_blocks(slice);
            let num_tokens = u64::from(slice.tokens.end - slice.tokens.start);
            let table = u64::from(slice.table_len) << 32 | blocks.len() as u64;
            let sample = u64::from(slice.sample) | u64::from(slice.last_sampled) << 1;
            self.words([slice.request.0, u64::from(slice.start) << 32 | num_tokens, table, sample]);
            let mut pairs = blocks.chunks_exact(2);
            for pair in &mut pairs {
                self.word(u64::from(pair[0].0) << 32 | u64::from(pair[1].0));
            }
            pairs.remainder().iter().for_each(|block| self.word(block.0.into()));
        }
    }

    /// Adds what was told to the outside, but for a token's value.
    pub fn effect(&mut self, effect: &Effect) {
        match effect {
            Effect::Scheduled { request, worker, cached_tokens } => {
                self.words([2, request.0, worker.0.into(), u64::from(*cached_tokens)]);
            }
            Effect::Preempted { request } => self.words([3, request.0]),
            Effect::Moved { request, worker } => self.words([4, request.0, worker.0.into()]),
            Effect::Transfer { transfer, request, from, to, blocks } => {
                self.words([5, transfer.0, request.0, from.0.into(), to.0.into(), blocks.len() as u64]);
                blocks.iter().for_each(|(from, to)| self.word(u64::from(from.0) << 32 | u64::from(to.0)));
            }
            Effect::Token { request, index, token: _ } => self.words([6, request.0, u64::from(*index)]),
            Effect::Finish { request, reason, usage } => {
                self.words([7, request.0]);
                self.reason(*reason);
                let tokens = u64::from(usage.prompt_tokens) << 32 | u64::from(usage.completion_tokens);
                self.words([tokens, u64::from(usage.cached_tokens) << 32 | u64::from(usage.preemptions)]);
                self.word(usage.uncomputed_tokens.into());
            }
        }
    }

    fn reason(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.word(1),
            FinishReason::Length => self.word(2),
            FinishReason::Deadline => self.word(3),
            FinishReason::Error => self.word(4),
            FinishReason::Cancelled(reason) => self.word(match reason {
                CancelReason::ClientGone => 5,
                CancelReason::SlowReader => 6,
                CancelReason::StopString => 7,
                CancelReason::Shutdown => 8,
            }),
            FinishReason::Refused(refusal) => {
                let (number, backoff) = match refusal {
                    Refusal::Empty => (9, Backoff::default()),
                    Refusal::TooLong => (10, Backoff::default()),
                    Refusal::UnknownTenant => (11, Backoff::default()),
                    Refusal::QueueFull(backoff) => (12, backoff),
                    Refusal::QueueTokens(backoff) => (13, backoff),
                    Refusal::Deadline(backoff) => (14, backoff),
                    Refusal::Quarantined(backoff) => (15, backoff),
                };
                self.words([number, backoff.retry_in.0, u64::from(backoff.queue_depth)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockId, DeviceShare, Micros, RequestId, SeqSlice, StepId, TransferId, Usage, WorkerId};
    use std::collections::HashSet;

    fn digest(effect: &Effect) -> u64 {
        let mut digest = Digest::new();
        digest.effect(effect);
        digest.value()
    }

    #[test]
    fn every_field_but_tokens_counts() {
        let (request, usage) = (RequestId(1), Usage::default());
        let refused = |refusal| FinishReason::Refused(refusal);
        let backoff = Backoff { retry_in: Micros(5), queue_depth: 6 };
        let reasons = [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Deadline,
            FinishReason::Error,
            FinishReason::Cancelled(CancelReason::ClientGone),
            FinishReason::Cancelled(CancelReason::Shutdown),
            refused(Refusal::Empty),
            refused(Refusal::TooLong),
            refused(Refusal::UnknownTenant),
            refused(Refusal::QueueFull(backoff)),
            refused(Refusal::QueueTokens(backoff)),
            refused(Refusal::Deadline(backoff)),
            refused(Refusal::Deadline(Backoff { queue_depth: 7, ..backoff })),
            refused(Refusal::Deadline(Backoff { retry_in: Micros(6), ..backoff })),
            refused(Refusal::Quarantined(backoff)),
        ];
        let mut effects: Vec<Effect> =
            reasons.into_iter().map(|reason| Effect::Finish { request, reason, usage }).collect();
        effects.extend([
            Effect::Finish { request, reason: FinishReason::Stop, usage: Usage { cached_tokens: 1, ..usage } },
            Effect::Finish { request, reason: FinishReason::Stop, usage: Usage { prompt_tokens: 1, ..usage } },
            Effect::Finish { request, reason: FinishReason::Stop, usage: Usage { completion_tokens: 1, ..usage } },
            Effect::Finish { request, reason: FinishReason::Stop, usage: Usage { preemptions: 1, ..usage } },
            Effect::Finish { request, reason: FinishReason::Stop, usage: Usage { uncomputed_tokens: 1, ..usage } },
            Effect::Scheduled { request, worker: WorkerId(0), cached_tokens: 0 },
            Effect::Scheduled { request, worker: WorkerId(1), cached_tokens: 0 },
            Effect::Scheduled { request, worker: WorkerId(0), cached_tokens: 16 },
            Effect::Preempted { request },
            Effect::Moved { request, worker: WorkerId(0) },
            Effect::Token { request, index: 0, token: 0 },
            Effect::Token { request, index: 1, token: 0 },
        ]);
        for blocks in [vec![], vec![(BlockId(0), BlockId(1))], vec![(BlockId(1), BlockId(0))]] {
            let (transfer, from, to) = (TransferId(0), WorkerId(0), WorkerId(1));
            effects.push(Effect::Transfer { transfer, request, from, to, blocks });
        }
        let different: HashSet<u64> = effects.iter().map(digest).collect();
        assert_eq!(different.len(), effects.len());
        let token = |token| digest(&Effect::Token { request, index: 3, token });
        assert_eq!(token(1), token(2));
    }

    #[test]
    fn a_plan_counts_without_its_tokens() {
        let on = |share, start, sample, tokens: &[u32], blocks: &[u32], table_len| {
            let (sample, last_sampled) = sample;
            let slice = SeqSlice {
                request: RequestId(1),
                start,
                tokens: 0..tokens.len() as u32,
                table_len,
                blocks: 0..blocks.len() as u32,
                sample,
                last_sampled,
            };
            let mut digest = Digest::new();
            digest.plan(&StepPlan {
                step: StepId(4),
                worker: WorkerId(0),
                share,
                slices: vec![slice],
                tokens: tokens.to_vec(),
                blocks: blocks.iter().copied().map(BlockId).collect(),
            });
            digest.value()
        };
        let plan = |start, sample, tokens: &[u32], blocks: &[u32], table_len| {
            on(DeviceShare::Whole, start, sample, tokens, blocks, table_len)
        };
        let base = plan(0, (true, false), &[1, 2], &[3, 4, 5], 6);
        assert_eq!(base, plan(0, (true, false), &[8, 9], &[3, 4, 5], 6));
        let others = [
            plan(1, (true, false), &[1, 2], &[3, 4, 5], 6),
            plan(0, (false, false), &[1, 2], &[3, 4, 5], 6),
            plan(0, (true, true), &[1, 2], &[3, 4, 5], 6),
            plan(0, (true, false), &[1], &[3, 4, 5], 6),
            plan(0, (true, false), &[1, 2], &[3, 5, 4], 6),
            plan(0, (true, false), &[1, 2], &[3, 4, 6], 6),
            plan(0, (true, false), &[1, 2], &[3, 4], 6),
            plan(0, (true, false), &[1, 2], &[3, 4, 5], 5),
            on(DeviceShare::Part, 0, (true, false), &[1, 2], &[3, 4, 5], 6),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }
}
