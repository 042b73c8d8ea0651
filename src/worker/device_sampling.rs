//! Sampling on a GPU: each sampled row's settings go to the device, and its token comes back.

use super::sampler::TokenCounts;
use super::{SequenceSampling, StepError, StepOutput};
use crate::request::{SamplingParams, TokenLogprobs};
use kvern_core::{RequestId, Sampled, StepPlan, TokenId};
use kvern_kernels::{DeviceSampler, KernelError, SampleBias, SampleCount, SampleRow};
use std::collections::HashMap;
use std::sync::Arc;

/// Brings to the sampler how each slice that samples is sampled, in order.
///
/// # Errors
/// A slice of a step that was planned ahead has penalties, and the device does not have all that it has seen; or the sampler
/// refuses a row.
pub(super) fn push_rows(
    sampler: &mut DeviceSampler,
    sequences: &HashMap<RequestId, Arc<SequenceSampling>>,
    plan: &StepPlan,
) -> Result<(), StepError> {
    sampler.begin();
    for slice in plan.slices.iter().filter(|slice| slice.sample) {
        let position = slice.start + slice.tokens.len() as u32;
        match sequences.get(&slice.request) {
            Some(sequence) => sequence.with_counts(position, |params, counts| {
                let id = params.uses_penalties().then_some(slice.request.0);
                // The counts lack the token that such a slice goes on with.
                if slice.last_sampled && id.is_some_and(|id| !sampler.knows(id, position)) {
                    return Err(StepError::Seen { request: slice.request, position });
                }
                Ok(sampler.push(sample_row(params, position), biases(params, counts), id, seen(counts))?)
            }),
            // Nobody wants its token; its row is passed over.
            None => Ok(sampler.push(SampleRow::greedy(position), [].into_iter(), None, [].into_iter())?),
        }?;
    }
    Ok(())
}

/// Waits for the tokens of the oldest step that the sampler has under way, which is `plan`.
pub(super) fn take_rows(
    sampler: &mut DeviceSampler,
    sequences: &HashMap<RequestId, Arc<SequenceSampling>>,
    plan: &StepPlan,
    output: &mut StepOutput<'_>,
) -> Result<(), KernelError> {
    let rows = sampler.finish()?.to_vec();
    for (at, (slice, row)) in plan.slices.iter().filter(|slice| slice.sample).zip(&rows).enumerate() {
        let position = slice.start + slice.tokens.len() as u32;
        let sampled = row.token.map_or(Sampled::Failed, Sampled::Token);
        output.sampled.push((slice.request, sampled));
        // One that ended meanwhile is forgotten already: its token is dropped, but it is no failure.
        let Some(sequence) = sequences.get(&slice.request) else { continue };
        sequence.has_drawn(position, sampled);
        if let (Some(count), Some(_)) = (sequence.params.logprobs, row.token) {
            let top = sampler.top(at, count as usize).to_vec();
            output.logprobs.push((slice.request, Box::new(TokenLogprobs { logprob: row.logprob, top })));
        }
    }
    Ok(())
}

/// A request's settings as the kernel takes them.
fn sample_row(params: &SamplingParams, position: u32) -> SampleRow {
    SampleRow {
        seed: params.seed,
        temperature: params.temperature,
        top_p: params.top_p,
        min_p: params.min_p,
        top_k: params.top_k,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        top_logprobs: params.logprobs.unwrap_or(0),
        wants_logprob: u32::from(params.logprobs.is_some()),
        ..SampleRow::greedy(position)
    }
}

/// Biases, and stop tokens that may not come yet; a token that is both is forbidden.
fn biases<'a>(params: &'a SamplingParams, counts: &TokenCounts) -> impl Iterator<Item = SampleBias> + 'a {
    let forbidden: &[TokenId] = if counts.new_tokens() < params.min_tokens { &params.stop_tokens } else { &[] };
    let biased = params.logit_bias.iter().filter(|(token, _)| !forbidden.contains(token));
    let biased = biased.map(|&(token, bias)| SampleBias { token, bias });
    biased.chain(forbidden.iter().map(|&token| SampleBias { token, bias: f32::NEG_INFINITY }))
}

/// Tokens that penalties are for: those of the output, and those that only the prompt has. Without penalties none is counted.
fn seen(counts: &TokenCounts) -> impl Iterator<Item = SampleCount> + '_ {
    let of_output = counts.output().map(|(token, count)| SampleCount { token, count });
    of_output.chain(counts.prompt_only().map(|token| SampleCount { token, count: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.0,
            repetition_penalty: 1.3,
            seed: 7,
            stop_tokens: vec![2, 9],
            min_tokens: 2,
            logit_bias: vec![(9, 4.0), (5, -1.0)],
            logprobs: Some(3),
        }
    }

    #[test]
    fn stop_tokens_are_forbidden_until_enough_have_come() {
        let params = params();
        let mut counts = TokenCounts::new(&[], &params);
        let list =
            |counts: &TokenCounts| biases(&params, counts).map(|entry| (entry.token, entry.bias)).collect::<Vec<_>>();
        let never = f32::NEG_INFINITY;
        assert_eq!(list(&counts), [(5, -1.0), (2, never), (9, never)]);
        counts.push(1, &params);
        counts.push(1, &params);
        assert_eq!(list(&counts), [(9, 4.0), (5, -1.0)]);
    }

    #[test]
    fn each_token_is_counted_once() {
        let params = params();
        let mut counts = TokenCounts::new(&[4, 6, 4], &params);
        for token in [6, 1, 6] {
            counts.push(token, &params);
        }
        let mut found: Vec<_> = seen(&counts).map(|entry| (entry.token, entry.count)).collect();
        found.sort_unstable();
        assert_eq!(found, [(1, 1), (4, 0), (6, 2)]);
    }
}
