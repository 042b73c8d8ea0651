//! Logits to tokens, against a reference that sorts.

use kvern_kernels::{
    DeviceSampler, Element, Format, Precision, SampleBias, SampleCount, StepInputs, Tensor, Weight, ops,
};

use super::matrices::{Random, view};
use super::support::sampling::{Row, expected, plain, with};
use super::{Rig, close};

const TOP_MAX: usize = 4;

/// Tokens, log-probabilities, and likeliest tokens of every row.
struct Sampled {
    tokens: Vec<Option<u32>>,
    logprobs: Vec<f32>,
    top: Vec<Vec<(u32, f32)>>,
}

fn sample(rig: &Rig, sampler: &mut DeviceSampler, logits: &Tensor, rows: &[Row]) -> Sampled {
    sampler.begin();
    for (at, Row { params, biases, counts }) in rows.iter().enumerate() {
        // Of the same position every time, so that each begins anew.
        let sequence = (!counts.is_empty()).then_some(at as u64);
        sampler.push(*params, biases.iter().copied(), sequence, counts.iter().copied()).unwrap();
    }
    sampler.upload().unwrap();
    sampler.launch(&rig.device, logits).unwrap();
    let sampled = sampler.finish().unwrap();
    let (tokens, logprobs) = sampled.iter().map(|row| (row.token, row.logprob)).unzip();
    let top = |(at, row): (usize, &Row)| sampler.top(at, row.params.top_logprobs as usize).to_vec();
    Sampled { tokens, logprobs, top: rows.iter().enumerate().map(top).collect() }
}

/// Samples every row over its own logits and compares with the reference.
fn check(rig: &Rig, sampler: &mut DeviceSampler, logits: &[f32], rows: &[Row]) {
    let vocab = logits.len() / rows.len();
    let sampled = sample(rig, sampler, &rig.tensor(vocab, logits), rows);
    assert_eq!(sampled.tokens.len(), rows.len());
    for (at, (row, logits)) in rows.iter().zip(logits.chunks(vocab)).enumerate() {
        let params = &row.params;
        assert_eq!(sampled.tokens[at], expected(logits, row, None), "row {at} of {vocab}: {params:?}");
        let Some(token) = sampled.tokens[at] else { continue };
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let logprob = |token: u32| (f64::from(logits[token as usize]) - total.ln()) as f32;
        // e^x in f32 is off by some 2^-23 of each weight, and the sum leaves out less than 2^-40 per token.
        if params.wants_logprob != 0 {
            close("logprob", &[sampled.logprobs[at]], &[logprob(token)], 1e-6, 1e-6);
        }
        let mut order: Vec<u32> = (0..vocab as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let top = &order[..if params.wants_logprob == 0 { 0 } else { params.top_logprobs as usize }];
        let (tokens, logprobs): (Vec<u32>, Vec<f32>) = sampled.top[at].iter().take(top.len()).copied().unzip();
        assert_eq!(tokens, top, "row {at}: likeliest tokens");
        let expected: Vec<f32> = top.iter().map(|&token| logprob(token)).collect();
        close("likeliest tokens' logprobs", &logprobs, &expected, 1e-6, 1e-6);
    }
}

fn sampler(rig: &Rig, rows_max: usize, vocab: usize) -> DeviceSampler {
    let tokens = StepInputs::new(&rig.device, 1, rows_max).unwrap().sampled_tokens();
    DeviceSampler::new(&rig.device, tokens, rows_max, vocab, TOP_MAX).unwrap().unwrap()
}

/// Biases of every third token, one of them that forbids, and counts of every second one.
fn edited(row: Row, vocab: u32) -> Row {
    let mut row = with(row, |p| (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.3, 0.4, 0.2));
    row.counts = (0..vocab).step_by(2).map(|token| SampleCount { token, count: token % 5 }).collect();
    row.biases =
        (0..vocab).step_by(3).map(|token| SampleBias { token, bias: (token % 7) as f32 * 0.3 - 1.0 }).collect();
    row.biases[4].bias = f32::NEG_INFINITY;
    row
}

fn logprobs(row: Row, top: u32) -> Row {
    with(row, |p| (p.wants_logprob, p.top_logprobs) = (1, top))
}

#[test]
fn rows_of_all_kinds() {
    let rig = Rig::new(Element::F32);
    let filters: [fn(&mut kvern_kernels::SampleRow); 8] = [
        |p| p.temperature = 0.0,
        |_| (),
        |p| p.top_k = 40,
        |p| p.top_p = 0.9,
        |p| p.min_p = 0.05,
        |p| (p.top_k, p.top_p) = (50, 0.7),
        |p| (p.top_k, p.top_p, p.min_p) = (3, 0.99, 0.2),
        |p| p.top_k = 1,
    ];
    for vocab in [1000, 33, 5003] {
        let mut sampler = sampler(&rig, 32, vocab);
        let mut random = Random(vocab as u64);
        // The same sampler for several steps, and rows that differ in what they ask for.
        for step in 0..3 {
            let row = |at: usize| {
                let row = with(plain((step * 100 + at) as u64, 0.8), filters[at % filters.len()]);
                match at % 5 {
                    0 => edited(row, vocab as u32),
                    1 => logprobs(row, 4),
                    2 => logprobs(edited(row, vocab as u32), at as u32 % 4),
                    _ => row,
                }
            };
            let rows: Vec<Row> = (0..[32, 1, 19][step]).map(row).collect();
            let logits: Vec<f32> =
                (0..rows.len() * vocab).map(|_| (random.unit() + random.unit() + random.unit()) * 4.0).collect();
            check(&rig, &mut sampler, &logits, &rows);
        }
    }
}

/// More biases and counts than one launch has room for: the step is several launches, over the same logits.
#[test]
fn entries_for_several_launches() {
    const VOCAB: usize = 180_000;
    let rig = Rig::new(Element::F32);
    let all = |row: Row| Row {
        biases: (0..VOCAB as u32).map(|token| SampleBias { token, bias: (token % 11) as f32 * 0.1 }).collect(),
        counts: (0..VOCAB as u32).map(|token| SampleCount { token, count: token % 3 }).collect(),
        params: with(row, |p| p.presence_penalty = 0.5).params,
    };
    let rows = [
        all(plain(1, 0.0)),
        logprobs(plain(2, 0.0), 2),
        all(logprobs(with(plain(3, 0.7), |p| p.top_k = 20), 3)),
        all(with(plain(4, 0.9), |p| p.top_k = 5)),
        plain(5, 0.0),
    ];
    let mut random = Random(2);
    let logits: Vec<f32> = (0..rows.len() * VOCAB).map(|_| random.unit() * 8.0).collect();
    let mut sampler = sampler(&rig, rows.len(), VOCAB);
    check(&rig, &mut sampler, &logits, &rows);
    let Some(shim) = &rig.shim else { return };
    let launches = shim.log().iter().filter(|line| line.contains("kvern_sample_best")).count();
    assert_eq!(launches, 2, "{:?}", shim.log());
}

/// A step follows the one before it before that one's tokens are known: nothing of them comes from the host.
#[test]
fn seen_tokens_stay_on_the_device() {
    const VOCAB: usize = 300;
    const STEPS: u32 = 20;
    let rig = Rig::new(Element::F32);
    let penalties = |row: Row| with(row, |p| (p.repetition_penalty, p.frequency_penalty) = (1.5, 0.6));
    let prompt: Vec<SampleCount> =
        [(3, 0), (150, 1), (299, 0)].map(|(token, count)| SampleCount { token, count }).to_vec();
    let mut rows = [penalties(plain(1, 0.0)), plain(2, 0.7), penalties(plain(3, 0.9)), penalties(plain(4, 0.0))];
    rows[0].counts = prompt;
    let at = |row: &Row, step: u32| with(row.clone(), |p| p.position = 17 + step);
    let mut random = Random(12);
    // Few distinct likely tokens, so that they come again.
    let mut make = || -> Vec<f32> {
        (0..rows.len() * VOCAB).map(|at| random.unit() + if at % 31 == 0 { 2.0 } else { 0.0 }).collect()
    };
    let logits: Vec<Vec<f32>> = (0..STEPS).map(|_| make()).collect();
    let tensors: Vec<Tensor> = logits.iter().map(|logits| rig.tensor(VOCAB, logits)).collect();
    let mut sampler = sampler(&rig, rows.len(), VOCAB);
    let begin = |sampler: &mut DeviceSampler, rows: &[Row; 4], step: u32| {
        sampler.begin();
        for (number, row) in rows.iter().enumerate() {
            let Row { params, biases, counts } = at(row, step);
            let sequence = (number != 1).then_some(100 + number as u64);
            assert!(sequence.is_none_or(|id| sampler.knows(id, params.position) == (step > 0)));
            // Nobody asks for counts after the first step: these would be wrong.
            sampler.push(params, biases.into_iter(), sequence, counts.into_iter()).unwrap();
        }
        sampler.upload().unwrap();
        sampler.launch(&rig.device, &tensors[step as usize]).unwrap();
    };
    let begun = rows.clone();
    begin(&mut sampler, &begun, 0);
    let mut repeats = 0;
    for step in 0..STEPS {
        if step + 1 < STEPS {
            begin(&mut sampler, &begun, step + 1);
        }
        let tokens: Vec<Option<u32>> = sampler.finish().unwrap().iter().map(|row| row.token).collect();
        for (number, row) in rows.iter_mut().enumerate() {
            let own = &logits[step as usize][number * VOCAB..][..VOCAB];
            assert_eq!(tokens[number], expected(own, &at(row, step), None), "step {step}, row {number}");
            let token = tokens[number].unwrap();
            match row.counts.iter_mut().find(|entry| entry.token == token) {
                _ if number == 1 => {}
                Some(entry) => (entry.count, repeats) = (entry.count + 1, repeats + 1),
                None => row.counts.push(SampleCount { token, count: 1 }),
            }
        }
    }
    assert!(repeats > 10, "tokens came again: {repeats}");
}

#[test]
fn rows_without_a_token_leave_their_neighbours_alone() {
    const VOCAB: usize = 100;
    let rig = Rig::new(Element::F32);
    let mut sampler = sampler(&rig, 7, VOCAB);
    let mut logits: Vec<f32> = Random(3).floats(7 * VOCAB);
    for (row, value) in [(1, f32::NAN), (3, f32::INFINITY), (5, -f32::NAN)] {
        logits[row * VOCAB + 17 * row] = value;
    }
    logits[4 * VOCAB..5 * VOCAB].fill(f32::NEG_INFINITY);
    let rows: Vec<Row> = (0..7).map(|at| logprobs(plain(at, if at % 2 == 0 { 0.7 } else { 0.0 }), 2)).collect();
    check(&rig, &mut sampler, &logits, &rows);
    let tensor = rig.tensor(VOCAB, &logits);
    let found: Vec<bool> = sample(&rig, &mut sampler, &tensor, &rows).tokens.iter().map(Option::is_some).collect();
    assert_eq!(found, [true, false, true, false, false, false, true]);
    // The next step does not remember them.
    check(&rig, &mut sampler, &Random(4).floats(7 * VOCAB), &rows);
}

/// Logits of F32 that a product leaves beside activations of 16 bits.
#[test]
fn logits_of_a_product() {
    const VOCAB: usize = 64;
    for element in [Element::BF16, Element::F16] {
        let rig = Rig::new(element);
        let mut identity = vec![0.0f32; VOCAB * VOCAB];
        identity.iter_mut().step_by(VOCAB + 1).for_each(|value| *value = 1.0);
        let bytes: Vec<u8> = identity.iter().flat_map(|value| value.to_le_bytes()).collect();
        let head = Weight::pack(&rig.device, &[view(Format::F32, VOCAB, VOCAB, &bytes)], Precision::AsStored).unwrap();
        let rows = [plain(1, 0.0), with(plain(2, 0.9), |p| p.top_k = 7), edited(plain(3, 0.5), VOCAB as u32)];
        let values = rig.values(&mut Random(5), rows.len() * VOCAB, 6.0);
        let (x, mut logits) = (rig.tensor(VOCAB, &values), Tensor::f32(&rig.device, rows.len(), VOCAB).unwrap());
        ops::matmul(&rig.device, &x, &head, None, &mut logits).unwrap();
        let found = sample(&rig, &mut sampler(&rig, 3, VOCAB), &logits, &rows).tokens;
        let expected: Vec<_> =
            rows.iter().zip(values.chunks(VOCAB)).map(|(row, own)| expected(own, row, None)).collect();
        assert_eq!(found, expected, "{element}");
    }
}
