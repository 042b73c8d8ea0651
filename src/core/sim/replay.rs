//! A run that was recorded repeats itself, from nothing but the recording's bytes, with tokens or with pseudonyms; and a run
//! that is not the recorded one is seen.

use super::run::Run;
use super::workload::VOCABULARY;
use crate::record::{Encoder, Entry, Pseudonyms, Recording, write_header};
use crate::replay::{Divergence, Replay};
use crate::{CoreConfig, Effect, Input, StepPlan, Submission, Timed, WorkerId};
use std::hash::{DefaultHasher, Hasher};

/// All that went into a core, as bytes, and all that came out.
pub(crate) struct Log {
    encoder: Encoder,
    recording: Vec<u8>,
    submissions: Vec<Submission>,
    effects: Vec<Effect>,
    plans: Vec<StepPlan>,
}

impl Log {
    fn new(config: &CoreConfig, pseudonyms: Option<Pseudonyms>) -> Self {
        let mut recording = Vec::new();
        write_header(config, &mut recording);
        let (submissions, effects, plans) = (Vec::new(), Vec::new(), Vec::new());
        Log { encoder: Encoder::new(pseudonyms), recording, submissions, effects, plans }
    }

    pub(crate) fn input(&mut self, input: &Timed<Input>) {
        self.encoder.input(input, &mut self.recording);
        if let Input::Submit(submission) = &input.input {
            self.submissions.push(submission.clone());
        }
    }

    /// A call of `plan`: one that gave no step may have moved requests and is recorded, too.
    pub(crate) fn plan(&mut self, worker: WorkerId, is_planned: bool, plan: &StepPlan) {
        self.encoder.planned(worker, plan, is_planned, &mut self.recording);
        if is_planned {
            self.plans.push(plan.clone());
        }
    }

    /// The same of `plan_ahead`.
    pub(crate) fn plan_ahead(&mut self, worker: WorkerId, is_planned: bool, plan: &StepPlan) {
        self.encoder.planned_ahead(worker, plan, is_planned, &mut self.recording);
        if is_planned {
            self.plans.push(plan.clone());
        }
    }

    pub(crate) fn effects(&mut self, effects: &[Effect]) {
        self.encoder.effects(effects, &mut self.recording);
        self.effects.extend_from_slice(effects);
    }

    fn entries(&self) -> Vec<Entry> {
        let recording = Recording::open(&self.recording).expect("the header was written by us");
        recording.map(|entry| entry.expect("the entry was written by us")).collect()
    }
}

fn prf(a: u64, b: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(a);
    hasher.write_u64(b);
    hasher.finish()
}

/// Runs a seed to its end.
fn recorded(seed: u64, with_pseudonyms: bool) -> (CoreConfig, Log) {
    let mut run = Run::new(seed, None);
    let config = run.config().clone();
    let pseudonyms = with_pseudonyms.then(|| Pseudonyms::new(Box::new(prf), config.block_size));
    run.log = Some(Log::new(&config, pseudonyms));
    let outcome = run.drive();
    assert!(outcome.is_ok(), "seed {seed}: {outcome:?}");
    (config, run.log.expect("set above"))
}

/// What a replay decided, or its first divergence and the number of that entry.
fn replayed(config: &CoreConfig, entries: &[Entry]) -> Result<(Vec<Effect>, Vec<StepPlan>), (usize, Divergence)> {
    let mut replay = Replay::new(config.clone()).expect("the simulator's configurations are in bounds");
    let (mut effects, mut plans) = (Vec::new(), Vec::new());
    for (at, entry) in entries.iter().enumerate() {
        replay.take(entry.clone()).map_err(|divergence| (at, divergence))?;
        if !matches!(entry, Entry::Digest(_)) {
            let (decided, plan) = replay.decision();
            effects.extend_from_slice(decided);
            plans.extend(plan.cloned());
        }
    }
    assert!(replay.engine().is_idle(), "the recorded run ended");
    let digests = entries.iter().filter(|entry| matches!(entry, Entry::Digest(_))).count();
    assert_eq!((replay.replayed().compared as usize, digests * 2), (digests, entries.len()));
    Ok((effects, plans))
}

#[test]
fn recorded_runs_repeat_themselves() {
    let mut num_plans = 0;
    for seed in 0..200 {
        let (config, log) = recorded(seed, false);
        num_plans += log.plans.len();
        let (effects, plans) =
            replayed(&config, &log.entries()).unwrap_or_else(|found| panic!("seed {seed}: {found:?}"));
        assert_eq!(effects, log.effects, "seed {seed}");
        assert_eq!(plans, log.plans, "seed {seed}");
    }
    assert!(num_plans > 1_000, "the runs planned only {num_plans} steps");
}

fn likeness(a: &Submission, b: &Submission) -> usize {
    a.prompt.iter().zip(&b.prompt).take_while(|(a, b)| a == b).count()
}

/// Tokens in whole public blocks.
fn num_public(submission: &Submission, block_size: u32) -> usize {
    let num_shared = submission.prompt.len().min(submission.shared_tokens as usize);
    num_shared - num_shared % block_size as usize
}

/// How many tokens the prompts of two requests begin alike with, as far as the core may treat them alike.
fn expected_likeness(a: &Submission, b: &Submission, block_size: u32) -> usize {
    let (public_a, public_b) = (num_public(a, block_size), num_public(b, block_size));
    let is_own = a.salt == b.salt && public_a == public_b;
    likeness(a, b).min(if is_own { usize::MAX } else { public_a.min(public_b) })
}

/// Whether a quarantine of one prompt may fall upon another whose pseudonyms are others.
fn is_ambiguous(submissions: &[Submission], block_size: u32) -> bool {
    let same = |a: &Submission, b: &Submission| a.salt == b.salt && a.prompt == b.prompt;
    let differ = |a, b| num_public(a, block_size) != num_public(b, block_size);
    let pairs = |at: usize| submissions[..at].iter().any(|a| same(a, &submissions[at]) && differ(a, &submissions[at]));
    (0..submissions.len()).any(pairs)
}

#[test]
fn pseudonyms_change_every_token_and_no_decision() {
    let (mut num_hits, mut num_pairs, mut num_skipped) = (0, 0, 0);
    for seed in 0..400 {
        let (config, log) = recorded(seed, true);
        if config.quarantine.0 > 0 && is_ambiguous(&log.submissions, config.block_size) {
            num_skipped += 1;
            continue;
        }
        let entries = log.entries();
        let (effects, _) = replayed(&config, &entries).unwrap_or_else(|found| panic!("seed {seed}: {found:?}"));
        num_hits += effects.iter().filter(|e| matches!(e, Effect::Scheduled { cached_tokens: 1.., .. })).count();
        assert_eq!(effects.len(), log.effects.len());
        for (found, real) in effects.iter().zip(&log.effects) {
            match (found, real) {
                (Effect::Token { token, .. }, Effect::Token { .. }) => assert!(*token >= VOCABULARY, "seed {seed}"),
                _ => assert_eq!(found, real, "seed {seed}"),
            }
        }
        let written = entries.iter().filter_map(|entry| match entry {
            Entry::Input(Timed { input: Input::Submit(submission), .. }) => Some(submission),
            _ => None,
        });
        let written: Vec<&Submission> = written.collect();
        assert_eq!(written.len(), log.submissions.len());
        for (at, (other, real)) in written.iter().zip(&log.submissions).enumerate() {
            let tokens = other.prompt.iter().chain(&other.stop_tokens);
            assert!(tokens.copied().all(|token| token >= VOCABULARY) && other.salt != real.salt, "seed {seed}");
            for (before, earlier) in written.iter().zip(&log.submissions).take(at) {
                let expected = expected_likeness(real, earlier, config.block_size);
                assert_eq!(likeness(other, before), expected, "seed {seed}");
                assert_eq!(other.salt == before.salt, real.salt == earlier.salt, "seed {seed}");
                num_pairs += usize::from(expected > 0 && real.salt != earlier.salt);
            }
        }
    }
    println!("{num_hits} hits, {num_pairs} pairs alike in public blocks, {num_skipped} seeds left out");
    assert!(num_pairs > 100 && num_skipped < 200, "{num_pairs} pairs alike in public blocks, {num_skipped} left out");
    assert!(num_hits > 100, "only {num_hits} starts found a cached prefix");
}

#[test]
fn a_run_that_is_not_the_recorded_one_is_seen() {
    let mut seen = [0; 3];
    for seed in 0..100 {
        let (config, log) = recorded(seed, true);
        let entries = log.entries();
        // The first request that was started is not submitted.
        let started = log.effects.iter().find_map(|effect| match effect {
            Effect::Scheduled { request, .. } => Some(*request),
            _ => None,
        });
        let submits = |entry: &Entry| match entry {
            Entry::Input(Timed { input: Input::Submit(submission), .. }) => Some(submission.request) == started,
            _ => false,
        };
        if let Some(at) = entries.iter().position(submits) {
            let without = [&entries[..at], &entries[at + 2..]].concat();
            let divergence = replayed(&config, &without).expect_err("a request is missing");
            assert!(divergence.0 >= at && matches!(divergence.1, Divergence::Decision { .. }), "seed {seed}");
            seen[0] += 1;
        }
        let smaller = CoreConfig { running_max: 1, step_tokens_max: 1, ..config.clone() };
        let other_size = CoreConfig { block_size: config.block_size + 1, ..config.clone() };
        for (at, other) in [smaller, other_size].into_iter().enumerate() {
            seen[1 + at] += usize::from(replayed(&other, &entries).is_err());
        }
    }
    assert!(seen.into_iter().all(|seen| seen >= 90), "only {seen:?} of 100 changed runs were seen");
}
