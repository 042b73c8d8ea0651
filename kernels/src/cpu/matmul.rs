//! Matrix products: divides panels over threads and runs register tiles over rows.
//!
//! A task owns some panels and all rows: a panel comes from memory once, stays in the cache while the rows pass in tiles,
//! and every tile reuses a loaded weight for each of its rows. No output depends on how rows are tiled.

use std::ops::Range;

use super::CpuDevice;
use super::amx::{TileUnit, TileUnits};
use super::dense;
use super::element::{Element, as_f16};
use super::open::Group;
use super::pair::Pair;
use super::pair_task::PairTask;
use super::panel::{Panels, Part};
use super::quant_task;
use super::quantize::Quantized;
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch, for_row_tiles};
use crate::{Result, Weight};

/// Bytes of panels per task: they stay in the second-level cache while all rows pass.
const TASK_BYTES: usize = 256 << 10;
/// Tasks per thread, so that a thread that loses its core for a while does not hold up the others.
const TASKS_PER_THREAD: usize = 8;

/// `out[t, n] = x[t] . w[n] (+ bias[n])`.
pub(crate) fn matmul(cpu: &CpuDevice, x: &[f32], weight: &Weight, bias: Option<&[f32]>, out: &mut [f32]) -> Result<()> {
    let (cols, out_cols) = (weight.cols(), weight.rows());
    let mut scratch = cpu.activations();
    let quantized = match weight.parts.iter().any(|part| matches!(part.panels, Panels::Quant(..))) {
        true => scratch.quantize(cpu, x, cols)?,
        false => Quantized::NONE,
    };
    let mut pairs = cpu.pairs();
    let pairs = match weight.parts.iter().any(|part| matches!(part.panels, Panels::BF16(_))) {
        true => pairs.round(cpu, x, cols)?,
        false => &[],
    };
    let rows = Rows { x, pairs, quantized, cols, count: x.len() / cols };
    let out = Out { values: &SharedSlice::new(out), cols: out_cols, bias };
    // Tasks are numbered through the parts, so that stacked matrices cost one fork and join.
    let panels: usize = weight.parts.iter().map(Part::panel_count).sum();
    let step = |part: &Part| task_panels(part, panels.div_ceil(TASKS_PER_THREAD * cpu.pool.threads()));
    let tasks = weight.parts.iter().map(|part| part.panel_count().div_ceil(step(part))).sum();
    cpu.pool.run(tasks, &|worker, mut task| {
        for part in &weight.parts {
            let (panels, step) = (part.panel_count(), step(part));
            if task < panels.div_ceil(step) {
                let panels = task * step..panels.min((task + 1) * step);
                let scratch = &mut cpu.opened_records(worker)[..];
                return dispatch(cpu.isa, Task { part, panels, rows, out, units: cpu.tiles, scratch });
            }
            task -= panels.div_ceil(step);
        }
        unreachable!("a task beyond the last part");
    });
    Ok(())
}

/// Panels per task: `balanced`, unless they leave the cache; an even number, for tiles of two panels.
fn task_panels(part: &Part, balanced: usize) -> usize {
    balanced.min(TASK_BYTES / part.panel_bytes()).max(1).next_multiple_of(2)
}

/// The activations: as given and, if the weight asks for it, rounded or quantized.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) x: &'a [f32],
    pub(super) pairs: &'a [Pair],
    pub(super) quantized: Quantized<'a>,
    pub(super) cols: usize,
    pub(super) count: usize,
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) struct Out<'a> {
    pub(super) values: &'a SharedSlice<'a, f32>,
    pub(super) cols: usize,
    pub(super) bias: Option<&'a [f32]>,
}

impl Out<'_> {
    /// For sums that are not complete yet.
    #[inline(always)]
    pub(super) fn without_bias(self) -> Self {
        Out { bias: None, ..self }
    }

    /// Stores the live lanes of one output panel of one row, plus the bias.
    ///
    /// # Safety
    /// No other task stores this panel.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(&self, s: S, part: &Part, row: usize, panel: usize, value: S::F) {
        let (col, live) = (part.first_row + panel * LANES, part.live(panel));
        let value = match self.bias {
            Some(bias) => s.add(value, s.load_partial(&bias[col..col + live])),
            None => value,
        };
        // SAFETY: the panel is this task's alone.
        let to = unsafe { self.values.part(row * self.cols + col..row * self.cols + col + live) };
        match to.as_mut_array::<LANES>() {
            Some(to) => s.store(to, value),
            None => s.store_partial(to, value),
        }
    }

    /// What was stored, without a bias, of one panel of one row.
    ///
    /// # Safety
    /// No other task uses this panel.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(&self, s: S, part: &Part, row: usize, panel: usize) -> S::F {
        let (col, live) = (part.first_row + panel * LANES, part.live(panel));
        // SAFETY: the panel is this task's alone.
        let from = unsafe { self.values.part(row * self.cols + col..row * self.cols + col + live) };
        match from.as_array::<LANES>() {
            Some(from) => s.load(from),
            None => s.load_partial(from),
        }
    }
}

/// All rows through some panels of a part.
pub(super) struct Task<'a> {
    pub(super) part: &'a Part,
    pub(super) panels: Range<usize>,
    pub(super) rows: Rows<'a>,
    pub(super) out: Out<'a>,
    pub(super) units: TileUnits,
    /// This worker's, for opened records.
    pub(super) scratch: &'a mut [Group],
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match &self.part.panels {
            Panels::F32(data) => self.dense::<S, f32>(s, data, self.rows.x),
            Panels::F16(data) => self.dense(s, as_f16(data), self.rows.x),
            Panels::BF16(data) if self.units.bf16 == TileUnit::None => self.dense::<S, Pair>(s, data, self.rows.pairs),
            Panels::BF16(data) => s.outlined(PairTask { data, task: &self }),
            Panels::Quant(layout, data) => quant_task::run(s, *layout, data, self),
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn dense<S: Simd, E: Element>(&self, s: S, data: &[E], x: &[E::Cell]) {
        let cells = x.len() / self.rows.count.max(1);
        for_row_tiles!(S, self.rows.count, |row, R| {
            let rows: [&[E::Cell]; R] = std::array::from_fn(|r| &x[(row + r) * cells..][..cells]);
            let mut panel = self.panels.start;
            while S::PANEL_PAIRS && panel + 1 < self.panels.end {
                self.dense_tile::<S, E, R, 2>(s, data, rows, row, panel);
                panel += 2;
            }
            while panel < self.panels.end {
                self.dense_tile::<S, E, R, 1>(s, data, rows, row, panel);
                panel += 1;
            }
        });
    }

    #[inline(always)]
    fn dense_tile<S: Simd, E: Element, const R: usize, const P: usize>(
        &self,
        s: S,
        data: &[E],
        rows: [&[E::Cell]; R],
        row: usize,
        panel: usize,
    ) {
        let len = rows[0].len() * LANES;
        let panels = std::array::from_fn(|p| data[(panel + p) * len..][..len].as_chunks::<LANES>().0);
        let dots = dense::dots::<S, E, R, P>(s, panels, rows);
        for (p, dots) in dots.into_iter().enumerate() {
            for (r, dot) in dots.into_iter().enumerate() {
                // SAFETY: a task owns its panels.
                unsafe { self.out.store(s, self.part, row + r, panel + p, dot) };
            }
        }
    }
}

#[cfg(test)]
#[path = "tile_product_tests.rs"]
mod tests;
