//! Architectures. Each file composes [`blocks`](crate::blocks) into a decoder layer; this one is their registry.

mod llama;
mod qwen2;
mod qwen3;

use crate::blocks::DecoderParts;
use crate::builder::Builder;
use crate::config::Architecture;
use crate::error::LoadError;

type Build = fn(&mut Builder<'_>) -> Result<DecoderParts, LoadError>;

/// One row per architecture: how its parts are built.
const REGISTRY: &[(Architecture, Build)] = &[
    (Architecture::Llama, llama::build),
    (Architecture::Qwen2, qwen2::build),
    (Architecture::Qwen3, qwen3::build),
];
