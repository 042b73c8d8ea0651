//! Token embedding, and the logits where the head is tied to it.

use kvern_kernels::{Device, Indices, KernelError, Tensor, Weight, ops};

use crate::builder::Builder;
use crate::error::LoadError;

pub(crate) struct Embedding {
    /// `[vocab, hidden]`
    table: Weight,
}

impl Embedding {
    pub(crate) fn load(builder: &mut Builder<'_>, name: &str) -> Result<Self, LoadError> {
        let config = builder.config();
        let table = builder.table(name, config.vocab_size, config.hidden_size)?;
        Ok(Embedding { table })
    }

    /// `out [T, hidden]` of `ids [T]`.
    pub(crate) fn forward(&self, device: &Device, ids: Indices<'_>, out: &mut Tensor) -> Result<(), KernelError> {
        ops::embed(device, &self.table, ids, out)
    }

    /// `out [S, vocab]` of `x [S, hidden]`: the same table as output head.
    pub(crate) fn logits(&self, device: &Device, x: &Tensor, out: &mut Tensor) -> Result<(), KernelError> {
        ops::matmul(device, x, &self.table, None, out)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }
}
