//! The pre-norm decoder: embedding, layers of attention and feed-forward network, final norm, head.
//!
//! Owner of a model's weights and workspace. A step costs one pass over the weights; the head runs on sampled rows alone,
//! and so does the last layer after its attention.

use std::sync::Arc;

use kvern_kernels::{
    AttentionLimits, AttentionPlan, Device, HeadLayout, KernelError, KvCache, RopeTable, SampledTokens, SequenceBatch,
    StepGraphs, StepInputs, StepRows, Tensor, ops,
};

use super::attention::Step;
use super::workspace::{Activations, Widths, Workspace};
use super::{Attention, Embedding, Linear, Mlp, RmsNorm};
use crate::batch::{BatchBounds, check};
use crate::builder::Builder;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::rope::RopeFrequencies;
use crate::{ForwardBatch, Model, StepLimits};

pub(crate) struct DecoderLayer {
    pub(crate) input_norm: RmsNorm,
    pub(crate) attention: Attention,
    pub(crate) post_attention_norm: RmsNorm,
    pub(crate) mlp: Mlp,
}

impl DecoderLayer {
    /// The layer after attention. `rows.attended` becomes `next_norm` of the layer's result in `rows.normed`, and the
    /// residual stream moves on.
    fn transform(&self, device: &Device, rows: &mut Activations, next_norm: &RmsNorm) -> Result<(), KernelError> {
        let Activations { residual, normed, attended, delta, gate_up, gated } = rows;
        self.attention.project(device, attended, delta)?;
        self.post_attention_norm.add_forward(device, residual, delta, normed)?;
        self.mlp.forward(device, normed, gate_up, gated, delta)?;
        next_norm.add_forward(device, residual, delta, normed)
    }

    fn bytes(&self) -> usize {
        self.input_norm.bytes() + self.attention.bytes() + self.post_attention_norm.bytes() + self.mlp.bytes()
    }
}

/// What an architecture composes.
pub(crate) struct DecoderParts {
    embedding: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None`: tied to the embedding.
    head: Option<Linear>,
}

impl DecoderParts {
    /// Loads what is around the layers, and each layer by `layer(builder, index)`.
    pub(crate) fn load(
        builder: &mut Builder<'_>,
        mut layer: impl FnMut(&mut Builder<'_>, usize) -> Result<DecoderLayer, LoadError>,
    ) -> Result<Self, LoadError> {
        let config = builder.config();
        let embedding = Embedding::load(builder, "model.embed_tokens")?;
        let layers = (0..config.layers).map(|index| layer(builder, index)).collect::<Result<_, _>>()?;
        let norm = RmsNorm::load(builder, "model.norm")?;
        let head = [("lm_head".to_owned(), config.vocab_size)];
        let head = if config.tie_word_embeddings {
            None
        } else {
            Some(Linear::load(builder, &head, config.hidden_size, false)?)
        };
        Ok(DecoderParts { embedding, layers, norm, head })
    }

    /// The whole forward pass over inputs that are on the device; logits of the sampled rows to the workspace.
    fn compute(&self, step: &Step<'_>, workspace: &mut Workspace, kv: &mut KvCache) -> Result<(), KernelError> {
        let DecoderParts { embedding, layers, norm, head } = self;
        let Workspace { tokens, sampled, qkv, logits } = workspace;
        let (device, inputs) = (step.device, &step.inputs);
        embedding.forward(device, inputs.ids, &mut tokens.residual)?;
        layers[0].input_norm.forward(device, &tokens.residual, &mut tokens.normed)?;
        let (last, body) = layers.split_last().expect("a decoder has layers, asserted at construction");
        for (layer, next) in body.iter().zip(&layers[1..]) {
            layer.attention.attend(step, &tokens.normed, qkv, kv, &mut tokens.attended)?;
            layer.transform(device, tokens, &next.input_norm)?;
        }
        last.attention.attend(step, &tokens.normed, qkv, kv, &mut tokens.attended)?;
        if inputs.sample_rows.is_empty() {
            return Ok(());
        }
        ops::gather_rows(device, &tokens.attended, inputs.sample_rows, &mut sampled.attended)?;
        ops::gather_rows(device, &tokens.residual, inputs.sample_rows, &mut sampled.residual)?;
        last.transform(device, sampled, norm)?;
        match head {
            Some(head) => head.forward(device, &sampled.normed, logits),
            None => embedding.logits(device, &sampled.normed, logits),
        }
    }
}

pub(crate) struct Decoder {
    device: Device,
    config: ModelConfig,
    parts: Arc<DecoderParts>,
    rope: RopeTable,
    bounds: BatchBounds,
    inputs: StepInputs,
    plan: AttentionPlan,
    graphs: StepGraphs,
    workspace: Workspace,
}

impl Decoder {
    /// Allocates the workspace of `limits` beside the weights.
    pub(crate) fn new(
        device: &Device,
        config: &ModelConfig,
        parts: Arc<DecoderParts>,
        limits: StepLimits,
    ) -> Result<Self, KernelError> {
        assert!(!parts.layers.is_empty(), "a decoder has layers");
        let HeadLayout { heads, kv_heads, head_dim } = config.heads;
        let widths = Widths {
            hidden: config.hidden_size,
            qkv: (heads + 2 * kv_heads) * head_dim,
            attended: heads * head_dim,
            intermediate: config.intermediate_size,
            vocab: config.vocab_size,
        };
        let StepLimits { tokens_max, sequences_max, context_max } = limits;
        let windows = config.distinct_windows();
        let attention =
            AttentionLimits { windows: &windows, ..AttentionLimits::new(tokens_max, sequences_max, context_max) };
        let RopeFrequencies { inv_freq, scale } = config.rope.frequencies(context_max);
        Ok(Decoder {
            device: device.clone(),
            config: config.clone(),
            rope: RopeTable::new(device, &inv_freq, scale, context_max)?,
            bounds: BatchBounds { limits, vocab_size: widths.vocab, layers: parts.layers.len(), heads: config.heads },
            inputs: StepInputs::new(device, tokens_max, sequences_max)?,
            plan: AttentionPlan::new(device, config.heads, &attention)?,
            graphs: StepGraphs::new(device, sequences_max.min(tokens_max)),
            workspace: Workspace::new(device, &widths, &limits)?,
            parts,
        })
    }

    /// Bytes of weights on the device.
    pub(crate) fn weight_bytes(&self) -> usize {
        let DecoderParts { embedding, layers, norm, head } = &*self.parts;
        let layers: usize = layers.iter().map(DecoderLayer::bytes).sum();
        embedding.bytes() + layers + norm.bytes() + head.as_ref().map_or(0, Linear::bytes)
    }

    /// Bytes of buffers that a forward pass writes; of the plan of attention and of tables, those on a GPU.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace.bytes() + self.inputs.bytes() + self.plan.device_bytes() + self.rope.device_bytes()
    }
}

/// Work on the device may still use what is about to be given back.
impl Drop for Decoder {
    fn drop(&mut self) {
        // A device that fails now has failed before, where somebody was told.
        let _ = self.device.synchronize();
    }
}

impl Model for Decoder {
    fn twin(&self, device: &Device) -> Result<Box<dyn Model>, KernelError> {
        Ok(Box::new(Decoder::new(device, &self.config, Arc::clone(&self.parts), self.bounds.limits)?))
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, kv: &mut KvCache) -> Result<&Tensor, KernelError> {
        check(batch, &self.bounds, &kv.shape())?;
        let Decoder { device, parts, rope, inputs, plan, graphs, workspace, .. } = self;
        let sequences = SequenceBatch {
            cu_seqlens_q: batch.cu_seqlens_q,
            context_lens: batch.context_lens,
            block_tables: batch.block_tables,
            block_table_stride: batch.block_table_stride,
        };
        let rows = StepRows {
            ids: batch.input_ids,
            positions: batch.positions,
            slots: batch.slot_mapping,
            sample_rows: batch.sample_rows,
            last_sampled: batch.last_sampled,
        };
        let padded = graphs.padded_rows(device, &sequences, kv);
        let padded = plan.update(device, &sequences, kv, padded)?;
        let indices = inputs.update(device, &rows, &sequences, plan, padded)?;
        let step = Step { device, rope, plan, inputs: indices };
        graphs.run(device, padded, kv, |kv| {
            inputs.build(device)?;
            parts.compute(&step, workspace, kv)
        })?;
        workspace.logits.set_rows(batch.sample_rows.len());
        Ok(&workspace.logits)
    }

    fn sampled_tokens(&self) -> SampledTokens {
        self.inputs.sampled_tokens()
    }

    fn capture(&mut self, kv: &mut KvCache, progress: &mut dyn FnMut(usize, usize)) -> Result<(), KernelError> {
        let (ladder, shares) = (self.graphs.ladder(), self.device.shares());
        let total = ladder.len() * shares.len();
        // The largest first: what it needs serves the others.
        let steps = shares.iter().flat_map(|share| ladder.iter().rev().map(|rows| (*share, *rows)));
        for (done, (share, rows)) in steps.enumerate() {
            progress(done, total);
            self.device.move_to(share)?;
            self.capture_step(rows, kv)?;
        }
        progress(total, total);
        self.device.synchronize()
    }
}

impl Decoder {
    /// Runs and captures a decode step of so many sequences, with the share of the device that work has now.
    fn capture_step(&mut self, rows: usize, kv: &mut KvCache) -> Result<(), KernelError> {
        let (zeros, ones) = (vec![0; rows], vec![1; rows]);
        let ends: Vec<u32> = (0..=rows as u32).collect();
        let batch = ForwardBatch {
            input_ids: &zeros,
            positions: &zeros,
            slot_mapping: &zeros,
            cu_seqlens_q: &ends,
            context_lens: &ones,
            block_tables: &zeros,
            block_table_stride: 1,
            sample_rows: &ends[..rows],
            last_sampled: &[],
        };
        // Once as it is, because what is loaded at first use cannot be loaded during a capture.
        self.forward(&batch, kv)?;
        self.graphs.begin_capture();
        let captured = self.forward(&batch, kv).map(|_| ());
        self.graphs.end_capture();
        captured
    }
}
