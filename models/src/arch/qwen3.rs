//! Qwen3 (dense): each head of q and of k is normalized before RoPE, and there is no bias unless the configuration asks.
//!
//! Reference: `Qwen3ForCausalLM` of transformers.

use crate::blocks::{Attention, AttentionSpec, DecoderLayer, DecoderParts, Mlp, RmsNorm};
use crate::builder::Builder;
use crate::error::LoadError;

pub(crate) fn build(builder: &mut Builder<'_>) -> Result<DecoderParts, LoadError> {
    let config = builder.config();
    DecoderParts::load(builder, |builder, layer| {
        let prefix = format!("model.layers.{layer}");
        let spec = AttentionSpec {
            layer,
            bias: config.attention_bias,
            output_bias: config.attention_bias,
            head_norm: true,
            window: config.window(layer),
        };
        Ok(DecoderLayer {
            input_norm: RmsNorm::load(builder, &format!("{prefix}.input_layernorm"))?,
            attention: Attention::load(builder, &format!("{prefix}.self_attn"), spec)?,
            post_attention_norm: RmsNorm::load(builder, &format!("{prefix}.post_attention_layernorm"))?,
            mlp: Mlp::load(builder, &format!("{prefix}.mlp"), false)?,
        })
    })
}
