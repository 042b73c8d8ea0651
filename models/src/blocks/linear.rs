//! A linear layer. Its quantization is the packed weight's, unknown to architectures.

use kvern_kernels::{Device, KernelError, Tensor, Weight, ops};

/// `x W^T + b`. Several projections of one input are stacked along the out features: their products are one op.
pub(crate) struct Linear {
    weight: Weight,
    /// `[1, rows]`
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        assert!(bias.as_ref().is_none_or(|b| b.cols() == weight.rows()), "a bias has one value per out feature");
        Linear { weight, bias }
    }

    /// `out [T, rows]` of `x [T, cols]`.
    pub(crate) fn forward(&self, device: &Device, x: &Tensor, out: &mut Tensor) -> Result<(), KernelError> {
        ops::matmul(device, x, &self.weight, self.bias.as_ref(), out)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Tensor::bytes)
    }
}
