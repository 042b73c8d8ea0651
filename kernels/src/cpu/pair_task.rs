//! A task of a product with bf16 panels in the order of tile registers: all rows through some panels.
//!
//! ```text
//!                 B0: panel      B1: next panel
//! A0: 16 rows     C0             C1
//! A1: 16 more     C2             C3
//! ```
//!
//! Rows of activations are read as they were rounded, panels as they are packed: a block of 16 cells is what each register
//! holds. Registers have fewer rows where rows end, and fewer cells in the last block of a panel, for which the sums so far
//! rest in the output.

use std::ops::Range;

use super::amx::{A0, A1, B0, B1, C0, C1, C2, C3, TILE_ROW_BYTES, TILE_ROWS, TileShapes, Tiles, with_tiles};
use super::blocked::{BLOCK, add_block, finish};
use super::matmul::Task;
use super::pair::Pair;
use super::simd::{Kernel, LANES, Simd};

/// A task and the bf16 panels that it is over.
///
/// Up to three rows are left to vectors, a choice of speed alone, by peak rates rather than by measurement: a vector takes two
/// products per row and 64 bytes of weights, so that four rows take about the time in which a thread reads those from
/// memory. A tile product takes up to 16 rows in the time of some 16 vector products.
pub(super) struct PairTask<'a> {
    pub(super) data: &'a [Pair],
    pub(super) task: &'a Task<'a>,
}

impl Kernel for PairTask<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PairTask { data, task } = self;
        match task.rows.count {
            _ if !S::BF16_TILES => unreachable!("tile registers at a level without"),
            0 => (),
            1 => by_vectors::<S, 1>(s, data, task),
            2 => by_vectors::<S, 2>(s, data, task),
            3 => by_vectors::<S, 3>(s, data, task),
            _ => by_tiles(s, data, task),
        }
    }
}

/// `R` rows, all there are.
#[inline(always)]
fn by_vectors<S: Simd, const R: usize>(s: S, data: &[Pair], task: &Task<'_>) {
    let mut panel = task.panels.start;
    while panel + 1 < task.panels.end {
        vector_panels::<S, R, 2>(s, data, task, panel);
        panel += 2;
    }
    if panel < task.panels.end {
        vector_panels::<S, R, 1>(s, data, task, panel);
    }
}

#[inline(always)]
fn vector_panels<S: Simd, const R: usize, const P: usize>(s: S, data: &[Pair], task: &Task<'_>, first: usize) {
    let cells = task.rows.cols.div_ceil(2);
    let rows: [&[Pair]; R] = std::array::from_fn(|r| &task.rows.pairs[r * cells..][..cells]);
    let panels: [&[Pair]; P] = std::array::from_fn(|p| &data[(first + p) * cells * LANES..][..cells * LANES]);
    let mut sums = [[s.splat(0.0); P]; R];
    for at in (0..cells).step_by(BLOCK) {
        let end = cells.min(at + BLOCK);
        add_block(s, rows.map(|row| &row[at..end]), panels.map(|panel| &panel[at * LANES..]), LANES, &mut sums);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: a task owns its panels.
            unsafe { task.out.store(s, task.part, r, first + p, finish(s, sum)) };
        }
    }
}

/// A register of results.
#[repr(C, align(64))]
struct Sums([[f32; LANES]; TILE_ROWS]);

#[inline(always)]
fn by_tiles<S: Simd>(s: S, data: &[Pair], task: &Task<'_>) {
    let cells = task.rows.cols.div_ceil(2);
    let whole = cells / BLOCK * BLOCK;
    for first in (0..task.rows.count).step_by(2 * TILE_ROWS) {
        let rows = first..task.rows.count.min(first + 2 * TILE_ROWS);
        // Where there is no second tile of rows its registers are not used, but have a shape.
        let (upper, lower) = (rows.len().min(TILE_ROWS), rows.len().saturating_sub(TILE_ROWS).max(1));
        for stretch in [0..whole, whole..cells] {
            if stretch.is_empty() {
                continue;
            }
            let bytes = stretch.len().min(BLOCK) * size_of::<Pair>();
            let shapes = TileShapes::products([upper, upper, lower, lower], [(upper, bytes), (lower, bytes)]);
            with_tiles!(
                task.units.bf16,
                &shapes,
                |registers| by_registers(s, registers, data, task, rows.clone(), stretch),
                unreachable!("a device with this order has registers")
            );
        }
    }
}

/// Up to 32 rows through all panels of a task, over whole blocks of cells or the part of one at the end.
#[inline(always)]
fn by_registers<S: Simd, T: Tiles>(
    s: S,
    mut registers: T,
    data: &[Pair],
    task: &Task<'_>,
    rows: Range<usize>,
    stretch: Range<usize>,
) {
    let cells = task.rows.cols.div_ceil(2);
    let x = &task.rows.pairs[rows.start * cells..rows.end * cells];
    let mut sums = [const { Sums([[0.0; LANES]; TILE_ROWS]) }; 4];
    for first in task.panels.clone().step_by(2) {
        let panels = first..task.panels.end.min(first + 2);
        let product = Product {
            x,
            panels: &data[first * cells * LANES..panels.end * cells * LANES],
            cells,
            tiles: rows.len().div_ceil(TILE_ROWS),
            count: panels.len(),
        };
        // The rows and the panel of each result.
        let results = |result: usize| {
            let (tile, panel) = (result / 2, panels.start + result % 2);
            let rows = if panel < panels.end { rows.start + tile * TILE_ROWS..rows.end } else { 0..0 };
            (rows, panel)
        };
        if stretch.start > 0 {
            for (result, sums) in sums.iter_mut().enumerate() {
                let (rows, panel) = results(result);
                for (row, sums) in rows.zip(&mut sums.0) {
                    // SAFETY: a task owns its panels.
                    s.store(sums, unsafe { task.out.load(s, task.part, row, panel) });
                }
            }
        }
        product.run(&mut registers, stretch.clone(), &mut sums);
        for (result, sums) in sums.iter().enumerate() {
            let (rows, panel) = results(result);
            for (row, sums) in rows.zip(&sums.0) {
                // SAFETY: a task owns its panels.
                unsafe {
                    match stretch.end == cells {
                        true => task.out.store(s, task.part, row, panel, finish(s, s.load(sums))),
                        false => task.out.without_bias().store(s, task.part, row, panel, s.load(sums)),
                    }
                }
            }
        }
    }
}

/// One or two tiles of rows times one or two panels.
struct Product<'a> {
    /// `[rows][cells]`.
    x: &'a [Pair],
    /// `[panels][cells][16]`.
    panels: &'a [Pair],
    cells: usize,
    tiles: usize,
    count: usize,
}

impl Product<'_> {
    /// Adds the products of a stretch of cells to `sums`, or sets those where it is the first one. Results of missing tiles and
    /// panels have no meaning.
    #[inline(always)]
    fn run<T: Tiles>(&self, registers: &mut T, stretch: Range<usize>, sums: &mut [Sums; 4]) {
        let Product { x, panels, cells, tiles, count } = *self;
        assert!(stretch.end <= cells && panels.len() == count * cells * LANES, "cells of whole panels");
        assert!(x.len() > (tiles - 1) * TILE_ROWS * cells, "rows of each tile");
        let (second_tile, second_panel) = (tiles > 1, count > 1);
        let stride = cells * size_of::<Pair>();
        // SAFETY: results are 16 rows of 64 bytes. Per block, the rows of `x` are as many as the shape of `A0` and `A1` has,
        // and have its bytes from the block on, as the stretch is whole blocks or the part of one that is configured; the
        // panels have 64 bytes for each of its cells.
        unsafe {
            if stretch.start == 0 {
                registers.zero::<C0>();
                registers.zero::<C1>();
                registers.zero::<C2>();
                registers.zero::<C3>();
            } else {
                registers.load::<C0>(sums[0].0.as_ptr().cast(), TILE_ROW_BYTES);
                registers.load::<C1>(sums[1].0.as_ptr().cast(), TILE_ROW_BYTES);
                registers.load::<C2>(sums[2].0.as_ptr().cast(), TILE_ROW_BYTES);
                registers.load::<C3>(sums[3].0.as_ptr().cast(), TILE_ROW_BYTES);
            }
            for at in stretch.step_by(BLOCK) {
                let (row, lanes) = (x.as_ptr().add(at), panels.as_ptr().add(at * LANES));
                registers.load::<A0>(row.cast(), stride);
                registers.load::<B0>(lanes.cast(), TILE_ROW_BYTES);
                registers.dot_bf16::<C0, A0, B0>();
                if second_panel {
                    registers.load::<B1>(lanes.add(cells * LANES).cast(), TILE_ROW_BYTES);
                    registers.dot_bf16::<C1, A0, B1>();
                }
                if second_tile {
                    registers.load::<A1>(row.add(TILE_ROWS * cells).cast(), stride);
                    registers.dot_bf16::<C2, A1, B0>();
                    if second_panel {
                        registers.dot_bf16::<C3, A1, B1>();
                    }
                }
            }
            registers.store::<C0>(sums[0].0.as_mut_ptr().cast(), TILE_ROW_BYTES);
            registers.store::<C1>(sums[1].0.as_mut_ptr().cast(), TILE_ROW_BYTES);
            registers.store::<C2>(sums[2].0.as_mut_ptr().cast(), TILE_ROW_BYTES);
            registers.store::<C3>(sums[3].0.as_mut_ptr().cast(), TILE_ROW_BYTES);
        }
    }
}
