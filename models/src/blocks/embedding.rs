//! Token embedding, and the logits where the head is tied to it.

use kvern_kernels::{Device, KernelError, Tensor, Weight, ops};

pub(crate) struct Embedding {
    /// `[vocab, hidden]`
    table: Weight,
}

impl Embedding {
    pub(crate) fn new(table: Weight) -> Self {
        Embedding { table }
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.table.rows()
    }

    /// `out [T, hidden]` of `ids [T]`.
    pub(crate) fn forward(&self, device: &Device, ids: &[u32], out: &mut Tensor) -> Result<(), KernelError> {
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
