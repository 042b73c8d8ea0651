//! One function per op, the same on every backend.

use crate::{AttentionPlan, Device, HeadLayout, KvCache, Result, RopeTable, Tensor, Weight};

/// `out[t] = table[ids[t]]`, widened to F32. `out` gets `ids.len()` rows. An id out of range is an error.
pub fn embed(_device: &Device, _table: &Weight, _ids: &[u32], _out: &mut Tensor) -> Result<()> {
    todo!()
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` per row; `weight` is `[1, cols]`.
pub fn rms_norm(_device: &Device, _x: &Tensor, _weight: &Tensor, _eps: f32, _out: &mut Tensor) -> Result<()> {
    todo!()
}

/// `residual += delta; out = rms_norm(residual)`, in one pass.
pub fn add_rms_norm(
    _device: &Device,
    _residual: &mut Tensor,
    _delta: &Tensor,
    _weight: &Tensor,
    _eps: f32,
    _out: &mut Tensor,
) -> Result<()> {
    todo!()
}

/// `out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n])`; `x [T, K]`, `w [N, K]`, `bias [1, N]`, `out [T, N]`.
/// F32 accumulation in an order that depends on K alone.
pub fn matmul(_device: &Device, _x: &Tensor, _w: &Weight, _bias: Option<&Tensor>, _out: &mut Tensor) -> Result<()> {
    todo!()
}

/// `out[t, i] = silu(x[t, i]) * x[t, I + i]`; `x [T, 2 I]` (gate, then up), `out [T, I]`.
pub fn silu_mul(_device: &Device, _x: &Tensor, _out: &mut Tensor) -> Result<()> {
    todo!()
}

/// RMSNorm per head of q and of k, before RoPE (qwen3); weights `[1, head_dim]`.
#[derive(Clone, Copy)]
pub struct QkNorm<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub eps: f32,
}

/// In place on fused rows `qkv [T, (heads + 2 kv_heads) * head_dim]`: optional norm per head, split-half RoPE of q and k
/// (the first `rotary_dim` of each head), and k and v written to `kv` at `slots[t]`.
pub struct RopeAndStore<'a> {
    pub heads: HeadLayout,
    pub norm: Option<QkNorm<'a>>,
    pub rope: &'a RopeTable,
    /// `[T]`, each below `rope.positions()`.
    pub positions: &'a [u32],
    /// `[T]`, each below `blocks * block_size`.
    pub slots: &'a [u32],
    pub layer: usize,
}

pub fn rope_and_store(_device: &Device, _args: &RopeAndStore<'_>, _qkv: &mut Tensor, _kv: &mut KvCache) -> Result<()> {
    todo!()
}

pub struct Attention<'a> {
    pub heads: HeadLayout,
    pub layer: usize,
    /// Multiplies q . k.
    pub scale: f32,
    /// A query at position p sees positions `p - window + 1 ..= p`.
    pub window: Option<u32>,
    pub plan: &'a AttentionPlan,
}

/// Causal grouped-query attention through block tables: q from the fused rows `qkv`, K and V from `kv`;
/// `out [T, heads * head_dim]`. Online softmax in F32; the order of reduction depends on positions alone.
pub fn attention(
    _device: &Device,
    _args: &Attention<'_>,
    _qkv: &Tensor,
    _kv: &KvCache,
    _out: &mut Tensor,
) -> Result<()> {
    todo!()
}

/// `out[i] = x[rows[i]]`; `out` gets `rows.len()` rows.
pub fn gather_rows(_device: &Device, _x: &Tensor, _rows: &[u32], _out: &mut Tensor) -> Result<()> {
    todo!()
}
