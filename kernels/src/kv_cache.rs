//! K and V of every layer, in blocks.

use crate::buffer::Buffer;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

/// How K and V are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvDType {
    F32,
    #[default]
    BF16,
}

impl KvDType {
    /// Bytes per element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::BF16 => 2,
        }
    }
}

/// Shape of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDType,
}

impl KvShape {
    /// Bytes of one block over all layers, K and V.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        2 * self.layers * self.block_size * self.kv_heads * self.head_dim * self.dtype.bytes()
    }

    /// Elements of K, or of V, of one head in one block of one layer.
    pub(crate) fn page(&self) -> usize {
        self.block_size * self.head_dim
    }
}

/// K and V of all layers in blocks. A slot is `block * block_size + offset`.
///
/// On the CPU a block of a layer holds, per KV head, K transposed and then V, so that both products of attention run
/// lane by lane without a horizontal sum:
///
/// ```text
/// [layer][block][kv_head] -> K [head_dim][block_size] | V [block_size][head_dim]
/// ```
pub struct KvCache {
    pub(crate) data: KvData,
    shape: KvShape,
}

/// The elements, by dtype.
pub(crate) enum KvData {
    F32(Buffer<f32>),
    BF16(Buffer<u16>),
}

impl KvCache {
    /// Zeros. Memory is touched lazily by the operating system on the CPU. A shape with a zero, or too large to address, is
    /// [`Shape`](KernelError::Shape).
    pub fn new(device: &Device, shape: KvShape) -> Result<KvCache> {
        let Backend::Cpu(_) = &device.backend else { return Err(KernelError::BuiltWithoutCuda) };
        let sizes = [shape.layers, shape.blocks, shape.kv_heads, 2, shape.block_size, shape.head_dim];
        let elements = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let slots = shape.blocks.checked_mul(shape.block_size).filter(|&slots| u32::try_from(slots).is_ok());
        let elements = match (elements, slots) {
            (Some(elements), Some(_)) if elements > 0 => elements,
            _ => {
                return Err(KernelError::shape(
                    "kv cache",
                    "positive sizes and slots below 2^32",
                    format!("{shape:?}"),
                ));
            }
        };
        let data = match shape.dtype {
            KvDType::F32 => KvData::F32(Buffer::zeros(elements)?),
            KvDType::BF16 => KvData::BF16(Buffer::zeros(elements)?),
        };
        Ok(KvCache { data, shape })
    }

    /// The shape it was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }
}

impl KvShape {
    /// Where K of this layer, block and head starts in the elements; V follows after [`page`](Self::page) elements.
    pub(crate) fn page_start(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * 2 * self.page()
    }
}
