//! Rotary position embedding: frequencies of every scaling that checkpoints name.
//!
//! Formulas and the places where f32 rounds are those of transformers' `modeling_rope_utils.py`, so that tables agree
//! with what models were trained and tested with. Two kinds depend on the length of the sequence there: `dynamic` and
//! `longrope`. Keys in a shared cache are rotated once, so here the length is fixed at load: the longest context that the
//! server admits, as vLLM does.

use std::f64::consts::PI;

/// Rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated elements of each head, even; the rest of the head is left alone.
    pub rotary_dim: usize,
    /// The context that the configuration names (`max_position_embeddings`).
    pub context: usize,
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than those of the first training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// [Su et al. 2021](https://arxiv.org/abs/2104.09864), as it is.
    Default,
    /// Position interpolation: all frequencies divided by `factor`.
    Linear { factor: f64 },
    /// NTK-aware: the base grows with the length beyond the model's context.
    Dynamic { factor: f64 },
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: usize },
    /// [YaRN](https://arxiv.org/abs/2309.00071).
    Yarn(Yarn),
    /// [LongRoPE](https://arxiv.org/abs/2402.13753): a divisor per frequency, one list for short contexts and one for long.
    LongRope { short: Vec<f32>, long: Vec<f32>, original_context: usize, attention_factor: f64 },
    /// A divisor per frequency for every context, as GGUF carries llama3's in `rope_freqs.weight`.
    Divided { divisors: Vec<f32> },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_context: usize,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which it is divided by `factor`.
    pub beta_slow: f64,
    /// Scale of cos and sin.
    pub attention_factor: f64,
    /// Whether the bounds of the blend are rounded outwards to whole dimensions.
    pub truncate: bool,
}

/// What [`kvern_kernels::RopeTable`] is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    /// `[rotary_dim / 2]`, radians per position.
    pub inv_freq: Vec<f32>,
    /// Factor of cos and sin.
    pub scale: f32,
}

impl Rope {
    /// The frequencies of a server whose longest context is `context_max` tokens. O(rotary_dim).
    #[must_use]
    pub fn frequencies(&self, context_max: usize) -> RopeFrequencies {
        let mut scale = 1.0;
        let inv_freq = match &self.scaling {
            RopeScaling::Default => self.inverse_powers(self.theta),
            RopeScaling::Linear { factor } => {
                self.inverse_powers(self.theta).into_iter().map(|f| f / *factor as f32).collect()
            }
            RopeScaling::Dynamic { factor } => self.inverse_powers(self.dynamic_theta(*factor, context_max)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let blend = Llama3Blend {
                    factor: *factor as f32,
                    low: *low_freq_factor as f32,
                    high: *high_freq_factor as f32,
                    original: *original_context as f32,
                };
                self.inverse_powers(self.theta).into_iter().map(|f| blend.apply(f)).collect()
            }
            RopeScaling::Yarn(yarn) => {
                scale = yarn.attention_factor;
                yarn.blend(self)
            }
            RopeScaling::LongRope { short, long, original_context, attention_factor } => {
                scale = *attention_factor;
                let divisors = if context_max > *original_context { long } else { short };
                self.powers(self.theta).into_iter().zip(divisors).map(|(power, d)| 1.0 / (d * power)).collect()
            }
            RopeScaling::Divided { divisors } => {
                self.inverse_powers(self.theta).into_iter().zip(divisors).map(|(f, d)| f / d).collect()
            }
        };
        RopeFrequencies { inv_freq, scale: scale as f32 }
    }

    /// `theta^(2i/d)` for each pair `i`.
    fn powers(&self, theta: f64) -> Vec<f32> {
        let dim = self.rotary_dim as f32;
        (0..self.rotary_dim).step_by(2).map(|i| (theta as f32).powf(i as f32 / dim)).collect()
    }

    fn inverse_powers(&self, theta: f64) -> Vec<f32> {
        self.powers(theta).into_iter().map(|power| 1.0 / power).collect()
    }

    fn dynamic_theta(&self, factor: f64, context_max: usize) -> f64 {
        let (context, dim) = (self.context as f64, self.rotary_dim as f64);
        let length = context.max(context_max as f64);
        self.theta * (factor * length / context - (factor - 1.0)).powf(dim / (dim - 2.0))
    }
}

struct Llama3Blend {
    factor: f32,
    low: f32,
    high: f32,
    original: f32,
}

impl Llama3Blend {
    fn apply(&self, frequency: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / frequency;
        if wavelength < self.original / self.high {
            frequency
        } else if wavelength > self.original / self.low {
            frequency / self.factor
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

impl Yarn {
    /// The paper's scale of cos and sin: `0.1 mscale ln(factor) + 1`.
    #[must_use]
    pub fn mscale(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// The dimension whose frequency turns `rotations` times over the original context.
    fn correction_dim(&self, rotations: f64, rope: &Rope) -> f64 {
        let dim = rope.rotary_dim as f64;
        dim * (self.original_context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln())
    }

    fn blend(&self, rope: &Rope) -> Vec<f32> {
        let (mut low, mut high) =
            (self.correction_dim(self.beta_fast, rope), self.correction_dim(self.beta_slow, rope));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(rope.rotary_dim as f64 - 1.0);
        if low == high {
            high += 0.001; // no division by zero
        }
        let (low, span) = (low as f32, (high - low) as f32);
        let powers = rope.powers(rope.theta).into_iter().enumerate();
        powers
            .map(|(i, power)| {
                let kept = 1.0 - ((i as f32 - low) / span).clamp(0.0, 1.0);
                let (interpolated, extrapolated) = (1.0 / (self.factor as f32 * power), 1.0 / power);
                interpolated * (1.0 - kept) + extrapolated * kept
            })
            .collect()
    }
}

/// LongRoPE's scale of cos and sin.
pub(crate) fn longrope_scale(factor: f64, original_context: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_context as f64).ln()).sqrt() }
}
