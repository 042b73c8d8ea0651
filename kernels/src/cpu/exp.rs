//! The exponential functions, the same at every level.

use super::simd::Simd;

/// Arguments are clamped here from above: e^88 is just below the largest f32.
const MAX: f32 = 88.0;
/// Below this the result is zero: its exponent would leave the normal range.
const MIN: f32 = -87.3;
/// 1.5 * 2^23, which rounds what is added to it to an integer.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; products of the first with small integers are exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// e^r on |r| <= ln(2) / 2, from r^2 / 2 on, highest power first (the minimax polynomial of Cephes' `expf`).
const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// e^x, within 2 units in the last place; exactly 1 at 0, 0 below -87.3, NaN for NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let high = s.select_less(s.splat(MAX), x, s.splat(MAX), x);
    let clamped = s.select_less(high, s.splat(MIN), s.splat(MIN), high);
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2[1]), s.fma(n, s.splat(-LN2[0]), clamped));
    let mut p = s.splat(POLYNOMIAL[0]);
    for &coefficient in &POLYNOMIAL[1..] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let fraction = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let value = s.mul(fraction, s.power_of_two(shifted));
    s.select_less(x, s.splat(MIN), s.splat(0.0), value)
}

/// 2^f - 1 on |f| <= 1/2, divided by f, highest power first: minimax in the relative error of 2^f (2.6e-9), by Remez'
/// algorithm.
const POLYNOMIAL_2: [f32; 6] =
    [1.559_467_8e-4, 1.340_664_3e-3, 9.617_693e-3, 5.550_310_4e-2, 2.402_265_2e-1, 6.931_472_4e-1];
/// Below this the result of [`exp2`] is zero.
const MIN_2: f32 = -126.0;

/// 2^x for x below 127, within 2 units in the last place; exactly 1 at 0, 0 below -126, NaN for NaN.
#[inline(always)]
pub(super) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    let shifted = s.add(x, s.splat(ROUND));
    let f = s.sub(x, s.sub(shifted, s.splat(ROUND)));
    let mut p = s.splat(POLYNOMIAL_2[0]);
    for &coefficient in &POLYNOMIAL_2[1..] {
        p = s.fma(p, f, s.splat(coefficient));
    }
    let value = s.mul(s.fma(p, f, s.splat(1.0)), s.power_of_two(shifted));
    s.select_less(x, s.splat(MIN_2), s.splat(0.0), value)
}

/// 2^x of one number.
#[inline(always)]
pub(super) fn exp2_one<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    s.store(&mut lanes, exp2(s, s.splat(x)));
    lanes[0]
}
