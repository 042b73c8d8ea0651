//! A task of a product with integer panels: all rows through some panels, by vectors or by tile registers.
//!
//! Vectors: rows go in the register tiles of the level, and records are opened in registers for each of them. Tile registers:
//! the records of some panels are opened to memory first, as many as the second-level cache holds, and tiles of 16 rows go
//! through them. Where a panel has more records than that, the sums so far rest in the output between its stretches.

use super::amx::{TileUnit, Tiles, with_tiles};
use super::matmul::Task;
use super::open::{Affine, Planes, expand, with_kinds};
use super::quant;
use super::quantize::TILE_ROWS;
use super::record::{GROUP, Layout};
use super::simd::{Simd, for_row_tiles};

/// Records that a worker has open at once: 384 KiB of them.
pub(super) const OPEN_RECORDS: usize = 512;
/// Rows from which on tile products are worth more than vector products; a choice of speed alone.
const TILE_PRODUCT_ROWS: usize = 5;

/// Runs a task over the integer panels `data`.
#[inline(always)]
pub(super) fn run<S: Simd>(s: S, layout: Layout, data: &[u8], task: Task<'_>) {
    let unit = if task.rows.count < TILE_PRODUCT_ROWS { TileUnit::None } else { task.units.int8 };
    with_kinds!(layout, |P, A| with_tiles!(
        unit,
        &quant::tile_shapes::<A>(),
        |registers| by_tiles::<S, _, P, A>(s, registers, layout, data, task),
        by_vectors::<S, P, A>(s, layout, data, &task)
    ))
}

#[inline(always)]
fn by_vectors<S: Simd, P: Planes, A: Affine>(s: S, layout: Layout, data: &[u8], task: &Task<'_>) {
    let Task { part, rows, out, .. } = task;
    let panel_bytes = part.panel_bytes();
    for_row_tiles!(S, rows.count, |row, R| {
        let x = rows.quantized.tile(row / TILE_ROWS, 0..rows.cols / GROUP);
        for panel in task.panels.clone() {
            let bytes = &data[panel * panel_bytes..][..panel_bytes];
            let dots = quant::dots::<S, P, A, R>(s, layout, bytes, x, row % TILE_ROWS);
            for (r, &dot) in dots.iter().enumerate() {
                // SAFETY: a task owns its panels.
                unsafe { out.store(s, part, row + r, panel, dot) };
            }
        }
    });
}

#[inline(always)]
fn by_tiles<S: Simd, T: Tiles, P: Planes, A: Affine>(
    s: S,
    mut registers: T,
    layout: Layout,
    data: &[u8],
    task: Task<'_>,
) {
    let Task { part, panels, rows, out, scratch, .. } = task;
    let (panel_bytes, records) = (part.panel_bytes(), rows.cols / GROUP);
    let (stretch, at_once) = (records.min(OPEN_RECORDS), (OPEN_RECORDS / records).max(1));
    for first_panel in panels.clone().step_by(at_once) {
        let panels = first_panel..panels.end.min(first_panel + at_once);
        for first in (0..records).step_by(stretch) {
            let stretch = first..records.min(first + stretch);
            let opened = scratch.chunks_exact_mut(stretch.len());
            for (panel, to) in panels.clone().zip(opened) {
                expand::<S, P, A>(s, layout.zero, &data[panel * panel_bytes..][..panel_bytes], first, to);
            }
            for tile in 0..rows.count.div_ceil(TILE_ROWS) {
                let (first_row, x) = (tile * TILE_ROWS, rows.quantized.tile(tile, stretch.clone()));
                let live = TILE_ROWS.min(rows.count - first_row);
                for (panel, groups) in panels.clone().zip(scratch.chunks_exact(stretch.len())) {
                    let mut acc = [s.splat(0.0); TILE_ROWS];
                    if first > 0 {
                        for (r, acc) in acc.iter_mut().enumerate().take(live) {
                            // SAFETY: a task owns its panels.
                            *acc = unsafe { out.load(s, part, first_row + r, panel) };
                        }
                    }
                    let acc = quant::tile_dots::<S, T, A>(s, &mut registers, groups, x, acc);
                    let out = if stretch.end < records { out.without_bias() } else { out };
                    for (r, &dot) in acc.iter().enumerate().take(live) {
                        // SAFETY: a task owns its panels.
                        unsafe { out.store(s, part, first_row + r, panel, dot) };
                    }
                }
            }
        }
    }
}
