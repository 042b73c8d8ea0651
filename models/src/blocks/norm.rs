//! RMS normalization ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)).

use kvern_kernels::{Device, KernelError, Tensor, ops};

pub(crate) struct RmsNorm {
    /// `[1, cols]`
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(crate) fn new(weight: Tensor, eps: f32) -> Self {
        RmsNorm { weight, eps }
    }

    /// `out = norm(x)`, per row.
    pub(crate) fn forward(&self, device: &Device, x: &Tensor, out: &mut Tensor) -> Result<(), KernelError> {
        ops::rms_norm(device, x, &self.weight, self.eps, out)
    }

    /// `residual += delta; out = norm(residual)`, per row.
    pub(crate) fn add_forward(
        &self,
        device: &Device,
        residual: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), KernelError> {
        ops::add_rms_norm(device, residual, delta, &self.weight, self.eps, out)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes()
    }
}
