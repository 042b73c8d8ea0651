//! Qwen2 and Qwen2.5: biases on q, k and v, and a window in the upper layers where the configuration asks for one.
//!
//! Reference: `Qwen2ForCausalLM` of transformers.

use crate::blocks::{Attention, AttentionSpec, DecoderLayer, DecoderParts, Mlp, RmsNorm};
use crate::builder::Builder;
use crate::error::LoadError;

pub(crate) fn build(builder: &mut Builder<'_>) -> Result<DecoderParts, LoadError> {
    let config = builder.config();
    DecoderParts::load(builder, |builder, layer| {
        let prefix = format!("model.layers.{layer}");
        let spec =
            AttentionSpec { layer, bias: true, output_bias: false, head_norm: false, window: config.window(layer) };
        Ok(DecoderLayer {
            input_norm: RmsNorm::load(builder, &format!("{prefix}.input_layernorm"))?,
            attention: Attention::load(builder, &format!("{prefix}.self_attn"), spec)?,
            post_attention_norm: RmsNorm::load(builder, &format!("{prefix}.post_attention_layernorm"))?,
            mlp: Mlp::load(builder, &format!("{prefix}.mlp"), false)?,
        })
    })
}
