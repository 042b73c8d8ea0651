//! Sampling against a reference that sorts, with the semantics of the server's CPU sampler.
#![allow(clippy::unwrap_used)]

mod support;

use kvern_cuda_abi::{NONE, Ptr, SEEN_COUNT_MAX, SampleParams, SampleRow, TokenBias, TokenCount, launch};
use kvern_cuda_shim::{Buffer, Launch};
use support::sampling::{Row, expected, plain, with};
use support::*;

const TOP_STRIDE: usize = 5;

/// Tokens, log-probabilities as bits, and top tokens of every row.
type Sampled = (Vec<u32>, Vec<u32>, Vec<u32>);

/// Rows that have seen tokens begin anew, in slots of another order.
fn sample(logits: &[f32], vocab: usize, rows: &[Row], mask: Option<&[u32]>) -> Sampled {
    let rows: Vec<Row> = rows
        .iter()
        .enumerate()
        .map(|(at, row)| match row.counts.is_empty() {
            true => row.clone(),
            false => with(row.clone(), |p| (p.seen_slot, p.seen_anew) = ((rows.len() - 1 - at) as u32, 1)),
        })
        .collect();
    // What was there is another's.
    let seen: Vec<u16> = (0..rows.len() * vocab).map(|at| at as u16 | 1).collect();
    sample_seen(logits, vocab, &rows, mask, &seen).0
}

/// Over slots that hold `seen`; gives what they hold then.
fn sample_seen(logits: &[f32], vocab: usize, rows: &[Row], mask: Option<&[u32]>, seen: &[u16]) -> (Sampled, Vec<u16>) {
    sample_planted(logits, vocab, rows, mask, seen, 0).unwrap()
}

/// With a fault in every launch.
fn sample_planted(
    logits: &[f32],
    vocab: usize,
    rows: &[Row],
    mask: Option<&[u32]>,
    seen: &[u16],
    fault: u32,
) -> Result<(Sampled, Vec<u16>), String> {
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
        let zeros = vec![0; rows.len() * launch::SAMPLE_COUNTERS];
        let numbers =
            [Buffer::<u32>::poisoned(rows.len()), Buffer::of(&vec![NONE; rows.len() * TOP_STRIDE]), Buffer::of(&zeros)];
        let row_work = [launch::sample_partials(vocab, TOP_STRIDE), 2 * launch::SAMPLE_BINS, launch::SAMPLE_LISTED];
        let work = row_work.map(|len| Buffer::<u64>::poisoned(rows.len() * len));
        let seen = Buffer::of(seen);
        let params = SampleParams {
            logits: values[0].ptr(),
            scratch: values[1].ptr(),
            rows: lists.0.ptr(),
            biases: lists.1.ptr(),
            counts: lists.2.ptr(),
            mask: lists.3.as_ref().map_or(Ptr::NULL, Buffer::ptr),
            tokens: numbers[0].ptr(),
            logprobs: values[2].ptr(),
            top_tokens: numbers[1].ptr(),
            seen: seen.ptr(),
            partials: work[0].ptr(),
            bins: work[1].ptr(),
            listed: work[2].ptr(),
            counters: numbers[2].ptr(),
            vocab: vocab as u32,
            top_stride: TOP_STRIDE as u32,
        };
        (Memory { _lists: lists, values, numbers, _work: work, seen }, params)
    };
    let read = |memory: &Memory| {
        let Memory { values, numbers, seen, .. } = memory;
        let unchanged = bits(&values[0]) == logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        assert!(unchanged, "the logits are as they were");
        if fault == 0 {
            assert!(
                numbers[2].values().iter().all(|&counter| counter == 0),
                "counters are as the next step needs them"
            );
        }
        ((numbers[0].values(), bits(&values[2]), numbers[1].values()), seen.values())
    };
    let shape = Launch::new(rows.len(), launch::SAMPLE_THREADS).rows(launch::sample_parts(vocab)).planted(fault);
    run_all(&["kvern_sample_best", "kvern_sample_weigh", "kvern_sample_select"].map(|name| (name, shape)), make, read)
}

struct Memory {
    _lists: (Buffer<SampleRow>, Buffer<TokenBias>, Buffer<TokenCount>, Option<Buffer<u32>>),
    /// Logits, scratch, log-probabilities.
    values: [Buffer<f32>; 3],
    /// Tokens, likeliest tokens, counters.
    numbers: [Buffer<u32>; 3],
    _work: [Buffer<u64>; 3],
    seen: Buffer<u16>,
}

/// Every row over its own logits, one step.
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

/// Rows of several blocks, in which bins, lists and ties span blocks; two values are more equal weights than a list takes.
#[test]
fn rows_of_several_blocks_match() {
    let normal = |random: &mut Random, _: usize| (random.unit() + random.unit() + random.unit()) * 4.0;
    let wide = |random: &mut Random, _: usize| random.unit() * 60.0;
    let filters: [fn(&mut SampleRow); 7] = [
        |p| p.temperature = 0.0,
        |_| (),
        |p| p.top_k = 12_000,
        |p| p.top_p = 0.95,
        |p| p.min_p = 1e-6,
        |p| (p.top_k, p.top_p) = (50, 0.7),
        |p| (p.top_k, p.top_p, p.min_p) = (9000, 0.99, 1e-3),
    ];
    let rows: Vec<Row> = (0..)
        .zip(filters)
        .flat_map(|(at, filter)| {
            [0.7, 1.6].map(|temperature| with(with(plain(at * 5 + 1, temperature), |p| p.position = at as u32), filter))
        })
        .collect();
    for vocab in [20_000, 17_003] {
        check(vocab, &rows, normal, false);
        check(vocab, &rows, wide, false);
        check(vocab, &rows, |random, _| random.below(40) as f32 * 0.25, true);
        check(vocab, &rows, |random, _| random.below(2) as f32, false);
    }
}

/// Penalties, biases and log-probabilities of a row of several blocks.
#[test]
fn lists_span_blocks() {
    const VOCAB: usize = 18_000;
    let tokens = || (0..VOCAB as u32).step_by(1237);
    let mut row = with(plain(3, 0.0), |p| (p.repetition_penalty, p.frequency_penalty) = (1.3, 0.2));
    row.counts = tokens().map(|token| TokenCount { token, count: token % 5 }).collect();
    row.biases = tokens().map(|token| TokenBias { token, bias: (token % 7) as f32 }).collect();
    let hot = with(row.clone(), |p| (p.temperature, p.top_k) = (0.9, 30));
    check(VOCAB, &[row, hot], |random, _| random.unit() * 6.0, false);
    let logits: Vec<f32> = (0..VOCAB).map(|at| if at % 6000 == 11 { 3.0 + at as f32 / 1e5 } else { 0.0 }).collect();
    let filters: [fn(&mut SampleRow); 3] = [|p| p.temperature = 0.0, |_| (), |p| p.top_p = 0.4];
    for filter in filters {
        let row = with(plain(5, 0.9), |p| (p.wants_logprob, p.top_logprobs) = (1, 4));
        let (tokens, logprobs, top) = sample(&logits, VOCAB, &[with(row, filter)], None);
        assert_eq!(top[..4], [12_011, 6011, 11, 0]);
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let of = |token: &u32| (f64::from(logits[*token as usize]) - total.ln()) as f32;
        let expected: Vec<f32> = tokens.iter().chain(&top[..4]).map(of).collect();
        compare("logprobs", &logprobs[..5], &expected, 1e-6, 1e-6).unwrap();
    }
}

/// A row that ends before its blocks have, and a plan for the wrong bins: the first shows, the second costs time alone.
#[test]
fn planted_faults() {
    const VOCAB: usize = 20_000;
    let mut random = Random(77);
    let logits: Vec<f32> = (0..VOCAB).map(|_| random.unit() * 9.0).collect();
    let sampled = |row: &Row, fault: u32| {
        sample_planted(&logits, VOCAB, std::slice::from_ref(row), None, &[], fault).map(|((tokens, ..), _)| tokens[0])
    };
    for row in [plain(4, 0.0), with(plain(4, 1.1), |p| p.top_p = 0.9), with(plain(9, 1.1), |p| p.top_k = 700)] {
        let expected = expected(&logits, &row, None);
        assert_eq!(sampled(&row, 0).ok(), expected);
        assert_eq!(sampled(&row, TABLE_OFF_BY_ONE).ok(), expected);
    }
    assert_ne!(sampled(&plain(4, 0.0), EARLY_RELEASE).ok(), expected(&logits, &plain(4, 0.0), None));
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

/// What a slot holds for these tokens.
fn slot(vocab: usize, counts: &[TokenCount]) -> Vec<u16> {
    let mut slot = vec![0; vocab];
    for TokenCount { token, count } in counts {
        slot[*token as usize] = if *count == 0 { 0x8000 } else { (*count).min(SEEN_COUNT_MAX) as u16 };
    }
    slot
}

/// What is sampled is seen by the next launch, without a list; a slot is its row's alone.
#[test]
fn seen_tokens_go_on_in_their_slot() {
    const VOCAB: usize = 70;
    let penalties = |p: &mut SampleRow| {
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.4, 0.5, 0.3);
    };
    let prompt: Vec<TokenCount> = [(3, 0), (9, 2), (40, 0)].map(|(token, count)| TokenCount { token, count }).to_vec();
    let mut rows = [with(plain(5, 0.0), penalties), plain(6, 0.9), with(plain(7, 0.8), penalties)];
    (rows[0].params.seen_slot, rows[2].params.seen_slot) = (2, 0);
    // Row 2 has seen nothing when it begins.
    rows[0].counts = prompt;
    let mut seen = vec![0xabcd; 3 * VOCAB];
    let mut random = Random(8);
    let mut repeats = 0;
    for step in 0..24 {
        // Few likely tokens, so that they come again.
        let mut logit = |at: usize| random.unit() * 2.0 + if at.is_multiple_of(9) { 3.0 } else { 0.0 };
        let logits: Vec<f32> = (0..3 * VOCAB).map(&mut logit).collect();
        let launched = rows.clone().map(|row| Row {
            counts: if step == 0 { row.counts.clone() } else { Vec::new() },
            ..with(row, |p| (p.seen_anew, p.position) = (u32::from(step == 0), 17 + step))
        });
        let ((tokens, _, _), after) = sample_seen(&logits, VOCAB, &launched, None, &seen);
        for (at, row) in rows.iter_mut().enumerate() {
            row.params.position = 17 + step;
            let expected = expected(&logits[at * VOCAB..][..VOCAB], row, None);
            assert_eq!(Some(tokens[at]), expected, "step {step}, row {at}");
            if row.params.seen_slot == NONE {
                continue;
            }
            match row.counts.iter_mut().find(|entry| entry.token == tokens[at]) {
                Some(entry) => (entry.count, repeats) = (entry.count + 1, repeats + 1),
                None => row.counts.push(TokenCount { token: tokens[at], count: 1 }),
            }
            let own = &after[row.params.seen_slot as usize * VOCAB..][..VOCAB];
            // Whether the prompt has it too is not asked of a token that the output has.
            let without_prompt: Vec<u16> =
                own.iter().map(|&seen| if seen > 0x8000 { seen & 0x7fff } else { seen }).collect();
            assert_eq!(without_prompt, slot(VOCAB, &row.counts), "step {step}, row {at}");
        }
        assert_eq!(after[VOCAB..2 * VOCAB], [0xabcd; VOCAB], "nobody's slot is as it was");
        seen = after;
    }
    assert!(repeats > 4, "tokens came again: {repeats}");
}

/// A count ends at its most; a row without a token adds none, but takes its list.
#[test]
fn seen_tokens_at_their_limits() {
    const VOCAB: usize = 40;
    let counts: Vec<TokenCount> =
        [(7, 40_000), (8, 32_766), (9, 1)].map(|(token, count)| TokenCount { token, count }).to_vec();
    let mut row = with(plain(1, 0.0), |p| (p.frequency_penalty, p.seen_slot, p.seen_anew) = (1e-4, 0, 1));
    row.counts.clone_from(&counts);
    let likeliest = |token: u32| {
        let mut row = row.clone();
        row.biases = vec![TokenBias { token, bias: 100.0 }];
        row
    };
    let logits = [0.25; VOCAB];
    for (token, count) in [(7, SEEN_COUNT_MAX), (8, SEEN_COUNT_MAX), (9, 2), (0, 1)] {
        let ((tokens, _, _), seen) = sample_seen(&logits, VOCAB, &[likeliest(token)], None, &[9; VOCAB]);
        let mut after = slot(VOCAB, &counts);
        after[token as usize] = count as u16;
        assert_eq!((tokens[0], seen), (token, after));
    }
    let ((tokens, _, _), seen) = sample_seen(&[f32::NAN; VOCAB], VOCAB, &[row], None, &[9; VOCAB]);
    assert_eq!((tokens[0], seen), (NONE, slot(VOCAB, &counts)));
    // So much of one, which counts as the most: 3.2767 less.
    let mut least = with(plain(1, 0.0), |p| (p.frequency_penalty, p.seen_slot, p.seen_anew) = (1e-4, 0, 1));
    least.counts = counts[..1].to_vec();
    let edge = |ahead: f32| {
        let mut logits = [0.0; VOCAB];
        logits[7] = ahead;
        sample_seen(&logits, VOCAB, std::slice::from_ref(&least), None, &[9; VOCAB]).0.0[0]
    };
    assert_eq!((edge(3.2766), edge(3.2768)), (0, 7));
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
