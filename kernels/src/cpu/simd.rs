//! Sixteen lanes at every instruction-set level.
//!
//! A kernel is written once, over [`Simd`], and compiled per level by [`dispatch`]. All levels give the same bits because
//! each method means the same IEEE operation in each lane, and because the only operations across lanes ([`Simd::sum`],
//! [`Simd::max_lane`]) go through one fixed tree. Integer products are exact. The one exception: the instructions of
//! AVX512-BF16 take and give zero for subnormal numbers in [`Simd::dot2`] and [`Simd::round_pairs`].
//! [`Simd::dot2_apart`] does so at every level.
//!
//! A value of a level's type is the proof that the machine has it: only [`dispatch`], behind the detection in
//! [`best_isa`], makes one. That is why the methods are safe.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use super::amx::TileUnit;
#[cfg(target_arch = "x86_64")]
use super::amx::hardware;
use super::pair::Pair;
use crate::CpuIsa;

/// Lanes of a vector: values of [`Simd::F`] and [`Simd::I`].
pub(crate) const LANES: usize = 16;

/// The operations of one level.
pub(crate) trait Simd: Copy {
    /// 16 x f32.
    type F: Copy;
    /// 16 x i32.
    type I: Copy;
    /// 64 x u8: four consecutive codes per lane.
    type B: Copy;
    /// 16 pairs of bf16.
    type P: Copy;

    /// Rows of activations that a matrix-product tile keeps in registers.
    const TILE_ROWS: usize;
    /// Whether a float tile is two panels wide.
    const PANEL_PAIRS: bool;
    /// Query vectors, and vectors of positions or of output values, that a tile of attention keeps in registers.
    const ATTEND_TILE: (usize, usize);
    /// Whether a device may have tile registers for bf16 beside these vectors; kernels for them are compiled at no other level.
    const BF16_TILES: bool;
    /// What [`dot4_bytes`](Self::dot4_bytes) subtracts from each code.
    const BYTE_BIAS: i32;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    fn load_f16(self, from: &[u16; LANES]) -> Self::F;
    fn store(self, to: &mut [f32; LANES], value: Self::F);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`, so `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if x < bound { below } else { value }`.
    fn select_less(self, x: Self::F, bound: Self::F, below: Self::F, value: Self::F) -> Self::F;
    /// Lane `i` of `a` where bit `i` of `mask` is set, else of `b`.
    fn select(self, mask: u16, a: Self::F, b: Self::F) -> Self::F;
    /// `2^n` from `n + 1.5 * 2^23`, for `n` in -126..=127.
    fn power_of_two(self, shifted: Self::F) -> Self::F;
    /// Lanes `i` and `i + 8`, then `i + 4`, then `i + 2`, then `i + 1`.
    fn sum(self, value: Self::F) -> f32;
    /// The maximum over the same tree as [`sum`](Self::sum).
    fn max_lane(self, value: Self::F) -> f32;

    /// Runs the kernel as a function of its own: its loops then have all registers to themselves.
    fn outlined<K: Kernel>(self, kernel: K);

    /// Asks for the cache line of `at` to be brought near; any address will do.
    #[inline(always)]
    fn prefetch<T>(self, _at: &T) {}

    fn load_pairs(self, from: &[Pair; LANES]) -> Self::P;
    fn splat_pair(self, pair: Pair) -> Self::P;
    /// Per lane `fma(a.odd, b.odd, acc)`, then `fma(a.even, b.even, that)`: the order of `vdpbf16ps`.
    fn dot2(self, acc: Self::F, a: Self::P, b: Self::P) -> Self::F;
    /// The even values and the odd ones.
    fn halves(self, pairs: Self::P) -> (Self::F, Self::F);
    /// Neighbouring lanes rounded to bf16, ties to even, as pairs.
    fn round_pairs(self, value: Self::F, to: &mut [Pair; LANES / 2]);

    fn splat_int(self, value: i32) -> Self::I;
    fn load_int(self, from: &[i32; LANES]) -> Self::I;
    /// Sixteen i8, given as their bytes.
    fn load_i8(self, from: &[u8; LANES]) -> Self::F;
    fn to_float(self, value: Self::I) -> Self::F;
    fn load_codes(self, from: &[u8; 4 * LANES]) -> Self::B;
    fn store_codes(self, to: &mut [u8; 4 * LANES], codes: Self::B);
    /// Per byte `code >> shift & mask`, for masks that leave no bit of a neighbour.
    fn field(self, codes: Self::B, shift: u32, mask: u8) -> Self::B;
    /// Per byte `low | high << shift`, where no bit leaves its byte.
    fn or_shifted(self, low: Self::B, high: Self::B, shift: u32) -> Self::B;
    /// Per byte `code - value`, wrapping.
    fn less(self, codes: Self::B, value: u8) -> Self::B;
    /// Per lane `acc + sum of code[j] * x[j]` over its four codes, each below 64; `x` is in -127..=127.
    fn dot4_small(self, acc: Self::I, codes: Self::B, x: [i8; 4]) -> Self::I;
    /// Per lane `acc + sum of (code[j] - BYTE_BIAS) * x[j]` over its four codes; `x` is in -127..=127.
    fn dot4_bytes(self, acc: Self::I, codes: Self::B, x: [i8; 4]) -> Self::I;

    /// Zero in place of subnormal numbers, of either sign.
    #[inline(always)]
    fn flushed(self, value: Self::F) -> Self::F {
        let small = self.select_less(self.splat(-f32::MIN_POSITIVE), value, self.splat(0.0), value);
        self.select_less(value, self.splat(f32::MIN_POSITIVE), small, value)
    }

    /// Per lane `fma(a.even, b.even, sums.0)` and `fma(a.odd, b.odd, sums.1)`, the two chains of `tdpbf16ps`: subnormal
    /// numbers are taken and given as zero. The signs of zeros are not specified.
    #[inline(always)]
    fn dot2_apart(self, sums: (Self::F, Self::F), a: Self::P, b: Self::P) -> (Self::F, Self::F) {
        apart_by_halves(self, sums, a, b)
    }

    /// The first lanes from a slice of at most 16, zeros after.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F {
        if let Some(from) = from.as_array() {
            return self.load(from);
        }
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first lanes to a slice of at most 16.
    #[inline(always)]
    fn store_partial(self, to: &mut [f32], value: Self::F) {
        if let Some(to) = to.as_mut_array() {
            return self.store(to, value);
        }
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, value);
        to.copy_from_slice(&lanes[..to.len()]);
    }
}

/// [`Simd::dot2_apart`] where no instruction flushes subnormal numbers by itself.
#[inline(always)]
fn apart_by_halves<S: Simd>(s: S, sums: (S::F, S::F), a: S::P, b: S::P) -> (S::F, S::F) {
    let ((a_even, a_odd), (b_even, b_odd)) = (s.halves(a), s.halves(b));
    let even = s.fma(s.flushed(a_even), s.flushed(b_even), sums.0);
    let odd = s.fma(s.flushed(a_odd), s.flushed(b_odd), sums.1);
    (s.flushed(even), s.flushed(odd))
}

/// Work that is compiled once per level. `run` must be `#[inline(always)]`, so that it takes on the features of its caller.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, s: S);
}

/// The best level of this machine.
pub(crate) fn best_isa() -> CpuIsa {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        if avx2 && avx512 {
            return if hardware::available() { CpuIsa::Amx } else { CpuIsa::Avx512 };
        }
        if avx2 {
            return CpuIsa::Avx2;
        }
    }
    CpuIsa::Scalar
}

/// The tile registers of a level, which the device has checked against [`best_isa`].
pub(crate) fn tile_unit(level: CpuIsa) -> TileUnit {
    match level {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Amx => TileUnit::Hardware,
        _ => TileUnit::None,
    }
}

/// What a device runs on: a level, and within it what only some of its machines have.
#[derive(Clone, Copy)]
pub(crate) struct Isa {
    pub(crate) level: CpuIsa,
    /// The bf16 instructions of AVX-512.
    bf16: bool,
}

impl Isa {
    /// A level that [`best_isa`] reaches, with the machine's bf16 instructions if they are wanted.
    pub(crate) fn new(level: CpuIsa, bf16: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        let bf16 = bf16 && level >= CpuIsa::Avx512 && is_x86_feature_detected!("avx512bf16");
        Isa { level, bf16 }
    }
}

/// Runs the kernel at a level, which the device has checked against [`best_isa`] when it was made.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    match isa.level {
        CpuIsa::Scalar => kernel.run(scalar::Scalar),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a device has a level only where `best_isa` found its features.
        CpuIsa::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above, and `Isa::new` found the bf16 instructions.
        CpuIsa::Avx512 | CpuIsa::Amx if isa.bf16 => unsafe { avx512::run_bf16(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        CpuIsa::Avx512 | CpuIsa::Amx => unsafe { avx512::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        CpuIsa::Avx2 | CpuIsa::Avx512 | CpuIsa::Amx => unreachable!("a device has only levels of its machine"),
    }
}

/// Runs a body over tiles of rows that cover `0..$count`: `$row` is a tile's first row and the constant `$tile_rows` its
/// number of rows, 8, 4, 2 or 1 and at most `$s::TILE_ROWS`.
macro_rules! for_row_tiles {
    ($s:ident, $count:expr, |$row:ident, $tile_rows:ident| $body:expr) => {{
        let mut $row = 0;
        while $row < $count {
            let left = $count - $row;
            if $s::TILE_ROWS >= 8 && left >= 8 {
                const $tile_rows: usize = 8;
                $body;
                $row += 8;
            } else if $s::TILE_ROWS >= 4 && left >= 4 {
                const $tile_rows: usize = 4;
                $body;
                $row += 4;
            } else if $s::TILE_ROWS >= 2 && left >= 2 {
                const $tile_rows: usize = 2;
                $body;
                $row += 2;
            } else {
                const $tile_rows: usize = 1;
                $body;
                $row += 1;
            }
        }
    }};
}
pub(crate) use for_row_tiles;
