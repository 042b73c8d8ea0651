//! The pre-norm decoder: embedding, layers of attention and feed-forward network, final norm, head.
//!
//! Owner of a model's weights and workspace. A step costs one pass over the weights; the head runs on sampled rows alone,
//! and so does the last layer after its attention.

use kvern_kernels::{
    AttentionPlan, Device, HeadLayout, KernelError, KvCache, RopeTable, SequenceBatch, Tensor, ops,
};

use super::attention::Step;
use super::workspace::{Activations, Widths, Workspace};
use super::{Attention, Embedding, Linear, Mlp, RmsNorm};
use crate::batch::{BatchBounds, check};
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
        self.attention.output.forward(device, attended, delta)?;
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
    pub(crate) embedding: Embedding,
    /// At least one.
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: RmsNorm,
    /// `None`: tied to the embedding.
    pub(crate) head: Option<Linear>,
    pub(crate) rope: RopeTable,
    pub(crate) heads: HeadLayout,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
}

pub(crate) struct Decoder {
    device: Device,
    parts: DecoderParts,
    bounds: BatchBounds,
    plan: AttentionPlan,
    workspace: Workspace,
    workspace_bytes: usize,
}

impl Decoder {
    /// Allocates the workspace of `limits` beside the weights.
    pub(crate) fn new(device: &Device, parts: DecoderParts, limits: StepLimits) -> Result<Self, KernelError> {
        assert!(!parts.layers.is_empty(), "a decoder has layers");
        let HeadLayout { heads, kv_heads, head_dim } = parts.heads;
        let widths = Widths {
            hidden: parts.hidden,
            qkv: (heads + 2 * kv_heads) * head_dim,
            attended: heads * head_dim,
            intermediate: parts.intermediate,
            vocab: parts.embedding.vocab_size(),
        };
        let StepLimits { tokens_max, sequences_max, context_max } = limits;
        Ok(Decoder {
            device: device.clone(),
            bounds: BatchBounds { limits, vocab_size: widths.vocab, layers: parts.layers.len(), heads: parts.heads },
            plan: AttentionPlan::new(device, parts.heads, tokens_max, sequences_max, context_max)?,
            workspace: Workspace::new(device, &widths, &limits)?,
            workspace_bytes: Workspace::bytes(&widths, &limits),
            parts,
        })
    }

    /// Bytes of weights on the device.
    pub(crate) fn weight_bytes(&self) -> usize {
        let DecoderParts { embedding, layers, norm, head, .. } = &self.parts;
        let layers: usize = layers.iter().map(DecoderLayer::bytes).sum();
        embedding.bytes() + layers + norm.bytes() + head.as_ref().map_or(0, Linear::bytes)
    }

    /// Bytes of buffers that a forward pass writes, the plan of attention excluded.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }
}

impl Model for Decoder {
    fn forward(&mut self, batch: &ForwardBatch<'_>, kv: &mut KvCache) -> Result<&Tensor, KernelError> {
        check(batch, &self.bounds, &kv.shape())?;
        let Decoder { device, parts, plan, workspace, .. } = self;
        let DecoderParts { embedding, layers, norm, head, rope, .. } = parts;
        workspace.set_rows(batch.input_ids.len(), batch.sample_rows.len());
        let Workspace { tokens, sampled, qkv, logits } = workspace;

        let sequences = SequenceBatch {
            cu_seqlens_q: batch.cu_seqlens_q,
            context_lens: batch.context_lens,
            block_tables: batch.block_tables,
            block_table_stride: batch.block_table_stride,
        };
        plan.update(device, &sequences, kv)?;
        let step = Step { device, rope, plan, positions: batch.positions, slots: batch.slot_mapping };

        embedding.forward(device, batch.input_ids, &mut tokens.residual)?;
        layers[0].input_norm.forward(device, &tokens.residual, &mut tokens.normed)?;
        let (last, body) = layers.split_last().expect("a decoder has layers, asserted at construction");
        for (layer, next) in body.iter().zip(&layers[1..]) {
            layer.attention.attend(&step, &tokens.normed, qkv, kv, &mut tokens.attended)?;
            layer.transform(device, tokens, &next.input_norm)?;
        }
        last.attention.attend(&step, &tokens.normed, qkv, kv, &mut tokens.attended)?;
        if batch.sample_rows.is_empty() {
            return Ok(logits);
        }
        ops::gather_rows(device, &tokens.attended, batch.sample_rows, &mut sampled.attended)?;
        ops::gather_rows(device, &tokens.residual, batch.sample_rows, &mut sampled.residual)?;
        last.transform(device, sampled, norm)?;
        match head {
            Some(head) => head.forward(device, &sampled.normed, logits)?,
            None => embedding.logits(device, &sampled.normed, logits)?,
        }
        Ok(logits)
    }
}
