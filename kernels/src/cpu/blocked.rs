//! Products of bf16 in the order of tile registers, by vectors.
//!
//! `tdpbf16ps` takes a block of up to 16 pairs at a time. Per result it makes two chains of fused multiply-adds from zero,
//! one over the even elements and one over the odd ones, adds the two, and adds that to the result so far. Subnormal
//! numbers are taken and given as zero. A device whose tile registers take bf16 sums all bf16 products so, whatever their
//! number of rows: few rows, which vectors multiply in time, get the bits that they would get among many.
//!
//! Results are never -0 ([`finish`]). No sign of a zero on the way shows then, so that adding the product of a zero and a
//! finite number changes nothing, and a block may hold zeros in place of what does not count.

use super::amx::TILE_ROW_BYTES;
use super::pair::Pair;
use super::simd::{LANES, Simd};

/// Cells of a block: a row of a tile register.
pub(super) const BLOCK: usize = TILE_ROW_BYTES / size_of::<Pair>();

/// Adds the products of one block of cells: `rows[r]` are a row's cells, `columns[p]` their rows of 16 lanes, `stride` apart.
#[inline(always)]
pub(super) fn add_block<S: Simd, const R: usize, const P: usize>(
    s: S,
    rows: [&[Pair]; R],
    columns: [&[Pair]; P],
    stride: usize,
    sums: &mut [[S::F; P]; R],
) {
    let cells = rows[0].len();
    assert!(0 < cells && cells <= BLOCK && rows.iter().all(|row| row.len() == cells), "rows of one block");
    assert!(columns.iter().all(|column| column.len() >= (cells - 1) * stride + LANES), "lanes for {cells} cells");
    let mut chains = [[(s.splat(0.0), s.splat(0.0)); P]; R];
    for cell in 0..cells {
        for p in 0..P {
            // SAFETY: row `cell` of 16 lanes is there, as asserted; the check would stay in the innermost loop.
            let lanes = s.load_pairs(unsafe { &*columns[p].as_ptr().add(cell * stride).cast::<[Pair; LANES]>() });
            for r in 0..R {
                // SAFETY: every row has `cells` cells, as asserted.
                let x = s.splat_pair(unsafe { *rows[r].get_unchecked(cell) });
                chains[r][p] = s.dot2_apart(chains[r][p], x, lanes);
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            let (even, odd) = chains[r][p];
            sums[r][p] = s.flushed(s.add(sums[r][p], s.flushed(s.add(even, odd))));
        }
    }
}

/// A complete sum, +0 in place of -0.
#[inline(always)]
pub(super) fn finish<S: Simd>(s: S, sum: S::F) -> S::F {
    s.add(sum, s.splat(0.0))
}
