//! Sampling of one row by sorting, with the semantics of the server's CPU sampler.

use kvern_cuda_abi::{SampleRow, TokenBias, TokenCount};

/// One row: its parameters, and the lists that they point into.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) params: SampleRow,
    pub(crate) biases: Vec<TokenBias>,
    pub(crate) counts: Vec<TokenCount>,
}

pub(crate) fn plain(seed: u64, temperature: f32) -> Row {
    let params = SampleRow { seed, temperature, ..SampleRow::greedy(17) };
    Row { params, biases: Vec::new(), counts: Vec::new() }
}

pub(crate) fn with(row: Row, change: impl Fn(&mut SampleRow)) -> Row {
    let mut row = row;
    change(&mut row.params);
    row
}

/// Bias, mask and penalties, as the CPU sampler applies them.
pub(crate) fn adjusted(logits: &[f32], row: &Row, mask: Option<&[u32]>) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for (token, logit) in logits.iter_mut().enumerate() {
        if mask.is_some_and(|mask| mask[token / 32] >> (token % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
    for bias in &row.biases {
        logits[bias.token as usize] += bias.bias;
    }
    let p = &row.params;
    for seen in &row.counts {
        let logit = &mut logits[seen.token as usize];
        *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
        if seen.count > 0 {
            *logit -= p.frequency_penalty * seen.count as f32 + p.presence_penalty;
        }
    }
    logits
}

/// Uniform in [0, 1), as on the CPU.
pub(crate) fn uniform(seed: u64, position: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let key = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = mix(key.wrapping_add((u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The token of one row, by sorting; `None` where no token can be drawn.
pub(crate) fn expected(logits: &[f32], row: &Row, mask: Option<&[u32]>) -> Option<u32> {
    let p = &row.params;
    let valid = |logits: &[f32]| logits.iter().all(|l| *l < f32::INFINITY) && logits.iter().any(|l| l.is_finite());
    let changed = adjusted(logits, row, mask);
    if !valid(logits) || !valid(&changed) {
        return None;
    }
    let top = changed.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !(1.0 / p.temperature).is_finite() {
        return changed.iter().position(|logit| *logit == top).map(|token| token as u32);
    }
    let weight = |logit: &f32| {
        let x = (logit - top) * (1.0 / p.temperature);
        let weight = if x < -87.0 { 0.0 } else { x.exp() };
        if weight >= p.min_p { weight } else { 0.0 }
    };
    let weights: Vec<f32> = changed.iter().map(weight).collect();
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&token| weights[token as usize] > 0.0).collect();
    // Of each prefix of the order.
    let masses = |order: &[u32]| -> Vec<f64> {
        let weights = order.iter().map(|&token| f64::from(weights[token as usize]));
        weights
            .scan(0.0, |sum, weight| {
                *sum += weight;
                Some(*sum)
            })
            .collect()
    };
    let vocab = logits.len() as u32;
    if (p.top_k != 0 && p.top_k < vocab) || p.top_p < 1.0 || p.min_p > 0.0 {
        order.sort_by(|a, b| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b)));
        order.truncate(if p.top_k == 0 { order.len() } else { p.top_k as usize });
        let upto = masses(&order);
        let target = upto[upto.len() - 1] * f64::from(p.top_p);
        order.truncate(upto.iter().position(|mass| *mass >= target).map_or(order.len(), |last| last + 1));
    }
    let upto = masses(&order);
    let target = uniform(p.seed, p.position) * upto[upto.len() - 1];
    let drawn = upto.iter().position(|mass| *mass > target);
    Some(order[drawn.unwrap_or(order.len() - 1)])
}
