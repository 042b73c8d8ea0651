//! What float products are made of: cells of K, V and activations, and the elements of float panels.

use super::pair::Pair;
use super::simd::{LANES, Simd};
use crate::buffer::Plain;

/// What a lane multiplies at a time: one f32, or a pair of bf16.
pub(crate) trait Cell: Plain {
    /// Values in a cell.
    const VALUES: usize;
    /// Sixteen cells.
    type Vector<S: Simd>: Copy;

    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> Self::Vector<S>;
    /// One cell in all lanes.
    fn splat<S: Simd>(s: S, cell: Self) -> Self::Vector<S>;
    /// `acc` plus the products of a lane's values, the last value first, each rounded once.
    fn dot<S: Simd>(s: S, a: Self::Vector<S>, b: Self::Vector<S>, acc: S::F) -> S::F;
    /// Sixteen values, rounded, as `16 / VALUES` cells.
    fn round<S: Simd>(s: S, values: S::F, to: &mut [Self]);
    /// Up to `VALUES` values, rounded; missing ones are zero.
    fn of(values: &[f32]) -> Self;
    /// Value number `at`.
    fn get(self, at: usize) -> f32;
    /// With value number `at` replaced.
    fn with(self, at: usize, value: f32) -> Self;
    /// Only the values whose bit is set in `mask`, zeros for the others.
    fn only(self, mask: u32) -> Self;
}

impl Cell for f32 {
    const VALUES: usize = 1;
    type Vector<S: Simd> = S::F;

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F {
        s.load(from)
    }
    #[inline(always)]
    fn splat<S: Simd>(s: S, cell: f32) -> S::F {
        s.splat(cell)
    }
    #[inline(always)]
    fn dot<S: Simd>(s: S, a: S::F, b: S::F, acc: S::F) -> S::F {
        s.fma(a, b, acc)
    }
    #[inline(always)]
    fn round<S: Simd>(s: S, values: S::F, to: &mut [f32]) {
        s.store(to.as_mut_array().expect("16 cells"), values);
    }
    #[inline(always)]
    fn of(values: &[f32]) -> f32 {
        values[0]
    }
    #[inline(always)]
    fn get(self, _: usize) -> f32 {
        self
    }
    #[inline(always)]
    fn with(self, _: usize, value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn only(self, mask: u32) -> f32 {
        if mask & 1 == 1 { self } else { 0.0 }
    }
}

impl Cell for Pair {
    const VALUES: usize = 2;
    type Vector<S: Simd> = S::P;

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Pair; LANES]) -> S::P {
        s.load_pairs(from)
    }
    #[inline(always)]
    fn splat<S: Simd>(s: S, cell: Pair) -> S::P {
        s.splat_pair(cell)
    }
    #[inline(always)]
    fn dot<S: Simd>(s: S, a: S::P, b: S::P, acc: S::F) -> S::F {
        s.dot2(acc, a, b)
    }
    #[inline(always)]
    fn round<S: Simd>(s: S, values: S::F, to: &mut [Pair]) {
        s.round_pairs(values, to.as_mut_array().expect("8 cells"));
    }
    #[inline(always)]
    fn of(values: &[f32]) -> Pair {
        Pair::new(values[0], values.get(1).copied().unwrap_or(0.0))
    }
    #[inline(always)]
    fn get(self, at: usize) -> f32 {
        if at == 0 { self.even() } else { self.odd() }
    }
    #[inline(always)]
    fn with(self, at: usize, value: f32) -> Pair {
        Pair::with(self, at, value)
    }
    #[inline(always)]
    fn only(self, mask: u32) -> Pair {
        Pair::only(self, mask)
    }
}

/// Elements of float panels, each multiplied by a cell of activations.
pub(crate) trait Element: Copy + Send + Sync {
    type Cell: Cell;
    /// Sixteen of them, widened where that is needed.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> <Self::Cell as Cell>::Vector<S>;
}

impl<C: Cell> Element for C {
    type Cell = C;
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[C; LANES]) -> C::Vector<S> {
        C::load(s, from)
    }
}

/// f16 bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(u16);

impl Element for F16 {
    type Cell = f32;
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[F16; LANES]) -> S::F {
        s.load_f16(&from.map(|bits| bits.0))
    }
}

/// f16 bits as elements.
pub(crate) fn as_f16(bits: &[u16]) -> &[F16] {
    // SAFETY: `F16` is a transparent u16.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}
