//! What each op computes, as plain loops: the specification.
//!
//! Backends must give these bits where the text says in which order things are added (the CPU backend does, at every
//! level), and may differ by rounding where it does not. Matrices are row-major slices; sizes are the caller's to get
//! right, and a slice that is too short panics. [`dequantize`](crate::dequantize) is the reference of the stored formats.

mod attention;

pub use attention::{Attend, Products, attention, exp2};

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

/// One output of a product with bf16 weights (or of attention with a BF16 cache): both factors rounded to bf16, taken in
/// pairs in order, an odd size filled up with zeros; of a pair the odd product is added first, each by a fused multiply-add.
#[must_use]
pub fn dot_bf16(x: &[f32], w: &[f32]) -> f32 {
    let round = |value: f32| half::bf16::from_f32(value).to_f32();
    let product = |x: f32, w: f32, acc: f32| round(w).mul_add(round(x), acc);
    x.chunks(2).zip(w.chunks(2)).fold(0.0, |acc, (x, w)| {
        let odd = if x.len() == 2 { product(x[1], w[1], acc) } else { acc };
        product(x[0], w[0], odd)
    })
}

/// As [`dot_bf16`] in the order of the tile registers of AMX (`tdpbf16ps`), in blocks of `block` values: in each one chain
/// of fused multiply-adds over the even elements and one over the odd ones, from zero; the two are added, and then added to
/// the sum of the blocks before. Subnormal numbers, given or resulting, count as zero, and the result is never -0.
#[must_use]
pub fn dot_bf16_tiles(x: &[f32], w: &[f32], block: usize) -> f32 {
    let flushed = |value: f32| if value.is_subnormal() { 0.0 } else { value };
    let round = |value: f32| flushed(half::bf16::from_f32(flushed(value)).to_f32());
    let chain = |x: &[f32], w: &[f32], first: usize| {
        let pairs = x.iter().zip(w).skip(first).step_by(2);
        pairs.fold(0.0, |sum, (x, w)| flushed(round(*w).mul_add(round(*x), sum)))
    };
    let sum = x
        .chunks(block)
        .zip(w.chunks(block))
        .fold(0.0, |sum, (x, w)| flushed(sum + flushed(chain(x, w, 0) + chain(x, w, 1))));
    sum + 0.0
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

/// Where a head's values begin in a fused row: `[q: heads * head_dim | k: kv_heads * head_dim | v: same]`.
#[must_use]
pub fn fused_heads(heads: HeadLayout) -> [usize; 3] {
    [0, heads.heads * heads.head_dim, (heads.heads + heads.kv_heads) * heads.head_dim]
}
