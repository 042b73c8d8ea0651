//! What each op computes, as plain loops: the specification.
//!
//! Backends must give these bits where the text says in which order things are added (the CPU backend does, at every
//! level), and may differ by rounding where it does not. Matrices are row-major slices; sizes are the caller's to get
//! right, and a slice that is too short panics. [`dequantize`](crate::dequantize) is the reference of the stored formats.

use std::ops::Range;

use crate::attention_plan::{SPLIT, TILE};
use crate::format::Unpacked;
use crate::{Format, HeadLayout};

const LANES: usize = 16;
const GROUP: usize = 32;

/// Folds 16 lanes: `i` and `i + 8`, then 4, 2 and 1 apart.
fn fold(mut lanes: [f32; LANES], op: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = op(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// One row of RMSNorm: squares are summed into lane `i % 16`, lanes are folded, and values are scaled, then weighted.
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut lanes = [0.0f32; LANES];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % LANES] = x.mul_add(x, lanes[i % LANES]);
    }
    let scale = 1.0 / (fold(lanes, |a, b| a + b) / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

/// One output of a product with float weights (those of [`dequantize`](crate::dequantize)): fused multiply-adds in the
/// order of the in features.
#[must_use]
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |acc, (x, w)| w.mul_add(*x, acc))
}

/// Int8 codes, scale and half sums of a group of activations.
///
/// The scale is `max |x| / 127`, codes are `x * (127 / max |x|)` rounded half to even. A group below 1e-30 is zero; one
/// with an infinity or a NaN has the scale NaN and codes of zero.
#[must_use]
pub fn quantize_group(x: &[f32]) -> ([i8; GROUP], f32) {
    let amax = x.iter().fold(0.0f32, |max, x| if max >= x.abs() { max } else { x.abs() });
    if !x.iter().all(|x| x.is_finite()) {
        return ([0; GROUP], f32::NAN);
    }
    if amax < 1e-30 {
        return ([0; GROUP], 0.0);
    }
    // The product is rounded once, straight to an integer: in f64 it is exact.
    let code = |x: f32| (f64::from(x) * f64::from(127.0 / amax)).round_ties_even() as i8;
    (std::array::from_fn(|i| code(x[i])), amax / 127.0)
}

/// One output of a product with a quantized weight row: `x` is quantized per group of 32; per group of the weight (16 or
/// 32), exact integer sums, then `acc = fma(scale_w * scale_x, sum((code_w - zero) * code_x), acc)` and, where there are
/// minimums, `acc = fma(min_w, scale_x * sum(code_x), acc)`.
#[must_use]
pub fn dot_quantized(x: &[f32], format: Format, row: &[u8]) -> f32 {
    let (block_elements, group) = (format.block_elements(), format.group());
    let mut block = Unpacked::new();
    let mut acc = 0.0f32;
    for (x, bytes) in x.chunks_exact(block_elements).zip(row.chunks_exact(format.block_bytes())) {
        format.unpack(bytes, &mut block);
        for start in (0..block_elements).step_by(group) {
            let first = start / GROUP * GROUP;
            let (codes, scale) = quantize_group(&x[first..first + GROUP]);
            let (mut dot, mut sum) = (0, 0);
            for i in start..start + group {
                let code = i32::from(codes[i - first]);
                dot += (i32::from(block.codes[i]) - format.zero_point()) * code;
                sum += code;
            }
            let at = start / group;
            acc = (block.scale(at) * scale).mul_add(dot as f32, acc);
            if format.has_min() {
                acc = block.min(at).mul_add(scale * sum as f32, acc);
            }
        }
    }
    acc
}

/// e^x, in f32 steps that every level repeats; see `cpu/exp.rs` for the constants' source.
#[must_use]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    if x < -87.3 {
        return 0.0;
    }
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let powers = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = powers.iter().fold(1.987_569_1e-4f32, |p, &coefficient| p.mul_add(r, coefficient));
    (p.mul_add(r * r, r) + 1.0) * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// `gate / (1 + e^-gate) * up`.
#[must_use]
pub fn silu_mul(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(0.0 - gate)) * up
}

/// Split-half RoPE of one head: values `i` and `i + cos.len()` turn by the angle of `cos[i]`, `sin[i]`.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

/// Running softmax over positions: the maximum, 16 lanes of the sum, the weighted values.
struct Softmax {
    max: f32,
    sum: [f32; LANES],
    out: Vec<f32>,
}

/// Attention of one query vector at `position` over `k` and `v`, `[positions][head_dim]` each, of which it sees the last
/// `window` up to itself.
///
/// Positions are taken in tiles of 32 within splits of 256, both counted from 0. In a tile: scores by fused multiply-adds
/// over the head; the new maximum; sums and outputs so far scaled by `e^(old - new)`; then weights `e^(score - max)`, added
/// to lane `position % 16` of the sum, and fused multiply-adds of the values. At the end of a split its lanes are folded,
/// and it is merged with the splits before it.
#[must_use]
pub fn attention(q: &[f32], k: &[f32], v: &[f32], scale: f32, position: usize, window: Option<u32>) -> Vec<f32> {
    let head_dim = q.len();
    let seen = window.map_or(0, |window| (position + 1).saturating_sub(window as usize))..position + 1;
    let mut total: Option<(f32, f32, Vec<f32>)> = None;
    for split in seen.start / SPLIT..seen.end.div_ceil(SPLIT) {
        let mut state = Softmax { max: f32::NEG_INFINITY, sum: [0.0; LANES], out: vec![0.0; head_dim] };
        for start in (split * SPLIT..(split + 1) * SPLIT).step_by(TILE) {
            let tile = start.max(seen.start)..(start + TILE).min(seen.end);
            if !tile.is_empty() {
                attend_tile(&mut state, q, k, v, scale, tile);
            }
        }
        let later = (state.max, fold(state.sum, |a, b| a + b), state.out);
        total = Some(match total {
            None => later,
            Some(earlier) => merge(earlier, later),
        });
    }
    let (_, sum, out) = total.expect("a query sees itself");
    let inverse = 1.0 / sum;
    out.iter().map(|out| out * inverse).collect()
}

fn attend_tile(state: &mut Softmax, q: &[f32], k: &[f32], v: &[f32], scale: f32, tile: Range<usize>) {
    let head_dim = q.len();
    let scores: Vec<f32> = tile.clone().map(|at| dot(q, &k[at * head_dim..][..head_dim]) * scale).collect();
    let max = scores.iter().fold(state.max, |max, &score| if max > score { max } else { score });
    let factor = exp(state.max - max);
    state.sum.iter_mut().chain(&mut state.out).for_each(|value| *value *= factor);
    state.max = max;
    for (score, at) in scores.into_iter().zip(tile) {
        let weight = exp(score - max);
        state.sum[at % LANES] += weight;
        for (out, v) in state.out.iter_mut().zip(&v[at * head_dim..]) {
            *out = weight.mul_add(*v, *out);
        }
    }
}

fn merge(earlier: (f32, f32, Vec<f32>), later: (f32, f32, Vec<f32>)) -> (f32, f32, Vec<f32>) {
    let max = if earlier.0 > later.0 { earlier.0 } else { later.0 };
    let (a, b) = (exp(earlier.0 - max), exp(later.0 - max));
    let out = earlier.2.iter().zip(&later.2).map(|(x, y)| x.mul_add(a, y * b)).collect();
    (max, earlier.1.mul_add(a, later.1 * b), out)
}

/// Where a head's values begin in a fused row: `[q: heads * head_dim | k: kv_heads * head_dim | v: same]`.
#[must_use]
pub fn fused_heads(heads: HeadLayout) -> [usize; 3] {
    [0, heads.heads * heads.head_dim, (heads.heads + heads.kv_heads) * heads.head_dim]
}
