//! Writes what happens to a core, call by call, with the digest of what it decides.

use super::pseudonyms::{Pseudonyms, disguised};
use super::{Digest, write_digest, write_input, write_plan};
use crate::{Effect, Input, RequestId, Sampled, StepPlan, Timed, WorkerId};

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
/// ```
///
/// Allocates for each submission, and where `out` or the pseudonyms' table grows. O(tokens + slices + blocks) a call.
pub struct Encoder {
    /// `None` writes tokens and salts as they are.
    pseudonyms: Option<Pseudonyms>,
    digest: Digest,
    sampled: Vec<(RequestId, Sampled)>,
}

impl Encoder {
    #[must_use]
    pub fn new(pseudonyms: Option<Pseudonyms>) -> Self {
        Encoder { pseudonyms, digest: Digest::new(), sampled: Vec::new() }
    }

    /// Appends an input that is about to be applied.
    pub fn input(&mut self, input: &Timed<Input>, out: &mut Vec<u8>) {
        let disguised = self.pseudonyms.as_mut().and_then(|pseudonyms| disguised(pseudonyms, input, &mut self.sampled));
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
