//! Products of opened integer records with quantized rows.
//!
//! Per record of 32 in features the products of codes are summed exactly in i32; then one rounding per term, in the order
//! of the records: `acc = fma(scale_w * scale_x, dot, acc)`, and where there are minimums `acc = fma(min_w, offset_x, acc)`.
//! Which instruction made the exact sums cannot be seen in the result.

use super::amx::{A0, A1, B0, B1, C0, C1, TILE_ROW_BYTES, TileShapes, Tiles};
use super::expand::Group;
use super::quantize::{QuantTile, TILE_ROWS};
use super::record::{GROUP, VECTOR};
use super::simd::{LANES, Simd};

/// Scales per record of a layout with `HALVES` or without.
const fn parts(halves: bool) -> usize {
    if halves { 2 } else { 1 }
}

/// `acc` plus the dot products of one panel with the rows `first..first + R` of a tile of rows, record by record.
///
/// `BYTES`: codes take 8 bits, else at most 6. `HALVES` and `MIN` are those of the layout, `zero` its zero point.
#[inline(always)]
pub(super) fn dots<S: Simd, const R: usize, const HALVES: bool, const MIN: bool, const BYTES: bool>(
    s: S,
    groups: &[Group],
    tiles: &[QuantTile],
    first: usize,
    zero: i32,
    mut acc: [S::F; R],
) -> [S::F; R] {
    let bias = if BYTES { S::BYTE_BIAS } else { 0 };
    for (group, x) in groups.iter().zip(tiles) {
        for part in 0..parts(HALVES) {
            let sums = if HALVES { &x.half_sums[part] } else { &x.sums };
            let mut dots: [S::I; R] = std::array::from_fn(|r| s.splat_int((bias - zero) * sums[first + r]));
            for quad in if HALVES { part * 4..part * 4 + 4 } else { 0..GROUP / 4 } {
                let codes = s.load_codes(&group.codes[quad]);
                for r in 0..R {
                    let x = x.codes[first + r][quad];
                    dots[r] = if BYTES { s.dot4_bytes(dots[r], codes, x) } else { s.dot4_small(dots[r], codes, x) };
                }
            }
            let (scale, min) = (s.load(&group.scales[part]), s.load(&group.mins[part]));
            let offsets = if HALVES { &x.half_offsets[part] } else { &x.offsets };
            for r in 0..R {
                acc[r] = s.fma(s.mul(scale, s.splat(x.scales[first + r])), s.to_float(dots[r]), acc[r]);
                if MIN {
                    acc[r] = s.fma(min, s.splat(offsets[first + r]), acc[r]);
                }
            }
        }
    }
    acc
}

/// Exact sums of one step of a tile product: `[16 rows][16 out features]`.
#[repr(C, align(64))]
struct Sums([[i32; LANES]; TILE_ROWS]);

/// As [`dots`] with the codes of `groups` signed, for all rows of a tile of rows, by tile registers. Rows that hold no
/// activations give results without meaning.
#[inline(always)]
pub(super) fn tile_dots<S: Simd, T: Tiles, const HALVES: bool, const MIN: bool>(
    s: S,
    registers: &mut T,
    groups: &[Group],
    tiles: &[QuantTile],
    mut acc: [S::F; TILE_ROWS],
) -> [S::F; TILE_ROWS] {
    let steps = groups.len().min(tiles.len()) * parts(HALVES);
    let step = |step: usize| (&groups[step / parts(HALVES)], &tiles[step / parts(HALVES)], step % parts(HALVES));
    let mut sums = [const { Sums([[0; LANES]; TILE_ROWS]) }; 2];
    // The sums of a step are used while the unit works on the next one.
    for next in 0..steps {
        let (group, x, part) = step(next);
        if next % 2 == 0 {
            multiply::<T, C0, A0, B0>(registers, group, x, part, &mut sums[0]);
        } else {
            multiply::<T, C1, A1, B1>(registers, group, x, part, &mut sums[1]);
        }
        if next > 0 {
            let (group, x, part) = step(next - 1);
            scale_and_add::<S, HALVES, MIN>(s, &sums[(next - 1) % 2], group, x, part, &mut acc);
        }
    }
    if steps > 0 {
        let (group, x, part) = step(steps - 1);
        scale_and_add::<S, HALVES, MIN>(s, &sums[(steps - 1) % 2], group, x, part, &mut acc);
    }
    acc
}

/// The registers' shapes for [`tile_dots`].
pub(super) const fn tile_shapes(halves: bool) -> TileShapes {
    TileShapes::product(TILE_ROWS, GROUP / parts(halves))
}

#[inline(always)]
fn multiply<T: Tiles, const C: usize, const A: usize, const B: usize>(
    registers: &mut T,
    group: &Group,
    x: &QuantTile,
    part: usize,
    sums: &mut Sums,
) {
    let quad = part * GROUP / 8;
    registers.zero::<C>();
    // SAFETY: a tile has 16 rows of 32 codes, a group 8 rows of 64; both are read from the part's first quad on, as far as
    // the shapes go. The result is 16 rows of 64 bytes.
    unsafe {
        registers.load::<A>(x.codes.as_ptr().cast::<u8>().add(4 * quad), GROUP);
        registers.load::<B>(group.codes.as_ptr().cast::<u8>().add(VECTOR * quad), VECTOR);
        registers.dot_i8::<C, A, B>();
        registers.store::<C>(sums.0.as_mut_ptr().cast(), TILE_ROW_BYTES);
    }
}

#[inline(always)]
fn scale_and_add<S: Simd, const HALVES: bool, const MIN: bool>(
    s: S,
    sums: &Sums,
    group: &Group,
    x: &QuantTile,
    part: usize,
    acc: &mut [S::F; TILE_ROWS],
) {
    let (scale, min) = (s.load(&group.scales[part]), s.load(&group.mins[part]));
    let offsets = if HALVES { &x.half_offsets[part] } else { &x.offsets };
    for r in 0..TILE_ROWS {
        let dot = s.to_float(s.load_int(&sums.0[r]));
        acc[r] = s.fma(s.mul(scale, s.splat(x.scales[r])), dot, acc[r]);
        if MIN {
            acc[r] = s.fma(min, s.splat(offsets[r]), acc[r]);
        }
    }
}
