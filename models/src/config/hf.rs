//! [`ModelConfig`] from a Hugging Face repository: config.json and generation_config.json. Defaults of absent keys are
//! those of transformers' configuration classes.

use std::path::Path;

use kvern_kernels::HeadLayout;
use serde_json::Value as Json;

use super::keys::{JsonKeys, Keys, describe};
use super::{Architecture, GenerationDefaults, ModelConfig, rope};
use super::{CONTEXT_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX, VOCAB_MAX};
use crate::error::LoadError;
use crate::json;

/// Parsed JSON takes up to about 100 times its text.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// What a window is when a mistral's config.json does not mention it.
const MISTRAL_WINDOW: u64 = 4096;
const QWEN3_HEAD_DIM: usize = 128;
const QWEN_WINDOW: u64 = 4096;
const QWEN_MAX_WINDOW_LAYERS: u64 = 28;

/// The families by their `model_type`; some read other keys, or have other defaults.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

const FAMILIES: [(&str, &str, Family); 4] = [
    ("llama", "LlamaForCausalLM", Family::Llama),
    ("mistral", "MistralForCausalLM", Family::Mistral),
    ("qwen2", "Qwen2ForCausalLM", Family::Qwen2),
    ("qwen3", "Qwen3ForCausalLM", Family::Qwen3),
];

pub(super) fn read(dir: &Path) -> Result<ModelConfig, LoadError> {
    let path = dir.join("config.json");
    let file: Json = json::read(&path, CONFIG_BYTES_MAX)?;
    let keys = JsonKeys::new(&path, &file)?;
    let mut config = parse(&keys)?;
    let path = dir.join("generation_config.json");
    if path.exists() {
        let file: Json = json::read(&path, CONFIG_BYTES_MAX)?;
        let keys = JsonKeys::new(&path, &file)?;
        config.generation = GenerationDefaults::from_json(&keys)?;
        for id in token_ids(&keys, "eos_token_id")? {
            if !config.eos_token_ids.contains(&id) {
                config.eos_token_ids.push(id);
            }
        }
        config.bos_token_id = config.bos_token_id.or(token_ids(&keys, "bos_token_id")?.first().copied());
    }
    Ok(config)
}

fn parse(keys: &JsonKeys<'_>) -> Result<ModelConfig, LoadError> {
    let family = family(keys)?;
    refuse_unsupported(keys)?;
    let heads = heads(keys, family)?;
    let layers = keys.required_size("num_hidden_layers", LAYERS_MAX)?;
    let max_position_embeddings = keys.required_size("max_position_embeddings", CONTEXT_MAX)?;
    let flag = |key: &str| keys.bool(key).map(|flag| flag.unwrap_or(false));
    Ok(ModelConfig {
        architecture: match family {
            Family::Llama | Family::Mistral => Architecture::Llama,
            Family::Qwen2 => Architecture::Qwen2,
            Family::Qwen3 => Architecture::Qwen3,
        },
        vocab_size: keys.required_size("vocab_size", VOCAB_MAX)?,
        hidden_size: keys.required_size("hidden_size", HIDDEN_MAX)?,
        intermediate_size: keys.required_size("intermediate_size", INTERMEDIATE_MAX)?,
        layers,
        heads,
        rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        tie_word_embeddings: flag("tie_word_embeddings")?,
        attention_bias: match family {
            Family::Llama | Family::Qwen3 => flag("attention_bias")?,
            Family::Mistral => false,
            Family::Qwen2 => true,
        },
        mlp_bias: family == Family::Llama && flag("mlp_bias")?,
        windows: windows(keys, family, layers)?,
        rope: rope::from_json(keys, heads.head_dim, max_position_embeddings)?,
        max_position_embeddings,
        bos_token_id: token_ids(keys, "bos_token_id")?.first().copied(),
        eos_token_ids: token_ids(keys, "eos_token_id")?,
        generation: GenerationDefaults::default(),
    })
}

/// By `model_type`, or by `architectures` where that is absent; both must agree where both are there.
fn family(keys: &JsonKeys<'_>) -> Result<Family, LoadError> {
    let model_type = keys.str("model_type")?;
    let class = match keys.array("architectures")?.unwrap_or_default() {
        [] => None,
        [class, ..] => Some(class.as_str().ok_or_else(|| keys.mismatch("architectures", "names", describe(class)))?),
    };
    let (key, found, row) = match (model_type, class) {
        (None, None) => return Err(keys.error("model_type", "missing")),
        (Some(model_type), _) => ("model_type", model_type, FAMILIES.iter().find(|row| row.0 == model_type)),
        (None, Some(class)) => ("architectures", class, FAMILIES.iter().find(|row| row.1 == class)),
    };
    let Some(&(_, expected, family)) = row else {
        return Err(super::unsupported_architecture(keys, key, found));
    };
    match class {
        Some(class) if class != expected => {
            let found = crate::error::quoted(class);
            Err(LoadError::unsupported(keys.path(), format!("architectures: expected {expected}, found {found}")))
        }
        _ => Ok(family),
    }
}

/// What changes the computation and is not there.
fn refuse_unsupported(keys: &JsonKeys<'_>) -> Result<(), LoadError> {
    for key in ["num_local_experts", "num_experts"] {
        if let Some(experts) = keys.u64(key)?.filter(|&experts| experts > 0) {
            let reason = format!("expected a dense model, found a mixture of {experts} experts ({key})");
            return Err(LoadError::unsupported(keys.path(), reason));
        }
    }
    if let Some(quantization) = keys.object("quantization_config")? {
        let method = quantization.str("quant_method")?.unwrap_or("unnamed");
        let reason = format!(
            "expected weights in F32, F16 or BF16, found quantization method {} (quantization_config); use a GGUF file for \
             quantized weights",
            crate::error::quoted(method)
        );
        return Err(LoadError::unsupported(keys.path(), reason));
    }
    match keys.str("hidden_act")? {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => {
            let other = crate::error::quoted(other);
            Err(LoadError::unsupported(keys.path(), format!("hidden_act: expected silu, found {other}")))
        }
    }
}

fn heads(keys: &JsonKeys<'_>, family: Family) -> Result<HeadLayout, LoadError> {
    let heads = keys.required_size("num_attention_heads", HEADS_MAX)?;
    let kv_heads = keys.size("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
    let head_dim = match keys.size("head_dim", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 && !keys.has("head_dim") => QWEN3_HEAD_DIM,
        None => {
            let hidden = keys.required_size("hidden_size", HIDDEN_MAX)?;
            if !hidden.is_multiple_of(heads) {
                return Err(keys.mismatch(
                    "hidden_size",
                    &format!("a multiple of the {heads} attention heads"),
                    hidden,
                ));
            }
            hidden / heads
        }
    };
    let layout = HeadLayout { heads, kv_heads, head_dim };
    super::check_heads(keys, "num_key_value_heads", "head_dim", layout)?;
    Ok(layout)
}

/// The window of each layer.
fn windows(keys: &JsonKeys<'_>, family: Family, layers: usize) -> Result<Vec<Option<u32>>, LoadError> {
    const KEY: &str = "sliding_window";
    let window = |default: u64| -> Result<Option<u32>, LoadError> {
        let found = if keys.has(KEY) { keys.u64(KEY)? } else { Some(default) };
        let Some(found) = found else { return Ok(None) };
        match u32::try_from(found) {
            Ok(window) if window > 0 => Ok(Some(window)),
            _ => Err(keys.mismatch(KEY, "a window of 1 to 2^32 - 1, or null", found)),
        }
    };
    match family {
        Family::Llama => Ok(vec![None; layers]),
        Family::Mistral => Ok(vec![window(MISTRAL_WINDOW)?; layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let uses_window = keys.bool("use_sliding_window")?.unwrap_or(false);
            let window = if uses_window { window(QWEN_WINDOW)? } else { None };
            let Some(types) = keys.array("layer_types")? else {
                let full = keys.u64("max_window_layers")?.unwrap_or(QWEN_MAX_WINDOW_LAYERS);
                return Ok((0..layers as u64).map(|layer| window.filter(|_| layer >= full)).collect());
            };
            layer_types(keys, types, layers, window)
        }
    }
}

fn layer_types(
    keys: &JsonKeys<'_>,
    types: &[Json],
    layers: usize,
    window: Option<u32>,
) -> Result<Vec<Option<u32>>, LoadError> {
    const KEY: &str = "layer_types";
    if types.len() != layers {
        return Err(keys.mismatch(KEY, &format!("a type for each of {layers} layers"), types.len()));
    }
    let window_of = |layer_type: &Json| match layer_type.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(keys.error(KEY, "a layer has sliding_attention, but sliding_window is not set"))
        }
        _ => Err(keys.mismatch(KEY, "full_attention or sliding_attention", describe(layer_type))),
    };
    types.iter().map(window_of).collect()
}

/// One id, a list of ids, or nothing.
fn token_ids(keys: &JsonKeys<'_>, key: &str) -> Result<Vec<u32>, LoadError> {
    let ids = match keys.get(key) {
        None => return Ok(Vec::new()),
        Some(Json::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
    };
    let id = |id: &Json| match id.as_u64() {
        Some(id) => super::token_id(keys, key, id),
        None => Err(keys.mismatch(key, "a token id or a list of them", describe(id))),
    };
    ids.iter().map(id).collect()
}
