//! Writes what happens to a core, call by call, with the digest of what it decides.

use super::pseudonyms::{Pseudonyms, disguised};
use super::{Digest, write_digest, write_input, write_plan, write_plan_ahead};
use crate::{Effect, Input, RequestId, Sampled, StepId, StepPlan, Timed, WorkerId};

/// A step that was planned ahead and is not reported.
struct StepAhead {
    worker: WorkerId,
    step: StepId,
    /// The step before it has not failed.
    counts: bool,
}

/// Called beside an [`crate::Engine`] whose configuration the header holds:
///
/// ```text
///   input(&input)                      effects
///   engine.apply(input, &mut effects)  are empty before
///   effects(&effects)                  each of the two
///
///   engine.plan(worker, &mut plan, &mut effects)
///   planned(worker, &plan, is_planned)
///   effects(&effects)
///
///   engine.plan_ahead(worker, &mut plan)
///   planned_ahead(worker, &plan, is_planned)
///   effects(&[])
/// ```
///
/// Allocates for each submission, and where `out` or the pseudonyms' table grows. O(tokens + slices + blocks) a call.
pub struct Encoder {
    /// `None` writes tokens and salts as they are.
    pseudonyms: Option<Pseudonyms>,
    digest: Digest,
    ahead: Vec<StepAhead>,
    sampled: Vec<(RequestId, Sampled)>,
}

impl Encoder {
    #[must_use]
    pub fn new(pseudonyms: Option<Pseudonyms>) -> Self {
        Encoder { pseudonyms, digest: Digest::new(), ahead: Vec::new(), sampled: Vec::new() }
    }

    /// Appends an input that is about to be applied.
    pub fn input(&mut self, input: &Timed<Input>, out: &mut Vec<u8>) {
        let counts = self.follow(&input.input);
        let disguised =
            self.pseudonyms.as_mut().and_then(|pseudonyms| disguised(pseudonyms, input, counts, &mut self.sampled));
        write_input(disguised.as_ref().unwrap_or(input), out);
        if let Some(Timed { input: Input::StepDone { sampled, .. }, .. }) = disguised {
            self.sampled = sampled;
        }
    }

    /// Appends a call of `plan`, whatever it gave.
    pub fn planned(&mut self, worker: WorkerId, plan: &StepPlan, is_planned: bool, out: &mut Vec<u8>) {
        write_plan(worker, out);
        if is_planned {
            self.digest.plan(plan);
        }
    }

    /// Appends a call of `plan_ahead`, whatever it gave.
    pub fn planned_ahead(&mut self, worker: WorkerId, plan: &StepPlan, is_planned: bool, out: &mut Vec<u8>) {
        write_plan_ahead(worker, out);
        if is_planned {
            self.digest.plan(plan);
            self.ahead.push(StepAhead { worker, step: plan.step, counts: true });
        }
    }

    /// Follows the steps that were planned ahead; `false` where this is the end of one whose results the core drops, because
    /// the step before it failed.
    fn follow(&mut self, input: &Input) -> bool {
        let mut end = |worker: WorkerId, step: StepId| {
            let at = self.ahead.iter().position(|ahead| (ahead.worker, ahead.step) == (worker, step));
            at.is_none_or(|at| self.ahead.swap_remove(at).counts)
        };
        match input {
            Input::StepDone { worker, step, .. } => return end(*worker, *step),
            Input::StepFailed { worker, step } => {
                end(*worker, *step);
                let behind = self.ahead.iter_mut().filter(|ahead| ahead.worker == *worker);
                behind.for_each(|ahead| ahead.counts = false);
            }
            Input::WorkerLost { worker } => self.ahead.retain(|ahead| ahead.worker != *worker),
            _ => {}
        }
        true
    }

    /// Appends the digest of what was decided since the last call: these effects, and a step that was planned.
    pub fn effects(&mut self, effects: &[Effect], out: &mut Vec<u8>) {
        let mut digest = std::mem::take(&mut self.digest);
        for effect in effects {
            digest.effect(effect);
            if let Some(pseudonyms) = &mut self.pseudonyms {
                pseudonyms.effect(effect);
            }
        }
        write_digest(digest.value(), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Entry, read_entry};
    use crate::{CacheSalt, ClassId, Micros, Submission, TenantId};

    const WORKER: WorkerId = WorkerId(0);
    const REQUEST: RequestId = RequestId(3);

    fn encoder(out: &mut Vec<u8>) -> Encoder {
        let prf = |a: u64, b: u64| (a ^ b.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        let mut encoder = Encoder::new(Some(Pseudonyms::new(Box::new(prf), 16)));
        let submission = Submission {
            request: REQUEST,
            prompt: vec![1, 2, 3],
            max_new_tokens: 9,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: vec![7],
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        };
        encoder.input(&Timed { at: Micros(0), input: Input::Submit(submission) }, out);
        encoder
    }

    fn done(encoder: &mut Encoder, step: u64, token: u32, out: &mut Vec<u8>) {
        let sampled = vec![(REQUEST, Sampled::Token(token))];
        let input = Input::StepDone { worker: WORKER, step: StepId(step), device_us: 0, sampled };
        encoder.input(&Timed { at: Micros(0), input }, out);
    }

    /// What was recorded as the result of each step that was reported done.
    fn results(mut bytes: &[u8]) -> Vec<Sampled> {
        let mut results = Vec::new();
        while !bytes.is_empty() {
            let (entry, len) = read_entry(bytes).expect("it was written by us");
            if let Entry::Input(Timed { input: Input::StepDone { sampled, .. }, .. }) = entry {
                results.extend(sampled.into_iter().map(|(_, result)| result));
            }
            bytes = &bytes[len..];
        }
        results
    }

    #[test]
    fn what_is_dropped_changes_no_pseudonym() {
        let (mut plain, mut ahead) = (Vec::new(), Vec::new());
        let mut encoder_plain = encoder(&mut plain);
        [50, 51, 52].into_iter().enumerate().for_each(|(at, token)| {
            done(&mut encoder_plain, at as u64, token, &mut plain);
        });
        let mut encoder_ahead = encoder(&mut ahead);
        let plan_ahead = |encoder: &mut Encoder, step, out: &mut Vec<u8>| {
            encoder.planned_ahead(WORKER, &StepPlan { step: StepId(step), ..StepPlan::empty() }, true, out);
            encoder.effects(&[], out);
        };
        // Step 1 is ahead of step 0, and counts; step 3 is ahead of step 2, which fails.
        plan_ahead(&mut encoder_ahead, 1, &mut ahead);
        done(&mut encoder_ahead, 0, 50, &mut ahead);
        done(&mut encoder_ahead, 1, 51, &mut ahead);
        plan_ahead(&mut encoder_ahead, 3, &mut ahead);
        let failed = Input::StepFailed { worker: WORKER, step: StepId(2) };
        encoder_ahead.input(&Timed { at: Micros(0), input: failed }, &mut ahead);
        done(&mut encoder_ahead, 3, 99, &mut ahead);
        done(&mut encoder_ahead, 4, 52, &mut ahead);
        let (plain, mut ahead) = (results(&plain), results(&ahead));
        assert_eq!(ahead.remove(2), Sampled::Failed);
        assert_eq!(ahead, plain);
        assert!(encoder_ahead.ahead.is_empty());
    }
}
