//! Which [`Rope`] a configuration asks for, in either spelling.

use super::keys::{GgufKeys, JsonKeys, Keys, describe};
use super::{CONTEXT_MAX, LoadError};
use crate::gguf::Gguf;
use crate::rope::{Rope, RopeScaling, Yarn, longrope_scale};

const THETA_DEFAULT: f64 = 10_000.0;

/// From config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`; values in the object win over
/// those beside it.
pub(super) fn from_json(config: &JsonKeys<'_>, head_dim: usize, context: usize) -> Result<Rope, LoadError> {
    let object = match config.object("rope_scaling")? {
        Some(object) => Some(object),
        None => config.object("rope_parameters")?,
    };
    let object = object.map(flat).transpose()?;
    let number = |key: &str| -> Result<Option<f64>, LoadError> {
        match object.as_ref().map(|object| object.positive(key)).transpose()?.flatten() {
            Some(value) => Ok(Some(value)),
            None => config.positive(key),
        }
    };
    let theta = number("rope_theta")?.unwrap_or(THETA_DEFAULT);
    let rotary_dim = (head_dim as f64 * number("partial_rotary_factor")?.unwrap_or(1.0)) as usize;
    let scaling = match &object {
        None => RopeScaling::Default,
        Some(object) => json_scaling(config, object, rotary_dim, context)?,
    };
    checked(config, Rope { theta, rotary_dim, context, scaling }, head_dim)
}

/// The object itself, or the one that all layer types share in an object nested by layer type.
fn flat(object: JsonKeys<'_>) -> Result<JsonKeys<'_>, LoadError> {
    let [full, sliding] = ["full_attention", "sliding_attention"].map(|key| object.get(key));
    match (full, sliding) {
        (None, None) => Ok(object),
        (Some(full), Some(sliding)) if full != sliding => {
            Err(object.mismatch("sliding_attention", "the same rope as full_attention", describe(sliding)))
        }
        (full, _) => {
            let key = if full.is_some() { "full_attention" } else { "sliding_attention" };
            let nested = object.object(key)?;
            object.required(key, nested)
        }
    }
}

fn json_scaling(
    config: &JsonKeys<'_>,
    object: &JsonKeys<'_>,
    rotary_dim: usize,
    context: usize,
) -> Result<RopeScaling, LoadError> {
    // `type` is the old spelling of `rope_type`.
    let type_key = if object.get("rope_type").is_some() { "rope_type" } else { "type" };
    let required = |key: &str| object.required(key, object.positive(key)?);
    let original_context = || -> Result<usize, LoadError> {
        const KEY: &str = "original_max_position_embeddings";
        let beside = config.size(KEY, CONTEXT_MAX)?;
        Ok(beside.or(object.size(KEY, CONTEXT_MAX)?).unwrap_or(context))
    };
    let factor_or_ratio = |original: usize| -> Result<f64, LoadError> {
        Ok(object.positive("factor")?.unwrap_or(context as f64 / original as f64))
    };
    Ok(match object.str(type_key)?.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: required("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: required("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context: original_context()?,
        },
        "yarn" => {
            let original_context = original_context()?;
            let factor = factor_or_ratio(original_context)?;
            let attention_factor = match object.positive("attention_factor")? {
                Some(attention_factor) => attention_factor,
                None => match (object.f64("mscale")?, object.f64("mscale_all_dim")?) {
                    // Zero counts as unset, as in the reference.
                    (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                        Yarn::mscale(factor, mscale) / Yarn::mscale(factor, all)
                    }
                    _ => Yarn::mscale(factor, 1.0),
                },
            };
            RopeScaling::Yarn(Yarn {
                factor,
                original_context,
                beta_fast: object.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: object.positive("beta_slow")?.unwrap_or(1.0),
                attention_factor,
                truncate: object.bool("truncate")?.unwrap_or(true),
            })
        }
        "longrope" | "su" => {
            let original_context = original_context()?;
            let list = |key: &str| object.required(key, object.factors(key)?);
            let (short, long) = (list("short_factor")?, list("long_factor")?);
            check_divisors(object, "short_factor", &short, rotary_dim)?;
            check_divisors(object, "long_factor", &long, rotary_dim)?;
            let attention_factor = match object.positive("attention_factor")? {
                Some(attention_factor) => attention_factor,
                None => longrope_scale(factor_or_ratio(original_context)?, original_context),
            };
            RopeScaling::LongRope { short, long, original_context, attention_factor }
        }
        other => {
            let expected = "default, linear, dynamic, llama3, yarn or longrope";
            return Err(object.mismatch(type_key, expected, crate::error::quoted(other)));
        }
    })
}

/// From GGUF metadata and the tensors that hold divisors of frequencies.
pub(super) fn from_gguf(keys: &GgufKeys<'_>, head_dim: usize, context: usize) -> Result<Rope, LoadError> {
    let theta = keys.positive("rope.freq_base")?.unwrap_or(THETA_DEFAULT);
    let rotary_dim = keys.size("rope.dimension_count", head_dim)?.unwrap_or(head_dim);
    let factor = match keys.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.positive("rope.scale_linear")?, // the old spelling
    };
    let original_context = keys.size("rope.scaling.original_context_length", CONTEXT_MAX)?.unwrap_or(context);
    let attn_factor = keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let divisors = |name: &str| divisors(keys.gguf, name, rotary_dim);
    let default_type = if factor.is_some() { "linear" } else { "none" };
    let scaling = match keys.str("rope.scaling.type")?.unwrap_or(default_type) {
        "none" => match divisors("rope_freqs.weight")? {
            Some(divisors) => RopeScaling::Divided { divisors },
            None => RopeScaling::Default,
        },
        "linear" => RopeScaling::Linear { factor: factor.unwrap_or(1.0) },
        "yarn" => {
            let factor = factor.unwrap_or(1.0);
            RopeScaling::Yarn(Yarn {
                factor,
                original_context,
                beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: attn_factor * Yarn::mscale(factor, 1.0),
                truncate: true,
            })
        }
        "longrope" => {
            let list = |name: &str| {
                divisors(name)?.ok_or_else(|| LoadError::tensor(keys.path(), name, "missing, and rope is longrope"))
            };
            let (short, long) = (list("rope_factors_short.weight")?, list("rope_factors_long.weight")?);
            RopeScaling::LongRope { short, long, original_context, attention_factor: attn_factor }
        }
        other => {
            let expected = "none, linear, yarn or longrope";
            return Err(keys.mismatch("rope.scaling.type", expected, crate::error::quoted(other)));
        }
    };
    if !matches!(scaling, RopeScaling::Default | RopeScaling::Divided { .. })
        && keys.gguf.tensor("rope_freqs.weight").is_some()
    {
        let reason = "expected either divisors of frequencies or rope scaling in the metadata, found both";
        return Err(LoadError::tensor(keys.path(), "rope_freqs.weight", reason));
    }
    checked(keys, Rope { theta, rotary_dim, context, scaling }, head_dim)
}

/// An F32 tensor of one divisor per frequency.
fn divisors(gguf: &Gguf, name: &str, rotary_dim: usize) -> Result<Option<Vec<f32>>, LoadError> {
    let Some(info) = gguf.tensor(name) else { return Ok(None) };
    let path = gguf.tensor_path(info);
    if info.tensor_type.format() != Some(kvern_kernels::Format::F32) || info.dims != [rotary_dim / 2] {
        let found = format!("{} of {:?}", info.tensor_type.name(), info.dims);
        return Err(LoadError::tensor(path, name, format!("expected F32 of [{}], found {found}", rotary_dim / 2)));
    }
    let (values, _) = gguf.tensor_bytes(info).as_chunks::<4>();
    let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    match values.iter().find(|value| !is_divisor(**value)) {
        Some(value) => Err(LoadError::tensor(path, name, format!("expected finite divisors above 0, found {value}"))),
        None => Ok(Some(values)),
    }
}

fn check_divisors(keys: &JsonKeys<'_>, key: &str, values: &[f32], rotary_dim: usize) -> Result<(), LoadError> {
    if values.len() != rotary_dim / 2 {
        let expected = format!("{} numbers, one per frequency", rotary_dim / 2);
        return Err(keys.mismatch(key, &expected, values.len()));
    }
    match values.iter().find(|value| !is_divisor(**value)) {
        Some(value) => Err(keys.mismatch(key, "finite divisors above 0", value)),
        None => Ok(()),
    }
}

fn is_divisor(value: f32) -> bool {
    value.is_finite() && value > 0.0
}

/// Holds what each formula needs, and its result.
fn checked(keys: &impl Keys, rope: Rope, head_dim: usize) -> Result<Rope, LoadError> {
    let fail = |reason: String| Err(LoadError::file(keys.path(), format!("in the rope configuration: {reason}")));
    let Rope { theta, rotary_dim, .. } = rope;
    if theta <= 1.0 {
        return fail(format!("expected a base above 1, found {theta}"));
    }
    if rotary_dim == 0 || rotary_dim > head_dim || rotary_dim % 2 != 0 {
        return fail(format!("expected an even number of rotated elements up to {head_dim}, found {rotary_dim}"));
    }
    match rope.scaling {
        RopeScaling::Dynamic { .. } if rotary_dim < 4 => {
            return fail(format!("dynamic scaling needs at least 4 rotated elements, found {rotary_dim}"));
        }
        RopeScaling::Llama3 { low_freq_factor, high_freq_factor, .. } if low_freq_factor >= high_freq_factor => {
            return fail(format!(
                "expected a low_freq_factor below the high_freq_factor {high_freq_factor}, found {low_freq_factor}"
            ));
        }
        _ => {}
    }
    for context in [1, CONTEXT_MAX] {
        let frequencies = rope.frequencies(context);
        let sound = frequencies.inv_freq.iter().all(|f| f.is_finite() && *f >= 0.0);
        if !sound || !frequencies.scale.is_finite() || frequencies.scale <= 0.0 {
            return fail("its numbers give frequencies that are not finite".to_owned());
        }
    }
    Ok(rope)
}
