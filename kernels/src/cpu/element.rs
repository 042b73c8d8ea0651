//! Float element types of panels and of the KV cache, read as f32.

use super::simd::{LANES, Simd};

/// Values that widen to f32 without loss.
pub(crate) trait Element: Copy + Send + Sync {
    /// Sixteen of them.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
    /// One of them.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F {
        s.load(from)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// bf16 bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Element for Bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Bf16; LANES]) -> S::F {
        s.load_bf16(&from.map(|bits| bits.0))
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// f16 bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(u16);

impl Element for F16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[F16; LANES]) -> S::F {
        s.load_f16(&from.map(|bits| bits.0))
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        half::f16::from_bits(self.0).to_f32()
    }
}

/// bf16 bits as elements.
pub(crate) fn as_bf16(bits: &[u16]) -> &[Bf16] {
    // SAFETY: `Bf16` is a transparent u16.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}

/// f16 bits as elements.
pub(crate) fn as_f16(bits: &[u16]) -> &[F16] {
    // SAFETY: `F16` is a transparent u16.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}
