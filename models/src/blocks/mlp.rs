//! The gated feed-forward network, SwiGLU ([Shazeer 2020](https://arxiv.org/abs/2002.05202)).

use kvern_kernels::{Device, KernelError, Tensor, ops};

use super::Linear;

/// `down(silu(gate(x)) * up(x))`
pub(crate) struct Mlp {
    /// `[2 * intermediate, hidden]`: gate, then up.
    pub(crate) gate_up: Linear,
    /// `[hidden, intermediate]`
    pub(crate) down: Linear,
}

impl Mlp {
    /// `out [T, hidden]` of `x [T, hidden]`, through `gate_up [T, 2 * intermediate]` and `gated [T, intermediate]`.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Tensor,
        gate_up: &mut Tensor,
        gated: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<(), KernelError> {
        self.gate_up.forward(device, x, gate_up)?;
        ops::silu_mul(device, gate_up, gated)?;
        self.down.forward(device, gated, out)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}
