//! Causal self-attention with grouped key and value heads over the paged cache.

use kvern_kernels::ops::{self, QkNorm, RopeAndStore};
use kvern_kernels::{AttentionPlan, Device, HeadLayout, KernelError, KvCache, RopeTable, Tensor};

use super::Linear;

/// RMSNorm of each query and key head, before RoPE.
pub(crate) struct HeadNorm {
    /// `[1, head_dim]`
    pub(crate) q: Tensor,
    /// `[1, head_dim]`
    pub(crate) k: Tensor,
    pub(crate) eps: f32,
}

pub(crate) struct Attention {
    /// q, k and v stacked, in [`HeadLayout`]'s order.
    pub(crate) qkv: Linear,
    pub(crate) output: Linear,
    pub(crate) norm: Option<HeadNorm>,
    pub(crate) heads: HeadLayout,
    /// Index of this layer in the cache.
    pub(crate) layer: usize,
    /// Multiplies q . k.
    pub(crate) scale: f32,
    /// Positions that a query sees, its own included; `None` is all.
    pub(crate) window: Option<u32>,
}

/// What every layer of one forward pass shares.
pub(crate) struct Step<'a> {
    pub(crate) device: &'a Device,
    pub(crate) rope: &'a RopeTable,
    pub(crate) plan: &'a AttentionPlan,
    /// `[T]`
    pub(crate) positions: &'a [u32],
    /// `[T]`
    pub(crate) slots: &'a [u32],
}

impl Attention {
    /// Writes K and V of `x [T, hidden]` to the cache and what the heads see to `out [T, heads * head_dim]`, before the
    /// output projection; `qkv [T, (heads + 2 kv_heads) * head_dim]` is overwritten.
    pub(crate) fn attend(
        &self,
        step: &Step<'_>,
        x: &Tensor,
        qkv: &mut Tensor,
        kv: &mut KvCache,
        out: &mut Tensor,
    ) -> Result<(), KernelError> {
        self.qkv.forward(step.device, x, qkv)?;
        let store = RopeAndStore {
            heads: self.heads,
            norm: self.norm.as_ref().map(|norm| QkNorm { q: &norm.q, k: &norm.k, eps: norm.eps }),
            rope: step.rope,
            positions: step.positions,
            slots: step.slots,
            layer: self.layer,
        };
        ops::rope_and_store(step.device, &store, qkv, kv)?;
        let attention = ops::Attention {
            heads: self.heads,
            layer: self.layer,
            scale: self.scale,
            window: self.window,
            plan: step.plan,
        };
        ops::attention(step.device, &attention, qkv, kv, out)
    }

    pub(crate) fn bytes(&self) -> usize {
        let norm = self.norm.as_ref().map_or(0, |norm| norm.q.bytes() + norm.k.bytes());
        self.qkv.bytes() + self.output.bytes() + norm
    }
}
