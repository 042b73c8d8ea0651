//! One function per op, the same on every backend. Shapes and indices are checked here; backends trust them.
//!
//! An op sets the live rows of its output. A mismatch is [`KernelError::Shape`] and leaves every tensor as it was, up to
//! the output's number of rows.

use crate::device::Backend;
use crate::step_inputs::Indices;
use crate::{AttentionPlan, Device, HeadLayout, KernelError, KvCache, Result, RopeTable, Tensor, Weight, cpu, cuda};

/// `Ok` if the found number is the expected one.
fn expect(op: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(KernelError::shape(op, format!("{expected} {what}"), found)) }
}

/// `out[t] = table[ids[t]]`, in the type of activations. `out` gets `ids.len()` rows. An id out of range is an error on the
/// CPU, and zeros on a GPU.
pub fn embed<'a>(device: &Device, table: &Weight, ids: impl Into<Indices<'a>>, out: &mut Tensor) -> Result<()> {
    let ids = ids.into();
    expect("embed", "output columns", table.cols(), out.cols())?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            let ids = ids.host_below("embed", "ids", table.rows())?;
            out.resize("embed", ids.len())?;
            cpu::embed(cpu, table, ids, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => {
            out.resize("embed", ids.len())?;
            cuda::embed(gpu, table, ids, out)
        }
    }
}

/// The shapes of a norm: one weight per column, and outputs like inputs.
fn check_norm(op: &'static str, x: &Tensor, weight: &Tensor, out: &mut Tensor) -> Result<()> {
    expect(op, "norm weights", x.cols(), weight.len())?;
    expect(op, "output columns", x.cols(), out.cols())?;
    out.resize(op, x.rows())
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` per row; `weight` is `[1, cols]`.
pub fn rms_norm(device: &Device, x: &Tensor, weight: &Tensor, eps: f32, out: &mut Tensor) -> Result<()> {
    check_norm("rms_norm", x, weight, out)?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            cpu::rms_norm(cpu, x.host(), weight.host(), eps, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => cuda::rms_norm(gpu, x, weight, eps, out),
    }
}

/// `residual += delta; out = rms_norm(residual)`, in one pass.
pub fn add_rms_norm(
    device: &Device,
    residual: &mut Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
    out: &mut Tensor,
) -> Result<()> {
    expect("add_rms_norm", "delta rows", residual.rows(), delta.rows())?;
    expect("add_rms_norm", "delta columns", residual.cols(), delta.cols())?;
    check_norm("add_rms_norm", residual, weight, out)?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            cpu::add_rms_norm(cpu, residual.host_mut(), delta.host(), weight.host(), eps, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => cuda::add_rms_norm(gpu, residual, delta, weight, eps, out),
    }
}

/// `out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n])`; `x [T, K]`, `w [N, K]`, `bias [1, N]`, `out [T, N]`.
///
/// F32 accumulation in an order that depends on K alone. With F32 and F16 weights one chain of fused multiply-adds over k;
/// with BF16 ones `x` is rounded to bf16 and the chain takes each pair's odd element first, or, by
/// [`Device::bf16_products`], there are a chain of even and one of odd elements per 32 in features; with quantized ones `x`
/// is quantized to int8 per row and group of 32, and per group an exact integer sum is scaled and added.
pub fn matmul(device: &Device, x: &Tensor, w: &Weight, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    expect("matmul", "input columns", w.cols(), x.cols())?;
    expect("matmul", "output columns", w.rows(), out.cols())?;
    if let Some(bias) = bias {
        expect("matmul", "bias values", w.rows(), bias.len())?;
    }
    out.resize("matmul", x.rows())?;
    match &device.backend {
        Backend::Cpu(cpu) => cpu::matmul(cpu, x.host(), w, bias.map(Tensor::host), out.host_mut()),
        Backend::Cuda(gpu) => cuda::matmul(gpu, x, w, bias, out),
    }
}

/// `out[t, i] = silu(x[t, i]) * x[t, I + i]`; `x [T, 2 I]` (gate, then up), `out [T, I]`.
pub fn silu_mul(device: &Device, x: &Tensor, out: &mut Tensor) -> Result<()> {
    expect("silu_mul", "input columns", 2 * out.cols(), x.cols())?;
    out.resize("silu_mul", x.rows())?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            let cols = out.cols();
            cpu::silu_mul(cpu, x.host(), cols, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => cuda::silu_mul(gpu, x, out),
    }
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
    pub positions: Indices<'a>,
    /// `[T]`, each below `blocks * block_size`, no two alike.
    pub slots: Indices<'a>,
    pub layer: usize,
}

/// Heads, layer and columns that fit a KV cache.
fn check_heads(op: &'static str, heads: HeadLayout, layer: usize, qkv: &Tensor, kv: &KvCache) -> Result<()> {
    heads.check(op)?;
    let shape = kv.shape();
    expect(op, "KV heads as in the cache", shape.kv_heads, heads.kv_heads)?;
    expect(op, "values per head as in the cache", shape.head_dim, heads.head_dim)?;
    expect(op, "columns of fused rows", heads.row_len(), qkv.cols())?;
    if layer >= shape.layers {
        return Err(KernelError::shape(op, format!("a layer below {}", shape.layers), layer));
    }
    Ok(())
}

/// See [`RopeAndStore`]. Two rows with one slot leave either of them, or a mixture, in the cache.
pub fn rope_and_store(device: &Device, args: &RopeAndStore<'_>, qkv: &mut Tensor, kv: &mut KvCache) -> Result<()> {
    const OP: &str = "rope_and_store";
    let shape = kv.shape();
    check_heads(OP, args.heads, args.layer, qkv, kv)?;
    expect(OP, "positions", qkv.rows(), args.positions.len())?;
    expect(OP, "slots", qkv.rows(), args.slots.len())?;
    if args.rope.rotary_dim() > shape.head_dim {
        return Err(KernelError::shape(
            OP,
            format!("at most {} rotated values", shape.head_dim),
            args.rope.rotary_dim(),
        ));
    }
    if let Some(norm) = &args.norm {
        expect(OP, "norm weights of q", shape.head_dim, norm.q.len())?;
        expect(OP, "norm weights of k", shape.head_dim, norm.k.len())?;
    }
    match &device.backend {
        Backend::Cpu(cpu) => {
            let positions = args.positions.host_below(OP, "positions", args.rope.positions())?;
            let slots = args.slots.host_below(OP, "slots", shape.blocks * shape.block_size)?;
            cpu::rope_and_store(cpu, args, (positions, slots), qkv.host_mut(), kv);
            Ok(())
        }
        Backend::Cuda(gpu) => cuda::rope_and_store(gpu, args, qkv, kv),
    }
}

/// The arguments of [`attention`].
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
/// `out [T, heads * head_dim]`. Softmax in F32 over splits of positions, merged as in FlashAttention (arXiv:2205.14135) and
/// split over tasks as in FlashDecoding; the order of reduction depends on positions alone. With a BF16 cache q and the
/// softmax's weights are rounded to bf16 for the products, which have the order of [`Device::bf16_products`].
pub fn attention(device: &Device, args: &Attention<'_>, qkv: &Tensor, kv: &KvCache, out: &mut Tensor) -> Result<()> {
    const OP: &str = "attention";
    check_heads(OP, args.heads, args.layer, qkv, kv)?;
    args.plan.check(args.heads, qkv.rows(), kv)?;
    expect(OP, "output columns", args.heads.heads * args.heads.head_dim, out.cols())?;
    if args.window == Some(0) {
        return Err(KernelError::shape(OP, "a window of at least 1 position", 0));
    }
    out.resize(OP, qkv.rows())?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            cpu::attention(cpu, args, qkv.host(), kv, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => cuda::attention(gpu, args, qkv, kv, out),
    }
}

/// `out[i] = x[rows[i]]`; `out` gets `rows.len()` rows.
pub fn gather_rows<'a>(device: &Device, x: &Tensor, rows: impl Into<Indices<'a>>, out: &mut Tensor) -> Result<()> {
    let rows = rows.into();
    expect("gather_rows", "output columns", x.cols(), out.cols())?;
    match &device.backend {
        Backend::Cpu(cpu) => {
            let (rows, cols) = (rows.host_below("gather_rows", "rows", x.rows())?, x.cols());
            out.resize("gather_rows", rows.len())?;
            cpu::gather_rows(cpu, x.host(), rows, cols, out.host_mut());
            Ok(())
        }
        Backend::Cuda(gpu) => {
            out.resize("gather_rows", rows.len())?;
            cuda::gather_rows(gpu, x, rows, out)
        }
    }
}
