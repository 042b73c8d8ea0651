//! Activations quantized to int8 per row and group of 32, once per matrix product.
//!
//! `x ~ scale * code` with `scale = amax / 127` and codes rounded half to even in -127..=127. The sums of codes that zero
//! points and minimums of the weights need are taken here, once for all out features.

use super::CpuDevice;
use super::record::GROUP;
use super::shared::SharedSlice;
use super::simd::{Kernel, Simd, dispatch};
use crate::Result;
use crate::buffer::{Buffer, Plain};

/// Rows whose groups lie together: those of a tile register.
pub(super) const TILE_ROWS: usize = 16;

/// One group of 16 rows. Rows that a product does not have hold whatever was there.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct QuantTile {
    /// Per row, four in features each.
    pub(super) codes: [[[i8; 4]; GROUP / 4]; TILE_ROWS],
    pub(super) scales: [f32; TILE_ROWS],
    /// `sum(codes)` per row, and times the scale.
    pub(super) sums: [i32; TILE_ROWS],
    pub(super) offsets: [f32; TILE_ROWS],
    /// Likewise over the two halves of the group.
    pub(super) half_sums: [[i32; TILE_ROWS]; 2],
    pub(super) half_offsets: [[f32; TILE_ROWS]; 2],
}

// SAFETY: 960 bytes of integers and floats without padding.
unsafe impl Plain for QuantTile {}

/// The quantized rows of one matrix product.
pub(super) struct QuantRows {
    tiles: Buffer<QuantTile>,
}

impl QuantRows {
    pub(super) fn new() -> Result<Self> {
        Ok(QuantRows { tiles: Buffer::zeros(0)? })
    }

    /// Quantizes the rows of `x [rows, cols]`, whose `cols` are whole groups; returns them as `[rows / 16][cols / 32]`.
    pub(super) fn quantize(&mut self, cpu: &CpuDevice, x: &[f32], cols: usize) -> Result<&[QuantTile]> {
        let (rows, groups) = (x.len() / cols, cols / GROUP);
        let count = rows.div_ceil(TILE_ROWS) * groups;
        if self.tiles.len() < count {
            self.tiles = Buffer::zeros(count.next_power_of_two())?;
        }
        let tiles = SharedSlice::new(&mut self.tiles[..count]);
        cpu.for_row_chunks(count, GROUP * rows.min(TILE_ROWS), &|range| {
            // SAFETY: each tile is one task's.
            let to = unsafe { tiles.part(range.clone()) };
            dispatch(cpu.isa, QuantizeTiles { x, cols, first: range.start, to });
        });
        Ok(&self.tiles[..count])
    }
}

/// Fills the tiles from number `first` on.
struct QuantizeTiles<'a> {
    x: &'a [f32],
    cols: usize,
    first: usize,
    to: &'a mut [QuantTile],
}

impl Kernel for QuantizeTiles<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let groups = self.cols / GROUP;
        for (tile, to) in (self.first..).zip(self.to) {
            let (first_row, group) = (tile / groups * TILE_ROWS, tile % groups);
            let rows = self.x[first_row * self.cols..].chunks_exact(self.cols).take(TILE_ROWS);
            for (row, x) in rows.enumerate() {
                quantize_group(x[group * GROUP..].first_chunk().expect("whole groups"), row, to);
            }
        }
    }
}

/// 1.5 * 2^23: added to a small number, it leaves the number's nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below this a group is zero; its inverse scale would leave the range of f32.
const AMAX_MIN: f32 = 1e-30;

/// Into lane `row` of a tile, by plain loops that the compiler vectorizes at the level of its caller. A group with an infinity or a NaN gets the scale NaN,
/// so that it shows in the results instead of becoming some finite number.
#[inline(always)]
fn quantize_group(x: &[f32; GROUP], row: usize, to: &mut QuantTile) {
    // Magnitudes compare as integers, NaN above all.
    let amax = f32::from_bits(x.iter().fold(0, |max, value| max.max(value.to_bits() & 0x7fff_ffff)));
    let (scale, inverse) = match amax {
        amax if !amax.is_finite() => (f32::NAN, 0.0),
        amax if amax < AMAX_MIN => (0.0, 0.0),
        amax => (amax / 127.0, 127.0 / amax),
    };
    let mut codes = [0i8; GROUP];
    if inverse != 0.0 {
        // In two loops, each of which becomes a few vector instructions.
        let mut rounded = [0.0; GROUP];
        for (rounded, value) in rounded.iter_mut().zip(x) {
            *rounded = value.mul_add(inverse, ROUND);
        }
        for (code, rounded) in codes.iter_mut().zip(&rounded) {
            *code = (rounded.to_bits() as u8).cast_signed();
        }
    }
    // Loops rather than closures over arrays, which are compiled without the level's instructions when not inlined.
    for (to, codes) in to.codes[row].iter_mut().zip(codes.as_chunks::<4>().0) {
        *to = *codes;
    }
    let mut half_sums = [0i32; 2];
    for (sum, codes) in half_sums.iter_mut().zip(codes.as_chunks::<{ GROUP / 2 }>().0) {
        for &code in codes {
            *sum += i32::from(code);
        }
    }
    let sum = half_sums[0] + half_sums[1];
    (to.scales[row], to.sums[row], to.offsets[row]) = (scale, sum, scale * sum as f32);
    for (half, sum) in half_sums.into_iter().enumerate() {
        (to.half_sums[half][row], to.half_offsets[half][row]) = (sum, scale * sum as f32);
    }
}
