//! Pairs of bf16: what a lane of a bf16 product takes at a time.

use crate::buffer::Plain;

/// Two neighbours as bf16 bits, the even one in the lower half: 32 bits in a processor's own order, as
/// `vdpbf16ps` and `tdpbf16ps` read them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Pair(u32);

// SAFETY: a transparent u32.
unsafe impl Plain for Pair {}

impl Pair {
    /// Both values rounded.
    #[inline(always)]
    pub(crate) fn new(even: f32, odd: f32) -> Self {
        Pair(round(even) | round(odd) << 16)
    }

    #[inline(always)]
    pub(crate) fn even(self) -> f32 {
        f32::from_bits(self.0 << 16)
    }

    #[inline(always)]
    pub(crate) fn odd(self) -> f32 {
        f32::from_bits(self.0 & 0xffff_0000)
    }

    #[inline(always)]
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// Whether neither value is infinite or a NaN.
    #[inline(always)]
    pub(crate) fn is_finite(self) -> bool {
        // An exponent of ones carries into the place of the sign.
        ((self.0 & 0x7f80_7f80) + 0x0080_0080) & 0x8000_8000 == 0
    }

    /// With the even (0) or the odd (1) value replaced by a rounded one.
    #[inline(always)]
    pub(crate) fn with(self, at: usize, value: f32) -> Self {
        let shift = 16 * at;
        Pair(self.0 & !(0xffff << shift) | round(value) << shift)
    }

    /// Only the values whose bit is set in `mask` (1: even, 2: odd), the other one zero.
    #[inline(always)]
    pub(crate) fn only(self, mask: u32) -> Self {
        let halves = [0, 0xffff, 0xffff_0000, 0xffff_ffff];
        Pair(self.0 & halves[mask as usize & 3])
    }
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bits >> 16 | 0x40 } else { nearest }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounds_as_half_does() {
        let mut bits = 1u32;
        for i in 0..2_000_000u32 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Ties too: every fourth number lies halfway.
            let value = f32::from_bits(if i % 4 == 0 { bits & 0xffff_0000 | 0x8000 } else { bits });
            let (found, expected) = (Pair::new(value, -value), bf16::from_f32(value).to_f32());
            assert!(found.even() == expected && found.odd() == -expected || value.is_nan() && found.even().is_nan());
        }
        for value in [f32::INFINITY, f32::MAX, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            assert_eq!(Pair::new(value, 0.0).even().is_nan(), value.is_nan(), "{value}");
        }
    }

    #[test]
    fn halves_are_replaced_and_dropped() {
        let pair = Pair::new(1.5, -2.0);
        assert_eq!((pair.even(), pair.odd()), (1.5, -2.0));
        for odd in [1.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let finite = Pair::new(odd, 0.0).odd().is_finite() && Pair::new(odd, 0.0).even().is_finite();
            let pairs = [Pair::new(odd, -1.0), Pair::new(-3e38, odd), Pair::new(odd, odd)];
            assert!(pairs.iter().all(|pair| pair.is_finite() == finite), "{odd}");
        }
        assert_eq!((pair.with(0, 3.0), pair.with(1, 3.0)), (Pair::new(3.0, -2.0), Pair::new(1.5, 3.0)));
        assert_eq!((pair.only(1), pair.only(2), pair.only(3)), (Pair::new(1.5, 0.0), Pair::new(0.0, -2.0), pair));
    }
}
