//! The ops that are one launch. Shapes were checked by [`crate::ops`].

use kvern_cuda_abi::{GateParams, GatherParams, Ptr, RmsNormParams, RopeStoreParams, launch};

use super::attention::check_head;
use super::{CudaDevice, shape};
use crate::ops::{Attention, RopeAndStore};
use crate::step_inputs::Indices;
use crate::{KvCache, Result, Tensor, Weight};

/// Threads of kernels that go over elements in any grid, and the most blocks of them.
const ROW_THREADS: usize = 256;
const ROW_BLOCKS_MAX: usize = 1 << 14;
/// Values that one thread of a norm takes at a time.
const NORM_VALUES: usize = 8;

/// `out[i] = table[ids[i]]`.
fn gather(gpu: &CudaDevice, table: Ptr, table_rows: usize, ids: Ptr, out: &Tensor) -> Result<()> {
    if out.rows() == 0 {
        return Ok(());
    }
    let params = GatherParams {
        table,
        ids,
        out: out.ptr(),
        rows: out.rows() as u32,
        columns: out.cols() as u32,
        table_rows: table_rows as u32,
        pad: 0,
    };
    // SAFETY: `out` has a row for each id; ids beyond the table read nothing.
    unsafe { gpu.launch(gpu.kernels.gather, shape([out.rows(), 1], ROW_THREADS), &params) }
}

pub(crate) fn embed(gpu: &CudaDevice, table: &Weight, ids: Indices<'_>, out: &mut Tensor) -> Result<()> {
    gather(gpu, table.on_device()?.table()?, table.rows(), ids.on_device("embed")?, out)
}

pub(crate) fn gather_rows(gpu: &CudaDevice, x: &Tensor, rows: Indices<'_>, out: &mut Tensor) -> Result<()> {
    gather(gpu, x.ptr(), x.rows(), rows.on_device("gather_rows")?, out)
}

pub(crate) fn rms_norm(gpu: &CudaDevice, x: &Tensor, weight: &Tensor, eps: f32, out: &mut Tensor) -> Result<()> {
    norm(gpu, x, None, weight, eps, out)
}

pub(crate) fn add_rms_norm(
    gpu: &CudaDevice,
    residual: &mut Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
    out: &mut Tensor,
) -> Result<()> {
    norm(gpu, delta, Some(residual), weight, eps, out)
}

fn norm(
    gpu: &CudaDevice,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
    out: &mut Tensor,
) -> Result<()> {
    if x.rows() == 0 {
        return Ok(());
    }
    let params = RmsNormParams {
        x: x.ptr(),
        residual: residual.map_or(Ptr::NULL, Tensor::ptr),
        weight: weight.ptr(),
        out: out.ptr(),
        rows: x.rows() as u32,
        columns: x.cols() as u32,
        eps,
        pad: 0,
    };
    let threads = x.cols().div_ceil(NORM_VALUES).next_multiple_of(32).clamp(32, 1024);
    let kernel = if residual.is_some() { gpu.kernels.add_rms_norm } else { gpu.kernels.rms_norm };
    // SAFETY: all tensors have these rows and columns, and the weight a row.
    unsafe { gpu.launch(kernel, shape([x.rows(), 1], threads), &params) }
}

pub(crate) fn silu_mul(gpu: &CudaDevice, x: &Tensor, out: &mut Tensor) -> Result<()> {
    let (rows, columns) = (out.rows(), out.cols());
    if rows == 0 {
        return Ok(());
    }
    let params = GateParams { x: x.ptr(), out: out.ptr(), rows: rows as u32, columns: columns as u32 };
    let packs = (rows * columns).div_ceil(16 / gpu.element.bytes());
    let blocks = packs.div_ceil(ROW_THREADS).clamp(1, ROW_BLOCKS_MAX);
    // SAFETY: x has twice the columns of out.
    unsafe { gpu.launch(gpu.kernels.silu_mul, shape([blocks, 1], ROW_THREADS), &params) }
}

pub(crate) fn rope_and_store(
    gpu: &CudaDevice,
    args: &RopeAndStore<'_>,
    qkv: &mut Tensor,
    kv: &mut KvCache,
) -> Result<()> {
    const OP: &str = "rope_and_store";
    let (rows, heads, cache) = (qkv.rows(), args.heads, kv.on_device()?);
    check_head(OP, heads.head_dim)?;
    if rows == 0 {
        return Ok(());
    }
    let (cos, sin) = args.rope.on_device()?;
    let (k_cache, v_cache) = cache.layer(args.layer);
    let weight = |of: Option<&Tensor>| of.map_or(Ptr::NULL, Tensor::ptr);
    let params = RopeStoreParams {
        qkv: qkv.ptr(),
        k_cache,
        v_cache,
        q_weight: weight(args.norm.as_ref().map(|norm| norm.q)),
        k_weight: weight(args.norm.as_ref().map(|norm| norm.k)),
        cos,
        sin,
        positions: args.positions.on_device(OP)?,
        slots: args.slots.on_device(OP)?,
        rows: rows as u32,
        heads: heads.heads as u32,
        kv_heads: heads.kv_heads as u32,
        block_size: kv.shape().block_size as u32,
        rotary_dim: args.rope.rotary_dim() as u32,
        head_dim: heads.head_dim as u32,
        eps: args.norm.as_ref().map_or(0.0, |norm| norm.eps),
        pad: 0,
    };
    let warps = rows * (heads.heads + 2 * heads.kv_heads);
    let shape = shape([warps.div_ceil(launch::ROPE_WARPS), 1], launch::ROPE_WARPS * 32);
    // SAFETY: rows, heads and layer are those of qkv and of the cache; positions and slots were checked where they came to the
    // device.
    unsafe { gpu.launch(gpu.kernels.rope_store, shape, &params) }
}

pub(crate) fn attention(
    gpu: &CudaDevice,
    args: &Attention<'_>,
    qkv: &Tensor,
    kv: &KvCache,
    out: &mut Tensor,
) -> Result<()> {
    args.plan.on_device()?.launch(gpu, args, qkv, kv, out)
}
