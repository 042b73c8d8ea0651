//! A paged cache of one layer, as the kernels lay it out, and the reference of attention over it.

use kvern_cuda_abi::Ptr;
use kvern_cuda_shim::Buffer;
use kvern_kernels::reference::{Attend, Products, attention};

use super::{Element, Random, widen};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
}

/// K and V of some sequences, scattered over blocks in random order. Blocks that no table holds, and positions past a
/// context's end, are NaN.
pub(crate) struct Paged<T> {
    pub(crate) heads: Heads,
    pub(crate) block_size: usize,
    pub(crate) stride: usize,
    pub(crate) tables: Vec<u32>,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    contexts: Vec<usize>,
}

impl<T: Element> Paged<T> {
    pub(crate) fn new(random: &mut Random, heads: Heads, block_size: usize, contexts: &[usize]) -> Self {
        let stride = contexts.iter().map(|context| context.div_ceil(block_size)).max().unwrap() + 2;
        let blocks = contexts.len() * stride;
        let tables = random.shuffled(blocks);
        let len = blocks * heads.kv_heads * block_size * heads.dim;
        let nan = vec![T::round(f32::NAN); len];
        let mut paged =
            Paged { heads, block_size, stride, tables, k: nan.clone(), v: nan, contexts: contexts.to_vec() };
        for (sequence, &context) in contexts.iter().enumerate() {
            for (position, kv_head) in (0..context).flat_map(|p| (0..heads.kv_heads).map(move |h| (p, h))) {
                let at = paged.at(sequence, position, kv_head);
                paged.k[at..at + heads.dim].copy_from_slice(&random.values::<T>(heads.dim, 2.0));
                paged.v[at..at + heads.dim].copy_from_slice(&random.values::<T>(heads.dim, 2.0));
            }
        }
        paged
    }

    /// Where a head's values of a position begin.
    pub(crate) fn at(&self, sequence: usize, position: usize, kv_head: usize) -> usize {
        let block = self.tables[sequence * self.stride + position / self.block_size] as usize;
        let row = (block * self.heads.kv_heads + kv_head) * self.block_size + position % self.block_size;
        row * self.heads.dim
    }

    /// Attention of one query vector, in f32 over the rounded values.
    pub(crate) fn expected(
        &self,
        q: &[T],
        sequence: usize,
        position: usize,
        head: usize,
        scale: f32,
        window: Option<u32>,
    ) -> Vec<f32> {
        let kv_head = head / (self.heads.heads / self.heads.kv_heads);
        let gather = |cache: &[T]| -> Vec<f32> {
            let row = |p| &cache[self.at(sequence, p, kv_head)..][..self.heads.dim];
            (0..=position).flat_map(|p| widen(row(p))).collect()
        };
        assert!(position < self.contexts[sequence]);
        let (k, v, q) = (gather(&self.k), gather(&self.v), widen(q));
        attention(&Attend { q: &q, k: &k, v: &v, scale, position, window, products: Products::F32 })
    }

    pub(crate) fn buffers(&self) -> ([Buffer<T>; 2], Buffer<u32>) {
        ([Buffer::of(&self.k), Buffer::of(&self.v)], Buffer::of(&self.tables))
    }

    pub(crate) fn row_len(&self) -> usize {
        (self.heads.heads + 2 * self.heads.kv_heads) * self.heads.dim
    }
}

/// What the kernel and the reference may differ by. The kernels round each weight of the softmax to T (half a unit of weight, and
/// so of a mean of values up to 2) and the result to T once; the rest is the order of f32 sums, 1e-5 of values up to 2.
pub(crate) fn tolerance<T: Element>() -> (f32, f32) {
    (T::EPSILON, 2.0 * T::EPSILON + 2e-5)
}

/// Keeps buffers alive, and gives their addresses.
pub(crate) fn pointers<T: Copy, const N: usize>(buffers: &[Buffer<T>; N]) -> [Ptr; N] {
    buffers.each_ref().map(Buffer::ptr)
}
