//! Tiles of matrix products with integer panels.
//!
//! Per record of 32 in features the products of codes are summed exactly in i32; then one rounding per term, in the order
//! of the records: `acc = fma(scale_w * scale_x, dot, acc)`, and where there are minimums `acc = fma(min_w, offset_x, acc)`.
//! Which instruction made the exact sums cannot be seen in the result.

use super::panel::{GROUP, QuantLayout};
use super::quantize::QuantGroup;
use super::simd::{LANES, Simd};

/// The dot products of one panel with `R` quantized rows of `panel.len() / record_bytes` groups each.
///
/// The four constants are those of [`QuantLayout`], which they must agree with.
#[inline(always)]
fn tile<S: Simd, const R: usize, const NIBBLES: bool, const WIDE: bool, const MIN: bool, const HALVES: bool>(
    s: S,
    panel: &[u8],
    rows: [&[QuantGroup]; R],
    zero: i32,
) -> [S::F; R] {
    let layout = QuantLayout { nibbles: NIBBLES, wide: WIDE, min: MIN, halves: HALVES, zero };
    let bias = if NIBBLES { 0 } else { S::BYTE_BIAS };
    let scale_stride = LANES * if WIDE { 4 } else { 2 };
    let mut acc = [s.splat(0.0); R];
    for (group, record) in panel.chunks_exact(layout.record_bytes()).enumerate() {
        let x: [&QuantGroup; R] = std::array::from_fn(|r| &rows[r][group]);
        let (codes, affine) = record.split_at(layout.code_bytes());
        let vectors = codes.as_chunks::<{ 4 * LANES }>().0;
        for half in 0..if HALVES { 2 } else { 1 } {
            let mut dots: [S::I; R] = std::array::from_fn(|r| {
                s.splat_int((bias - zero) * if HALVES { x[r].half_sums[half] } else { x[r].sum })
            });
            if NIBBLES {
                for (quad, vector) in vectors.iter().enumerate() {
                    let bytes = s.load_codes(vector);
                    let (low, high) = (s.low_nibbles(bytes), s.high_nibbles(bytes));
                    for r in 0..R {
                        dots[r] = s.dot4_nibbles(dots[r], low, x[r].codes[quad]);
                        dots[r] = s.dot4_nibbles(dots[r], high, x[r].codes[quad + 4]);
                    }
                }
            } else {
                let quads = if HALVES { half * 4..half * 4 + 4 } else { 0..GROUP / 4 };
                for quad in quads {
                    let bytes = s.load_codes(&vectors[quad]);
                    for r in 0..R {
                        dots[r] = s.dot4_bytes(dots[r], bytes, x[r].codes[quad]);
                    }
                }
            }
            let scale = load_scales::<S, WIDE>(s, &affine[half * scale_stride..]);
            for r in 0..R {
                acc[r] = s.fma(s.mul(scale, s.splat(x[r].scale)), s.to_float(dots[r]), acc[r]);
            }
            if MIN {
                let min = load_scales::<S, WIDE>(s, &affine[layout.scale_bytes() + half * scale_stride..]);
                for r in 0..R {
                    let offset = if HALVES { x[r].half_offsets[half] } else { x[r].offset };
                    acc[r] = s.fma(min, s.splat(offset), acc[r]);
                }
            }
        }
    }
    acc
}

/// 16 scales from the start of `bytes`.
#[inline(always)]
fn load_scales<S: Simd, const WIDE: bool>(s: S, bytes: &[u8]) -> S::F {
    if WIDE {
        let bytes: &[[u8; 4]; LANES] = bytes[..4 * LANES].as_chunks().0.try_into().expect("16 scales");
        s.load(&bytes.map(f32::from_ne_bytes))
    } else {
        let bytes: &[[u8; 2]; LANES] = bytes[..2 * LANES].as_chunks().0.try_into().expect("16 scales");
        s.load_f16(&bytes.map(u16::from_ne_bytes))
    }
}

/// [`tile`] with the constants of `layout`, one of those that [`QuantLayout::of`] gives.
#[inline(always)]
pub(super) fn dots<S: Simd, const R: usize>(
    s: S,
    layout: QuantLayout,
    panel: &[u8],
    rows: [&[QuantGroup]; R],
) -> [S::F; R] {
    let QuantLayout { nibbles, wide, min, halves, zero } = layout;
    match (nibbles, wide, min, halves) {
        (true, false, false, false) => tile::<S, R, true, false, false, false>(s, panel, rows, zero),
        (true, false, true, false) => tile::<S, R, true, false, true, false>(s, panel, rows, zero),
        (true, true, true, false) => tile::<S, R, true, true, true, false>(s, panel, rows, zero),
        (false, false, false, false) => tile::<S, R, false, false, false, false>(s, panel, rows, zero),
        (false, false, true, false) => tile::<S, R, false, false, true, false>(s, panel, rows, zero),
        (false, true, true, false) => tile::<S, R, false, true, true, false>(s, panel, rows, zero),
        (false, true, true, true) => tile::<S, R, false, true, true, true>(s, panel, rows, zero),
        (false, true, false, true) => tile::<S, R, false, true, false, true>(s, panel, rows, zero),
        _ => unreachable!("no format has the layout {layout:?}"),
    }
}
