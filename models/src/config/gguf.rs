//! [`ModelConfig`] from GGUF metadata, and from which tensors there are: biases and an output head of its own are not in
//! the metadata.

use kvern_kernels::HeadLayout;

use super::keys::{GgufKeys, Keys};
use super::{Architecture, GenerationDefaults, ModelConfig, rope};
use super::{CONTEXT_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX, VOCAB_MAX};
use crate::error::LoadError;
use crate::gguf::Gguf;

/// Keys below the architecture's prefix that change the computation, unless they are absent or zero.
const UNSUPPORTED: [&str; 8] = [
    "expert_count",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "rope.scaling.yarn_log_multiplier",
];

pub(super) fn read(gguf: &Gguf) -> Result<ModelConfig, LoadError> {
    let general = GgufKeys { gguf, prefix: String::new() };
    const ARCHITECTURE: &str = "general.architecture";
    let name = general.required(ARCHITECTURE, general.str(ARCHITECTURE)?)?;
    let architecture = match name {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        other => return Err(super::unsupported_architecture(&general, ARCHITECTURE, other)),
    };
    let keys = GgufKeys { gguf, prefix: format!("{name}.") };
    refuse_unsupported(&keys)?;

    let hidden_size = keys.required_size("embedding_length", HIDDEN_MAX)?;
    let layers = keys.required_size("block_count", LAYERS_MAX)?;
    let heads = heads(&keys, hidden_size)?;
    let context = keys.required_size("context_length", CONTEXT_MAX)?;
    let has = |tensor: &str| gguf.tensor(tensor).is_some();
    Ok(ModelConfig {
        architecture,
        vocab_size: vocab_size(&general, &keys)?,
        hidden_size,
        intermediate_size: keys
            .required("feed_forward_length", keys.uniform_size("feed_forward_length", INTERMEDIATE_MAX)?)?,
        layers,
        heads,
        rms_norm_eps: keys
            .required("attention.layer_norm_rms_epsilon", keys.positive("attention.layer_norm_rms_epsilon")?)?
            as f32,
        tie_word_embeddings: !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias"),
        mlp_bias: has("blk.0.ffn_gate.bias"),
        windows: vec![window(&keys)?; layers],
        rope: rope::from_gguf(&keys, heads.head_dim, context)?,
        max_position_embeddings: context,
        bos_token_id: token_id(&general, "tokenizer.ggml.bos_token_id")?,
        eos_token_ids: eos_token_ids(&general)?,
        generation: GenerationDefaults::from_gguf(&general)?,
    })
}

fn refuse_unsupported(keys: &GgufKeys<'_>) -> Result<(), LoadError> {
    for key in UNSUPPORTED {
        if let Some(found) = keys.f64(key)?.filter(|&found| found != 0.0) {
            let reason = format!("{}: expected none, since it changes the computation, found {found}", keys.full(key));
            return Err(LoadError::unsupported(keys.path(), reason));
        }
    }
    Ok(())
}

fn heads(keys: &GgufKeys<'_>, hidden_size: usize) -> Result<HeadLayout, LoadError> {
    const HEADS: &str = "attention.head_count";
    const KV_HEADS: &str = "attention.head_count_kv";
    const KEY_LENGTH: &str = "attention.key_length";
    const VALUE_LENGTH: &str = "attention.value_length";
    let heads = keys.required(HEADS, keys.uniform_size(HEADS, HEADS_MAX)?)?;
    let kv_heads = keys.uniform_size(KV_HEADS, HEADS_MAX)?.unwrap_or(heads);
    let head_dim = match keys.size(KEY_LENGTH, HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of the embedding length {hidden_size}");
            return Err(keys.mismatch(HEADS, &expected, heads));
        }
    };
    match keys.size(VALUE_LENGTH, HEAD_DIM_MAX)? {
        Some(value_length) if value_length != head_dim => {
            return Err(keys.mismatch(VALUE_LENGTH, &format!("the length {head_dim} of keys"), value_length));
        }
        _ => {}
    }
    let layout = HeadLayout { heads, kv_heads, head_dim };
    super::check_heads(keys, KV_HEADS, KEY_LENGTH, layout)?;
    Ok(layout)
}

/// As the metadata say, or as many as the tokenizer has.
fn vocab_size(general: &GgufKeys<'_>, keys: &GgufKeys<'_>) -> Result<usize, LoadError> {
    if let Some(size) = keys.size("vocab_size", VOCAB_MAX)? {
        return Ok(size);
    }
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let tokens = general.get(TOKENS).and_then(|value| value.as_strings()).map(<[String]>::len);
    match tokens {
        Some(size) if (1..=VOCAB_MAX).contains(&size) => Ok(size),
        Some(size) => Err(general.mismatch(TOKENS, &format!("1 to {VOCAB_MAX} tokens"), size)),
        None => Err(keys.error("vocab_size", format!("missing, and so is {TOKENS}"))),
    }
}

/// One window for all layers; zero is none.
fn window(keys: &GgufKeys<'_>) -> Result<Option<u32>, LoadError> {
    const WINDOW: &str = "attention.sliding_window";
    const PATTERN: &str = "attention.sliding_window_pattern";
    let Some(found) = keys.u64(WINDOW)?.filter(|&window| window > 0) else { return Ok(None) };
    if let Some(pattern) = keys.get(PATTERN) {
        let reason = format!("expected one window for all layers, found {}", pattern.describe());
        return Err(LoadError::unsupported(keys.path(), format!("{}: {reason}", keys.full(PATTERN))));
    }
    u32::try_from(found).map(Some).map_err(|_| keys.mismatch(WINDOW, "a window below 2^32", found))
}

fn token_id(general: &GgufKeys<'_>, key: &str) -> Result<Option<u32>, LoadError> {
    general.u64(key)?.map(|id| super::token_id(general, key, id)).transpose()
}

/// Ends of sequence, turn and message.
fn eos_token_ids(general: &GgufKeys<'_>) -> Result<Vec<u32>, LoadError> {
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some(id) = token_id(general, &format!("tokenizer.ggml.{name}_token_id"))?
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
