//! Sampling defaults that a model's authors ship, for requests that leave them open.

use super::keys::{GgufKeys, JsonKeys, Keys};
use crate::error::LoadError;

/// From generation_config.json, or `general.sampling.*` of GGUF. `None`: the authors say nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// At least 0.
    pub temperature: Option<f32>,
    /// Above 0, up to 1.
    pub top_p: Option<f32>,
    /// At least 1; a file's 0 or -1, which both mean no limit, are `None`.
    pub top_k: Option<u32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    pub(super) fn from_json(keys: &JsonKeys<'_>) -> Result<Self, LoadError> {
        Ok(GenerationDefaults {
            temperature: number(keys, "temperature", "at least 0", |t| t >= 0.0)?,
            top_p: number(keys, "top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
            top_k: top_k(keys, "top_k")?,
            min_p: number(keys, "min_p", "from 0 to 1", |p| (0.0..=1.0).contains(&p))?,
            repetition_penalty: number(keys, "repetition_penalty", "above 0", |penalty| penalty > 0.0)?,
            presence_penalty: number(keys, "presence_penalty", "that is finite", |_| true)?,
            frequency_penalty: number(keys, "frequency_penalty", "that is finite", |_| true)?,
            max_new_tokens: keys.size("max_new_tokens", u32::MAX as usize)?.map(|tokens| tokens as u32),
        })
    }

    pub(super) fn from_gguf(general: &GgufKeys<'_>) -> Result<Self, LoadError> {
        let keys = GgufKeys { gguf: general.gguf, prefix: "general.sampling.".to_owned() };
        Ok(GenerationDefaults {
            temperature: number(&keys, "temp", "at least 0", |t| t >= 0.0)?,
            top_p: number(&keys, "top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
            top_k: top_k(&keys, "top_k")?,
            min_p: number(&keys, "min_p", "from 0 to 1", |p| (0.0..=1.0).contains(&p))?,
            repetition_penalty: number(&keys, "penalty_repeat", "above 0", |penalty| penalty > 0.0)?,
            presence_penalty: None,
            frequency_penalty: None,
            max_new_tokens: None,
        })
    }
}

fn number(keys: &impl Keys, key: &str, expected: &str, fits: impl Fn(f32) -> bool) -> Result<Option<f32>, LoadError> {
    match keys.f64(key)? {
        None => Ok(None),
        Some(found) if (found as f32).is_finite() && fits(found as f32) => Ok(Some(found as f32)),
        Some(found) => Err(keys.mismatch(key, &format!("a number {expected}"), found)),
    }
}

fn top_k(keys: &impl Keys, key: &str) -> Result<Option<u32>, LoadError> {
    match keys.f64(key)? {
        None | Some(-1.0 | 0.0) => Ok(None),
        Some(found) if found.fract() == 0.0 && (1.0..=f64::from(u32::MAX)).contains(&found) => Ok(Some(found as u32)),
        Some(found) => Err(keys.mismatch(key, "a whole number of at least -1", found)),
    }
}
