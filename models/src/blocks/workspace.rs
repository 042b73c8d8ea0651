//! Buffers that a forward pass writes, allocated once for the largest step. Each op sets the live rows of its output.

use kvern_kernels::{Device, KernelError, Tensor};

use crate::StepLimits;

/// Widths of a decoder's activations, in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widths {
    pub(crate) hidden: usize,
    /// `(heads + 2 kv_heads) * head_dim`
    pub(crate) qkv: usize,
    /// `heads * head_dim`
    pub(crate) attended: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocab: usize,
}

/// What the part of a layer after attention reads and writes: rows that do not see each other.
pub(crate) struct Activations {
    /// The residual stream, `[rows, hidden]`.
    pub(crate) residual: Tensor,
    /// The residual stream, normalized, `[rows, hidden]`.
    pub(crate) normed: Tensor,
    /// What the attention heads saw, `[rows, heads * head_dim]`.
    pub(crate) attended: Tensor,
    /// What a projection adds to the residual stream, `[rows, hidden]`.
    pub(crate) delta: Tensor,
    /// `[rows, 2 * intermediate]`
    pub(crate) gate_up: Tensor,
    /// `[rows, intermediate]`
    pub(crate) gated: Tensor,
}

impl Activations {
    fn new(device: &Device, widths: &Widths, rows_max: usize) -> Result<Self, KernelError> {
        Ok(Activations {
            residual: Tensor::zeros(device, rows_max, widths.hidden)?,
            normed: Tensor::zeros(device, rows_max, widths.hidden)?,
            attended: Tensor::zeros(device, rows_max, widths.attended)?,
            delta: Tensor::zeros(device, rows_max, widths.hidden)?,
            gate_up: Tensor::zeros(device, rows_max, 2 * widths.intermediate)?,
            gated: Tensor::zeros(device, rows_max, widths.intermediate)?,
        })
    }

    fn bytes(&self) -> usize {
        let Activations { residual, normed, attended, delta, gate_up, gated } = self;
        [residual, normed, attended, delta, gate_up, gated].map(Tensor::bytes).iter().sum()
    }
}

/// All buffers of a decoder. The last layer computes only sampled rows after attention, so it has activations of its own.
pub(crate) struct Workspace {
    /// Of all rows, `[T, ..]`.
    pub(crate) tokens: Activations,
    /// Of the sampled rows, `[S, ..]`.
    pub(crate) sampled: Activations,
    /// `[T, qkv]`
    pub(crate) qkv: Tensor,
    /// `[S, vocab]`
    pub(crate) logits: Tensor,
}

impl Workspace {
    pub(crate) fn new(device: &Device, widths: &Widths, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(Workspace {
            tokens: Activations::new(device, widths, limits.tokens_max)?,
            sampled: Activations::new(device, widths, limits.sequences_max)?,
            qkv: Tensor::zeros(device, limits.tokens_max, widths.qkv)?,
            logits: Tensor::f32(device, limits.sequences_max, widths.vocab)?,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tokens.bytes() + self.sampled.bytes() + self.qkv.bytes() + self.logits.bytes()
    }
}
