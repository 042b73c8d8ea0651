//! The level that every machine has: arrays and loops.

use half::f16;

use super::super::pair::Pair;
use super::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Scalar;

type F = [f32; LANES];

/// `of` for each lane. Unlike `array::from_fn` it is always a loop in its caller, which compilers turn into vectors.
#[inline(always)]
fn each<T: Copy + Default, const N: usize>(mut of: impl FnMut(usize) -> T) -> [T; N] {
    let mut lanes = [T::default(); N];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = of(i);
    }
    lanes
}

#[inline(always)]
fn zip(a: F, b: F, op: impl Fn(f32, f32) -> f32) -> F {
    each(|i| op(a[i], b[i]))
}

const fn in_each_byte(byte: u8) -> u32 {
    byte as u32 * 0x0101_0101
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

/// `a * b + c` rounded once, where the machine may have no such instruction. The product of two f32 is exact in f64, so that
/// only the sum is rounded there, and rounding it to f32 then gives what a single rounding gives, with the exceptions of
/// [`is_hard`], which are left to the library.
#[inline(always)]
fn fused(a: F, b: F, c: F) -> F {
    let sums = each(|i| f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]));
    if sums.iter().fold(false, |any, &sum| any | is_hard(sum)) {
        fused_by_parts(a, b, c, sums)
    } else {
        each(|i| sums[i] as f32)
    }
}

/// Whether a sum that was rounded to f64 lies halfway between two f32, as far as f64 can tell, or below the normal ones.
#[inline(always)]
fn is_hard(sum: f64) -> bool {
    const DROPPED: u64 = (1 << (f64::MANTISSA_DIGITS - f32::MANTISSA_DIGITS)) - 1;
    let is_halfway = sum.to_bits() & DROPPED == DROPPED / 2 + 1;
    is_halfway | ((sum.abs() < f64::from(f32::MIN_POSITIVE)) & (sum != 0.0))
}

#[cold]
#[inline(never)]
fn fused_by_parts(a: F, b: F, c: F, sums: [f64; LANES]) -> F {
    each(|i| if is_hard(sums[i]) { a[i].mul_add(b[i], c[i]) } else { sums[i] as f32 })
}

impl Simd for Scalar {
    type F = F;
    type I = [i32; LANES];
    type B = [u32; LANES];
    type P = [Pair; LANES];

    const TILE_ROWS: usize = 4;
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
        each(|i| f16::from_bits(from[i]).to_f32())
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
        fused(a, b, c)
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, larger)
    }
    #[inline(always)]
    fn select_less(self, x: F, bound: F, below: F, value: F) -> F {
        each(|i| if x[i] < bound[i] { below[i] } else { value[i] })
    }
    #[inline(always)]
    fn select(self, mask: u16, a: F, b: F) -> F {
        each(|i| if mask >> i & 1 == 1 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn power_of_two(self, shifted: F) -> F {
        each(|i| f32::from_bits((shifted[i].to_bits() << 23).wrapping_add(1.0f32.to_bits())))
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
        each(|i| a[i].even().mul_add(b[i].even(), a[i].odd().mul_add(b[i].odd(), acc[i])))
    }
    #[inline(always)]
    fn halves(self, pairs: [Pair; LANES]) -> (F, F) {
        (each(|i| pairs[i].even()), each(|i| pairs[i].odd()))
    }
    #[inline(always)]
    fn round_pairs(self, value: F, to: &mut [Pair; LANES / 2]) {
        *to = each(|i| Pair::new(value[2 * i], value[2 * i + 1]));
    }
    #[inline(always)]
    fn splat_int(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    fn to_float(self, value: [i32; LANES]) -> F {
        each(|i| value[i] as f32)
    }
    #[inline(always)]
    fn load_codes(self, from: &[u8; 4 * LANES]) -> [u32; LANES] {
        let (fours, _) = from.as_chunks();
        each(|i| u32::from_le_bytes(fours[i]))
    }
    #[inline(always)]
    fn store_codes(self, to: &mut [u8; 4 * LANES], codes: [u32; LANES]) {
        for (four, code) in to.as_chunks_mut().0.iter_mut().zip(codes) {
            *four = code.to_le_bytes();
        }
    }
    #[inline(always)]
    fn field(self, codes: [u32; LANES], shift: u32, mask: u8) -> [u32; LANES] {
        each(|i| codes[i] >> shift & in_each_byte(mask))
    }
    #[inline(always)]
    fn or_shifted(self, low: [u32; LANES], high: [u32; LANES], shift: u32) -> [u32; LANES] {
        each(|i| low[i] | high[i] << shift)
    }
    #[inline(always)]
    fn less(self, codes: [u32; LANES], value: u8) -> [u32; LANES] {
        // The upper bit of each byte is set first, so that nothing is borrowed from a neighbor, and put right after.
        const UPPER: u32 = in_each_byte(0x80);
        let value = in_each_byte(value);
        each(|i| ((codes[i] | UPPER) - (value & !UPPER)) ^ ((codes[i] ^ !value) & UPPER))
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> [i32; LANES] {
        *from
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> F {
        each(|i| f32::from(from[i].cast_signed()))
    }
    #[inline(always)]
    fn dot4_small(self, acc: [i32; LANES], codes: [u32; LANES], x: [i8; 4]) -> [i32; LANES] {
        self.dot4_bytes(acc, codes, x)
    }
    #[inline(always)]
    fn dot4_bytes(self, acc: [i32; LANES], codes: [u32; LANES], x: [i8; 4]) -> [i32; LANES] {
        let x = x.map(i32::from);
        let byte = |four: u32, at: u32| i32::from((four >> (8 * at) & 0xff) as i16);
        // In pairs, which compilers turn into multiplications of pairs of i16.
        each(|i| {
            let even = byte(codes[i], 0) * x[0] + byte(codes[i], 2) * x[2];
            let odd = byte(codes[i], 1) * x[1] + byte(codes[i], 3) * x[3];
            acc[i].wrapping_add(even).wrapping_add(odd)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums near which rounding twice differs from rounding once, and any others.
    #[test]
    fn a_fused_product_is_rounded_once() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut hard = 0;
        for round in 0..200_000 {
            let mut lanes = || each(|_| f32::from_bits(random() as u32));
            let (mut a, mut b, mut c) = (lanes(), lanes(), lanes());
            if round % 2 == 0 {
                // A product of few bits and a sum that is far smaller, of either sign: halfway but for the smaller.
                for i in 0..LANES {
                    a[i] = (1.0 + f32::EPSILON) * if i % 2 == 0 { 1.0 } else { -1.0 };
                    b[i] = 1.0 + (random() % 64) as f32 / 64.0;
                    c[i] = f32::from_bits((random() as u32 & 0x80ff_ffff) | 0x1000_0000);
                }
            }
            hard += (0..LANES).filter(|&i| is_hard(f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]))).count();
            let sums = fused(a, b, c);
            for i in 0..LANES {
                let expected = a[i].mul_add(b[i], c[i]);
                let is_same = sums[i].to_bits() == expected.to_bits() || (sums[i].is_nan() && expected.is_nan());
                assert!(is_same, "{:e} * {:e} + {:e}: {expected:e}, found {:e}", a[i], b[i], c[i], sums[i]);
            }
        }
        assert!(hard > 10_000, "{hard} sums were hard");
    }

    #[test]
    fn bytes_are_subtracted_without_borrowing() {
        for value in [0, 1, 8, 32, 127, 128, 255] {
            for start in 0..4 {
                let bytes: [u8; 4 * LANES] = each(|i| (i as u8).wrapping_mul(4).wrapping_add(start));
                let mut found = [0; 4 * LANES];
                Scalar.store_codes(&mut found, Scalar.less(Scalar.load_codes(&bytes), value));
                assert_eq!(found, bytes.map(|byte| byte.wrapping_sub(value)));
            }
        }
    }
}
