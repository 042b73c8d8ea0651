//! AVX-512 with VNNI, with or without BF16: one register is a vector.

use std::arch::x86_64::*;
use std::{mem, ptr};

use super::super::pair::Pair;
use super::{Kernel, LANES, Simd, apart_by_halves};

/// Proof of AVX-512 F, BW, DQ, VL and VNNI, and of BF16 where it says so.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

/// # Safety
/// The machine has the features named here.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<false>(()));
}

/// # Safety
/// The machine has the features named here.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run_bf16<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<true>(()));
}

/// The upper halves of `value` folded on the lower ones until one lane is left.
macro_rules! fold {
    ($value:expr, $op256:ident, $op128:ident, $op_scalar:ident) => {{
        let low = _mm512_castps512_ps256($value);
        let high = _mm512_extractf32x8_ps::<1>($value);
        let eight = $op256(low, high);
        let four = $op128(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = $op128(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($op_scalar(two, _mm_movehdup_ps(two)))
    }};
}

// Every `unsafe` block below rests on the same argument, so that it is written once here and named at each of them:
// an `Avx512` exists only inside `run` and `run_bf16`, whose callers have checked the features.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type P = __m512i;

    const TILE_ROWS: usize = 8;
    const PANEL_PAIRS: bool = true;
    const ATTEND_TILE: (usize, usize) = (6, 4);
    const BF16_TILES: bool = true;
    const BYTE_BIAS: i32 = 0;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) {
        // SAFETY: `self` proves the features.
        unsafe { if BF16 { run_bf16(kernel) } else { run(kernel) } }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> __m512 {
        // SAFETY: `self` proves the features; the array is 32 readable bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], value: __m512) {
        // SAFETY: `self` proves the features; the array is 64 writable bytes.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn select_less(self, x: __m512, bound: __m512, below: __m512, value: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, bound), value, below) }
    }
    #[inline(always)]
    fn select(self, mask: u16, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_blend_ps(mask, b, a) }
    }
    #[inline(always)]
    fn power_of_two(self, shifted: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(1.0f32.to_bits().cast_signed())))
        }
    }
    #[inline(always)]
    fn sum(self, value: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { fold!(value, _mm256_add_ps, _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    fn max_lane(self, value: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { fold!(value, _mm256_max_ps, _mm_max_ps, _mm_max_ss) }
    }
    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a prefetch has no effect but on the cache.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(at).cast()) }
    }
    #[inline(always)]
    fn load_pairs(self, from: &[Pair; LANES]) -> __m512i {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_pair(self, pair: Pair) -> __m512i {
        self.splat_int(pair.bits().cast_signed())
    }
    #[inline(always)]
    fn dot2(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: `self` proves the features; both vectors are 64 bytes of any content.
        unsafe {
            if BF16 {
                let (a, b) = (mem::transmute::<__m512i, __m512bh>(a), mem::transmute::<__m512i, __m512bh>(b));
                return _mm512_dpbf16_ps(acc, a, b);
            }
            let upper = _mm512_set1_epi32(!0xffff);
            let (odd_a, odd_b) = (_mm512_and_si512(a, upper), _mm512_and_si512(b, upper));
            let (even_a, even_b) = (_mm512_slli_epi32::<16>(a), _mm512_slli_epi32::<16>(b));
            let odd = _mm512_fmadd_ps(_mm512_castsi512_ps(odd_a), _mm512_castsi512_ps(odd_b), acc);
            _mm512_fmadd_ps(_mm512_castsi512_ps(even_a), _mm512_castsi512_ps(even_b), odd)
        }
    }
    #[inline(always)]
    fn halves(self, pairs: __m512i) -> (__m512, __m512) {
        // SAFETY: `self` proves the features.
        unsafe {
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd))
        }
    }
    #[inline(always)]
    fn dot2_apart(self, sums: (__m512, __m512), a: __m512i, b: __m512i) -> (__m512, __m512) {
        if !BF16 {
            return apart_by_halves(self, sums, a, b);
        }
        // SAFETY: `self` proves the features.
        let [even_a, odd_a, even_b, odd_b] = unsafe {
            let lower = _mm512_set1_epi32(0xffff);
            let (even_a, even_b) = (_mm512_and_si512(a, lower), _mm512_and_si512(b, lower));
            [even_a, _mm512_srli_epi32::<16>(a), even_b, _mm512_srli_epi32::<16>(b)]
        };
        // The instruction of `dot2` flushes as wanted; the other half of each pair adds 0 * 0.
        (self.dot2(sums.0, even_a, even_b), self.dot2(sums.1, odd_a, odd_b))
    }
    #[inline(always)]
    fn round_pairs(self, value: __m512, to: &mut [Pair; LANES / 2]) {
        // SAFETY: `self` proves the features; the array is 32 writable bytes.
        unsafe {
            let rounded = if BF16 {
                mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value))
            } else {
                let bits = _mm512_castps_si512(value);
                let upper = _mm512_srli_epi32::<16>(bits);
                let half = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
                let nearest = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
                _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40)))
            };
            _mm256_storeu_si256(to.as_mut_ptr().cast(), rounded);
        }
    }
    #[inline(always)]
    fn splat_int(self, value: i32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn to_float(self, value: __m512i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(value) }
    }
    #[inline(always)]
    fn load_codes(self, from: &[u8; 4 * LANES]) -> __m512i {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_codes(self, to: &mut [u8; 4 * LANES], codes: __m512i) {
        // SAFETY: `self` proves the features; the array is 64 writable bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), codes) }
    }
    #[inline(always)]
    fn field(self, codes: __m512i, shift: u32, mask: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe {
            let shifted = _mm512_srl_epi16(codes, _mm_cvtsi32_si128(shift.cast_signed()));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask.cast_signed()))
        }
    }
    #[inline(always)]
    fn or_shifted(self, low: __m512i, high: __m512i, shift: u32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_or_si512(low, _mm512_sll_epi16(high, _mm_cvtsi32_si128(shift.cast_signed()))) }
    }
    #[inline(always)]
    fn less(self, codes: __m512i, value: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_epi8(codes, _mm512_set1_epi8(value.cast_signed())) }
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> __m512i {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> __m512 {
        // SAFETY: `self` proves the features; the array is 16 readable bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn dot4_small(self, acc: __m512i, codes: __m512i, x: [i8; 4]) -> __m512i {
        self.dot4_bytes(acc, codes, x)
    }
    #[inline(always)]
    fn dot4_bytes(self, acc: __m512i, codes: __m512i, x: [i8; 4]) -> __m512i {
        let x = i32::from_le_bytes(x.map(i8::cast_unsigned));
        // SAFETY: `self` proves the features.
        unsafe { _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(x)) }
    }
}
