#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn params() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
        stop_tokens: vec![],
        min_tokens: 0,
        logit_bias: vec![],
        logprobs: None,
    }
}

fn draw_token(logits: &[f32], params: &SamplingParams, counts: &TokenCounts, position: u32) -> Sampled {
    sample(logits, params, counts, position, &mut Scratch::new(logits.len())).sampled
}

/// Share of each token over many positions.
fn frequencies(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    const DRAWS: u32 = 40_000;
    let mut scratch = Scratch::new(logits.len());
    let mut counts = vec![0.0; logits.len()];
    for position in 0..DRAWS {
        match sample(logits, params, &TokenCounts::default(), position, &mut scratch).sampled {
            Sampled::Token(t) => counts[t as usize] += 1.0 / f64::from(DRAWS),
            Sampled::Failed => panic!("finite logits"),
        }
    }
    counts
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// The plain definition by a full sort: which tokens survive min-p, top-k and top-p, and their renormalized mass.
fn reference(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut p = softmax(logits, params.temperature);
    let max = p.iter().copied().fold(0.0, f64::max);
    let mut order: Vec<usize> = (0..p.len()).filter(|i| p[*i] >= f64::from(params.min_p) * max).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let mass: f64 = order.iter().map(|i| p[*i]).sum();
    let mut sum = 0.0;
    let kept = order
        .iter()
        .take_while(|i| {
            let take = sum < f64::from(params.top_p) * mass;
            sum += p[**i];
            take
        })
        .count();
    order.truncate(kept.max(1));
    let mass: f64 = order.iter().map(|i| p[*i]).sum();
    for (i, value) in p.iter_mut().enumerate() {
        *value = if order.contains(&i) { *value / mass } else { 0.0 };
    }
    p
}

#[test]
fn draws_follow_the_reference_distribution() {
    let logits: Vec<f32> = (0..40).map(|i| ((i * 37 % 40) as f32) / 9.0).collect();
    let cases = [
        params(),
        SamplingParams { temperature: 0.5, ..params() },
        SamplingParams { temperature: 1.7, top_p: 0.6, ..params() },
        SamplingParams { top_k: 5, ..params() },
        SamplingParams { top_k: 9, top_p: 0.5, ..params() },
        SamplingParams { min_p: 0.3, ..params() },
        SamplingParams { min_p: 0.05, top_p: 0.8, top_k: 30, ..params() },
        SamplingParams { top_p: 0.000_1, ..params() },
        SamplingParams { top_p: 0.999_9, temperature: 1e6, ..params() },
    ];
    for case in cases {
        let (found, want) = (frequencies(&logits, &case), reference(&logits, &case));
        for (token, (f, w)) in found.iter().zip(&want).enumerate() {
            assert!((f - w).abs() < 0.012, "{case:?}: token {token} drawn {f:.4}, expected {w:.4}");
            assert!(*w > 0.0 || *f == 0.0, "{case:?}: token {token} was cut off, yet drawn");
        }
    }
}

#[test]
fn greedy_takes_the_first_of_equals() {
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let mut logits = vec![0.5f32; 100];
    (logits[42], logits[97]) = (3.0, 3.0);
    assert_eq!(draw_token(&logits, &greedy, &TokenCounts::default(), 0), Sampled::Token(42));
}

#[test]
fn broken_logits_fail_this_row_only() {
    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 15, 16, 33, 34] {
            for temperature in [0.0, 1.0] {
                let mut logits = vec![1.0f32; 35];
                logits[at] = bad;
                let p = SamplingParams { temperature, ..params() };
                assert_eq!(draw_token(&logits, &p, &TokenCounts::default(), 0), Sampled::Failed, "{bad} at {at}");
            }
        }
    }
    assert_eq!(draw_token(&[f32::NEG_INFINITY; 35], &params(), &TokenCounts::default(), 0), Sampled::Failed);
    let mut one = [f32::NEG_INFINITY; 35];
    one[20] = -3.0;
    assert_eq!(draw_token(&one, &params(), &TokenCounts::default(), 0), Sampled::Token(20));
}

#[test]
fn penalties_bias_and_minimum_tokens() {
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let logits = [1.0f32, 0.9, 0.8, -0.5];
    let check = |p: SamplingParams, prompt: &[TokenId], output: &[TokenId], want: TokenId| {
        let mut counts = TokenCounts::new(prompt, &p);
        output.iter().for_each(|t| counts.push(*t, &p));
        assert_eq!(draw_token(&logits, &p, &counts, 0), Sampled::Token(want), "{p:?} after {output:?}");
    };
    check(SamplingParams { presence_penalty: 0.15, ..greedy.clone() }, &[], &[0], 1);
    check(SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[], &[0], 0);
    check(SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[], &[0, 0], 1);
    check(SamplingParams { presence_penalty: 0.15, ..greedy.clone() }, &[0], &[], 0); // the prompt does not count
    check(SamplingParams { repetition_penalty: 1.2, ..greedy.clone() }, &[0], &[], 1); // here it does
    check(SamplingParams { repetition_penalty: 1.2, ..greedy.clone() }, &[0], &[0, 1], 0); // once, not twice
    check(SamplingParams { repetition_penalty: 0.1, ..greedy.clone() }, &[2], &[], 2);
    check(SamplingParams { logit_bias: vec![(3, 100.0)], ..greedy.clone() }, &[], &[], 3);
    check(SamplingParams { logit_bias: vec![(0, -100.0), (99, 5.0)], ..greedy.clone() }, &[], &[], 1);
    let min = SamplingParams { min_tokens: 2, stop_tokens: vec![0], ..greedy };
    check(min.clone(), &[], &[], 1);
    check(min.clone(), &[], &[1], 1);
    check(min, &[], &[1, 1], 0);
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits = vec![0.0f32; 5000];
    let at =
        |seed, position| draw_token(&logits, &SamplingParams { seed, ..params() }, &TokenCounts::default(), position);
    assert_eq!(at(1, 5), at(1, 5));
    let distinct: std::collections::BTreeSet<_> =
        (0..64).flat_map(|i| [format!("{:?}", at(1, i)), format!("{:?}", at(i.into(), 1))]).collect();
    assert!(distinct.len() > 115, "64 positions and 64 seeds over 5,000 tokens gave {} tokens", distinct.len());
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let logits = [0.1f32, 2.0, -1.0, 2.0, 0.7];
    let p = SamplingParams { logprobs: Some(3), temperature: 0.0, logit_bias: vec![(2, 50.0)], ..params() };
    let draw = sample(&logits, &p, &TokenCounts::default(), 0, &mut Scratch::new(5));
    let want: Vec<f64> = softmax(&logits, 1.0).iter().map(|p| p.ln()).collect();
    let found = draw.logprobs.unwrap();
    assert_eq!(draw.sampled, Sampled::Token(2));
    assert!((f64::from(found.logprob) - want[2]).abs() < 1e-5);
    assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 4]);
    found.top.iter().for_each(|(t, l)| assert!((f64::from(*l) - want[*t as usize]).abs() < 1e-5));
}

proptest! {
    #[test]
    fn exp_is_close(x in -100.0f32..0.0) {
        let (found, want) = (f64::from(exp(x)), f64::from(x).exp());
        prop_assert!((found - want).abs() <= 3e-7 * want || x < -86.9, "exp({x}) = {found}, expected {want}");
    }

    #[test]
    fn any_logits_and_params_give_a_token_or_fail(
        logits in prop::collection::vec(prop_oneof![8 => -30.0f32..30.0, 1 => Just(f32::NEG_INFINITY), 1 => any::<f32>()], 1..70),
        temperature in prop_oneof![Just(0.0f32), 0.0f32..2.0, Just(1e-40), Just(1e30)],
        top_p in 0.0001f32..=1.0, top_k in 0u32..80, min_p in 0.0f32..=1.0, seed: u64, position: u32,
    ) {
        let p = SamplingParams { temperature, top_p, top_k, min_p, seed, logprobs: Some(5), ..params() };
        if let Sampled::Token(t) = draw_token(&logits, &p, &TokenCounts::default(), position) {
            prop_assert!((t as usize) < logits.len() && logits[t as usize] > f32::NEG_INFINITY);
        }
    }
}
