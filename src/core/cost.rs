//! What a step costs: a linear model of its work, in integers, corrected by what steps took.
//!
//! ```text
//!   time = fixed part    step + decode_sequence x sequences + decode_context x their context tokens
//!        + prefill part  prefill_token x tokens + prefill_context x (sum over the tokens of the context before each)
//! ```
//!
//! The five coefficients are measured at start. Online, each part has one factor, and every measured step moves both along
//! the gradient of its squared error, normalized (NLMS; Widrow and Hoff, 1960): a step of one part moves that part's factor
//! only. Everything is O(1).

/// Coefficients in picoseconds, so that integers are fine enough for one token on a fast device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    pub step_ps: u64,
    pub prefill_token_ps: u64,
    pub prefill_context_ps: u64,
    pub decode_sequence_ps: u64,
    pub decode_context_ps: u64,
}

impl Default for CostModel {
    /// A guess for an unmeasured machine: 1 ms a step, 50 us a prompt token, 100 us a decoding sequence.
    fn default() -> Self {
        CostModel {
            step_ps: 1_000_000_000,
            prefill_token_ps: 50_000_000,
            prefill_context_ps: 2_000,
            decode_sequence_ps: 100_000_000,
            decode_context_ps: 20_000,
        }
    }
}

/// The work of one step, or of many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct StepWork {
    pub(crate) prefill_tokens: u64,
    /// Sum over the prefill tokens of the tokens up to and with each.
    pub(crate) prefill_context: u64,
    pub(crate) decode_sequences: u64,
    pub(crate) decode_context: u64,
}

impl StepWork {
    pub(crate) fn add_decode(&mut self, context: u32) {
        self.decode_sequences += 1;
        self.decode_context += u64::from(context);
    }

    pub(crate) fn add_prefill(&mut self, start: u32, tokens: u32) {
        let tokens = u64::from(tokens);
        self.prefill_tokens += tokens;
        self.prefill_context += tokens * u64::from(start) + tokens * (tokens + 1) / 2;
    }
}

/// 1 as a factor.
const ONE: u64 = 1 << 16;
/// Factors stay within 1/64 and 64 of what was measured at start.
const FACTORS: (u64, u64) = (ONE / 64, ONE * 64);
/// A measured step moves the factors by this part of what would explain it.
const GAIN: i128 = 4;
/// A step that took longer than this many times its prediction counts as if it took that: it was disturbed.
const OUTLIER: u64 = 8;

const PS_PER_US: u64 = 1_000_000;

/// The model and its factors.
#[derive(Clone, Debug)]
pub(crate) struct Estimator {
    model: CostModel,
    fixed_factor: u64,
    prefill_factor: u64,
}

impl Estimator {
    pub(crate) fn new(model: CostModel) -> Self {
        Estimator { model, fixed_factor: ONE, prefill_factor: ONE }
    }

    /// Fixed and prefill part before their factors, in picoseconds.
    fn parts(&self, work: &StepWork) -> (u64, u64) {
        let m = &self.model;
        let fixed = m
            .step_ps
            .saturating_add(m.decode_sequence_ps.saturating_mul(work.decode_sequences))
            .saturating_add(m.decode_context_ps.saturating_mul(work.decode_context));
        let prefill = m
            .prefill_token_ps
            .saturating_mul(work.prefill_tokens)
            .saturating_add(m.prefill_context_ps.saturating_mul(work.prefill_context));
        (fixed, prefill)
    }

    pub(crate) fn predict_ps(&self, work: &StepWork) -> u64 {
        let (fixed, prefill) = self.parts(work);
        scale(fixed, self.fixed_factor).saturating_add(scale(prefill, self.prefill_factor))
    }

    pub(crate) fn predict_us(&self, work: &StepWork) -> u64 {
        self.predict_ps(work) / PS_PER_US
    }

    /// What `tokens` of prefill from position `start` add to a step.
    fn prefill_ps(&self, start: u32, tokens: u32) -> u64 {
        let mut work = StepWork::default();
        work.add_prefill(start, tokens);
        scale(self.parts(&work).1, self.prefill_factor)
    }

    /// The most of `tokens_max` prefill tokens from position `start` that a step with this work can take within `limit_us`.
    pub(crate) fn prefill_within(&self, work: &StepWork, start: u32, tokens_max: u32, limit_us: u64) -> u32 {
        let left = limit_us.saturating_mul(PS_PER_US).saturating_sub(self.predict_ps(work));
        let (mut fits, mut beyond) = (0, u64::from(tokens_max) + 1);
        while fits + 1 < beyond {
            let middle = u64::midpoint(fits, beyond);
            if self.prefill_ps(start, middle as u32) <= left { fits = middle } else { beyond = middle }
        }
        fits as u32
    }

    /// Learns from a step that took `measured_us`.
    pub(crate) fn correct(&mut self, work: &StepWork, measured_us: u64) {
        let predicted = self.predict_ps(work);
        let measured = measured_us.saturating_mul(PS_PER_US).min(predicted.saturating_mul(OUTLIER));
        // In microseconds from here: squares of picoseconds would overflow.
        let error = (i128::from(measured) - i128::from(predicted)) / i128::from(PS_PER_US);
        let (fixed, prefill) = self.parts(work);
        let (fixed, prefill) = (i128::from(fixed / PS_PER_US), i128::from(prefill / PS_PER_US));
        let norm = (fixed * fixed + prefill * prefill) * GAIN;
        if norm == 0 {
            return;
        }
        for (factor, part) in [(&mut self.fixed_factor, fixed), (&mut self.prefill_factor, prefill)] {
            let moved = i128::from(*factor) + error * part * i128::from(ONE) / norm;
            *factor = u64::try_from(moved).unwrap_or(0).clamp(FACTORS.0, FACTORS.1);
        }
    }
}

fn scale(value: u64, factor: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(factor) / u128::from(ONE)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(prefill: u32, decodes: u32) -> StepWork {
        let mut work = StepWork::default();
        if prefill > 0 {
            work.add_prefill(100, prefill);
        }
        (0..decodes).for_each(|at| work.add_decode(200 + at));
        work
    }

    #[test]
    fn sums_the_parts() {
        let model = CostModel {
            step_ps: 7_000_000,
            prefill_token_ps: 3_000_000,
            prefill_context_ps: 1_000,
            decode_sequence_ps: 2_000_000,
            decode_context_ps: 10_000,
        };
        // 7 + 2 x 2 + 0.01 x 401 + 3 x 10 + 0.001 x (10 x 100 + 55) = 46.065
        assert_eq!(Estimator::new(model).predict_us(&work(10, 2)), 46);
    }

    #[test]
    fn learns_a_machine_of_another_speed() {
        // The machine's fixed part is three times, its prefill part half of what the model says.
        let truth = Estimator { fixed_factor: 3 * ONE, prefill_factor: ONE / 2, model: CostModel::default() };
        let mut learnt = Estimator::new(CostModel::default());
        for turn in 0..400 {
            let work = work([0, 300, 900][turn % 3], turn as u32 % 40);
            learnt.correct(&work, truth.predict_us(&work));
        }
        for work in [work(0, 10), work(500, 0), work(1000, 30)] {
            let (found, expected) = (learnt.predict_us(&work), truth.predict_us(&work));
            assert!(found.abs_diff(expected) * 50 <= expected, "expected {expected} us, found {found}");
        }
    }

    #[test]
    fn fills_the_limit_and_no_more() {
        let estimator = Estimator::new(CostModel::default());
        let base = work(0, 5);
        for limit in [0, 1_400, 3_000, 20_000, u64::MAX] {
            let tokens = estimator.prefill_within(&base, 100, 1_000, limit);
            let with = |tokens| {
                let mut work = base;
                work.add_prefill(100, tokens);
                estimator.predict_ps(&work)
            };
            let limit = limit.saturating_mul(PS_PER_US);
            assert!(tokens == 0 || with(tokens) <= limit, "{tokens} tokens within {limit}");
            assert!(tokens == 1_000 || with(tokens + 1) > limit, "{} tokens within {limit}", tokens + 1);
        }
    }
}
