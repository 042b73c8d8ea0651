//! K and V of one split of positions: where they lie in the cache, or a copy of them.

use std::ops::Range;

use super::super::element::Cell;
use super::super::simd::{LANES, Simd};
use super::Job;
use crate::Result;
use crate::attention_plan::{SPLIT, Task};
use crate::buffer::Buffer;

/// Vectors of positions in a split.
const VECTORS: usize = SPLIT / LANES;
/// Bytes that a prefetch brings.
const CACHE_LINE: usize = 64;

/// For each 16 positions of a split, their cells of K and V. Those that no query of the task sees are empty.
pub(super) struct Positions<'a, C> {
    /// Rows of 16 positions, [`k_stride`](Self::k_stride) apart: one per cell of the head.
    pub(super) k: [&'a [C]; VECTORS],
    pub(super) k_stride: usize,
    /// `16 / VALUES` rows of one cell per value of the head, [`v_stride`](Self::v_stride) apart.
    pub(super) v: [&'a [C]; VECTORS],
    pub(super) v_stride: usize,
    /// K of the positions a split later, where they are read from the cache: to be brought near in time.
    pub(super) next_k: [&'a [C]; VECTORS],
}

impl<'a, C: Cell> Positions<'a, C> {
    /// Those of `span`, which lies within one split; more of the task's follow up to `end`. They are read from the cache
    /// where whole vectors lie side by side in it, else from `copy`.
    #[inline(always)]
    pub(super) fn new(job: &Job<'a, C>, task: &Task, span: Range<usize>, end: usize, copy: &'a mut Copied<C>) -> Self {
        let shape = job.shape;
        if !shape.block_size.is_multiple_of(LANES) || !shape.head_dim.is_multiple_of(LANES) {
            copy.fill(job, task, span);
            return copy.positions();
        }
        let mut positions = Positions {
            k: [&[]; VECTORS],
            k_stride: shape.padded_block(),
            v: [&[]; VECTORS],
            v_stride: shape.head_dim,
            next_k: [&[]; VECTORS],
        };
        for first in (span.start / LANES * LANES..span.end).step_by(LANES) {
            let vector = first % SPLIT / LANES;
            let (block, offset) = (first / shape.block_size, first % shape.block_size);
            let (k, v) = job.pages(task, block);
            positions.k[vector] = &k[offset..];
            positions.v[vector] = &v[offset / C::VALUES * shape.head_dim..];
            if first + SPLIT < end {
                let (block, offset) = ((first + SPLIT) / shape.block_size, (first + SPLIT) % shape.block_size);
                positions.next_k[vector] = &job.pages(task, block).0[offset..];
            }
        }
        positions
    }
}

/// Asks for the memory of 16 positions. Blocks lie anywhere, so that the processor cannot foresee the next one.
#[inline(always)]
pub(super) fn prefetch<S: Simd, C>(s: S, from: &[C], rows: usize, stride: usize, row_len: usize) {
    for row in from.chunks(stride).take(rows) {
        for line in row[..row.len().min(row_len)].chunks(CACHE_LINE / size_of::<C>()) {
            s.prefetch(&line[0]);
        }
    }
}

/// Memory for a split whose positions or values do not come in whole vectors.
pub(super) struct Copied<C: Cell> {
    /// `[16 vectors][cells of the head][16]`.
    k: Buffer<C>,
    /// `[SPLIT / VALUES][padded head]`; the padding stays zero.
    v: Buffer<C>,
    head_cells: usize,
    padded: usize,
}

impl<C: Cell> Copied<C> {
    pub(super) fn new(head_dim: usize) -> Result<Self> {
        let (head_cells, padded) = (head_dim.div_ceil(C::VALUES), head_dim.next_multiple_of(LANES));
        let (k, v) = (Buffer::zeros(SPLIT * head_cells)?, Buffer::zeros(SPLIT / C::VALUES * padded)?);
        Ok(Copied { k, v, head_cells, padded })
    }

    /// NaN in place of what a former split left; the padding stays zero.
    #[cfg(test)]
    pub(super) fn poison(&mut self, head_dim: usize) {
        self.k.fill(C::of(&[f32::NAN; 2][..C::VALUES]));
        self.v.chunks_mut(self.padded).for_each(|row| row[..head_dim].fill(C::of(&[f32::NAN; 2][..C::VALUES])));
    }

    fn positions(&self) -> Positions<'_, C> {
        let (k_len, v_len) = (LANES * self.head_cells, LANES / C::VALUES * self.padded);
        Positions {
            k: std::array::from_fn(|vector| &self.k[vector * k_len..][..k_len]),
            k_stride: LANES,
            v: std::array::from_fn(|vector| &self.v[vector * v_len..][..v_len]),
            v_stride: self.padded,
            next_k: [&[]; VECTORS],
        }
    }

    /// Copies the positions of `span`. Others keep what they had: they are hidden from every query.
    fn fill(&mut self, job: &Job<'_, C>, task: &Task, span: Range<usize>) {
        let (block_size, head_dim) = (job.shape.block_size, job.shape.head_dim);
        let (k_stride, v_stride) = (job.shape.padded_block(), job.shape.padded_head());
        let mut position = span.start;
        while position < span.end {
            let (block, offset, at) = (position / block_size, position % block_size, position % SPLIT);
            let (k, v) = job.pages(task, block);
            let count = (block_size - offset).min(span.end - position).min(LANES - at % LANES);
            let to = &mut self.k[at / LANES * LANES * self.head_cells..][..LANES * self.head_cells];
            for (to, from) in to.chunks_exact_mut(LANES).zip(k.chunks_exact(k_stride)) {
                to[at % LANES..][..count].copy_from_slice(&from[offset..offset + count]);
            }
            for (at, offset) in (at..at + count).zip(offset..) {
                let from = &v[offset / C::VALUES * v_stride..][..head_dim];
                let to = &mut self.v[at / C::VALUES * self.padded..][..head_dim];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = to.with(at % C::VALUES, from.get(offset % C::VALUES));
                }
            }
            position += count;
        }
    }
}
