//! A few query vectors over one split of positions: scores, then weights, then outputs.
//!
//! Which positions a query sees decides what is read for it: a score is computed wherever one of the queries sees something
//! and hidden before it counts; a value that a query does not see is never multiplied, as it may be anything.

use std::ops::Range;

use super::super::element::Cell;
use super::super::exp::exp2;
use super::super::simd::{LANES, Simd};
use super::positions::{Positions, prefetch};
use super::state::State;
use crate::Result;
use crate::attention_plan::SPLIT;
use crate::buffer::Buffer;

/// Query vectors of a tile at most, at any level.
pub(super) const QUERIES_MAX: usize = 6;

/// Memory for one tile.
pub(super) struct Scratch<C: Cell> {
    /// `[queries][SPLIT]`.
    scores: Buffer<f32>,
    /// `[queries][SPLIT / VALUES]`: rounded weights.
    weights: Buffer<C>,
    /// One row of V with only one of its positions.
    row: Buffer<C>,
}

impl<C: Cell> Scratch<C> {
    pub(super) fn new(head_dim: usize) -> Result<Self> {
        Ok(Scratch {
            scores: Buffer::zeros(QUERIES_MAX * SPLIT)?,
            weights: Buffer::zeros(QUERIES_MAX * SPLIT / C::VALUES)?,
            row: Buffer::zeros(head_dim.next_multiple_of(LANES))?,
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
            let scores = (&mut scratch.scores[r * SPLIT..][..SPLIT]).as_mut_array().expect("the scores of a split");
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
        let (cells, stride) = (self.q[0].len(), self.positions.k_stride);
        let k: [&[C]; P] = std::array::from_fn(|p| self.positions.k[first + p]);
        if self.fetch {
            for v in &self.positions.v[first..first + P] {
                prefetch(s, v, Self::PER_VECTOR, self.positions.v_stride, self.positions.v_stride);
            }
        }
        assert!(self.q.iter().all(|q| q.len() == cells), "queries of one length");
        assert!(k.iter().all(|k| k.len() >= (cells - 1) * stride + LANES), "keys of that length");
        let mut acc = [[s.splat(0.0); P]; R];
        for i in 0..cells {
            let k: [C::Vector<S>; P] = std::array::from_fn(|p| {
                // SAFETY: row `i` of 16 is there, as asserted; the check would stay in the innermost loop.
                C::load(s, unsafe { &*k[p].as_ptr().add(i * stride).cast::<[C; LANES]>() })
            });
            for r in 0..R {
                // SAFETY: every query has `cells` cells, as asserted.
                let q = C::splat(s, unsafe { *self.q[r].get_unchecked(i) });
                for p in 0..P {
                    acc[r][p] = C::dot(s, q, k[p], acc[r][p]);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (p, value) in acc.into_iter().enumerate() {
                s.store(lanes(&mut scores[r * SPLIT + (first + p) * LANES..]), value);
            }
        }
        P
    }

    /// Adds weight times value over what each query sees: together where all see all of a cell, one by one around that.
    #[inline(always)]
    fn accumulate<S: Simd>(&self, s: S, scratch: &mut Scratch<C>, first: usize, state: &mut State) {
        let Scratch { weights, row, .. } = scratch;
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
            for r in 0..R {
                let seen = self.seen[r].start.max(part.start)..self.seen[r].end.min(part.end);
                if !seen.is_empty() {
                    self.accumulate_alone(s, weights[r], seen, row, state.outs(first + r, 1));
                }
            }
        }
    }

    /// Adds positions that one query sees to its output. Of a cell that it sees in part, the rest counts as zero.
    #[inline(always)]
    fn accumulate_alone<S: Simd>(&self, s: S, weights: &[C], seen: Range<usize>, row: &mut [C], out: &mut [f32]) {
        for cell in seen.start / C::VALUES..seen.end.div_ceil(C::VALUES) {
            let first = cell * C::VALUES;
            let mask = (0..C::VALUES).fold(0, |mask, at| mask | u32::from(seen.contains(&(first + at))) << at);
            let v = &self.positions.v[cell / Self::PER_VECTOR][cell % Self::PER_VECTOR * self.positions.v_stride..];
            for (to, from) in row.iter_mut().zip(v) {
                *to = from.only(mask);
            }
            let weight = C::splat(s, weights[cell]);
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
            vector += if S::ATTEND_TILE.1 >= 4 && vectors - vector >= 4 {
                self.accumulate_vectors::<S, 4>(s, weights, cells.clone(), vector, out)
            } else {
                self.accumulate_vectors::<S, 1>(s, weights, cells.clone(), vector, out)
            };
        }
    }

    /// `O` vectors of output values from `first`: one chain over the cells each. Returns `O`.
    #[inline(always)]
    fn accumulate_vectors<S: Simd, const O: usize>(
        &self,
        s: S,
        weights: [&[C]; R],
        cells: Range<usize>,
        first: usize,
        out: &mut [f32],
    ) -> usize {
        let (padded, stride) = (out.len() / R, self.positions.v_stride);
        let at = |q: usize, o: usize| q * padded + (first + o) * LANES;
        let mut acc: [[S::F; O]; R] =
            std::array::from_fn(|q| std::array::from_fn(|o| s.load(lanes(&mut out[at(q, o)..]))));
        for vector in cells.start / Self::PER_VECTOR..cells.end.div_ceil(Self::PER_VECTOR) {
            let rows = vector * Self::PER_VECTOR;
            let rows = cells.start.max(rows)..cells.end.min(rows + Self::PER_VECTOR);
            let v = &self.positions.v[vector][rows.start % Self::PER_VECTOR * stride + first * LANES..];
            assert!(v.len() >= (rows.len() - 1) * stride + O * LANES, "values of {} rows", rows.len());
            if self.fetch && first == 0 {
                prefetch(s, self.positions.next_k[vector], self.q[0].len(), self.positions.k_stride, LANES);
            }
            let weights = weights.map(|weights| &weights[rows.clone()]);
            for i in 0..rows.len() {
                let v: [C::Vector<S>; O] = std::array::from_fn(|o| {
                    // SAFETY: row `i` has `O` vectors from `first` on, as asserted.
                    C::load(s, unsafe { &*v.as_ptr().add(i * stride + o * LANES).cast::<[C; LANES]>() })
                });
                for q in 0..R {
                    let weight = C::splat(s, weights[q][i]);
                    for o in 0..O {
                        acc[q][o] = C::dot(s, weight, v[o], acc[q][o]);
                    }
                }
            }
        }
        for (q, acc) in acc.into_iter().enumerate() {
            for (o, value) in acc.into_iter().enumerate() {
                s.store(lanes(&mut out[at(q, o)..]), value);
            }
        }
        O
    }
}

/// Turns the scores of the positions that a query sees into rounded weights; returns the maximum score and the sum of the
/// weights before rounding, taken in 16 lanes. In the vectors at both ends, positions that are not seen get the weight 0.
#[inline(always)]
fn weigh<S: Simd, C: Cell>(s: S, scores: &mut [f32; SPLIT], seen: Range<usize>, weights: &mut [C]) -> (f32, f32) {
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
    (&mut values[..LANES]).as_mut_array().expect("16 lanes")
}
