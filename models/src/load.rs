//! From files to a model on a device.

use std::sync::Arc;

use kvern_kernels::{Device, HeadLayout, KvDType, KvShape};

use crate::arch;
use crate::blocks::Decoder;
use crate::builder::{Builder, Source};
use crate::checkpoint::{Checkpoint, ModelFiles};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::weights::Weights;
use crate::{LoadFormat, LoadOptions, Model, Progress};

/// A model and what its owner must know to feed it.
pub struct LoadedModel {
    pub model: Box<dyn Model>,
    pub config: ModelConfig,
    /// Of every layer.
    pub heads: HeadLayout,
    /// Weights on the device, in bytes.
    pub weight_bytes: usize,
    /// Buffers for the largest step, in bytes.
    pub workspace_bytes: usize,
}

impl LoadedModel {
    /// Shape of a cache of `blocks` blocks of `block_size` tokens for this model.
    #[must_use]
    pub fn kv_shape(&self, blocks: usize, block_size: usize, dtype: KvDType) -> KvShape {
        let HeadLayout { kv_heads, head_dim, .. } = self.heads;
        KvShape { layers: self.config.layers, blocks, block_size, kv_heads, head_dim, dtype }
    }
}

/// Reads and packs all weights of `files`, and allocates the workspace of `options.limits`.
///
/// `progress` is called after each packed weight and once at the end.
///
/// # Errors
/// A file cannot be read or is not sound; the configuration asks for what Kvern does not have; a tensor is missing, unused, of a wrong shape or type; the device refuses (memory, an unsupported precision).
pub fn load(
    device: &Device,
    files: &ModelFiles,
    options: &LoadOptions,
    progress: Progress<'_>,
) -> Result<LoadedModel, LoadError> {
    let checkpoint = Checkpoint::open(files)?;
    let config = ModelConfig::read(&checkpoint)?;
    let source = match options.format {
        LoadFormat::Files => Source::Files(Weights::new(&checkpoint, &config)),
        LoadFormat::Dummy { seed } => Source::Random { seed },
    };
    let mut builder = Builder::new(device, &config, source, options.precision, progress);
    let parts = arch::build(&mut builder)?;
    builder.finish()?;
    device.synchronize()?;
    let decoder = Decoder::new(device, &config, Arc::new(parts), options.limits)?;
    Ok(LoadedModel {
        heads: config.heads,
        weight_bytes: decoder.weight_bytes(),
        workspace_bytes: decoder.workspace_bytes(),
        model: Box::new(decoder),
        config,
    })
}
