//! Logits to tokens: counter-based, so that a worker holds no random state.
//!
//! Order of operations, as vLLM's: minimum tokens and logit bias, penalties, temperature, min-p, top-k, top-p, draw. The
//! draw is a pure function of (seed, position, logits): a preempted request repeats itself exactly, and nothing else in
//! the batch matters. Cost: one to three passes over the vocabulary; it is never sorted, only the few candidates that
//! top-k and top-p leave in question are.

use crate::request::{SamplingParams, TokenLogprobs};
use kvern_core::{Sampled, TokenId};
use std::collections::HashMap;

/// Which tokens a request has seen; what the penalties depend on.
#[derive(Debug, Default)]
pub struct TokenCounts {
    /// Sorted and distinct; kept only when the repetition penalty is on.
    prompt: Vec<TokenId>,
    output: HashMap<TokenId, u32>,
    /// New tokens so far.
    new_tokens: u32,
}

impl TokenCounts {
    #[must_use]
    pub fn new(prompt: &[TokenId], params: &SamplingParams) -> Self {
        let mut prompt = if params.repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() };
        prompt.sort_unstable();
        prompt.dedup();
        TokenCounts { prompt, output: HashMap::new(), new_tokens: 0 }
    }

    /// New tokens so far.
    pub(super) fn new_tokens(&self) -> u32 {
        self.new_tokens
    }

    /// Tokens of the output, with their numbers.
    pub(super) fn output(&self) -> impl Iterator<Item = (TokenId, u32)> + '_ {
        self.output.iter().map(|(token, count)| (*token, *count))
    }

    /// Tokens that the prompt has and the output has not.
    pub(super) fn prompt_only(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.prompt.iter().copied().filter(|token| !self.output.contains_key(token))
    }

    /// Takes note of a new token.
    pub fn push(&mut self, token: TokenId, params: &SamplingParams) {
        self.new_tokens += 1;
        if params.uses_penalties() {
            *self.output.entry(token).or_default() += 1;
        }
    }
}

impl SamplingParams {
    /// Whether the host has to know the tokens drawn before to have the next one drawn: the list of forbidden tokens is its own.
    /// What penalties are for a device keeps itself.
    pub(crate) fn needs_tokens(&self) -> bool {
        self.min_tokens > 0
    }

    /// Whether logits change by which tokens were seen.
    pub(super) fn uses_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// Buffers for one row at a time; one per host thread.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    /// exp(logit - max), in vocabulary order.
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Scratch {
    #[must_use]
    pub fn new(vocab_size: usize) -> Self {
        Scratch {
            logits: Vec::with_capacity(vocab_size),
            weights: Vec::with_capacity(vocab_size),
            candidates: Vec::with_capacity(vocab_size),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: TokenId,
    weight: f32,
}

/// A drawn token and, where asked for, its log-probabilities.
#[derive(Debug)]
pub struct Draw {
    pub sampled: Sampled,
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Draws the token that follows `position - 1`, from the F32 `logits` of one row. Logits that hold NaN or +inf, or no
/// finite value at all, give [`Sampled::Failed`].
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    counts: &TokenCounts,
    position: u32,
    scratch: &mut Scratch,
) -> Draw {
    let Some(raw_best) = argmax(logits) else { return Draw { sampled: Sampled::Failed, logprobs: None } };
    let plain = !params.uses_penalties() && params.logit_bias.is_empty() && counts.new_tokens >= params.min_tokens;
    let token = if plain && params.temperature == 0.0 {
        Some(raw_best)
    } else {
        scratch.logits.clear();
        scratch.logits.extend_from_slice(logits);
        adjust(&mut scratch.logits, params, counts);
        if params.temperature == 0.0 { argmax(&scratch.logits) } else { draw(params, position, scratch) }
    };
    match token {
        None => Draw { sampled: Sampled::Failed, logprobs: None },
        Some(token) => Draw {
            sampled: Sampled::Token(token),
            logprobs: params.logprobs.map(|n| Box::new(raw_logprobs(logits, token, n as usize, scratch))),
        },
    }
}

/// Index of the largest value, the lowest at a tie; `None` when a value is NaN or +inf or all are -inf.
fn argmax(logits: &[f32]) -> Option<TokenId> {
    // Per lane first, so that the loop vectorizes; a NaN is made to stick through `poison`.
    const LANES: usize = 16;
    let mut best = [f32::NEG_INFINITY; LANES];
    let mut poison = [0.0f32; LANES];
    let (chunks, tail) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            best[lane] = if chunk[lane] > best[lane] { chunk[lane] } else { best[lane] };
            // -inf * 0 is NaN too, but -inf is legal: it is clamped away first.
            poison[lane] += chunk[lane].max(f32::MIN) * 0.0 + if chunk[lane].is_nan() { f32::NAN } else { 0.0 };
        }
    }
    let tail_ok = tail.iter().all(|l| !l.is_nan() && *l != f32::INFINITY);
    let max = best.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max);
    if !tail_ok || poison.iter().any(|p| p.is_nan()) || !max.is_finite() {
        return None;
    }
    logits.iter().position(|l| *l == max).map(|i| i as TokenId)
}

/// Minimum tokens, bias and penalties, in place.
fn adjust(logits: &mut [f32], params: &SamplingParams, counts: &TokenCounts) {
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    if counts.new_tokens < params.min_tokens {
        for token in &params.stop_tokens {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    if !params.uses_penalties() {
        return;
    }
    let p = params.repetition_penalty;
    let mut repeat = |token: TokenId| {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit > 0.0 { *logit / p } else { *logit * p };
        }
    };
    if p != 1.0 {
        counts.prompt.iter().copied().for_each(&mut repeat);
        // Each token is touched once, so the map's order does not show in the result.
        counts.output.keys().filter(|t| counts.prompt.binary_search(t).is_err()).copied().for_each(&mut repeat);
    }
    for (token, count) in &counts.output {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit -= params.frequency_penalty * *count as f32 + params.presence_penalty;
        }
    }
}

/// Temperature, min-p, top-k, top-p and the draw, from `scratch.logits`.
fn draw(params: &SamplingParams, position: u32, scratch: &mut Scratch) -> Option<TokenId> {
    let best = argmax(&scratch.logits)?;
    let max = scratch.logits[best as usize];
    let inverse = 1.0 / params.temperature;
    if !inverse.is_finite() {
        return Some(best);
    }
    scratch.weights.clear();
    scratch.weights.extend(scratch.logits.iter().map(|l| exp((l - max) * inverse)));
    let u = uniform(params.seed, position);
    let vocab = scratch.weights.len();
    let top_k = if params.top_k == 0 { vocab } else { (params.top_k as usize).min(vocab) };
    if top_k == vocab && params.top_p >= 1.0 && params.min_p <= 0.0 {
        return Some(pick(scratch.weights.iter().copied(), u) as TokenId);
    }
    let mass = gather_candidates(params, top_k, scratch);
    let candidates = &scratch.candidates;
    let kept = nucleus(candidates, mass * f64::from(params.top_p));
    Some(candidates[pick(candidates[..kept].iter().map(|c| c.weight), u)].token)
}

/// Leaves in `scratch.candidates` the tokens that min-p and top-k keep, heaviest first (the lower token at a tie), except
/// those so light that top-p drops them in any case. Returns the mass of all that min-p and top-k keep.
fn gather_candidates(params: &SamplingParams, top_k: usize, scratch: &mut Scratch) -> f64 {
    let Scratch { weights, candidates, .. } = scratch;
    let mut floor = params.min_p;
    let mut mass = None;
    if top_k == weights.len() {
        // Tokens below (1 - p) / V of the mass sum to less than 1 - p together: none is in the nucleus. With top-k the
        // mass is that of the k, so the bound would not hold. The half guards the rounding of the sum.
        let total: f64 = weights.iter().filter(|w| **w >= params.min_p).map(|w| f64::from(*w)).sum();
        floor = floor.max((total * f64::from(1.0 - params.top_p) / weights.len() as f64 * 0.5) as f32);
        mass = Some(total);
    }
    candidates.clear();
    let kept = weights.iter().enumerate().filter(|(_, w)| **w >= floor && **w > 0.0);
    candidates.extend(kept.map(|(i, w)| Candidate { token: i as TokenId, weight: *w }));
    let heavier = |a: &Candidate, b: &Candidate| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token));
    if top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, heavier);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(heavier);
    mass.unwrap_or_else(|| candidates.iter().map(|c| f64::from(c.weight)).sum())
}

/// Length of the shortest prefix whose mass reaches `target`; all when none does.
fn nucleus(candidates: &[Candidate], target: f64) -> usize {
    let mut mass = 0.0;
    for (i, candidate) in candidates.iter().enumerate() {
        mass += f64::from(candidate.weight);
        if mass >= target {
            return i + 1;
        }
    }
    candidates.len()
}

/// Inverse transform: the first index at which the running sum passes `u` of the whole, among positive weights.
fn pick(weights: impl Iterator<Item = f32> + Clone, u: f64) -> usize {
    let total: f64 = weights.clone().map(f64::from).sum();
    let target = u * total;
    let (mut sum, mut last) = (0.0, 0);
    for (i, weight) in weights.enumerate() {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = i;
            if sum > target {
                return i;
            }
        }
    }
    last
}

/// Uniform in [0, 1) with 53 bits, from a seed and a position alone: two rounds of the SplitMix64 finalizer (Steele,
/// Lea and Flood, 2014).
fn uniform(seed: u64, position: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let key = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(key.wrapping_add((u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// e^x for x <= 0, relative error below 3e-7 and 0 below -87: a degree-6 polynomial after range reduction, which the
/// compiler vectorizes, unlike a call of libm.
fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    let n = (clamped * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// Log-probabilities under the raw logits: of `token`, and of the `n` likeliest.
fn raw_logprobs(logits: &[f32], token: TokenId, n: usize, scratch: &mut Scratch) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scratch.weights.clear();
    scratch.weights.extend(logits.iter().map(|l| exp(l - max)));
    let total: f64 = scratch.weights.iter().map(|w| f64::from(*w)).sum();
    let log_total = f64::from(max) + total.ln();
    let logprob = |token: TokenId| (f64::from(logits[token as usize]) - log_total) as f32;
    TokenLogprobs {
        logprob: logprob(token),
        top: largest(logits, n, &mut scratch.candidates).iter().map(|c| (c.token, logprob(c.token))).collect(),
    }
}

/// The `n` largest logits, largest first, by insertion into a short sorted list.
fn largest<'a>(logits: &[f32], n: usize, list: &'a mut Vec<Candidate>) -> &'a [Candidate] {
    list.clear();
    if n == 0 {
        return list;
    }
    for (i, logit) in logits.iter().enumerate() {
        if list.len() == n && list[n - 1].weight >= *logit {
            continue;
        }
        let at = list.partition_point(|c| c.weight >= *logit);
        list.truncate(n - 1);
        list.insert(at, Candidate { token: i as TokenId, weight: *logit });
    }
    list
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
