//! Causal self-attention with grouped key and value heads over the paged cache.

use kvern_kernels::ops::{self, QkNorm, RopeAndStore};
use kvern_kernels::{AttentionPlan, Device, HeadLayout, KernelError, KvCache, RopeTable, StepIndices, Tensor};

use super::Linear;
use crate::builder::Builder;
use crate::error::LoadError;

/// In what attention differs between architectures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionSpec {
    /// Index of this layer in the cache.
    pub(crate) layer: usize,
    /// Of q, k and v.
    pub(crate) bias: bool,
    pub(crate) output_bias: bool,
    /// Each head of q and of k is RMS-normalized before RoPE.
    pub(crate) head_norm: bool,
    /// Positions that a query sees, its own included; `None` is all.
    pub(crate) window: Option<u32>,
}

/// RMSNorm of each query and key head.
struct HeadNorm {
    /// `[1, head_dim]`
    q: Tensor,
    /// `[1, head_dim]`
    k: Tensor,
    eps: f32,
}

pub(crate) struct Attention {
    /// q, k and v stacked, in [`HeadLayout`]'s order.
    qkv: Linear,
    output: Linear,
    norm: Option<HeadNorm>,
    heads: HeadLayout,
    spec: AttentionSpec,
}

/// What every layer of one forward pass shares.
pub(crate) struct Step<'a> {
    pub(crate) device: &'a Device,
    pub(crate) rope: &'a RopeTable,
    pub(crate) plan: &'a AttentionPlan,
    pub(crate) inputs: StepIndices<'a>,
}

impl Attention {
    pub(crate) fn load(builder: &mut Builder<'_>, prefix: &str, spec: AttentionSpec) -> Result<Self, LoadError> {
        let config = builder.config();
        let heads = config.heads;
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let qkv =
            [("q_proj", q), ("k_proj", kv), ("v_proj", kv)].map(|(name, rows)| (format!("{prefix}.{name}"), rows));
        let output = [(format!("{prefix}.o_proj"), config.hidden_size)];
        let norm = if spec.head_norm {
            Some(HeadNorm {
                q: builder.vector(&format!("{prefix}.q_norm.weight"), heads.head_dim)?,
                k: builder.vector(&format!("{prefix}.k_norm.weight"), heads.head_dim)?,
                eps: config.rms_norm_eps,
            })
        } else {
            None
        };
        Ok(Attention {
            qkv: Linear::load(builder, &qkv, config.hidden_size, spec.bias)?,
            output: Linear::load(builder, &output, q, spec.output_bias)?,
            norm,
            heads,
            spec,
        })
    }

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
            positions: step.inputs.positions,
            slots: step.inputs.slots,
            layer: self.spec.layer,
        };
        ops::rope_and_store(step.device, &store, qkv, kv)?;
        let attention = ops::Attention {
            heads: self.heads,
            layer: self.spec.layer,
            scale: (self.heads.head_dim as f32).sqrt().recip(),
            window: self.spec.window,
            plan: step.plan,
        };
        ops::attention(step.device, &attention, qkv, kv, out)
    }

    /// The output projection: `out [T, hidden]` of `attended [T, heads * head_dim]`.
    pub(crate) fn project(&self, device: &Device, attended: &Tensor, out: &mut Tensor) -> Result<(), KernelError> {
        self.output.forward(device, attended, out)
    }

    pub(crate) fn bytes(&self) -> usize {
        let norm = self.norm.as_ref().map_or(0, |norm| norm.q.bytes() + norm.k.bytes());
        self.qkv.bytes() + self.output.bytes() + norm
    }
}
