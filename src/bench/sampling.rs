//! Sampling alone: tokens of made-up logits, by the device's own sampler, step after step as the worker has them.

use crate::config::Sampling;
use kvern_kernels::{Device, DeviceSampler, KernelError, SampleCount, SampleRow, StepInputs, Tensor};

/// Tokens that a sequence with penalties has seen when it begins.
const SEEN: usize = 512;

/// A sampler, and what it draws from.
pub(super) struct SamplingAlone {
    sampler: DeviceSampler,
    logits: Tensor,
    /// Of the next step, in every sequence.
    position: u32,
    vocab: usize,
}

impl SamplingAlone {
    /// For up to `rows_max` rows; `None` on a CPU, whose sampler is the worker's.
    pub(super) fn new(device: &Device, vocab: usize, rows_max: usize) -> Result<Option<Self>, KernelError> {
        let tokens = StepInputs::new(device, rows_max, rows_max)?.sampled_tokens();
        let Some(sampler) = DeviceSampler::new(device, tokens, rows_max, vocab, 0)? else { return Ok(None) };
        let mut state = 1;
        let logits: Vec<f32> = (0..rows_max * vocab).map(|_| made_up(&mut state)).collect();
        Ok(Some(SamplingAlone {
            sampler,
            logits: Tensor::from_f32(device, vocab, &logits)?,
            position: SEEN as u32,
            vocab,
        }))
    }

    /// `steps` steps of `rows` rows, of which two are under way at a time.
    pub(super) fn run(&mut self, device: &Device, kind: Sampling, rows: u32, steps: u32) -> Result<(), KernelError> {
        for step in 0..steps {
            self.sampler.begin();
            for row in 0..rows {
                let sequence = (kind == Sampling::Penalties).then_some(u64::from(row));
                let seen = (0..SEEN.min(self.vocab) as u32).map(|token| SampleCount { token, count: token % 3 });
                let params = asked(kind, u64::from(row), self.position);
                self.sampler.push(params, [].into_iter(), sequence, seen)?;
            }
            self.sampler.upload()?;
            self.sampler.launch(device, &self.logits)?;
            self.position += 1;
            if step > 0 {
                self.sampler.finish()?;
            }
        }
        if steps > 0 {
            self.sampler.finish()?;
        }
        Ok(())
    }
}

fn asked(kind: Sampling, seed: u64, position: u32) -> SampleRow {
    let drawn = SampleRow { seed, temperature: 0.8, ..SampleRow::greedy(position) };
    match kind {
        Sampling::Greedy => SampleRow::greedy(position),
        Sampling::Temperature => drawn,
        Sampling::Filtered => SampleRow { top_k: 50, top_p: 0.95, ..drawn },
        Sampling::Penalties => {
            SampleRow { top_k: 50, top_p: 0.95, repetition_penalty: 1.1, frequency_penalty: 0.2, ..drawn }
        }
    }
}

/// About as logits are: near a normal distribution, of deviation 2.5. The sum of six uniform numbers, by Marsaglia's
/// xorshift.
fn made_up(state: &mut u64) -> f32 {
    let mut sum = 0.0;
    for _ in 0..6 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        sum += (*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
    }
    // Six such numbers have a variance of one half.
    sum * (2.5 * std::f32::consts::SQRT_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_are_spread_as_said() {
        let mut state = 1;
        let logits: Vec<f64> = (0..20_000).map(|_| f64::from(made_up(&mut state))).collect();
        let mean = logits.iter().sum::<f64>() / 20_000.0;
        let variance = logits.iter().map(|logit| (logit - mean).powi(2)).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.1 && (variance.sqrt() - 2.5).abs() < 0.1, "mean {mean}, variance {variance}");
    }
}
