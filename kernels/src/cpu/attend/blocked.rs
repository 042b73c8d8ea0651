//! Query vectors over one split of positions in the order of tile registers, by those or by vectors.
//!
//! Scores are sums over blocks of 32 of the head's values, outputs over blocks of 16 positions, each block summed as
//! [`blocked`](super::super::blocked) says. Both are read in place:
//!
//! ```text
//!         A                                      B                                        C
//! scores  q [16 queries][32 values]              K [16 pairs of values][16 positions][2]  [16 queries][16 positions]
//! output  weights [16 queries][16 positions]     V [8 pairs of positions][16 values][2]   [16 queries][16 values]
//! ```
//!
//! `A0` and `B0` have the shape of whole blocks of scores; `A1` and `B1` that of outputs, and of the 16 values by which a head
//! may exceed whole blocks. One configuration of the registers does for both.
//!
//! Queries see different positions where their rows are, and where a window begins. Of 16 positions that some query does
//! not see, its weights are zeros, which add nothing as long as the values are finite. Where one is not, each query takes
//! what it sees alone.

use std::ops::Range;

use super::super::amx::{A0, A1, B0, B1, C0, C1, C2, C3, TILE_ROWS, TileShapes, Tiles, with_tiles};
use super::super::blocked::{BLOCK, add_block, finish};
use super::super::pair::Pair;
use super::super::simd::{Kernel, LANES, Simd};
use super::positions::{Positions, prefetch};
use super::state::State;
use super::tile::{Scratch, weigh};
use super::{Job, Worker};
use crate::attention_plan::{SPLIT, Task};

/// Query vectors from which on tile registers are worth more than vectors, a choice of speed alone, by peak rates rather than
/// by measurement: up to three take less time than reading K and V from memory does.
const TILE_QUERIES: usize = 4;
/// Cells of weights, and rows of V, for 16 positions.
const POSITION_CELLS: usize = LANES / 2;
/// Cells of a query's weights.
const SPLIT_CELLS: usize = SPLIT / 2;
const CELL_BYTES: usize = size_of::<Pair>();

/// All queries of a task over one split, into the worker's state of it.
#[inline(always)]
pub(super) fn split<S: Simd>(s: S, job: &Job<'_, Pair>, task: &Task, split: usize, worker: &mut Worker<Pair>) {
    let (queries, head_cells) = (task.rows * job.args.heads.group(), job.shape.head_dim.div_ceil(2));
    let Worker { q, copied, tile: scratch, split: state, .. } = worker;
    state.clear(queries);
    let positions = job.positions(task, split, copied);
    // What a row sees moves on with its position, so that rows which see something of the split follow each other.
    let sees = |query: &usize| !job.seen(task, split, *query).is_empty();
    let Some(start) = (0..queries).find(sees) else { return };
    let end = (start..queries).find(|query| !sees(query)).unwrap_or(queries);
    let by_tiles = end - start >= TILE_QUERIES && job.shape.head_dim.is_multiple_of(LANES);
    let mut first = start;
    while first < end {
        let count = (end - first).min(if by_tiles { TILE_ROWS } else { TILE_QUERIES - 1 });
        let queries = Queries {
            q: &q[first * head_cells..][..count * head_cells],
            head_cells,
            count,
            seen: std::array::from_fn(|query| if query < count { job.seen(task, split, first + query) } else { 0..0 }),
            positions: &positions,
            fetch: first == start,
        };
        match count {
            _ if by_tiles => with_tiles!(
                job.unit,
                &TileShapes::products([count; 4], [(count, BLOCK * CELL_BYTES), (count, POSITION_CELLS * CELL_BYTES)]),
                |registers| queries.run(s, &mut ByTiles(registers), scratch, first, state),
                unreachable!("a device with this order has registers")
            ),
            1 => queries.run(s, &mut ByVectors::<1>, scratch, first, state),
            2 => queries.run(s, &mut ByVectors::<2>, scratch, first, state),
            _ => queries.run(s, &mut ByVectors::<3>, scratch, first, state),
        }
        first += count;
    }
}

/// What computes the products of some queries.
trait Products {
    /// q . k of all queries and these vectors of positions, to rows [`SPLIT`] apart.
    fn score<S: Simd>(&mut self, s: S, queries: &Queries<'_>, vectors: Range<usize>, scores: &mut [f32]);

    /// Adds weight times value over these vectors of positions to `out [queries][padded head]`.
    fn accumulate<S: Simd>(
        &mut self,
        s: S,
        queries: &Queries<'_>,
        vectors: Range<usize>,
        weights: &[Pair],
        out: &mut [f32],
    );
}

/// Up to 16 query vectors, each of which sees something of the split.
struct Queries<'a> {
    /// `[count][head_cells]`.
    q: &'a [Pair],
    head_cells: usize,
    count: usize,
    /// The positions that each sees, counted from the split's start.
    seen: [Range<usize>; TILE_ROWS],
    positions: &'a Positions<'a, Pair>,
    /// Whether these queries bring near what is needed next: values while they score, then the next split's keys.
    fetch: bool,
}

impl Queries<'_> {
    /// Sets the states of queries `first..first + count`, which are clear.
    #[inline(always)]
    fn run<S: Simd, P: Products>(
        &self,
        s: S,
        products: &mut P,
        scratch: &mut Scratch<Pair>,
        first: usize,
        state: &mut State,
    ) {
        let Scratch { scores, weights, rows } = scratch;
        let seen = &self.seen[..self.count];
        let start = seen.iter().map(|seen| seen.start).min().expect("a query") / LANES;
        let end = seen.iter().map(|seen| seen.end).max().expect("a query").div_ceil(LANES);
        products.score(s, self, start..end, scores);
        for (query, seen) in seen.iter().enumerate() {
            let scores = scores[query * SPLIT..][..SPLIT].as_mut_array().expect("the scores of a split");
            let weights = &mut weights[query * SPLIT_CELLS..][..SPLIT_CELLS];
            let (max, sum) = weigh(s, scores, seen.clone(), weights);
            weights[start * POSITION_CELLS..seen.start / LANES * POSITION_CELLS].fill(Pair::default());
            weights[seen.end.div_ceil(LANES) * POSITION_CELLS..end * POSITION_CELLS].fill(Pair::default());
            state.set(first + query, max, sum);
        }
        let out = state.outs(first, self.count);
        let mut vector = start;
        while vector < end {
            let together = (vector..end).take_while(|&vector| self.is_common(vector)).count();
            if together > 0 {
                products.accumulate(s, self, vector..vector + together, weights, out);
                vector += together;
            } else {
                self.accumulate_alone(s, vector, weights, rows, out);
                vector += 1;
            }
        }
        for lanes in out.as_chunks_mut::<LANES>().0 {
            let sum = s.load(lanes);
            s.store(lanes, finish(s, sum));
        }
    }

    /// Whether all queries may multiply the values of all 16 positions: they see them, or their weights, zeros, show nothing.
    #[inline(always)]
    fn is_common(&self, vector: usize) -> bool {
        let (start, end) = (vector * LANES, (vector + 1) * LANES);
        let values = &self.positions.v[vector][..POSITION_CELLS * self.positions.v_stride];
        self.seen[..self.count].iter().all(|seen| seen.start <= start && end <= seen.end)
            || values.iter().fold(true, |finite, pair| finite & pair.is_finite())
    }

    /// Adds what each query sees of 16 positions to its output, from a copy in which the others are zeros.
    #[inline(always)]
    fn accumulate_alone<S: Simd>(&self, s: S, vector: usize, weights: &[Pair], rows: &mut [Pair], out: &mut [f32]) {
        let (stride, first) = (self.positions.v_stride, vector * LANES);
        for (query, out) in out.chunks_exact_mut(stride).enumerate() {
            let seen = &self.seen[query];
            let mask = |cell: usize| {
                (0..2).fold(0, |mask, at| mask | u32::from(seen.contains(&(first + 2 * cell + at))) << at)
            };
            let values = self.positions.v[vector].chunks(stride).zip(rows.chunks_exact_mut(stride));
            for (cell, (from, to)) in values.enumerate().take(POSITION_CELLS) {
                let mask = mask(cell);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.only(mask);
                }
            }
            let weights = [&weights[query * SPLIT_CELLS + vector * POSITION_CELLS..][..POSITION_CELLS]];
            s.outlined(Values { weights, rows: &*rows, stride, out });
        }
    }

    /// Asks for the values of these positions, which come after their scores.
    #[inline(always)]
    fn fetch_values<S: Simd>(&self, s: S, vectors: Range<usize>) {
        if self.fetch {
            let stride = self.positions.v_stride;
            self.positions.v[vectors].iter().for_each(|v| prefetch(s, v, POSITION_CELLS, stride, stride));
        }
    }

    /// Asks for the keys a split after these positions.
    #[inline(always)]
    fn fetch_next_keys<S: Simd>(&self, s: S, vector: usize) {
        if self.fetch {
            prefetch(s, self.positions.next_k[vector], self.head_cells, self.positions.k_stride, LANES);
        }
    }

    /// Keys for all cells of the head, and values of 16 positions.
    fn assert_lengths(&self, vector: usize) {
        let Positions { k, k_stride, v, v_stride, .. } = self.positions;
        assert!(k[vector].len() >= (self.head_cells - 1) * k_stride + LANES, "keys of a head");
        assert!(v[vector].len() >= POSITION_CELLS * v_stride, "values of 16 positions");
    }
}

/// Tile registers, configured for as many rows as there are queries.
struct ByTiles<T>(T);

/// Runs the body for the first `$count`, at most 4, registers of results: `$register` is each one's name, `$at` its number.
macro_rules! for_results {
    ($count:expr, |$register:ident, $at:ident| $body:expr) => {
        for_results!($count, |$register, $at| $body, C0 C1 C2 C3)
    };
    ($count:expr, |$register:ident, $at:ident| $body:expr, $($result:ident)*) => {
        $({
            const $register: usize = $result;
            let $at = $result;
            if $at < $count {
                $body;
            }
        })*
    };
}

impl<T: Tiles> Products for ByTiles<T> {
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, queries: &Queries<'_>, vectors: Range<usize>, scores: &mut [f32]) {
        let Queries { q, head_cells, count, positions, .. } = queries;
        let (registers, k_stride, whole) = (&mut self.0, positions.k_stride, head_cells / BLOCK * BLOCK);
        assert!(q.len() == count * head_cells && scores.len() >= count * SPLIT, "rows of queries and scores");
        assert!(head_cells - whole == 0 || head_cells - whole == POSITION_CELLS, "whole vectors of a head's values");
        vectors.clone().for_each(|vector| queries.assert_lengths(vector));
        for first in vectors.clone().step_by(4) {
            let end = vectors.end.min(first + 4);
            let (k, to) = (&positions.k[first..end], scores[first * LANES..].as_mut_ptr());
            queries.fetch_values(s, first..end);
            for_results!(k.len(), |C, _at| registers.zero::<C>());
            // SAFETY: queries have `head_cells` cells and vectors of positions as many rows of 16, as asserted: whole blocks
            // of them for `A0` and `B0`, then half a one for `A1` and `B1`. Scores have a row per query.
            unsafe {
                for cell in (0..whole).step_by(BLOCK) {
                    registers.load::<A0>(q.as_ptr().add(cell).cast(), head_cells * CELL_BYTES);
                    for_results!(k.len(), |C, at| {
                        registers.load::<B0>(k[at].as_ptr().add(cell * k_stride).cast(), k_stride * CELL_BYTES);
                        registers.dot_bf16::<C, A0, B0>();
                    });
                }
                if whole < *head_cells {
                    registers.load::<A1>(q.as_ptr().add(whole).cast(), head_cells * CELL_BYTES);
                    for_results!(k.len(), |C, at| {
                        registers.load::<B1>(k[at].as_ptr().add(whole * k_stride).cast(), k_stride * CELL_BYTES);
                        registers.dot_bf16::<C, A1, B1>();
                    });
                }
                for_results!(k.len(), |C, at| registers
                    .store::<C>(to.add(at * LANES).cast(), SPLIT * size_of::<f32>()));
            }
        }
    }

    #[inline(always)]
    fn accumulate<S: Simd>(
        &mut self,
        s: S,
        queries: &Queries<'_>,
        vectors: Range<usize>,
        weights: &[Pair],
        out: &mut [f32],
    ) {
        let Queries { count, positions, .. } = queries;
        let (registers, stride) = (&mut self.0, positions.v_stride);
        assert!(out.len() == count * stride && weights.len() >= count * SPLIT_CELLS, "rows of outputs and weights");
        vectors.clone().for_each(|vector| queries.assert_lengths(vector));
        let row_bytes = stride * size_of::<f32>();
        for first in (0..stride).step_by(4 * LANES) {
            let (results, out) = (4.min((stride - first) / LANES), out[first..].as_mut_ptr());
            // SAFETY: outputs and weights have a row per query, and positions 8 rows of `stride` values, as asserted; 16 of
            // those from `first` on belong to each result.
            unsafe {
                for_results!(results, |C, at| registers.load::<C>(out.add(at * LANES).cast(), row_bytes));
                for vector in vectors.clone() {
                    if first == 0 {
                        queries.fetch_next_keys(s, vector);
                    }
                    let weights = weights[vector * POSITION_CELLS..].as_ptr();
                    let v = positions.v[vector][first..].as_ptr();
                    registers.load::<A1>(weights.cast(), SPLIT_CELLS * CELL_BYTES);
                    for_results!(results, |C, at| {
                        registers.load::<B1>(v.add(at * LANES).cast(), stride * CELL_BYTES);
                        registers.dot_bf16::<C, A1, B1>();
                    });
                }
                for_results!(results, |C, at| registers.store::<C>(out.add(at * LANES).cast(), row_bytes));
            }
        }
    }
}

/// Vectors, for `R` queries.
struct ByVectors<const R: usize>;

impl<const R: usize> Products for ByVectors<R> {
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, queries: &Queries<'_>, vectors: Range<usize>, scores: &mut [f32]) {
        let Queries { q, head_cells, positions, .. } = queries;
        let q: [&[Pair]; R] = std::array::from_fn(|r| &q[r * head_cells..][..*head_cells]);
        for first in vectors.clone().step_by(2) {
            queries.fetch_values(s, first..vectors.end.min(first + 2));
            let (k_stride, to) = (positions.k_stride, &mut scores[first * LANES..]);
            if first + 1 < vectors.end {
                s.outlined(Scores { q, k: [positions.k[first], positions.k[first + 1]], k_stride, to });
            } else {
                s.outlined(Scores { q, k: [positions.k[first]], k_stride, to });
            }
        }
    }

    #[inline(always)]
    fn accumulate<S: Simd>(
        &mut self,
        s: S,
        queries: &Queries<'_>,
        vectors: Range<usize>,
        weights: &[Pair],
        out: &mut [f32],
    ) {
        let stride = queries.positions.v_stride;
        for vector in vectors {
            queries.fetch_next_keys(s, vector);
            let weights: [&[Pair]; R] =
                std::array::from_fn(|r| &weights[r * SPLIT_CELLS + vector * POSITION_CELLS..][..POSITION_CELLS]);
            s.outlined(Values { weights, rows: queries.positions.v[vector], stride, out });
        }
    }
}

/// `R` queries times 16 positions of each of `P` vectors.
struct Scores<'a, const R: usize, const P: usize> {
    q: [&'a [Pair]; R],
    k: [&'a [Pair]; P],
    k_stride: usize,
    /// Rows of `P` vectors, [`SPLIT`] apart.
    to: &'a mut [f32],
}

impl<const R: usize, const P: usize> Kernel for Scores<'_, R, P> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Scores { q, k, k_stride, to } = self;
        let cells = q[0].len();
        let mut sums = [[s.splat(0.0); P]; R];
        for at in (0..cells).step_by(BLOCK) {
            let end = cells.min(at + BLOCK);
            add_block(s, q.map(|q| &q[at..end]), k.map(|k| &k[at * k_stride..]), k_stride, &mut sums);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                s.store(to[r * SPLIT + p * LANES..].first_chunk_mut().expect("16 lanes"), sum);
            }
        }
    }
}

/// Adds the values of 16 positions, times their weights, to the outputs of `R` queries.
struct Values<'a, const R: usize> {
    weights: [&'a [Pair]; R],
    /// 8 rows, `stride` apart.
    rows: &'a [Pair],
    stride: usize,
    /// `[R][stride]`.
    out: &'a mut [f32],
}

impl<const R: usize> Kernel for Values<'_, R> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Values { weights, rows, stride, out } = self;
        for first in (0..stride).step_by(LANES) {
            let mut sums = [[s.splat(0.0); 1]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                sums[0] = s.load(out[r * stride + first..].first_chunk().expect("16 lanes"));
            }
            add_block(s, weights, [&rows[first..]], stride, &mut sums);
            for (r, sums) in sums.into_iter().enumerate() {
                s.store(out[r * stride + first..].first_chunk_mut().expect("16 lanes"), sums[0]);
            }
        }
    }
}

#[cfg(test)]
#[path = "blocked_tests.rs"]
mod tests;
