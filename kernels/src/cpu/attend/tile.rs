//! One tile of positions: K and V, widened, and the scores of the queries.

use std::ops::Range;

use super::super::dense;
use super::super::element::Element;
use super::super::simd::{LANES, Simd, for_row_tiles};
use super::Job;
use super::softmax::State;
use crate::Result;
use crate::attention_plan::{TILE, Task};
use crate::buffer::Buffer;

/// Panels of 16 positions in a tile.
const PANELS: usize = TILE / LANES;
/// Bytes that a prefetch brings.
const CACHE_LINE: usize = 64;
/// Vectors of output values that are accumulated in registers at once.
const OUT_VECTORS: usize = 4;

pub(super) struct Tile {
    /// `[2 panels][head_dim][16 positions]`.
    k: Buffer<f32>,
    /// `[32 positions][padded]`; the padding stays zero.
    v: Buffer<f32>,
    /// `[queries][32]`: scores, then weights.
    scores: Buffer<f32>,
    head_dim: usize,
    padded: usize,
}

impl Tile {
    pub(super) fn new(queries: usize, head_dim: usize) -> Result<Self> {
        let padded = head_dim.next_multiple_of(LANES);
        let (k, v) = (Buffer::zeros(TILE * head_dim)?, Buffer::zeros(TILE * padded)?);
        Ok(Tile { k, v, scores: Buffer::zeros(queries * TILE)?, head_dim, padded })
    }

    /// Widens the positions of `span`, which lies within the tile at `start`. Positions around it keep what they had: they
    /// are hidden from every query.
    #[inline(always)]
    pub(super) fn load<S: Simd, E: Element>(
        &mut self,
        s: S,
        job: &Job<'_, E>,
        task: &Task,
        start: usize,
        span: Range<usize>,
    ) {
        let block_size = job.shape.block_size;
        let mut position = span.start / block_size * block_size;
        position = position.max(start);
        while position < span.end {
            let (block, offset) = (position / block_size, position % block_size);
            // Whole stretches of a block, past the span's end too: they are there, and they make whole vectors.
            let len = (block_size - offset).min(start + TILE - position);
            let id = job.args.plan.tables[task.table + block] as usize;
            let page = job.shape.page_start(job.args.layer, id, task.kv_head);
            let (k, v) = job.kv[page..page + 2 * job.shape.page()].split_at(job.shape.page());
            self.load_k(s, &k[offset..], block_size, position - start, len);
            self.load_v(s, &v[offset * self.head_dim..][..len * self.head_dim], position - start);
            position += len;
        }
    }

    /// Asks for the blocks of `span`. Blocks lie anywhere, so that the processor cannot foresee the next one.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd, E: Element>(s: S, job: &Job<'_, E>, task: &Task, span: Range<usize>) {
        let block_size = job.shape.block_size;
        for block in span.start / block_size..span.end.div_ceil(block_size) {
            let id = job.args.plan.tables[task.table + block] as usize;
            let page = job.shape.page_start(job.args.layer, id, task.kv_head);
            for line in job.kv[page..page + 2 * job.shape.page()].chunks(CACHE_LINE / size_of::<E>()) {
                s.prefetch(&line[0]);
            }
        }
    }

    /// `len` positions of each row of `k [head_dim][stride]`, to positions `to..` of the tile.
    #[inline(always)]
    fn load_k<S: Simd, E: Element>(&mut self, s: S, k: &[E], stride: usize, to: usize, len: usize) {
        let mut done = 0;
        while done < len {
            let (panel, lane) = ((to + done) / LANES, (to + done) % LANES);
            let count = (len - done).min(LANES - lane);
            let rows = &mut self.k[panel * self.head_dim * LANES..][..self.head_dim * LANES];
            for (i, row) in rows.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let from = &k[i * stride + done..][..count];
                match from.as_array::<LANES>() {
                    Some(from) => s.store(row, E::load(s, from)),
                    None => {
                        for (to, from) in row[lane..lane + count].iter_mut().zip(from) {
                            *to = from.widen();
                        }
                    }
                }
            }
            done += count;
        }
    }

    /// Rows `v [_][head_dim]`, to positions `to..` of the tile.
    #[inline(always)]
    fn load_v<S: Simd, E: Element>(&mut self, s: S, v: &[E], to: usize) {
        let rows = self.v[to * self.padded..].chunks_exact_mut(self.padded);
        for (row, from) in rows.zip(v.chunks_exact(self.head_dim)) {
            let (vectors, tail) = from.as_chunks::<LANES>();
            let (to, to_tail) = row.split_at_mut(vectors.len() * LANES);
            for (to, from) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(vectors) {
                s.store(to, E::load(s, from));
            }
            for (to, from) in to_tail.iter_mut().zip(tail) {
                *to = from.widen();
            }
        }
    }

    /// q . k of all queries `q [_][head_dim]` and all positions.
    #[inline(always)]
    pub(super) fn score<S: Simd>(&mut self, s: S, q: &[f32]) {
        let head_dim = self.head_dim;
        let (low, high) = self.k.as_chunks::<LANES>().0.split_at(head_dim);
        let scores = &mut self.scores;
        for_row_tiles!(S, q.len() / head_dim, |query, R| {
            let rows: [&[f32]; R] = std::array::from_fn(|r| &q[(query + r) * head_dim..][..head_dim]);
            let dots: [[S::F; R]; PANELS] = if S::PANEL_PAIRS {
                dense::dots(s, [low, high], rows)
            } else {
                let [low] = dense::dots(s, [low], rows);
                let [high] = dense::dots(s, [high], rows);
                [low, high]
            };
            for (panel, dots) in dots.into_iter().enumerate() {
                for (r, dot) in dots.into_iter().enumerate() {
                    let to = &mut scores[(query + r) * TILE + panel * LANES..][..LANES];
                    s.store(to.try_into().expect("16 scores"), dot);
                }
            }
        });
    }

    pub(super) fn scores(&mut self, query: usize) -> &mut [f32; TILE] {
        (&mut self.scores[query * TILE..][..TILE]).try_into().expect("a tile of scores")
    }

    /// Adds `weight * v` over the visible positions to the outputs. Queries that see the same positions share loads of V.
    #[inline(always)]
    pub(super) fn accumulate<S: Simd>(
        &self,
        s: S,
        queries: usize,
        state: &mut State,
        visible: impl Fn(usize) -> Range<usize>,
    ) {
        let mut first = 0;
        while first < queries {
            let span = visible(first);
            let mut count = 1;
            while count < S::TILE_ROWS.min(4) && first + count < queries && visible(first + count) == span {
                count += 1;
            }
            match count {
                4 if S::TILE_ROWS >= 4 => self.accumulate_some::<S, 4>(s, first, span, state),
                3 if S::TILE_ROWS >= 4 => self.accumulate_some::<S, 3>(s, first, span, state),
                2 if S::TILE_ROWS >= 2 => self.accumulate_some::<S, 2>(s, first, span, state),
                _ => self.accumulate_some::<S, 1>(s, first, span, state),
            }
            first += count;
        }
    }

    #[inline(always)]
    fn accumulate_some<S: Simd, const R: usize>(&self, s: S, first: usize, span: Range<usize>, state: &mut State) {
        let vectors = self.padded / LANES;
        let mut vector = 0;
        while vector + OUT_VECTORS <= vectors {
            self.accumulate_vectors::<S, R, OUT_VECTORS>(s, first, span.clone(), vector, state);
            vector += OUT_VECTORS;
        }
        while vector < vectors {
            self.accumulate_vectors::<S, R, 1>(s, first, span.clone(), vector, state);
            vector += 1;
        }
    }

    /// `R` queries from `first`, `C` vectors from `vector`: one chain of fused multiply-adds over positions each.
    #[inline(always)]
    fn accumulate_vectors<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        first: usize,
        span: Range<usize>,
        vector: usize,
        state: &mut State,
    ) {
        let weights: [&[f32]; R] = std::array::from_fn(|r| &self.scores[(first + r) * TILE..][..TILE]);
        let out = |r: usize, c: usize| (first + r) * self.padded + (vector + c) * LANES;
        let mut acc: [[S::F; C]; R] = std::array::from_fn(|r| {
            std::array::from_fn(|c| s.load(state.out[out(r, c)..][..LANES].try_into().expect("16 values")))
        });
        for position in span {
            let v = &self.v[position * self.padded + vector * LANES..][..C * LANES];
            let v: [S::F; C] = std::array::from_fn(|c| s.load(v[c * LANES..][..LANES].try_into().expect("16 values")));
            for r in 0..R {
                let weight = s.splat(weights[r][position]);
                for c in 0..C {
                    acc[r][c] = s.fma(weight, v[c], acc[r][c]);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (c, value) in acc.into_iter().enumerate() {
                s.store((&mut state.out[out(r, c)..][..LANES]).try_into().expect("16 values"), value);
            }
        }
    }
}
