//! Tiles of matrix products with float panels: one chain of fused multiply-adds per output, in the order of the in features.

use super::element::Element;
use super::simd::{LANES, Simd};

/// The dot products of `P` panels with `R` rows; all of them hold the same number of in features.
#[inline(always)]
pub(super) fn dots<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    rows: [&[f32]; R],
) -> [[S::F; R]; P] {
    let cols = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == cols) && panels.iter().all(|panel| panel.len() == cols), "one length");
    let mut acc = [[s.splat(0.0); R]; P];
    for k in 0..cols {
        for p in 0..P {
            // SAFETY: every panel and row has `cols` elements, as asserted; the check would stay in the innermost loop.
            let w = E::load(s, unsafe { panels[p].get_unchecked(k) });
            for r in 0..R {
                // SAFETY: as above.
                let x = s.splat(unsafe { *rows[r].get_unchecked(k) });
                acc[p][r] = s.fma(w, x, acc[p][r]);
            }
        }
    }
    acc
}
