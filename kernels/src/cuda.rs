//! The CUDA backend's signatures in a build without it: there is no CUDA device, and so nothing to run on one.

pub mod driver;

use std::convert::Infallible;

use crate::ops::{Attention, RopeAndStore};
use crate::{KernelError, KvCache, Result, Tensor, Weight};

/// A CUDA device; without CUDA there is none.
#[derive(Clone)]
pub(crate) struct CudaDevice {
    never: Infallible,
}

pub(crate) fn open(_ordinal: usize) -> Result<CudaDevice> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn describe(gpu: &CudaDevice) -> String {
    match gpu.never {}
}

pub(crate) fn threads(gpu: &CudaDevice) -> usize {
    match gpu.never {}
}

pub(crate) fn parallel_for(gpu: &CudaDevice, _tasks: usize, _work: &(dyn Fn(usize) + Sync)) {
    match gpu.never {}
}

pub(crate) fn embed(_gpu: &CudaDevice, _table: &Weight, _ids: &[u32], _out: &mut Tensor) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn rms_norm(_gpu: &CudaDevice, _x: &Tensor, _weight: &Tensor, _eps: f32, _out: &mut Tensor) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn add_rms_norm(
    _gpu: &CudaDevice,
    _residual: &mut Tensor,
    _delta: &Tensor,
    _weight: &Tensor,
    _eps: f32,
    _out: &mut Tensor,
) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn matmul(
    _gpu: &CudaDevice,
    _x: &Tensor,
    _w: &Weight,
    _bias: Option<&Tensor>,
    _out: &mut Tensor,
) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn silu_mul(_gpu: &CudaDevice, _x: &Tensor, _out: &mut Tensor) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn rope_and_store(
    _gpu: &CudaDevice,
    _args: &RopeAndStore<'_>,
    _qkv: &mut Tensor,
    _kv: &mut KvCache,
) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn attention(
    _gpu: &CudaDevice,
    _args: &Attention<'_>,
    _qkv: &Tensor,
    _kv: &KvCache,
    _out: &mut Tensor,
) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}

pub(crate) fn gather_rows(_gpu: &CudaDevice, _x: &Tensor, _rows: &[u32], _out: &mut Tensor) -> Result<()> {
    Err(KernelError::BuiltWithoutCuda)
}
