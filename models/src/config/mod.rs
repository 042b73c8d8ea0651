//! What a model is: sizes, attention, RoPE, special tokens. Read once, from config.json or from GGUF metadata, and checked
//! here, so that nothing later meets a size of zero or a product that overflows.

mod generation;
mod gguf;
mod hf;
mod keys;
mod rope;

use kvern_kernels::HeadLayout;

use crate::Checkpoint;
use crate::error::LoadError;
use crate::rope::Rope;
use keys::Keys;

pub use generation::GenerationDefaults;

/// The families whose layers Kvern composes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama, SmolLM2; Mistral is a llama with a window.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
}

/// For messages.
const SUPPORTED: &str = "llama, mistral, qwen2 or qwen3";

// Bounds on sizes. They are far beyond any published model, and their products fit `usize`.
const HIDDEN_MAX: usize = 1 << 20;
const INTERMEDIATE_MAX: usize = 1 << 22;
const LAYERS_MAX: usize = 1 << 12;
const HEADS_MAX: usize = 1 << 13;
const HEAD_DIM_MAX: usize = 1 << 12;
const VOCAB_MAX: usize = 1 << 24;
const CONTEXT_MAX: usize = 1 << 28;

/// A model's configuration; every number is checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// `heads` is a multiple of `kv_heads`; `head_dim` is even and may differ from hidden / heads.
    pub heads: HeadLayout,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v, and except for qwen2 on the output projection.
    pub attention_bias: bool,
    /// Biases in the feed-forward network.
    pub mlp_bias: bool,
    /// Per layer, positions that a query sees, its own included; `None` is all.
    pub windows: Vec<Option<u32>>,
    pub rope: Rope,
    /// The longest context that the configuration names, in tokens.
    pub max_position_embeddings: usize,
    pub bos_token_id: Option<u32>,
    /// Each of these ends a generation; may be empty. Of config.json and generation_config.json together, or of GGUF's
    /// end of sequence, turn and message.
    pub eos_token_ids: Vec<u32>,
    /// Defaults for requests that the model's authors recommend.
    pub generation: GenerationDefaults,
}

impl ModelConfig {
    /// Reads the configuration of an open checkpoint.
    ///
    /// # Errors
    /// A key is missing, of the wrong type or out of range; or the model needs something that Kvern does not have, such as
    /// another architecture, mixture of experts, or a quantization method of safetensors.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        match checkpoint {
            Checkpoint::Gguf(file) => gguf::read(file),
            Checkpoint::SafeTensors(files) => hf::read(files.dir()),
            Checkpoint::ConfigOnly(dir) => hf::read(dir),
        }
    }

    /// The windows that layers have, each once.
    pub(crate) fn distinct_windows(&self) -> Vec<Option<u32>> {
        let mut windows = self.windows.clone();
        windows.sort_unstable();
        windows.dedup();
        windows
    }

    /// Positions that a query of a layer sees, its own included; `None` is all.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<u32> {
        self.windows[layer]
    }
}

/// Heads that fit together, or an error at the key that does not.
fn check_heads(keys: &impl Keys, kv_heads_key: &str, head_dim_key: &str, layout: HeadLayout) -> Result<(), LoadError> {
    let HeadLayout { heads, kv_heads, head_dim } = layout;
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.mismatch(kv_heads_key, &format!("a divisor of the {heads} attention heads"), kv_heads));
    }
    if !(2..=HEAD_DIM_MAX).contains(&head_dim) || !head_dim.is_multiple_of(2) {
        return Err(keys.mismatch(head_dim_key, &format!("an even size of 2 to {HEAD_DIM_MAX}"), head_dim));
    }
    Ok(())
}

fn unsupported_architecture(keys: &impl Keys, key: &str, found: &str) -> LoadError {
    let found = crate::error::quoted(found);
    let reason = format!("{}: expected an architecture of {SUPPORTED}, found {found}", keys.full(key));
    LoadError::unsupported(keys.path(), reason)
}

fn token_id(keys: &impl Keys, key: &str, found: u64) -> Result<u32, LoadError> {
    u32::try_from(found).map_err(|_| keys.mismatch(key, "a token id below 2^32", found))
}
