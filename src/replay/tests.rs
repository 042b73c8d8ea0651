#![allow(clippy::unwrap_used)]

use super::*;
use kvern_core::record::{Encoder, write_header};
use kvern_core::{
    CacheSalt, ClassId, CoreConfig, Effect, Engine, Input, RequestId, Sampled, StepPlan, Submission, TenantId, Timed,
    WorkerId,
};
use proptest::prelude::*;

fn config() -> CoreConfig {
    CoreConfig { step_tokens_max: 64, running_max: 8, request_tokens_max: 4096, ..CoreConfig::mixed(60, 16) }
}

/// A recording of some requests, with where each entry ends; `lost` is a request whose submission is not written.
fn recording(config: &CoreConfig, lost: Option<u64>) -> (Vec<u8>, Vec<usize>) {
    let mut bytes = Vec::new();
    write_header(config, &mut bytes);
    let mut encoder = Encoder::new(None);
    let mut engine = Engine::new(config.clone());
    let (mut plan, mut effects, mut ends) = (StepPlan::empty(), Vec::<Effect>::new(), vec![bytes.len()]);
    let mut apply = |engine: &mut Engine, at: u64, input: Input, bytes: &mut Vec<u8>, ends: &mut Vec<usize>| {
        let len = bytes.len();
        let is_lost = matches!(&input, Input::Submit(submission) if Some(submission.request.0) == lost);
        let input = Timed { at: Micros(at), input };
        encoder.input(&input, bytes);
        ends.push(bytes.len());
        effects.clear();
        engine.apply(input, &mut effects);
        encoder.effects(&effects, bytes);
        ends.push(bytes.len());
        if is_lost {
            bytes.truncate(len);
            ends.truncate(ends.len() - 2);
        }
        effects.clear();
        let is_planned = engine.plan(WorkerId(0), &mut plan, &mut effects);
        encoder.planned(WorkerId(0), &plan, is_planned, bytes);
        ends.push(bytes.len());
        encoder.effects(&effects, bytes);
        ends.push(bytes.len());
        is_planned.then(|| {
            let samples = plan.slices.iter().filter(|slice| slice.sample);
            let sampled = samples.map(|slice| (slice.request, Sampled::Token(slice.start))).collect();
            Input::StepDone { worker: WorkerId(0), step: plan.step, device_us: 0, sampled }
        })
    };
    let (mut pending, mut at) = (None, 0);
    for request in 0..30 {
        let submission = Submission {
            request: RequestId(request),
            prompt: (0..40 + request as u32 % 30).collect(),
            max_new_tokens: 20,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: Vec::new(),
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        };
        at += 500_000;
        let next = apply(&mut engine, at, Input::Submit(submission), &mut bytes, &mut ends);
        pending = next.or(pending);
        if let Some(done) = pending.take() {
            at += 1_000;
            pending = apply(&mut engine, at, done, &mut bytes, &mut ends);
        }
    }
    while let Some(done) = pending {
        at += 1_000;
        pending = apply(&mut engine, at, done, &mut bytes, &mut ends);
    }
    assert!(engine.is_idle());
    (bytes, ends)
}

fn text(outcome: &Outcome) -> String {
    let mut out = Vec::new();
    write_report("FILE", outcome, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn outcome(bytes: &[u8]) -> Outcome {
    replay(bytes, "FILE").unwrap()
}

#[test]
fn a_whole_recording_has_no_difference() {
    let (bytes, ends) = recording(&config(), None);
    let outcome = outcome(&bytes);
    assert!(outcome.is_same(), "{}", text(&outcome));
    assert_eq!((outcome.entries, outcome.bytes), (ends.len() as u64 - 1, bytes.len() as u64));
    assert_eq!((outcome.replayed.submitted, outcome.replayed.finished, outcome.replayed.tokens), (30, 30, 600));
    let text = text(&outcome);
    assert!(text.contains("requests   30: 30 ended, 0 refused\n") && text.ends_with("no difference\n"), "{text}");
    let empty = self::outcome(&bytes[..ends[0]]);
    assert!(empty.is_same() && empty.entries == 0);
}

#[test]
fn a_torn_tail_is_said_and_is_no_difference() {
    let (bytes, ends) = recording(&config(), None);
    for cut in [1, 5, 20, 300] {
        let left = bytes.len() - cut;
        let whole = ends.iter().rev().find(|end| **end <= left).unwrap();
        let outcome = outcome(&bytes[..left]);
        let torn_at = (*whole != left).then_some(*whole as u64);
        assert_eq!(outcome.end, End::Whole { torn_at });
        assert!(outcome.is_same() && outcome.bytes == *whole as u64);
        assert_eq!(text(&outcome).contains("breaks off"), torn_at.is_some());
    }
}

#[test]
fn damage_in_the_middle_is_no_success() {
    let (mut bytes, ends) = recording(&config(), None);
    bytes[ends[10] + 9] ^= 1;
    let outcome = outcome(&bytes);
    assert!(!outcome.is_same() && outcome.entries == 10);
    assert!(text(&outcome).contains(&format!("entry at byte {}", ends[10])), "{}", text(&outcome));
}

#[test]
fn the_first_difference_is_shown() {
    // A core that takes fewer tokens a step.
    let (bytes, ends) = recording(&config(), None);
    let mut other = Vec::new();
    write_header(&CoreConfig { step_tokens_max: 32, ..config() }, &mut other);
    other.extend_from_slice(&bytes[ends[0]..]);
    let outcome = outcome(&other);
    let End::Differs(difference) = &outcome.end else { panic!("{}", text(&outcome)) };
    assert_eq!((difference.entry, difference.at, difference.done.as_str()), (2, Micros(500_000), "plan of worker 0"));
    let found = text(&outcome);
    assert!(found.contains("first difference at entry 2, 0.500000 s, plan of worker 0: expected"), "{found}");
    assert!(found.contains("step 0 of 32 tokens\n  slice of request 0: 32 tokens from 0"), "{found}");
    // A request that is missing.
    let (bytes, _) = recording(&config(), Some(3));
    let outcome = self::outcome(&bytes);
    let End::Differs(difference) = &outcome.end else { panic!("{}", text(&outcome)) };
    assert!(difference.at >= Micros(2_000_000) && !outcome.is_same(), "{difference:?}");
    // An entry that this core cannot be in the state for.
    let mut bytes = Vec::new();
    write_header(&config(), &mut bytes);
    let input = Input::StepFailed { worker: WorkerId(0), step: kvern_core::StepId(7) };
    kvern_core::record::write_input(&Timed { at: Micros(9), input }, &mut bytes);
    let found = text(&self::outcome(&bytes));
    assert!(found.contains("failure of step 7 on worker 0: expected step 7 on worker 0, found none"), "{found}");
}

#[test]
fn recordings_without_decisions_prove_nothing() {
    let mut bytes = Vec::new();
    write_header(&config(), &mut bytes);
    kvern_core::record::write_input(&Timed { at: Micros(9), input: Input::Tick }, &mut bytes);
    let outcome = outcome(&bytes);
    assert!(!outcome.is_same() && text(&outcome).contains("nothing to compare"));
}

#[test]
fn what_is_no_recording_is_refused() {
    let check = |bytes: &[u8], expected: &str| assert_eq!(replay(bytes, "FILE").unwrap_err().to_string(), expected);
    check(b"", "FILE: expected a recording that starts with KVERNREC, found other bytes");
    check(b"{}", "FILE: expected a recording that starts with KVERNREC, found other bytes");
    check(b"KVERN", "FILE: expected a whole entry at byte 5, found the end");
    let mut large = Vec::new();
    write_header(&CoreConfig::mixed(1 << 30, 16), &mut large);
    check(&large, "FILE: expected at most 16777216 blocks in a pool, found 1073741824");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However a source comes in pieces, and whatever stands in it.
    #[test]
    fn any_bytes_are_replayed_or_refused(
        at in any::<prop::sample::Index>(),
        junk in prop::collection::vec(any::<u8>(), 0..40),
        piece in 1usize..5_000,
    ) {
        /// Gives at most `piece` bytes at once.
        struct Slow<'a>(&'a [u8], usize);
        impl Read for Slow<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let len = self.1.min(out.len());
                self.0.read(&mut out[..len])
            }
        }
        let (mut bytes, _) = recording(&config(), None);
        let at = at.index(bytes.len());
        bytes.splice(at..(at + junk.len()).min(bytes.len()), junk.clone());
        let outcome = replay(Slow(&bytes, piece), "FILE");
        if let Ok(outcome) = outcome {
            prop_assert!(!matches!(outcome.end, End::Panicked { .. }), "{:?}", outcome.end);
            prop_assert!(outcome.bytes <= bytes.len() as u64);
        }
    }
}
