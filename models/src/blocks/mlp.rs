//! The gated feed-forward network, SwiGLU ([Shazeer 2020](https://arxiv.org/abs/2002.05202)).

use kvern_kernels::{Device, KernelError, Tensor, ops};

use super::Linear;
use crate::builder::Builder;
use crate::error::LoadError;

/// `down(silu(gate(x)) * up(x))`
pub(crate) struct Mlp {
    /// `[2 * intermediate, hidden]`: gate, then up.
    gate_up: Linear,
    /// `[hidden, intermediate]`
    down: Linear,
}

impl Mlp {
    /// `bias`: all three projections have one.
    pub(crate) fn load(builder: &mut Builder<'_>, prefix: &str, bias: bool) -> Result<Self, LoadError> {
        let config = builder.config();
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let gate_up = ["gate_proj", "up_proj"].map(|name| (format!("{prefix}.{name}"), intermediate));
        let down = [(format!("{prefix}.down_proj"), hidden)];
        Ok(Mlp {
            gate_up: Linear::load(builder, &gate_up, hidden, bias)?,
            down: Linear::load(builder, &down, intermediate, bias)?,
        })
    }

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
