//! Sixteen lanes at every instruction-set level.
//!
//! A kernel is written once, over [`Simd`], and compiled per level by [`dispatch`]. The three levels give the same bits
//! because each method means the same IEEE operation in each lane, and because the only operations across lanes
//! ([`Simd::sum`], [`Simd::max_lane`]) go through one fixed tree. Integer products are exact.
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

    /// Rows of activations that a matrix-product tile keeps in registers.
    const TILE_ROWS: usize;
    /// Whether a float tile is two panels wide.
    const PANEL_PAIRS: bool;
    /// What [`dot4_bytes`](Self::dot4_bytes) subtracts from each code.
    const BYTE_BIAS: i32;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F;
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

    /// Asks for the cache line of `at` to be brought near; any address will do.
    #[inline(always)]
    fn prefetch<T>(self, _at: &T) {}

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

    /// The first lanes from a short slice, zeros after.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first lanes to a short slice.
    #[inline(always)]
    fn store_partial(self, to: &mut [f32], value: Self::F) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, value);
        to.copy_from_slice(&lanes[..to.len()]);
    }
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
pub(crate) fn tile_unit(isa: CpuIsa) -> TileUnit {
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Amx => TileUnit::Hardware,
        _ => TileUnit::None,
    }
}

/// Runs the kernel at a level, which the device has checked against [`best_isa`] when it was made.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: CpuIsa, kernel: K) {
    match isa {
        CpuIsa::Scalar => kernel.run(scalar::Scalar),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a device has a level only where `best_isa` found its features.
        CpuIsa::Avx2 => unsafe { avx2::run(kernel) },
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
