//! A linear layer. Its quantization is the packed weight's, unknown to architectures.

use kvern_kernels::{Device, KernelError, Tensor, Weight, ops};

use crate::builder::Builder;
use crate::error::LoadError;

/// `x W^T + b`. Several projections of one input are stacked along the out features: their products are one op.
pub(crate) struct Linear {
    weight: Weight,
    /// `[1, rows]`
    bias: Option<Tensor>,
}

impl Linear {
    /// Stacks `parts`, the projections' names with their out features; each has `cols` in features and, if `bias`, one.
    pub(crate) fn load(
        builder: &mut Builder<'_>,
        parts: &[(String, usize)],
        cols: usize,
        bias: bool,
    ) -> Result<Self, LoadError> {
        let weight = builder.matrix(parts, cols)?;
        let bias = if bias { Some(builder.biases(parts)?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// `out [T, rows]` of `x [T, cols]`.
    pub(crate) fn forward(&self, device: &Device, x: &Tensor, out: &mut Tensor) -> Result<(), KernelError> {
        ops::matmul(device, x, &self.weight, self.bias.as_ref(), out)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Tensor::bytes)
    }
}
