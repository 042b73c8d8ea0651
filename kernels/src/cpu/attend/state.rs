//! The softmax of some query vectors over a split, or over several merged ones: maximum, sum, output before division.

use super::super::exp::exp2_one;
use super::super::simd::{LANES, Simd};
use super::PARTIAL_HEAD;
use crate::Result;
use crate::buffer::Buffer;

/// `n` states of `padded` output values.
pub(super) struct State {
    /// The largest score, in powers of two; negative infinity with a sum of 0 where nothing was seen.
    max: Buffer<f32>,
    sum: Buffer<f32>,
    /// `[n][padded]`.
    out: Buffer<f32>,
    padded: usize,
}

/// A state, wherever it lies.
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
            sum: Buffer::zeros(queries)?,
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
        self.sum[..queries].fill(0.0);
        self.out[..queries * self.padded].fill(0.0);
    }

    #[inline(always)]
    pub(super) fn set(&mut self, query: usize, max: f32, sum: f32) {
        (self.max[query], self.sum[query]) = (max, sum);
    }

    /// The outputs of some queries, `[count][padded]`.
    #[inline(always)]
    pub(super) fn outs(&mut self, first: usize, count: usize) -> &mut [f32] {
        &mut self.out[first * self.padded..][..count * self.padded]
    }

    pub(super) fn view(&self, query: usize) -> View<'_> {
        let out = &self.out[query * self.padded..][..self.padded];
        View { max: self.max[query], sum: self.sum[query], out }
    }

    /// Copies a state to memory that [`View::of`] reads.
    #[inline(always)]
    pub(super) fn save(&self, query: usize, partial: &mut [f32]) {
        let View { max, sum, out } = self.view(query);
        (partial[0], partial[1]) = (max, sum);
        partial[PARTIAL_HEAD..].copy_from_slice(out);
    }

    /// Adds the state of a later split. A split of which nothing is seen changes nothing, and the first one is taken over
    /// as it is.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(&mut self, s: S, query: usize, later: View<'_>) {
        let old = self.max[query];
        if later.max == f32::NEG_INFINITY && later.sum == 0.0 {
            return;
        }
        let out = &mut self.out[query * self.padded..][..self.padded];
        let sum = &mut self.sum[query];
        if old == f32::NEG_INFINITY && *sum == 0.0 {
            out.copy_from_slice(later.out);
            (self.max[query], *sum) = (later.max, later.sum);
            return;
        }
        let max = if old > later.max { old } else { later.max };
        let (a, b) = (exp2_one(s, old - max), exp2_one(s, later.max - max));
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
