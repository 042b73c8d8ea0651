//! Attention, position by position.

use super::{LANES, fold};
use crate::attention_plan::SPLIT;

/// How the products of attention, and of bf16 weights, are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Of f32 values: one chain of fused multiply-adds.
    F32,
    /// Of values rounded to bf16: as [`dot_bf16`](super::dot_bf16).
    Bf16Pairs,
    /// Likewise, as [`dot_bf16_tiles`](super::dot_bf16_tiles): in blocks of 32 values, and of 16 positions.
    Bf16Tiles,
}

impl Products {
    /// A factor as products take it.
    fn round(self, value: f32) -> f32 {
        match self {
            Products::F32 => value,
            Products::Bf16Pairs | Products::Bf16Tiles => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// The sum of `x[i] * w[i]` over the in features of a matrix or the values of a head, factors rounded.
    #[must_use]
    pub fn dot(self, x: &[f32], w: &[f32]) -> f32 {
        match self {
            Products::F32 => super::dot(x, w),
            Products::Bf16Pairs => super::dot_bf16(x, w),
            Products::Bf16Tiles => super::dot_bf16_tiles(x, w, 32),
        }
    }

    /// Likewise over the positions of a split.
    fn dot_positions(self, weights: &[f32], values: &[f32]) -> f32 {
        match self {
            Products::Bf16Tiles => super::dot_bf16_tiles(weights, values, 16),
            _ => self.dot(weights, values),
        }
    }
}

/// One query vector at `position`, over `k` and `v`, `[positions][head_dim]` each, of which it sees the last `window` up to
/// itself.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub scale: f32,
    pub position: usize,
    pub window: Option<u32>,
    pub products: Products,
}

/// The softmax of some positions: the largest score, the sum of weights, the weighted values.
struct Softmax {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

/// Attention of one query vector.
///
/// q is multiplied by `scale * log2(e)` and rounded. Positions are taken in splits of 256, counted from 0. In a split: the
/// scores; their maximum; weights `2^(score - max)`, added to lane `position % 16` of a sum whose lanes are then folded; the
/// weights, rounded, times the values, where a pair is of the positions `2i` and `2i + 1`, and what is not seen counts as
/// zero. Then the split is merged with those before it.
#[must_use]
pub fn attention(attend: &Attend<'_>) -> Vec<f32> {
    let Attend { q, scale, position, window, products, .. } = *attend;
    let q: Vec<f32> = q.iter().map(|q| products.round(q * (scale * std::f32::consts::LOG2_E))).collect();
    let seen = window.map_or(0, |window| (position + 1).saturating_sub(window as usize))..position + 1;
    let splits = (seen.start / SPLIT..seen.end.div_ceil(SPLIT)).map(|split| {
        let (first, end) = (split * SPLIT, (split + 1) * SPLIT);
        attend_split(attend, &q, first, seen.start.max(first)..seen.end.min(end))
    });
    let Softmax { sum, out, .. } = splits.reduce(merge).expect("a query sees itself");
    let inverse = 1.0 / sum;
    out.iter().map(|out| out * inverse).collect()
}

/// The positions `seen` of the split from `first` on.
fn attend_split(attend: &Attend<'_>, q: &[f32], first: usize, seen: std::ops::Range<usize>) -> Softmax {
    let Attend { k, v, products, .. } = *attend;
    let head_dim = q.len();
    let scores: Vec<f32> = seen.clone().map(|at| products.dot(q, &k[at * head_dim..][..head_dim])).collect();
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| if score > max { score } else { max });
    let mut lanes = [0.0; LANES];
    let mut weights = [0.0; SPLIT];
    for (at, score) in seen.clone().zip(scores) {
        let weight = exp2(score - max);
        lanes[at % LANES] += weight;
        weights[at - first] = products.round(weight);
    }
    let value = |at: usize, i: usize| if seen.contains(&at) { v[at * head_dim + i] } else { 0.0 };
    let out = (0..head_dim).map(|i| {
        let values: Vec<f32> = (first..first + SPLIT).map(|at| value(at, i)).collect();
        products.dot_positions(&weights, &values)
    });
    Softmax { max, sum: fold(lanes, |a, b| a + b), out: out.collect() }
}

fn merge(earlier: Softmax, later: Softmax) -> Softmax {
    let max = if earlier.max > later.max { earlier.max } else { later.max };
    let (a, b) = (exp2(earlier.max - max), exp2(later.max - max));
    let out = earlier.out.iter().zip(&later.out).map(|(x, y)| x.mul_add(a, y * b)).collect();
    Softmax { max, sum: earlier.sum.mul_add(a, later.sum * b), out }
}

/// 2^x for x below 127, in f32 steps that every level repeats; see `cpu/exp.rs` for the constants' source.
#[must_use]
pub fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    if x < -126.0 {
        return 0.0;
    }
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let powers = [1.340_664_3e-3, 9.617_693e-3, 5.550_310_4e-2, 2.402_265_2e-1, 6.931_472_4e-1, 1.0];
    let p = powers.iter().fold(1.559_467_8e-4f32, |p, &coefficient| p.mul_add(f, coefficient));
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}
