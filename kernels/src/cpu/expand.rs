//! Records of integer panels, opened up: one form for all formats, which the products read.
//!
//! A record is opened once per product and then used by all rows, so that the bits of a format cost a product of many rows
//! nothing, and one of few rows a handful of cycles per record beside the read from memory. Opened records stay in the
//! first-level cache: [`CHUNK`] at a time.

use super::record::{Codes, Layout, Scales, VECTOR};
use super::simd::{Kernel, LANES, Simd};
use crate::buffer::Plain;

/// Records opened at a time.
pub(super) const CHUNK: usize = 32;

/// One record, opened.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Group {
    /// `[8 quads][16 out features][4]`; u8, or i8 less the zero point (for tiles).
    pub(super) codes: [[u8; VECTOR]; 8],
    /// The second of each for layouts with two scales per record.
    pub(super) scales: [[f32; LANES]; 2],
    pub(super) mins: [[f32; LANES]; 2],
}

// SAFETY: 768 bytes of integers and floats without padding.
unsafe impl Plain for Group {}

/// Opens the records `first..first + to.len()` of a panel.
pub(super) struct Expand<'a> {
    pub(super) layout: Layout,
    pub(super) panel: &'a [u8],
    pub(super) first: usize,
    /// Codes less the zero point.
    pub(super) signed: bool,
    pub(super) to: &'a mut [Group],
}

impl Kernel for Expand<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Expand { layout, panel, first, signed, to } = self;
        for (record, to) in (first..).zip(to) {
            let (head, record) = layout.record(panel, record);
            let (planes, scales) = record.split_at(layout.code_bytes());
            expand_codes(s, layout.codes, planes.as_chunks().0, &mut to.codes);
            if signed && layout.zero != 0 {
                for codes in &mut to.codes {
                    s.store_codes(codes, s.less(s.load_codes(codes), layout.zero as u8));
                }
            }
            expand_scales(s, layout.scales, head, scales, to);
        }
    }
}

#[inline(always)]
fn expand_codes<S: Simd>(s: S, codes: Codes, planes: &[[u8; VECTOR]], to: &mut [[u8; VECTOR]; 8]) {
    match codes {
        Codes::Eight => to.copy_from_slice(planes),
        Codes::Four => put(s, to, |quad| nibble(s, planes, quad)),
        Codes::Five => put(s, to, |quad| s.or_shifted(nibble(s, planes, quad), bit(s, &planes[4], quad), 4)),
        Codes::Six => put(s, to, |quad| s.or_shifted(nibble(s, planes, quad), pair(s, &planes[4..], quad), 4)),
        Codes::Two => put(s, to, |quad| pair(s, planes, quad)),
        Codes::Three => put(s, to, |quad| s.or_shifted(pair(s, planes, quad), bit(s, &planes[2], quad), 2)),
    }
}

#[inline(always)]
fn put<S: Simd>(s: S, to: &mut [[u8; VECTOR]; 8], codes: impl Fn(usize) -> S::B) {
    for (quad, to) in to.iter_mut().enumerate() {
        s.store_codes(to, codes(quad));
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

#[inline(always)]
fn expand_scales<S: Simd>(s: S, scales: Scales, head: &[u8], bytes: &[u8], to: &mut Group) {
    // Sixteen of f16 are 32 bytes, of i8 16.
    let [unit, min_unit] = [0, 1].map(|at| if head.len() > 32 * at { halves_at(s, head, at) } else { s.splat(1.0) });
    match scales {
        Scales::Half => s.store(&mut to.scales[0], halves_at(s, bytes, 0)),
        Scales::HalfMin => {
            s.store(&mut to.scales[0], halves_at(s, bytes, 0));
            s.store(&mut to.mins[0], halves_at(s, bytes, 1));
        }
        Scales::Halves => {
            for half in 0..2 {
                s.store(&mut to.scales[half], s.mul(unit, s.load_i8(sixteen(bytes, half))));
            }
        }
        Scales::UnitsMin => {
            s.store(&mut to.scales[0], s.mul(unit, s.load_i8(sixteen(bytes, 0))));
            s.store(&mut to.mins[0], s.mul(min_unit, s.load_i8(sixteen(bytes, 1))));
        }
        Scales::HalvesMin => {
            for half in 0..2 {
                let both = sixteen(bytes, half);
                s.store(&mut to.scales[half], s.mul(unit, s.load_i8(&both.map(|both| both & 15))));
                s.store(&mut to.mins[half], s.mul(min_unit, s.load_i8(&both.map(|both| both >> 4))));
            }
        }
    }
}

#[inline(always)]
fn halves_at<S: Simd>(s: S, bytes: &[u8], at: usize) -> S::F {
    let halves: &[[u8; 2]; LANES] = bytes[at * 2 * LANES..][..2 * LANES].as_chunks().0.try_into().expect("16 halves");
    s.load_f16(&halves.map(u16::from_ne_bytes))
}

#[inline(always)]
fn sixteen(bytes: &[u8], at: usize) -> &[u8; LANES] {
    bytes[at * LANES..][..LANES].try_into().expect("16 bytes")
}
