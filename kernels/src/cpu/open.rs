//! Opening the records of `record.rs`: codes as bytes, scales and minimums as f32, one type per kind of either.
//!
//! Products of few rows open records in registers, on the way from memory; tile products open them to memory
//! ([`expand`]), once for all rows.

use super::record::{Codes, Layout, Scales, VECTOR};
use super::simd::{LANES, Simd};
use crate::buffer::Plain;

/// A kind of codes.
pub(super) trait Planes {
    const CODES: Codes;
    /// Codes take 8 bits, else at most 6.
    const BYTES: bool = false;

    /// The codes of one quad, `[16 out features][4]`.
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B;
}

/// A kind of scales; `head` and `bytes` are those of the record.
pub(super) trait Affine {
    const SCALES: Scales;
    /// Scales per record.
    const PARTS: usize = 1;
    const MIN: bool = false;

    fn scale<S: Simd>(s: S, head: &[u8], bytes: &[u8], part: usize) -> S::F;

    /// Meaningless without `MIN`.
    #[inline(always)]
    fn min<S: Simd>(s: S, _head: &[u8], _bytes: &[u8], _part: usize) -> S::F {
        s.splat(0.0)
    }
}

#[inline(always)]
fn nibble<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
    s.field(s.load_codes(&planes[quad % 4]), if quad < 4 { 0 } else { 4 }, 15)
}

#[inline(always)]
fn pair<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
    s.field(s.load_codes(&planes[quad / 4]), 2 * (quad % 4) as u32, 3)
}

#[inline(always)]
fn bit<S: Simd>(s: S, plane: &[u8; VECTOR], quad: usize) -> S::B {
    s.field(s.load_codes(plane), quad as u32, 1)
}

pub(super) struct Two;
impl Planes for Two {
    const CODES: Codes = Codes::Two;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        pair(s, planes, quad)
    }
}

pub(super) struct Three;
impl Planes for Three {
    const CODES: Codes = Codes::Three;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        s.or_shifted(pair(s, planes, quad), bit(s, &planes[2], quad), 2)
    }
}

pub(super) struct Four;
impl Planes for Four {
    const CODES: Codes = Codes::Four;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        nibble(s, planes, quad)
    }
}

pub(super) struct Five;
impl Planes for Five {
    const CODES: Codes = Codes::Five;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        s.or_shifted(nibble(s, planes, quad), bit(s, &planes[4], quad), 4)
    }
}

pub(super) struct Six;
impl Planes for Six {
    const CODES: Codes = Codes::Six;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        s.or_shifted(nibble(s, planes, quad), pair(s, &planes[4..], quad), 4)
    }
}

pub(super) struct Eight;
impl Planes for Eight {
    const CODES: Codes = Codes::Eight;
    const BYTES: bool = true;

    #[inline(always)]
    fn quad<S: Simd>(s: S, planes: &[[u8; VECTOR]], quad: usize) -> S::B {
        s.load_codes(&planes[quad])
    }
}

pub(super) struct Half;
impl Affine for Half {
    const SCALES: Scales = Scales::Half;

    #[inline(always)]
    fn scale<S: Simd>(s: S, _: &[u8], bytes: &[u8], _: usize) -> S::F {
        halves(s, bytes, 0)
    }
}

pub(super) struct HalfMin;
impl Affine for HalfMin {
    const SCALES: Scales = Scales::HalfMin;
    const MIN: bool = true;

    #[inline(always)]
    fn scale<S: Simd>(s: S, _: &[u8], bytes: &[u8], _: usize) -> S::F {
        halves(s, bytes, 0)
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, _: &[u8], bytes: &[u8], _: usize) -> S::F {
        halves(s, bytes, 1)
    }
}

pub(super) struct Halves;
impl Affine for Halves {
    const SCALES: Scales = Scales::Halves;
    const PARTS: usize = 2;

    #[inline(always)]
    fn scale<S: Simd>(s: S, head: &[u8], bytes: &[u8], part: usize) -> S::F {
        s.mul(halves(s, head, 0), s.load_i8(sixteen(bytes, part)))
    }
}

pub(super) struct UnitsMin;
impl Affine for UnitsMin {
    const SCALES: Scales = Scales::UnitsMin;
    const MIN: bool = true;

    #[inline(always)]
    fn scale<S: Simd>(s: S, head: &[u8], bytes: &[u8], _: usize) -> S::F {
        s.mul(halves(s, head, 0), s.load_i8(sixteen(bytes, 0)))
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, head: &[u8], bytes: &[u8], _: usize) -> S::F {
        s.mul(halves(s, head, 1), s.load_i8(sixteen(bytes, 1)))
    }
}

pub(super) struct HalvesMin;
impl Affine for HalvesMin {
    const SCALES: Scales = Scales::HalvesMin;
    const PARTS: usize = 2;
    const MIN: bool = true;

    #[inline(always)]
    fn scale<S: Simd>(s: S, head: &[u8], bytes: &[u8], part: usize) -> S::F {
        s.mul(halves(s, head, 0), s.load_i8(&nibbles(sixteen(bytes, part), 0)))
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, head: &[u8], bytes: &[u8], part: usize) -> S::F {
        s.mul(halves(s, head, 1), s.load_i8(&nibbles(sixteen(bytes, part), 4)))
    }
}

// Plain loops below: closures over arrays are compiled without the level's instructions where they are not inlined.

/// Sixteen f16 after `at` times as many.
#[inline(always)]
fn halves<S: Simd>(s: S, bytes: &[u8], at: usize) -> S::F {
    let mut bits = [0; LANES];
    for (bits, bytes) in bits.iter_mut().zip(bytes[at * 2 * LANES..][..2 * LANES].as_chunks::<2>().0) {
        *bits = u16::from_ne_bytes(*bytes);
    }
    s.load_f16(&bits)
}

#[inline(always)]
fn sixteen(bytes: &[u8], at: usize) -> &[u8; LANES] {
    bytes[at * LANES..][..LANES].try_into().expect("16 bytes")
}

#[inline(always)]
fn nibbles(bytes: &[u8; LANES], shift: u32) -> [u8; LANES] {
    let mut out = *bytes;
    for byte in &mut out {
        *byte = *byte >> shift & 15;
    }
    out
}

/// Evaluates `$body` with the types `$planes` and `$affine` of a layout.
macro_rules! with_kinds {
    ($layout:expr, |$planes:ident, $affine:ident| $body:expr) => {{
        use crate::cpu::open;
        use crate::cpu::record::{Codes, Scales};
        macro_rules! kinds {
            ($p:ident, $a:ident) => {{
                type $planes = open::$p;
                type $affine = open::$a;
                $body
            }};
        }
        match ($layout.codes, $layout.scales) {
            (Codes::Four, Scales::Half) => kinds!(Four, Half),
            (Codes::Four, Scales::HalfMin) => kinds!(Four, HalfMin),
            (Codes::Four, Scales::UnitsMin) => kinds!(Four, UnitsMin),
            (Codes::Five, Scales::Half) => kinds!(Five, Half),
            (Codes::Five, Scales::HalfMin) => kinds!(Five, HalfMin),
            (Codes::Five, Scales::UnitsMin) => kinds!(Five, UnitsMin),
            (Codes::Eight, Scales::Half) => kinds!(Eight, Half),
            (Codes::Two, Scales::HalvesMin) => kinds!(Two, HalvesMin),
            (Codes::Three, Scales::Halves) => kinds!(Three, Halves),
            (Codes::Six, Scales::Halves) => kinds!(Six, Halves),
            _ => unreachable!("no format has the layout {:?}", $layout),
        }
    }};
}
pub(super) use with_kinds;

/// One record, opened for tile products.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Group {
    /// `[8 quads][16 out features][4]`, i8, less the zero point.
    pub(super) codes: [[u8; VECTOR]; 8],
    /// The second of each for layouts with two scales per record.
    pub(super) scales: [[f32; LANES]; 2],
    pub(super) mins: [[f32; LANES]; 2],
}

// SAFETY: 768 bytes of integers and floats without padding.
unsafe impl Plain for Group {}

/// Opens the records of a panel from number `first` on, as many as there is room for.
#[inline(always)]
pub(super) fn expand<S: Simd, P: Planes, A: Affine>(s: S, zero: i32, panel: &[u8], first: usize, to: &mut [Group]) {
    let layout = Layout { codes: P::CODES, scales: A::SCALES, zero };
    for ((head, record), to) in layout.records(panel).skip(first).zip(to) {
        let (planes, scales) = record.split_at(layout.code_bytes());
        let planes = planes.as_chunks().0;
        for (quad, codes) in to.codes.iter_mut().enumerate() {
            s.store_codes(codes, s.less(P::quad(s, planes, quad), zero as u8));
        }
        for part in 0..A::PARTS {
            s.store(&mut to.scales[part], A::scale(s, head, scales, part));
            if A::MIN {
                s.store(&mut to.mins[part], A::min(s, head, scales, part));
            }
        }
    }
}
