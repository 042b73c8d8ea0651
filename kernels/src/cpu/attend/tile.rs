//! A few query vectors over one split of positions: scores, then weights, then outputs.
//!
//! Which positions a query sees decides what is read for it: a score is computed wherever one of the queries sees something
//! and hidden before it counts; a value that a query does not see is never multiplied, as it may be anything.

use std::ops::Range;

use super::super::element::Cell;
use super::super::exp::exp2;
use super::super::simd::{Kernel, LANES, Simd};
use super::positions::{Positions, prefetch};
use super::state::State;
use crate::Result;
use crate::attention_plan::SPLIT;
use crate::buffer::Buffer;

/// Query vectors of a tile at most, at any level and in any order.
pub(super) const QUERIES_MAX: usize = 16;

/// Memory for one tile.
pub(super) struct Scratch<C: Cell> {
    /// `[queries][SPLIT]`.
    pub(super) scores: Buffer<f32>,
    /// `[queries][SPLIT / VALUES]`: rounded weights.
    pub(super) weights: Buffer<C>,
    /// One row of V with only one of its positions, or the rows of 16 positions with only some.
    pub(super) rows: Buffer<C>,
}

impl<C: Cell> Scratch<C> {
    pub(super) fn new(head_dim: usize) -> Result<Self> {
        Ok(Scratch {
            scores: Buffer::zeros(QUERIES_MAX * SPLIT)?,
            weights: Buffer::zeros(QUERIES_MAX * SPLIT / C::VALUES)?,
            rows: Buffer::zeros(LANES / C::VALUES * head_dim.next_multiple_of(LANES))?,
        })
    }
}

/// `R` query vectors and the positions of a split that each of them sees, counted from its start.
pub(super) struct Tile<'a, C, const R: usize> {
    pub(super) q: [&'a [C]; R],
    pub(super) seen: [Range<usize>; R],
    pub(super) positions: &'a Positions<'a, C>,
    /// Whether this tile brings near what is needed next: values while it scores, then the next split's keys.
    pub(super) fetch: bool,
}

impl<C: Cell, const R: usize> Tile<'_, C, R> {
    /// Cells of V's rows, and of weights, in 16 positions.
    const PER_VECTOR: usize = LANES / C::VALUES;

    /// Sets the states of queries `first..first + R`, which are clear.
    #[inline(always)]
    pub(super) fn run<S: Simd>(&self, s: S, scratch: &mut Scratch<C>, first: usize, state: &mut State) {
        let seen = self.seen.iter().filter(|seen| !seen.is_empty());
        let Some(start) = seen.clone().map(|seen| seen.start).min() else { return };
        let end = seen.map(|seen| seen.end).max().unwrap_or(start);
        self.score(s, start / LANES..end.div_ceil(LANES), &mut scratch.scores);
        for (r, seen) in self.seen.iter().enumerate().filter(|(_, seen)| !seen.is_empty()) {
            let scores = scratch.scores[r * SPLIT..][..SPLIT].as_mut_array().expect("the scores of a split");
            let weights = &mut scratch.weights[r * SPLIT / C::VALUES..][..SPLIT / C::VALUES];
            let (max, sum) = weigh(s, scores, seen.clone(), weights);
            state.set(first + r, max, sum);
        }
        self.accumulate(s, scratch, first, state);
    }

    /// q . k of all queries and these vectors of positions.
    #[inline(always)]
    fn score<S: Simd>(&self, s: S, vectors: Range<usize>, scores: &mut [f32]) {
        let mut vector = vectors.start;
        while vector < vectors.end {
            let left = vectors.end - vector;
            vector += if S::ATTEND_TILE.1 >= 4 && left >= 4 {
                self.score_vectors::<S, 4>(s, vector, scores)
            } else if S::ATTEND_TILE.1 >= 2 && left >= 2 {
                self.score_vectors::<S, 2>(s, vector, scores)
            } else {
                self.score_vectors::<S, 1>(s, vector, scores)
            };
        }
    }

    /// `P` vectors of positions from `first`: one chain over the cells of the head per score. Returns `P`.
    #[inline(always)]
    fn score_vectors<S: Simd, const P: usize>(&self, s: S, first: usize, scores: &mut [f32]) -> usize {
        let k: [&[C]; P] = std::array::from_fn(|p| self.positions.k[first + p]);
        if self.fetch {
            for v in &self.positions.v[first..first + P] {
                prefetch(s, v, Self::PER_VECTOR, self.positions.v_stride, self.positions.v_stride);
            }
        }
        s.outlined(Scores { q: self.q, k, k_stride: self.positions.k_stride, to: &mut scores[first * LANES..] });
        P
    }

    /// Adds weight times value over what each query sees: together where all see all of a cell, one by one around that.
    #[inline(always)]
    fn accumulate<S: Simd>(&self, s: S, scratch: &mut Scratch<C>, first: usize, state: &mut State) {
        let Scratch { weights, rows, .. } = scratch;
        let row = &mut rows[..state.padded()];
        let weights: [&[C]; R] = std::array::from_fn(|r| &weights[r * SPLIT / C::VALUES..][..SPLIT / C::VALUES]);
        let whole = |seen: &Range<usize>| seen.start.div_ceil(C::VALUES)..seen.end / C::VALUES;
        let start = self.seen.iter().map(|seen| whole(seen).start).max().unwrap_or(0);
        let end = self.seen.iter().map(|seen| whole(seen).end).min().unwrap_or(0).max(start);
        let (start, end) = (start * C::VALUES, end * C::VALUES);
        for (part, together) in [(0..start, false), (start..end, true), (end..SPLIT, false)] {
            if together {
                self.accumulate_common(s, weights, part, state.outs(first, R));
                continue;
            }
            for (r, weights) in weights.iter().enumerate() {
                let seen = self.seen[r].start.max(part.start)..self.seen[r].end.min(part.end);
                if !seen.is_empty() {
                    self.accumulate_alone(s, weights, seen, row, state.outs(first + r, 1));
                }
            }
        }
    }

    /// Adds positions that one query sees to its output. Of a cell that it sees in part, the rest counts as zero.
    #[inline(always)]
    fn accumulate_alone<S: Simd>(&self, s: S, weights: &[C], seen: Range<usize>, row: &mut [C], out: &mut [f32]) {
        let cells = seen.start / C::VALUES..seen.end.div_ceil(C::VALUES);
        for (cell, &weight) in cells.clone().zip(&weights[cells]) {
            let first = cell * C::VALUES;
            let mask = (0..C::VALUES).fold(0, |mask, at| mask | u32::from(seen.contains(&(first + at))) << at);
            let v = &self.positions.v[cell / Self::PER_VECTOR][cell % Self::PER_VECTOR * self.positions.v_stride..];
            for (to, from) in row.iter_mut().zip(v) {
                *to = from.only(mask);
            }
            let weight = C::splat(s, weight);
            for (out, v) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(row.as_chunks::<LANES>().0) {
                s.store(out, C::dot(s, weight, C::load(s, v), s.load(out)));
            }
        }
    }

    /// Adds whole cells of positions that all queries see to their outputs `out [R][padded]`.
    #[inline(always)]
    fn accumulate_common<S: Simd>(&self, s: S, weights: [&[C]; R], seen: Range<usize>, out: &mut [f32]) {
        let cells = seen.start / C::VALUES..seen.end / C::VALUES;
        let vectors = out.len() / R / LANES;
        let mut vector = 0;
        while vector < vectors && !cells.is_empty() {
            let fetch = (self.fetch && vector == 0).then_some(self.q[0].len());
            let (positions, cells, out) = (self.positions, cells.clone(), &mut *out);
            if S::ATTEND_TILE.1 >= 4 && vectors - vector >= 4 {
                s.outlined(Outputs::<C, R, 4> { weights, positions, cells, first: vector, out, fetch });
                vector += 4;
            } else {
                s.outlined(Outputs::<C, R, 1> { weights, positions, cells, first: vector, out, fetch });
                vector += 1;
            }
        }
    }
}

/// `R` queries times 16 positions of each of `P` vectors: one chain over the cells of the head per score.
struct Scores<'a, C, const R: usize, const P: usize> {
    q: [&'a [C]; R],
    k: [&'a [C]; P],
    k_stride: usize,
    /// Rows of `P` vectors, [`SPLIT`] apart.
    to: &'a mut [f32],
}

impl<C: Cell, const R: usize, const P: usize> Kernel for Scores<'_, C, R, P> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Scores { q, k, k_stride, to } = self;
        let cells = q[0].len();
        assert!(q.iter().all(|q| q.len() == cells), "queries of one length");
        assert!(k.iter().all(|k| k.len() >= (cells - 1) * k_stride + LANES), "keys of that length");
        let mut acc = [[s.splat(0.0); P]; R];
        for i in 0..cells {
            for p in 0..P {
                // SAFETY: row `i` of 16 is there, as asserted; the check would stay in the innermost loop.
                let k = C::load(s, unsafe { &*k[p].as_ptr().add(i * k_stride).cast::<[C; LANES]>() });
                for r in 0..R {
                    // SAFETY: every query has `cells` cells, as asserted.
                    let q = C::splat(s, unsafe { *q[r].get_unchecked(i) });
                    acc[r][p] = C::dot(s, q, k, acc[r][p]);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (p, value) in acc.into_iter().enumerate() {
                s.store(lanes(&mut to[r * SPLIT + p * LANES..]), value);
            }
        }
    }
}

/// Adds whole cells of positions to `O` vectors of outputs of `R` queries: one chain over the cells each.
struct Outputs<'a, C, const R: usize, const O: usize> {
    weights: [&'a [C]; R],
    positions: &'a Positions<'a, C>,
    cells: Range<usize>,
    /// The first vector.
    first: usize,
    /// `[R][padded]`.
    out: &'a mut [f32],
    /// Cells of the head, if the next split's keys are to be brought near.
    fetch: Option<usize>,
}

impl<C: Cell, const R: usize, const O: usize> Kernel for Outputs<'_, C, R, O> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Outputs { weights, positions, cells, first, out, fetch } = self;
        let (padded, stride, per_vector) = (out.len() / R, positions.v_stride, LANES / C::VALUES);
        let mut acc = [[s.splat(0.0); R]; O];
        for (o, acc) in acc.iter_mut().enumerate() {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = s.load(lanes(&mut out[r * padded + (first + o) * LANES..]));
            }
        }
        assert!(weights.iter().all(|weights| weights.len() >= cells.end), "a weight per cell");
        for vector in cells.start / per_vector..cells.end.div_ceil(per_vector) {
            let rows = cells.start.max(vector * per_vector)..cells.end.min((vector + 1) * per_vector);
            let v = &positions.v[vector][rows.start % per_vector * stride + first * LANES..];
            assert!(v.len() >= (rows.len() - 1) * stride + O * LANES, "values of {} rows", rows.len());
            if let Some(cells) = fetch {
                prefetch(s, positions.next_k[vector], cells, positions.k_stride, LANES);
            }
            for (i, row) in rows.enumerate() {
                for (o, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: row `i` has `O` vectors from `first` on, as asserted.
                    let v = C::load(s, unsafe { &*v.as_ptr().add(i * stride + o * LANES).cast::<[C; LANES]>() });
                    for r in 0..R {
                        // SAFETY: there is a weight per cell, as asserted.
                        let weight = C::splat(s, unsafe { *weights[r].get_unchecked(row) });
                        acc[r] = C::dot(s, weight, v, acc[r]);
                    }
                }
            }
        }
        for (o, acc) in acc.into_iter().enumerate() {
            for (r, value) in acc.into_iter().enumerate() {
                s.store(lanes(&mut out[r * padded + (first + o) * LANES..]), value);
            }
        }
    }
}

/// Turns the scores of the positions that a query sees into rounded weights; returns the maximum score and the sum of the
/// weights before rounding, taken in 16 lanes. In the vectors at both ends, positions that are not seen get the weight 0.
#[inline(always)]
pub(super) fn weigh<S: Simd, C: Cell>(
    s: S,
    scores: &mut [f32; SPLIT],
    seen: Range<usize>,
    weights: &mut [C],
) -> (f32, f32) {
    let vectors = seen.start / LANES..seen.end.div_ceil(LANES);
    let hidden = s.splat(f32::NEG_INFINITY);
    let scores = &mut scores.as_chunks_mut::<LANES>().0[vectors.clone()];
    let mut max = hidden;
    for (vector, lanes) in vectors.clone().zip(scores.iter_mut()) {
        let first = vector * LANES;
        let (start, end) = (seen.start.max(first) - first, seen.end.min(first + LANES) - first);
        let mut values = s.load(lanes);
        if end - start < LANES {
            let mask = ((1u32 << end) - (1u32 << start)) as u16;
            values = s.select(mask, values, hidden);
            s.store(lanes, values);
        }
        max = s.max(values, max);
    }
    let max = s.max_lane(max);
    let mut sum = s.splat(0.0);
    for (vector, lanes) in vectors.zip(scores) {
        let values = exp2(s, s.sub(s.load(lanes), s.splat(max)));
        sum = s.add(sum, values);
        let per_vector = LANES / C::VALUES;
        C::round(s, values, &mut weights[vector * per_vector..][..per_vector]);
    }
    (max, s.sum(sum))
}

/// The first 16 values.
#[inline(always)]
fn lanes(values: &mut [f32]) -> &mut [f32; LANES] {
    values[..LANES].as_mut_array().expect("16 lanes")
}
