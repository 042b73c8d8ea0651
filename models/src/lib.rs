//! Architectures and weights: a model is composed of shared blocks over [`kvern_kernels`]; weights of GGUF and safetensors
//! arrive under one naming before any model code sees them.

mod arch;
mod batch;
mod blocks;
mod builder;
mod checkpoint;
pub mod config;
mod error;
pub mod gguf;
mod json;
mod load;
mod map;
pub mod rope;
pub mod safetensors;
mod weights;

pub use checkpoint::{Checkpoint, ModelFiles};
pub use config::{Architecture, GenerationDefaults, ModelConfig};
pub use error::LoadError;
pub use load::{LoadedModel, load};
pub use weights::Weights;

use kvern_kernels::{Device, KernelError, KvCache, Precision, SampledTokens, Tensor};

/// The input of one forward pass; borrowed for one step. T tokens of B sequences, S of whose rows are sampled.
#[derive(Clone, Copy, Debug)]
pub struct ForwardBatch<'a> {
    /// `[T]`
    pub input_ids: &'a [u32],
    /// `[T]`
    pub positions: &'a [u32],
    /// `[T]`: block * block_size + offset.
    pub slot_mapping: &'a [u32],
    /// `[B + 1]`
    pub cu_seqlens_q: &'a [u32],
    /// `[B]`, this step's tokens included.
    pub context_lens: &'a [u32],
    /// `[B, block_table_stride]`
    pub block_tables: &'a [u32],
    pub block_table_stride: usize,
    /// `[S]`: rows of `input_ids` whose logits are wanted, ascending.
    pub sample_rows: &'a [u32],
    /// `[B]`, or empty where all tokens are known: for a sequence of one token that the last step sampled and only the device
    /// knows, its place among that step's sampled rows; [`KNOWN`](kvern_kernels::KNOWN) for others.
    pub last_sampled: &'a [u32],
}

/// Most of everything in one step; workspace is allocated for it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// T
    pub tokens_max: usize,
    /// B and S
    pub sequences_max: usize,
    /// Longest context; RoPE tables cover it.
    pub context_max: usize,
}

/// A loaded model: weights and workspace on one device.
pub trait Model: Send {
    /// Logits `[S, vocab_size]` in F32, valid until the next call.
    fn forward(&mut self, batch: &ForwardBatch<'_>, kv: &mut KvCache) -> Result<&Tensor, KernelError>;

    /// Another model over the same weights, with a workspace of its own, that computes on `device`: of the same kind and
    /// level as the device that the weights were packed for. Costs the workspace's memory, and no time.
    fn twin(&self, device: &Device) -> Result<Box<dyn Model>, KernelError>;

    /// Where the sampler of this model's logits leaves its tokens, so that `last_sampled` finds them.
    fn sampled_tokens(&self) -> SampledTokens;

    /// Readies decode steps over `kv` to be put on the device as one, where that gains something: then each of a ladder of batch
    /// sizes is run and captured, with each [share](Device::shares) of the device, and `progress` hears how many are
    /// done of how many. What `kv` holds is lost, and the share that work has is any.
    fn capture(&mut self, kv: &mut KvCache, progress: &mut dyn FnMut(usize, usize)) -> Result<(), KernelError>;
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The model's files.
    #[default]
    Files,
    /// Random numbers from this seed, for measuring: norms are ones and biases zeros, so that activations stay finite.
    Dummy { seed: u64 },
}

#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    pub precision: Precision,
    pub format: LoadFormat,
    pub limits: StepLimits,
}

/// Progress of loading, in bytes of weights.
pub type Progress<'a> = &'a mut dyn FnMut(LoadProgress);

#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}
