//! The tensors of a checkpoint under one naming, that of Hugging Face (`model.layers.0.self_attn.q_proj.weight`), whatever
//! the file's format, with every shape held against what the configuration asks for.
//!
//! Each tensor is taken once; [`Weights::finish`] fails on what no one took, because a leftover means that the model
//! computes something else than its authors meant. Taking costs O(log tensors); data are borrowed from the map.

use std::collections::BTreeSet;
use std::path::Path;

use kvern_kernels::{Format, MatrixView, RowOrder, dequantize};

use crate::checkpoint::Checkpoint;
use crate::config::{Architecture, ModelConfig};
use crate::error::LoadError;

/// Hugging Face's names and GGUF's, without `.weight` and `.bias`; those of layers follow their prefix.
const GGUF_NAMES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
const GGUF_LAYER_NAMES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Ends of the names of tensors that a file may have without use: frequencies, which the configuration gives.
const IGNORABLE: [&str; 6] = [
    "rotary_emb.inv_freq",
    "attn_rot_embd",
    "attn_rot_embd.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];
/// What is read of GGUF, for messages.
const GGUF_TYPES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, or Q2_K to Q6_K";
const HEAD: &str = "lm_head.weight";

/// The tensors of an open checkpoint that are still to be taken.
#[derive(Debug)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    /// GGUF's llama stores q and k for interleaved RoPE.
    permuted: bool,
    heads: usize,
    kv_heads: usize,
    tied: bool,
    /// Names in the file.
    unused: BTreeSet<&'a str>,
}

/// A tensor as the file has it.
struct Stored<'a> {
    name: &'a str,
    path: &'a Path,
    format: Format,
    /// Slowest first.
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl<'a> Weights<'a> {
    /// All tensors of a checkpoint, for a model of this configuration. Asks the operating system to read the files ahead.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, config: &ModelConfig) -> Self {
        let unused = match checkpoint {
            Checkpoint::Gguf(gguf) => {
                gguf.read_ahead();
                gguf.tensors().map(|(name, _)| name).collect()
            }
            Checkpoint::SafeTensors(files) => {
                files.read_ahead();
                files.tensors().map(|(name, _)| name).collect()
            }
            Checkpoint::ConfigOnly(_) => BTreeSet::new(),
        };
        Weights {
            checkpoint,
            permuted: matches!(checkpoint, Checkpoint::Gguf(_)) && config.architecture == Architecture::Llama,
            heads: config.heads.heads,
            kv_heads: config.heads.kv_heads,
            tied: config.tie_word_embeddings,
            unused,
        }
    }

    /// Bytes of all tensors that are still to be taken.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        let bytes = |name: &&str| match self.checkpoint {
            Checkpoint::Gguf(gguf) => gguf.tensor(name).map_or(0, |info| gguf.tensor_bytes(info).len()),
            Checkpoint::SafeTensors(files) => files.tensor(name).map_or(0, |(_, info)| files.bytes(info).len()),
            Checkpoint::ConfigOnly(_) => 0,
        };
        self.unused.iter().map(|name| bytes(name) as u64).sum()
    }

    /// Takes a matrix of `rows` (out features) by `cols` (in features).
    ///
    /// # Errors
    /// [`LoadError::Tensor`]: it is missing, taken before, of another shape, or of a type that Kvern does not have.
    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<MatrixView<'a>, LoadError> {
        let stored = self.take(name, &[rows, cols])?;
        let row_order = self.row_order(name);
        if !cols.is_multiple_of(stored.format.block_elements()) {
            let expected = format!("rows of whole {:?} blocks", stored.format);
            return Err(LoadError::tensor(
                stored.path,
                stored.name,
                format!("expected {expected}, found {cols} columns"),
            ));
        }
        Self::check_order(&stored, row_order, rows)?;
        let Stored { name, format, bytes, .. } = stored;
        Ok(MatrixView { name, format, rows, cols, bytes, row_order })
    }

    /// Takes a vector of `len` elements, widened to f32 and in natural order.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let stored = self.take(name, &[len])?;
        let row_order = self.row_order(name);
        Self::check_order(&stored, row_order, len)?;
        let mut values = vec![0.0; len];
        dequantize(stored.format, stored.bytes, &mut values)
            .map_err(|error| LoadError::tensor(stored.path, stored.name, error.to_string()))?;
        match row_order {
            RowOrder::Natural => Ok(values),
            RowOrder::UnpermuteRope { heads } => Ok(unpermute(&values, heads)),
        }
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// [`LoadError::Tensor`] for a tensor that was not taken, unless it is one that needs no use.
    pub fn finish(self) -> Result<(), LoadError> {
        let left = self.unused.iter().find(|name| {
            let tied_head = self.tied && **name == HEAD;
            !tied_head && !IGNORABLE.iter().any(|end| name.ends_with(end))
        });
        match left {
            None => Ok(()),
            Some(name) => {
                let path = match self.checkpoint {
                    Checkpoint::Gguf(gguf) => gguf.tensor(name).map(|info| gguf.tensor_path(info)),
                    Checkpoint::SafeTensors(files) => files.tensor(name).map(|(_, info)| files.tensor_path(info)),
                    Checkpoint::ConfigOnly(_) => None,
                };
                let reason = "unused: the configuration does not ask for it";
                Err(LoadError::tensor(path.unwrap_or(self.checkpoint.path()), name, reason))
            }
        }
    }

    fn take(&mut self, name: &str, expected: &[usize]) -> Result<Stored<'a>, LoadError> {
        let stored = match self.checkpoint {
            Checkpoint::Gguf(_) => gguf_name(name).map(|name| self.find(&name)),
            Checkpoint::SafeTensors(_) | Checkpoint::ConfigOnly(_) => Some(self.find(name)),
        };
        let missing = || LoadError::tensor(self.checkpoint.path(), name, format!("missing: expected {expected:?}"));
        let stored = stored.transpose()?.flatten().ok_or_else(missing)?;
        if stored.shape != expected {
            let reason = format!("expected a shape of {expected:?}, found {:?}", stored.shape);
            return Err(LoadError::tensor(stored.path, stored.name, reason));
        }
        if !self.unused.remove(stored.name) {
            return Err(LoadError::tensor(stored.path, stored.name, "taken twice"));
        }
        Ok(stored)
    }

    /// A tensor by its name in the file.
    fn find(&self, name: &str) -> Result<Option<Stored<'a>>, LoadError> {
        match self.checkpoint {
            Checkpoint::Gguf(gguf) => {
                let Some((name, info)) = gguf.tensor_entry(name) else { return Ok(None) };
                let path = gguf.tensor_path(info);
                let format = info.tensor_type.format().ok_or_else(|| {
                    LoadError::tensor(path, name, format!("expected {GGUF_TYPES}, found {}", info.tensor_type.name()))
                })?;
                let shape = info.dims.iter().rev().copied().collect();
                Ok(Some(Stored { name, path, format, shape, bytes: gguf.tensor_bytes(info) }))
            }
            Checkpoint::SafeTensors(files) => {
                let Some((name, info)) = files.tensor(name) else { return Ok(None) };
                let path = files.tensor_path(info);
                let format = info.format().ok_or_else(|| {
                    LoadError::tensor(path, name, format!("expected F32, F16 or BF16, found {:?}", info.dtype))
                })?;
                Ok(Some(Stored { name, path, format, shape: info.shape.clone(), bytes: files.bytes(info) }))
            }
            Checkpoint::ConfigOnly(_) => Ok(None),
        }
    }

    fn row_order(&self, name: &str) -> RowOrder {
        if self.permuted && name.contains(".self_attn.q_proj.") {
            RowOrder::UnpermuteRope { heads: self.heads }
        } else if self.permuted && name.contains(".self_attn.k_proj.") {
            RowOrder::UnpermuteRope { heads: self.kv_heads }
        } else {
            RowOrder::Natural
        }
    }

    /// Rows in RoPE's order come in pairs per head.
    fn check_order(stored: &Stored<'_>, order: RowOrder, rows: usize) -> Result<(), LoadError> {
        match order {
            RowOrder::UnpermuteRope { heads } if !rows.is_multiple_of(2 * heads) => {
                let reason = format!("expected an even number of rows for each of {heads} heads, found {rows}");
                Err(LoadError::tensor(stored.path, stored.name, reason))
            }
            _ => Ok(()),
        }
    }
}

/// GGUF's name of a tensor; `None` when it has none.
fn gguf_name(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    if let Some((_, gguf)) = GGUF_NAMES.iter().find(|(hf, _)| *hf == stem) {
        return Some(format!("{gguf}.{suffix}"));
    }
    let (layer, stem) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, gguf) = GGUF_LAYER_NAMES.iter().find(|(hf, _)| *hf == stem)?;
    Some(format!("blk.{layer}.{gguf}.{suffix}"))
}

/// Stored element `2i + j` of a head of `d` is element `i + j * d / 2`.
fn unpermute(values: &[f32], heads: usize) -> Vec<f32> {
    let head_dim = values.len() / heads;
    let mut natural = vec![0.0; values.len()];
    for (from, to) in values.chunks_exact(head_dim).zip(natural.chunks_exact_mut(head_dim)) {
        for (stored, value) in from.iter().enumerate() {
            to[stored / 2 + (stored % 2) * head_dim / 2] = *value;
        }
    }
    natural
}
