//! Sampling against a reference that sorts, with the semantics of the server's CPU sampler.
#![allow(clippy::unwrap_used)]

mod support;

use kvern_cuda_abi::{NONE, Ptr, SampleParams, SampleRow, TokenBias, TokenCount, launch};
use kvern_cuda_shim::{Buffer, Launch};
use support::sampling::{Row, expected, plain, with};
use support::*;

const TOP_STRIDE: usize = 5;

/// Tokens, log-probabilities as bits, and top tokens of every row.
type Sampled = (Vec<u32>, Vec<u32>, Vec<u32>);

fn sample(logits: &[f32], vocab: usize, rows: &[Row], mask: Option<&[u32]>) -> Sampled {
    let (mut biases, mut counts) = (Vec::new(), Vec::new());
    let params: Vec<SampleRow> = rows
        .iter()
        .map(|row| {
            let (bias_first, count_first) = (biases.len() as u32, counts.len() as u32);
            biases.extend_from_slice(&row.biases);
            counts.extend_from_slice(&row.counts);
            let (bias_count, count_count) = (row.biases.len() as u32, row.counts.len() as u32);
            SampleRow { bias_first, bias_count, count_first, count_count, ..row.params }
        })
        .collect();
    let make = || {
        let lists = (Buffer::of(&params), Buffer::of(&biases), Buffer::of(&counts), mask.map(Buffer::of));
        let values =
            [Buffer::of(logits), Buffer::poisoned(logits.len()), Buffer::poisoned(rows.len() * (TOP_STRIDE + 1))];
        let tokens = [Buffer::<u32>::poisoned(rows.len()), Buffer::of(&vec![NONE; rows.len() * TOP_STRIDE])];
        let params = SampleParams {
            logits: values[0].ptr(),
            scratch: values[1].ptr(),
            rows: lists.0.ptr(),
            biases: lists.1.ptr(),
            counts: lists.2.ptr(),
            mask: lists.3.as_ref().map_or(Ptr::NULL, Buffer::ptr),
            tokens: tokens[0].ptr(),
            logprobs: values[2].ptr(),
            top_tokens: tokens[1].ptr(),
            vocab: vocab as u32,
            top_stride: TOP_STRIDE as u32,
        };
        ((lists, values, tokens), params)
    };
    let read = |memory: &(_, [Buffer<f32>; 3], [Buffer<u32>; 2])| {
        let (_, values, tokens): &((_, _, _, _), _, _) = memory;
        let unchanged = bits(&values[0]) == logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        assert!(unchanged, "the logits are as they were");
        (tokens[0].values(), bits(&values[2]), tokens[1].values())
    };
    run_sample(rows.len(), make, read)
}

fn run_sample<M>(rows: usize, make: impl Fn() -> (M, SampleParams), read: impl Fn(&M) -> Sampled) -> Sampled {
    run("kvern_sample", Launch::new(rows, launch::SAMPLE_THREADS), make, read).unwrap()
}

/// Every row over its own logits, one launch.
fn check(vocab: usize, rows: &[Row], logits: impl Fn(&mut Random, usize) -> f32, mask: bool) {
    let mut random = Random(vocab as u64 + rows.len() as u64);
    let all: Vec<f32> = (0..rows.len() * vocab).map(|at| logits(&mut random, at % vocab)).collect();
    let words = vocab.div_ceil(32);
    let mask: Option<Vec<u32>> = mask.then(|| (0..rows.len() * words).map(|_| random.bits() as u32).collect());
    let (tokens, _, _) = sample(&all, vocab, rows, mask.as_deref());
    for (at, (row, token)) in rows.iter().zip(tokens).enumerate() {
        let own = mask.as_ref().map(|mask| &mask[at * words..][..words]);
        let expected = expected(&all[at * vocab..][..vocab], row, own).unwrap_or(NONE);
        assert_eq!(token, expected, "row {at} of {vocab}: {:?}", row.params);
    }
}

/// Rows that differ in seed alone.
fn seeds(count: u64, row: &Row) -> Vec<Row> {
    (0..count).map(|seed| with(row.clone(), |params| params.seed = seed * 77 + 1)).collect()
}

#[test]
fn draws_match_the_sorting_reference() {
    let normal = |random: &mut Random, _: usize| (random.unit() + random.unit() + random.unit()) * 4.0;
    // Few distinct values: ties everywhere.
    let tied = |random: &mut Random, _: usize| random.below(4) as f32;
    let filters: [fn(&mut SampleRow); 7] = [
        |_| (),
        |p| p.top_k = 40,
        |p| p.top_p = 0.9,
        |p| p.min_p = 0.05,
        |p| (p.top_k, p.top_p) = (50, 0.7),
        |p| (p.top_k, p.top_p, p.min_p) = (3, 0.99, 0.2),
        |p| p.top_k = 1,
    ];
    for filter in filters {
        let row = with(plain(0, 0.8), filter);
        for (vocab, count) in [(1000, 16), (33, 16), (5003, 3)] {
            check(vocab, &seeds(count, &row), normal, false);
            check(vocab, &seeds(count, &row), tied, false);
        }
        check(700, &seeds(12, &row), normal, true);
    }
    check(1, &seeds(2, &plain(0, 1.0)), normal, false);
}

#[test]
fn greedy_and_penalties_match() {
    let normal = |random: &mut Random, _: usize| random.unit() * 3.0;
    let mut row = with(plain(3, 0.0), |p| {
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.3, 0.4, 0.2);
    });
    row.counts = (0..900).step_by(2).map(|token| TokenCount { token, count: token % 5 }).collect();
    row.biases = (0..900).step_by(3).map(|token| TokenBias { token, bias: (token % 7) as f32 * 0.3 - 1.0 }).collect();
    row.biases[4].bias = f32::NEG_INFINITY;
    let hot = with(row.clone(), |p| (p.temperature, p.top_p) = (1.1, 0.8));
    check(1000, &[row.clone(), hot.clone(), plain(1, 0.0), with(row, |p| p.temperature = 1e-40), hot], normal, false);
    check(64, &[plain(1, 0.0)], |_, at| if at % 2 == 0 { 1.0 } else { 0.5 }, false);
    check(40, &[plain(1, 0.0)], |_, at| if at % 2 == 0 { -0.0 } else { 0.0 }, false);
}

#[test]
fn rows_without_a_token_are_flagged() {
    const VOCAB: usize = 100;
    let bad = [f32::NAN, f32::INFINITY, -f32::NAN];
    for (at, value) in bad.into_iter().enumerate() {
        let mut logits = vec![0.5; 3 * VOCAB];
        logits[VOCAB + 30 * (at + 1)] = value;
        let rows = [plain(1, 0.0), with(plain(2, 0.7), |p| p.wants_logprob = 1), plain(3, 0.7)];
        let (tokens, logprobs, _) = sample(&logits, VOCAB, &rows, None);
        assert_eq!((tokens[1], tokens[0] != NONE, tokens[2] != NONE), (NONE, true, true));
        assert!(f32::from_bits(logprobs[TOP_STRIDE + 1]).is_nan());
    }
    let (tokens, _, _) = sample(&[f32::NEG_INFINITY; VOCAB], VOCAB, &[plain(1, 1.0)], None);
    assert_eq!(tokens, [NONE]);
    let (tokens, _, _) = sample(&[1.0; VOCAB], VOCAB, &[plain(1, 1.0)], Some(&[0; 4]));
    assert_eq!(tokens, [NONE]);
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    const VOCAB: usize = 1500;
    let mut random = Random(4);
    let logits: Vec<f32> = (0..VOCAB).map(|_| (random.unit() * 40.0).round() * 0.25).collect();
    let mut row = with(plain(5, 0.9), |p| (p.wants_logprob, p.top_logprobs) = (1, 4));
    row.biases = vec![TokenBias { token: 3, bias: 2.0 }];
    let (tokens, logprobs, top) = sample(&logits, VOCAB, &[row], None);
    let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let logprob = |token: u32| (f64::from(logits[token as usize]) - total.ln()) as f32;
    let mut order: Vec<u32> = (0..VOCAB as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    assert_eq!(top[..4], order[..4]);
    assert_eq!(top[4], NONE);
    let expected: Vec<f32> = tokens.iter().chain(&order[..4]).map(|&token| logprob(token)).collect();
    // e^x in f32 is off by some 2^-23 of each weight, and the sum leaves out less than 2^-40 per token.
    compare("logprobs", &logprobs[..5], &expected, 1e-6, 1e-6).unwrap();
    assert!(f32::from_bits(logprobs[5]).is_nan());
}
