//! Llama, and what shares its layer: SmolLM2, and Mistral with its window.
//!
//! Reference: `LlamaForCausalLM` and `MistralForCausalLM` of transformers.

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
            head_norm: false,
            window: config.window(layer),
        };
        Ok(DecoderLayer {
            input_norm: RmsNorm::load(builder, &format!("{prefix}.input_layernorm"))?,
            attention: Attention::load(builder, &format!("{prefix}.self_attn"), spec)?,
            post_attention_norm: RmsNorm::load(builder, &format!("{prefix}.post_attention_layernorm"))?,
            mlp: Mlp::load(builder, &format!("{prefix}.mlp"), config.mlp_bias)?,
        })
    })
}
