//! AVX2 with FMA and F16C: two registers are a vector, lanes 0..8 and 8..16.

use std::arch::x86_64::*;
use std::ptr;

use super::super::pair::Pair as Bf16Pair;
use super::{Kernel, LANES, Simd};

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The machine has the features named here.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

#[derive(Clone, Copy)]
pub(super) struct IntPair(__m256i, __m256i);

/// The upper halves folded on the lower ones until one lane is left.
macro_rules! fold {
    ($value:expr, $op256:ident, $op128:ident, $op_scalar:ident) => {{
        let eight = $op256($value.0, $value.1);
        let four = $op128(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = $op128(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($op_scalar(two, _mm_movehdup_ps(two)))
    }};
}

/// All ones in the lanes whose bit is set.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn lane_mask(bits: u16) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits & 0xff)), lane_bits);
        _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bits))
    }
}

/// `acc` plus the sums of four products of a u8 and an i8; pairs of products must fit 16 bits.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn dot4(acc: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let pairs = _mm256_maddubs_epi16(unsigned, signed);
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// `acc` plus the products of the odd halves of `a` and `b`, then of the even ones.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[inline(always)]
unsafe fn dot2(acc: __m256, a: __m256i, b: __m256i) -> __m256 {
    // SAFETY: the caller has AVX2 and FMA.
    unsafe {
        let upper = _mm256_set1_epi32(!0xffff);
        let (odd_a, odd_b) = (_mm256_and_si256(a, upper), _mm256_and_si256(b, upper));
        let (even_a, even_b) = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
        let odd = _mm256_fmadd_ps(_mm256_castsi256_ps(odd_a), _mm256_castsi256_ps(odd_b), acc);
        _mm256_fmadd_ps(_mm256_castsi256_ps(even_a), _mm256_castsi256_ps(even_b), odd)
    }
}

/// The nearest bf16 of each lane in its lower half, ties to even; a NaN stays one.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn round_bf16(value: __m256) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let bits = _mm256_castps_si256(value);
        let upper = _mm256_srli_epi32::<16>(bits);
        let half = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
        let nearest = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        _mm256_blendv_epi8(nearest, quiet, nan)
    }
}

// As for AVX-512: an `Avx2` exists only inside `run`, whose caller has checked the features.
impl Simd for Avx2 {
    type F = Pair;
    type I = IntPair;
    type B = IntPair;
    type P = IntPair;

    const TILE_ROWS: usize = 4;
    const PANEL_PAIRS: bool = false;
    const ATTEND_TILE: (usize, usize) = (4, 1);
    const BF16_TILES: bool = cfg!(test);
    // Two products of full bytes overflow the 16 bits of `vpmaddubsw`; centred codes fit.
    const BYTE_BIAS: i32 = 128;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) {
        // SAFETY: `self` proves the features.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { Pair(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Pair {
        // SAFETY: `self` proves the features; the array is 32 readable bytes.
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(8).cast())),
            )
        }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], value: Pair) {
        // SAFETY: `self` proves the features; the array is 64 writable bytes.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value.1);
        }
    }
    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn select_less(self, x: Pair, bound: Pair, below: Pair, value: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            Pair(
                _mm256_blendv_ps(value.0, below.0, _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0)),
                _mm256_blendv_ps(value.1, below.1, _mm256_cmp_ps::<_CMP_LT_OQ>(x.1, bound.1)),
            )
        }
    }
    #[inline(always)]
    fn select(self, mask: u16, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_blendv_ps(b.0, a.0, lane_mask(mask)), _mm256_blendv_ps(b.1, a.1, lane_mask(mask >> 8))) }
    }
    #[inline(always)]
    fn power_of_two(self, shifted: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            let one = _mm256_set1_epi32(1.0f32.to_bits().cast_signed());
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted.1));
            Pair(_mm256_castsi256_ps(_mm256_add_epi32(low, one)), _mm256_castsi256_ps(_mm256_add_epi32(high, one)))
        }
    }
    #[inline(always)]
    fn sum(self, value: Pair) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { fold!(value, _mm256_add_ps, _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    fn max_lane(self, value: Pair) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { fold!(value, _mm256_max_ps, _mm_max_ps, _mm_max_ss) }
    }
    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a prefetch has no effect but on the cache.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(at).cast()) }
    }
    #[inline(always)]
    fn load_pairs(self, from: &[Bf16Pair; LANES]) -> IntPair {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { IntPair(_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())) }
    }
    #[inline(always)]
    fn splat_pair(self, pair: Bf16Pair) -> IntPair {
        self.splat_int(pair.bits().cast_signed())
    }
    #[inline(always)]
    fn dot2(self, acc: Pair, a: IntPair, b: IntPair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(dot2(acc.0, a.0, b.0), dot2(acc.1, a.1, b.1)) }
    }
    #[inline(always)]
    fn halves(self, pairs: IntPair) -> (Pair, Pair) {
        // SAFETY: `self` proves the features.
        unsafe {
            let upper = _mm256_set1_epi32(!0xffff);
            let even = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            let odd = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
            (Pair(even(pairs.0), even(pairs.1)), Pair(odd(pairs.0), odd(pairs.1)))
        }
    }
    #[inline(always)]
    fn round_pairs(self, value: Pair, to: &mut [Bf16Pair; LANES / 2]) {
        // SAFETY: `self` proves the features; the array is 32 writable bytes.
        unsafe {
            // Packing works within halves of the registers: their middle quarters have to change places.
            let packed = _mm256_packus_epi32(round_bf16(value.0), round_bf16(value.1));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    fn splat_int(self, value: i32) -> IntPair {
        // SAFETY: `self` proves the features.
        unsafe { IntPair(_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
    }
    #[inline(always)]
    fn to_float(self, value: IntPair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_cvtepi32_ps(value.0), _mm256_cvtepi32_ps(value.1)) }
    }
    #[inline(always)]
    fn load_codes(self, from: &[u8; 4 * LANES]) -> IntPair {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { IntPair(_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(32).cast())) }
    }
    #[inline(always)]
    fn store_codes(self, to: &mut [u8; 4 * LANES], codes: IntPair) {
        // SAFETY: `self` proves the features; the array is 64 writable bytes.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), codes.0);
            _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), codes.1);
        }
    }
    #[inline(always)]
    fn field(self, codes: IntPair, shift: u32, mask: u8) -> IntPair {
        // SAFETY: `self` proves the features.
        unsafe {
            let (shift, mask) = (_mm_cvtsi32_si128(shift.cast_signed()), _mm256_set1_epi8(mask.cast_signed()));
            let field = |codes| _mm256_and_si256(_mm256_srl_epi16(codes, shift), mask);
            IntPair(field(codes.0), field(codes.1))
        }
    }
    #[inline(always)]
    fn or_shifted(self, low: IntPair, high: IntPair, shift: u32) -> IntPair {
        // SAFETY: `self` proves the features.
        unsafe {
            let shift = _mm_cvtsi32_si128(shift.cast_signed());
            let or = |low, high| _mm256_or_si256(low, _mm256_sll_epi16(high, shift));
            IntPair(or(low.0, high.0), or(low.1, high.1))
        }
    }
    #[inline(always)]
    fn less(self, codes: IntPair, value: u8) -> IntPair {
        // SAFETY: `self` proves the features.
        unsafe {
            let value = _mm256_set1_epi8(value.cast_signed());
            IntPair(_mm256_sub_epi8(codes.0, value), _mm256_sub_epi8(codes.1, value))
        }
    }
    #[inline(always)]
    fn load_int(self, from: &[i32; LANES]) -> IntPair {
        // SAFETY: `self` proves the features; the array is 64 readable bytes.
        unsafe { IntPair(_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())) }
    }
    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Pair {
        // SAFETY: `self` proves the features; each half of the array is 8 readable bytes.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().add(8).cast()));
            Pair(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    fn dot4_small(self, acc: IntPair, codes: IntPair, x: [i8; 4]) -> IntPair {
        let x = i32::from_le_bytes(x.map(i8::cast_unsigned));
        // SAFETY: `self` proves the features. Two products are at most 2 * 63 * 127 = 16,002 and fit 16 bits.
        unsafe {
            let x = _mm256_set1_epi32(x);
            IntPair(dot4(acc.0, codes.0, x), dot4(acc.1, codes.1, x))
        }
    }
    #[inline(always)]
    fn dot4_bytes(self, acc: IntPair, codes: IntPair, x: [i8; 4]) -> IntPair {
        let x = i32::from_le_bytes(x.map(i8::cast_unsigned));
        // SAFETY: `self` proves the features. Two products are at most 2 * 128 * 127 = 32,512 and fit 16 bits.
        unsafe {
            let (x, centre) = (_mm256_set1_epi32(x), _mm256_set1_epi8(-128));
            let (low, high) = (_mm256_xor_si256(codes.0, centre), _mm256_xor_si256(codes.1, centre));
            IntPair(
                dot4(acc.0, _mm256_abs_epi8(low), _mm256_sign_epi8(x, low)),
                dot4(acc.1, _mm256_abs_epi8(high), _mm256_sign_epi8(x, high)),
            )
        }
    }
}
