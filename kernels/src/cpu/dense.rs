//! Tiles of matrix products with float panels: one chain of fused multiply-adds per output, in the order of the in features,
//! or, where the weights are bf16, of their pairs (in the order of tile registers: `pair_task.rs`).

use super::element::{Cell, Element};
use super::simd::{LANES, Simd};

/// The dot products of `P` panels with `R` rows of cells; all of them hold the same number.
#[inline(always)]
pub(super) fn dots<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    rows: [&[E::Cell]; R],
) -> [[S::F; R]; P] {
    let cells = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == cells) && panels.iter().all(|panel| panel.len() == cells), "one length");
    let mut acc = [[s.splat(0.0); R]; P];
    for k in 0..cells {
        for p in 0..P {
            // SAFETY: every panel and row has `cells` elements, as asserted; the check would stay in the innermost loop.
            let w = E::load(s, unsafe { panels[p].get_unchecked(k) });
            for r in 0..R {
                // SAFETY: as above.
                let x = E::Cell::splat(s, unsafe { *rows[r].get_unchecked(k) });
                acc[p][r] = E::Cell::dot(s, w, x, acc[p][r]);
            }
        }
    }
    acc
}
