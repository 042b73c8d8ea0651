//! The state of online softmax of some query vectors: maximum, sum, output before division.

use std::ops::Range;

use super::super::exp::{exp, exp_one};
use super::super::simd::{LANES, Simd};
use super::PARTIAL_HEAD;
use crate::Result;
use crate::attention_plan::TILE;
use crate::buffer::Buffer;

/// `n` states of `padded` output values.
pub(super) struct State {
    max: Buffer<f32>,
    /// `[n][16]`; lane 0 alone once [`fold_sum`](Self::fold_sum) was called.
    sum: Buffer<f32>,
    /// `[n][padded]`.
    pub(super) out: Buffer<f32>,
    padded: usize,
}

/// A finished state, wherever it lies.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    max: f32,
    sum: f32,
    out: &'a [f32],
}

impl<'a> View<'a> {
    /// As [`State::save`] left it.
    pub(super) fn of(partial: &'a [f32]) -> Self {
        View { max: partial[0], sum: partial[1], out: &partial[PARTIAL_HEAD..] }
    }
}

impl State {
    pub(super) fn new(queries: usize, padded: usize) -> Result<Self> {
        Ok(State {
            max: Buffer::zeros(queries)?,
            sum: Buffer::zeros(queries * LANES)?,
            out: Buffer::zeros(queries * padded)?,
            padded,
        })
    }

    pub(super) fn padded(&self) -> usize {
        self.padded
    }

    /// Nothing seen yet.
    #[inline(always)]
    pub(super) fn clear(&mut self, queries: usize) {
        self.max[..queries].fill(f32::NEG_INFINITY);
        self.sum[..queries * LANES].fill(0.0);
        self.out[..queries * self.padded].fill(0.0);
    }

    /// Takes the scores of one tile, of which `visible` count, and leaves the weights in their place. The output so far is
    /// scaled to the new maximum.
    #[inline(always)]
    pub(super) fn update<S: Simd>(
        &mut self,
        s: S,
        query: usize,
        scores: &mut [f32; TILE],
        scale: f32,
        visible: Range<usize>,
    ) {
        if visible.is_empty() {
            return;
        }
        let mask = (((1u64 << visible.end) - 1) & !((1u64 << visible.start) - 1)) as u32;
        let hidden = s.splat(f32::NEG_INFINITY);
        let (low, high) = scores.split_at_mut(LANES);
        let low: &mut [f32; LANES] = low.try_into().expect("half a tile");
        let high: &mut [f32; LANES] = high.try_into().expect("half a tile");
        let a = s.select(mask as u16, s.mul(s.load(low), s.splat(scale)), hidden);
        let b = s.select((mask >> 16) as u16, s.mul(s.load(high), s.splat(scale)), hidden);
        let old = self.max[query];
        let tile_max = s.max_lane(s.max(a, b));
        let max = if old > tile_max { old } else { tile_max };
        let (a, b) = (exp(s, s.sub(a, s.splat(max))), exp(s, s.sub(b, s.splat(max))));
        s.store(low, a);
        s.store(high, b);
        let sum = lanes(&mut self.sum, query);
        let mut total = s.load(sum);
        if max != old {
            let factor = s.splat(exp_one(s, old - max));
            total = s.mul(total, factor);
            for out in self.out[query * self.padded..][..self.padded].as_chunks_mut::<LANES>().0 {
                s.store(out, s.mul(s.load(out), factor));
            }
            self.max[query] = max;
        }
        s.store(sum, s.add(s.add(total, a), b));
    }

    /// Folds the sum's lanes into lane 0, at the end of a split.
    #[inline(always)]
    pub(super) fn fold_sum<S: Simd>(&mut self, s: S, query: usize) {
        let sum = lanes(&mut self.sum, query);
        sum[0] = s.sum(s.load(sum));
    }

    pub(super) fn view(&self, query: usize) -> View<'_> {
        let out = &self.out[query * self.padded..][..self.padded];
        View { max: self.max[query], sum: self.sum[query * LANES], out }
    }

    /// Copies a folded state to memory that [`View::of`] reads.
    #[inline(always)]
    pub(super) fn save(&self, query: usize, partial: &mut [f32]) {
        let View { max, sum, out } = self.view(query);
        (partial[0], partial[1]) = (max, sum);
        partial[PARTIAL_HEAD..].copy_from_slice(out);
    }

    /// Adds the state of a later split. A split of which nothing is visible changes nothing, and the first one is taken over
    /// as it is.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(&mut self, s: S, query: usize, later: View<'_>) {
        let old = self.max[query];
        if later.max == f32::NEG_INFINITY && later.sum == 0.0 {
            return;
        }
        let out = &mut self.out[query * self.padded..][..self.padded];
        let sum = &mut self.sum[query * LANES];
        if old == f32::NEG_INFINITY && *sum == 0.0 {
            out.copy_from_slice(later.out);
            (self.max[query], *sum) = (later.max, later.sum);
            return;
        }
        let max = if old > later.max { old } else { later.max };
        let (a, b) = (exp_one(s, old - max), exp_one(s, later.max - max));
        *sum = sum.mul_add(a, later.sum * b);
        let (a, b) = (s.splat(a), s.splat(b));
        for (out, later) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(later.out.as_chunks::<LANES>().0) {
            s.store(out, s.fma(s.load(out), a, s.mul(s.load(later), b)));
        }
        self.max[query] = max;
    }

    /// `out / sum`, without the padding.
    #[inline(always)]
    pub(super) fn divide<S: Simd>(&self, s: S, query: usize, to: &mut [f32]) {
        let View { sum, out, .. } = self.view(query);
        let inverse = s.splat(1.0 / sum);
        for (to, out) in to.chunks_mut(LANES).zip(out.as_chunks::<LANES>().0) {
            s.store_partial(to, s.mul(s.load(out), inverse));
        }
    }
}

/// The 16 lanes of one query.
#[inline(always)]
fn lanes(sums: &mut [f32], query: usize) -> &mut [f32; LANES] {
    (&mut sums[query * LANES..][..LANES]).try_into().expect("16 lanes")
}
