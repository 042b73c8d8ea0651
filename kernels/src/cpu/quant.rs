//! Products of integer panels with quantized rows.
//!
//! Per record of 32 in features the products of codes are summed exactly in i32; then one rounding per term, in the order
//! of the records: `acc = fma(scale_w * scale_x, dot, acc)`, and where there are minimums `acc = fma(min_w, offset_x, acc)`.
//! Which instruction made the exact sums cannot be seen in the result.

use super::amx::{A0, A1, B0, B1, C0, C1, TILE_ROW_BYTES, TileShapes, Tiles};
use super::open::{Affine, Group, Planes};
use super::quantize::{QuantGroup, QuantTile, TILE_ROWS};
use super::record::{GROUP, Layout, VECTOR};
use super::simd::{LANES, Simd};

/// The dot products of one panel with the rows `first..first + R` of a tile of rows, records opened in registers.
#[inline(always)]
pub(super) fn dots<S: Simd, P: Planes, A: Affine, const R: usize>(
    s: S,
    layout: Layout,
    panel: &[u8],
    x: QuantTile<'_>,
    first: usize,
) -> [S::F; R] {
    assert!(first + R <= TILE_ROWS, "rows of one tile");
    // The same layout, of which the compiler knows the sizes.
    let layout = Layout { codes: P::CODES, scales: A::SCALES, zero: layout.zero };
    let mut acc = [s.splat(0.0); R];
    let (block_bytes, block_records) = (layout.block_bytes(), layout.block_records());
    for block in 0..x.len() / block_records {
        let (head, records) = panel[block * block_bytes..][..block_bytes].split_at(layout.head_bytes());
        for record in 0..block_records {
            let bytes = &records[record * layout.record_bytes()..][..layout.record_bytes()];
            let x = x.group(block * block_records + record);
            add_record::<S, P, A, R>(s, Record { layout, head, bytes }, x, first, &mut acc);
        }
    }
    acc
}

struct Record<'a> {
    layout: Layout,
    head: &'a [u8],
    bytes: &'a [u8],
}

/// Adds the products of one record.
#[inline(always)]
fn add_record<S: Simd, P: Planes, A: Affine, const R: usize>(
    s: S,
    record: Record<'_>,
    x: QuantGroup<'_>,
    first: usize,
    acc: &mut [S::F; R],
) {
    let Record { layout, head, bytes } = record;
    let bias = if P::BYTES { S::BYTE_BIAS } else { 0 } - layout.zero;
    let (planes, scales) = bytes.split_at(layout.code_bytes());
    let planes = planes.as_chunks().0;
    for part in 0..A::PARTS {
        let half = if A::PARTS == 2 { Some(part) } else { None };
        let mut dots = [s.splat_int(0); R];
        if bias != 0 {
            for (r, dot) in dots.iter_mut().enumerate() {
                *dot = s.splat_int(bias * x.sum(first + r, half));
            }
        }
        for quad in part * (8 / A::PARTS)..(part + 1) * (8 / A::PARTS) {
            let codes = P::quad(s, planes, quad);
            for (r, dot) in dots.iter_mut().enumerate() {
                let x = x.quad(first + r, quad);
                *dot = if P::BYTES { s.dot4_bytes(*dot, codes, x) } else { s.dot4_small(*dot, codes, x) };
            }
        }
        let (scale, min) = (A::scale(s, head, scales, part), A::min(s, head, scales, part));
        for r in 0..R {
            acc[r] = s.fma(s.mul(scale, s.splat(x.scale(first + r))), s.to_float(dots[r]), acc[r]);
            if A::MIN {
                acc[r] = s.fma(min, s.splat(x.offset(first + r, half)), acc[r]);
            }
        }
    }
}

/// Exact sums of one step of a tile product: `[16 rows][16 out features]`.
#[repr(C, align(64))]
struct Sums([[i32; LANES]; TILE_ROWS]);

/// `acc` plus the dot products of opened records with all rows of a tile of rows, by tile registers. Rows that hold no
/// activations give results without meaning.
#[inline(always)]
pub(super) fn tile_dots<S: Simd, T: Tiles, A: Affine>(
    s: S,
    registers: &mut T,
    groups: &[Group],
    x: QuantTile<'_>,
    mut acc: [S::F; TILE_ROWS],
) -> [S::F; TILE_ROWS] {
    let steps = groups.len().min(x.len()) * A::PARTS;
    let step = |step: usize| (&groups[step / A::PARTS], x.group(step / A::PARTS), step % A::PARTS);
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
            scale_and_add::<S, A>(s, &sums[(next - 1) % 2], group, x, part, &mut acc);
        }
    }
    if steps > 0 {
        let (group, x, part) = step(steps - 1);
        scale_and_add::<S, A>(s, &sums[(steps - 1) % 2], group, x, part, &mut acc);
    }
    acc
}

/// The registers' shapes for [`tile_dots`].
pub(super) fn tile_shapes<A: Affine>() -> TileShapes {
    TileShapes::product(TILE_ROWS, GROUP / A::PARTS)
}

#[inline(always)]
fn multiply<T: Tiles, const C: usize, const A: usize, const B: usize>(
    registers: &mut T,
    group: &Group,
    x: QuantGroup<'_>,
    part: usize,
    sums: &mut Sums,
) {
    let quad = part * GROUP / 8;
    registers.zero::<C>();
    // SAFETY: there are 16 rows of 32 codes, and 8 rows of 64 of the weights; both are read from the part's first quad on, as far
    // as the shapes go. The result is 16 rows of 64 bytes.
    unsafe {
        registers.load::<A>(x.codes().add(4 * quad), QuantGroup::CODE_BYTES);
        registers.load::<B>(group.codes.as_ptr().cast::<u8>().add(VECTOR * quad), VECTOR);
        registers.dot_i8::<C, A, B>();
        registers.store::<C>(sums.0.as_mut_ptr().cast(), TILE_ROW_BYTES);
    }
}

#[inline(always)]
fn scale_and_add<S: Simd, A: Affine>(
    s: S,
    sums: &Sums,
    group: &Group,
    x: QuantGroup<'_>,
    part: usize,
    acc: &mut [S::F; TILE_ROWS],
) {
    let (scale, min) = (s.load(&group.scales[part]), s.load(&group.mins[part]));
    let half = if A::PARTS == 2 { Some(part) } else { None };
    for (r, (acc, sums)) in acc.iter_mut().zip(&sums.0).enumerate() {
        *acc = s.fma(s.mul(scale, s.splat(x.scale(r))), s.to_float(s.load_int(sums)), *acc);
        if A::MIN {
            *acc = s.fma(min, s.splat(x.offset(r, half)), *acc);
        }
    }
}
