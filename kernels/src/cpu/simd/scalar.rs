//! The level that every machine has: arrays and loops.

use half::f16;

use super::super::pair::Pair;
use super::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Scalar;

type F = [f32; LANES];

#[inline(always)]
fn zip(a: F, b: F, op: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| op(a[i], b[i]))
}

/// Halves the lanes until one is left.
#[inline(always)]
fn fold(mut lanes: F, op: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = op(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

impl Simd for Scalar {
    type F = F;
    type I = [i32; LANES];
    type B = [u8; 4 * LANES];
    type P = [Pair; LANES];

    const TILE_ROWS: usize = 1;
    const PANEL_PAIRS: bool = false;
    const ATTEND_TILE: (usize, usize) = (1, 1);
    const BF16_TILES: bool = cfg!(test);
    const BYTE_BIAS: i32 = 0;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) {
        kernel.run(self);
    }
    #[inline(always)]
    fn splat(self, value: f32) -> F {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> F {
        *from
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> F {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], value: F) {
        *to = value;
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, larger)
    }
    #[inline(always)]
    fn select_less(self, x: F, bound: F, below: F, value: F) -> F {
        std::array::from_fn(|i| if x[i] < bound[i] { below[i] } else { value[i] })
    }
    #[inline(always)]
    fn select(self, mask: u16, a: F, b: F) -> F {
        std::array::from_fn(|i| if mask >> i & 1 == 1 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn power_of_two(self, shifted: F) -> F {
        shifted.map(|lane| f32::from_bits((lane.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }
    #[inline(always)]
    fn sum(self, value: F) -> f32 {
        fold(value, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, value: F) -> f32 {
        fold(value, larger)
    }
    #[inline(always)]
    fn load_pairs(self, from: &[Pair; LANES]) -> [Pair; LANES] {
        *from
    }
    #[inline(always)]
    fn splat_pair(self, pair: Pair) -> [Pair; LANES] {
        [pair; LANES]
    }
    #[inline(always)]
    fn dot2(self, acc: F, a: [Pair; LANES], b: [Pair; LANES]) -> F {
        std::array::from_fn(|i| a[i].even().mul_add(b[i].even(), a[i].odd().mul_add(b[i].odd(), acc[i])))
    }
    #[inline(always)]
    fn halves(self, pairs: [Pair; LANES]) -> (F, F) {
        (pairs.map(Pair::even), pairs.map(Pair::odd))
    }
    #[inline(always)]
    fn round_pairs(self, value: F, to: &mut [Pair; LANES / 2]) {
        *to = std::array::from_fn(|i| Pair::new(value[2 * i], value[2 * i + 1]));
    }
    #[inline(always)]
    fn splat_int(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    fn to_float(self, value: [i32; LANES]) -> F {
        value.map(|lane| lane as f32)
    }
    #[inline(always)]
    fn load_codes(self, from: &[u8; 4 * LANES]) -> [u8; 4 * LANES] {
        *from
    }
    #[inline(always)]
    fn store_codes(self, to: &mut [u8; 4 * LANES], codes: [u8; 4 * LANES]) {
        *to = codes;
    }
    #[inline(always)]
    fn field(self, codes: [u8; 4 * LANES], shift: u32, mask: u8) -> [u8; 4 * LANES] {
        codes.map(|byte| byte >> shift & mask)
    }
    #[inline(always)]
    fn or_shifted(self, low: [u8; 4 * LANES], high: [u8; 4 * LANES], shift: u32) -> [u8; 4 * LANES] {
        std::array::from_fn(|i| low[i] | high[i] << shift)
    }
    #[inline(always)]
    fn less(self, codes: [u8; 4 * LANES], value: u8) -> [u8; 4 * LANES] {
        codes.map(|byte| byte.wrapping_sub(value))
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> [i32; LANES] {
        *from
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> F {
        from.map(|byte| f32::from(byte.cast_signed()))
    }
    #[inline(always)]
    fn dot4_small(self, acc: [i32; LANES], codes: [u8; 4 * LANES], x: [i8; 4]) -> [i32; LANES] {
        self.dot4_bytes(acc, codes, x)
    }
    #[inline(always)]
    fn dot4_bytes(self, acc: [i32; LANES], codes: [u8; 4 * LANES], x: [i8; 4]) -> [i32; LANES] {
        std::array::from_fn(|i| (0..4).fold(acc[i], |sum, j| sum + i32::from(codes[4 * i + j]) * i32::from(x[j])))
    }
}
