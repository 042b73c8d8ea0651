//! Architectures. Each file composes [`blocks`](crate::blocks) into a decoder layer; this one is their registry.

mod llama;
mod qwen2;
mod qwen3;

use crate::blocks::DecoderParts;
use crate::builder::Builder;
use crate::config::Architecture;
use crate::error::LoadError;

/// Builds the parts of a model from its configuration and weights.
type Build = fn(&mut Builder<'_>) -> Result<DecoderParts, LoadError>;

/// The registry: one row per architecture.
fn build_of(architecture: Architecture) -> Build {
    match architecture {
        Architecture::Llama => llama::build,
        Architecture::Qwen2 => qwen2::build,
        Architecture::Qwen3 => qwen3::build,
    }
}

/// Builds the parts of the model that the builder's configuration names.
pub(crate) fn build(builder: &mut Builder<'_>) -> Result<DecoderParts, LoadError> {
    build_of(builder.config().architecture)(builder)
}
