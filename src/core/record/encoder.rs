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
