//! RMS normalization ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)).

use kvern_kernels::{Device, KernelError, Tensor, ops};

use crate::builder::Builder;
use crate::error::LoadError;

pub(crate) struct RmsNorm {
    /// `[1, cols]`
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// The norm `name` of the hidden state.
    pub(crate) fn load(builder: &mut Builder<'_>, name: &str) -> Result<Self, LoadError> {
        let config = builder.config();
        let weight = builder.vector(&format!("{name}.weight"), config.hidden_size)?;
        Ok(RmsNorm { weight, eps: config.rms_norm_eps })
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
