//! A task of a product with integer panels: opens records, a chunk at a time, and sends all rows through them.
//!
//! With tile registers a tile of 16 rows goes at once, and codes are opened signed; without, rows go in the register tiles of
//! the level. Between the chunks of a panel the sums so far rest in the output, in f32, as they would in a register.

use std::ops::Range;

use super::amx::{TileWork, Tiles};
use super::expand::{CHUNK, Expand, Group};
use super::matmul::{Out, Rows, Task};
use super::panel::Part;
use super::quant;
use super::quantize::{QuantTile, TILE_ROWS};
use super::record::{Codes, GROUP, Layout};
use super::simd::{Kernel, Simd, for_row_tiles};

/// Bytes of quantized activations that pass through a panel before the next panel is opened: they stay in the second-level
/// cache.
const PASS_BYTES: usize = 512 << 10;

/// A task over integer panels.
pub(super) struct QuantTask<'a, S> {
    pub(super) s: S,
    pub(super) layout: Layout,
    pub(super) data: &'a [u8],
    pub(super) task: Task<'a>,
}

/// Some opened records of a panel, the first of which is number `first`.
#[derive(Clone, Copy)]
struct Opened<'a> {
    groups: &'a [Group],
    panel: usize,
    first: usize,
}

impl<S: Simd> TileWork for QuantTask<'_, S> {
    #[inline(always)]
    fn run<T: Tiles>(self, mut registers: Option<T>) {
        let QuantTask { s, layout, data, task: Task { part, panels, rows, out, scratch, .. } } = self;
        let records = rows.cols / GROUP;
        let (panel_bytes, tiles) = (part.panel_bytes(), rows.count.div_ceil(TILE_ROWS));
        let pass = (PASS_BYTES / (records * size_of::<QuantTile>())).max(1);
        for tiles in (0..tiles).step_by(pass).map(|tile| tile..tiles.min(tile + pass)) {
            for panel in panels.clone() {
                let bytes = &data[panel * panel_bytes..][..panel_bytes];
                for first in (0..records).step_by(CHUNK) {
                    let to = &mut scratch[..CHUNK.min(records - first)];
                    Expand { layout, panel: bytes, first, signed: registers.is_some(), to }.run(s);
                    let work = Through { s, layout, part, rows, out, opened: Opened { groups: to, panel, first } };
                    work.run(tiles.clone(), &mut registers);
                }
            }
        }
    }
}

/// Rows through some opened records.
struct Through<'a, S> {
    s: S,
    layout: Layout,
    part: &'a Part,
    rows: Rows<'a>,
    out: Out<'a>,
    opened: Opened<'a>,
}

impl<S: Simd> Through<'_, S> {
    /// The tiles of rows `tiles`.
    #[inline(always)]
    fn run<T: Tiles>(&self, tiles: Range<usize>, registers: &mut Option<T>) {
        match (self.layout.halves(), self.layout.min(), self.layout.codes == Codes::Eight) {
            (false, false, false) => self.tiles::<T, false, false, false>(tiles, registers),
            (false, true, false) => self.tiles::<T, false, true, false>(tiles, registers),
            (true, false, false) => self.tiles::<T, true, false, false>(tiles, registers),
            (true, true, false) => self.tiles::<T, true, true, false>(tiles, registers),
            (false, false, true) => self.tiles::<T, false, false, true>(tiles, registers),
            _ => unreachable!("no format has the layout {:?}", self.layout),
        }
    }

    #[inline(always)]
    fn tiles<T: Tiles, const HALVES: bool, const MIN: bool, const BYTES: bool>(
        &self,
        tiles: Range<usize>,
        registers: &mut Option<T>,
    ) {
        let Opened { groups, first, .. } = self.opened;
        for tile in tiles {
            let first_row = tile * TILE_ROWS;
            let count = TILE_ROWS.min(self.rows.count - first_row);
            let x = self.rows.groups(tile, first..first + groups.len());
            if let Some(registers) = registers {
                let acc = self.begin::<TILE_ROWS>(first_row, count);
                let acc = quant::tile_dots::<S, T, HALVES, MIN>(self.s, registers, groups, x, acc);
                self.end(first_row, &acc[..count]);
            } else {
                for_row_tiles!(S, count, |row, R| {
                    let acc = self.begin::<R>(first_row + row, R);
                    let acc = quant::dots::<S, R, HALVES, MIN, BYTES>(self.s, groups, x, row, self.layout.zero, acc);
                    self.end(first_row + row, &acc);
                });
            }
        }
    }

    /// The sums so far of `count` rows.
    #[inline(always)]
    fn begin<const R: usize>(&self, row: usize, count: usize) -> [S::F; R] {
        std::array::from_fn(|r| match self.opened.first {
            0 => self.s.splat(0.0),
            // SAFETY: a task owns its panels.
            _ if r < count => unsafe { self.out.load(self.s, self.part, row + r, self.opened.panel) },
            _ => self.s.splat(0.0),
        })
    }

    /// Stores the sums, which are results after the last record.
    #[inline(always)]
    fn end(&self, row: usize, acc: &[S::F]) {
        let Opened { groups, panel, first } = self.opened;
        let out = Out { bias: self.out.bias.filter(|_| first + groups.len() == self.rows.cols / GROUP), ..self.out };
        for (r, &value) in acc.iter().enumerate() {
            // SAFETY: a task owns its panels.
            unsafe { out.store(self.s, self.part, row + r, panel, value) };
        }
    }
}
