//! Activations quantized to int8 per row and group of 32, once per matrix product.
//!
//! `x ~ scale * code` with `scale = amax / 127` and codes rounded half to even in -127..=127. The sums of codes that zero
//! points and minimums of the weights need are taken here, once for all out features.
//!
//! Rows lie in tiles of up to 16, in which all of a group is together:
//!
//! ```text
//! group   codes [rows][8] of four in features; scales [rows] f32; sums [rows] i32; offsets [rows] f32;
//!         sums and offsets of the two halves of the group, [2][rows] each; nothing, up to a cache line
//! ```
//!
//! So one row alone takes a cache line for a group, which is what threads fetch from the core that has quantized it.

use std::ops::Range;

use super::CpuDevice;
use super::record::GROUP;
use super::shared::SharedSlice;
use super::simd::{Kernel, Simd, dispatch};
use crate::Result;
use crate::buffer::Buffer;

/// Rows whose groups lie together: those of a tile register.
pub(super) const TILE_ROWS: usize = 16;
/// Words of a group's codes, of one row.
const CODE_WORDS: usize = GROUP / 4;
/// Words of a group in all, of one row.
const ROW_WORDS: usize = CODE_WORDS + 7;
/// Words of a cache line.
const LINE_WORDS: usize = 16;

/// Words of a group of so many rows.
#[inline(always)]
const fn group_words(rows: usize) -> usize {
    (ROW_WORDS * rows).next_multiple_of(LINE_WORDS)
}

/// The quantized rows of one product.
#[derive(Clone, Copy)]
pub(super) struct Quantized<'a> {
    /// Tile after tile, and a tile's rows of codes more.
    words: &'a [u32],
    rows: usize,
    /// Groups of a row.
    groups: usize,
}

impl<'a> Quantized<'a> {
    /// Of products that take none.
    pub(super) const NONE: Quantized<'static> = Quantized { words: &[], rows: 0, groups: 0 };

    /// Groups `groups` of the tile of rows number `tile`.
    #[inline(always)]
    pub(super) fn tile(self, tile: usize, groups: Range<usize>) -> QuantTile<'a> {
        assert!(groups.start <= groups.end && groups.end <= self.groups, "{groups:?} of {} groups", self.groups);
        let rows = TILE_ROWS.min(self.rows - tile * TILE_ROWS);
        let first = tile * group_words(TILE_ROWS) * self.groups + groups.start * group_words(rows);
        let end = first + groups.len() * group_words(rows) + TILE_ROWS * ROW_WORDS;
        QuantTile { words: &self.words[first..end], rows, groups: groups.len() }
    }
}

/// Some groups of a tile of rows.
#[derive(Clone, Copy)]
pub(super) struct QuantTile<'a> {
    /// Group after group, and as much as 16 rows of one have more.
    words: &'a [u32],
    rows: usize,
    groups: usize,
}

impl<'a> QuantTile<'a> {
    /// How many groups.
    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.groups
    }

    /// A group.
    #[inline(always)]
    pub(super) fn group(self, at: usize) -> QuantGroup<'a> {
        debug_assert!(at < self.groups);
        QuantGroup { words: &self.words[at * group_words(self.rows)..][..TILE_ROWS * ROW_WORDS], rows: self.rows }
    }
}

/// A group of a tile of rows. Numbers of rows beyond the tile's, up to 16, name words without meaning.
#[derive(Clone, Copy)]
pub(super) struct QuantGroup<'a> {
    /// As of 16 rows.
    words: &'a [u32],
    rows: usize,
}

impl QuantGroup<'_> {
    /// Bytes from a row's codes to the next one's.
    pub(super) const CODE_BYTES: usize = GROUP;

    /// Codes of 16 rows.
    #[inline(always)]
    pub(super) fn codes(&self) -> *const u8 {
        self.words.as_ptr().cast()
    }

    /// Four codes of a row.
    #[inline(always)]
    pub(super) fn quad(&self, row: usize, quad: usize) -> [i8; 4] {
        debug_assert!(quad < CODE_WORDS);
        let [a, b, c, d] = self.word(row * CODE_WORDS + quad).to_ne_bytes();
        [a.cast_signed(), b.cast_signed(), c.cast_signed(), d.cast_signed()]
    }

    #[inline(always)]
    pub(super) fn scale(&self, row: usize) -> f32 {
        f32::from_bits(self.of(0, row))
    }

    /// `sum(codes)`: of all or, where the group is in two parts, of one.
    #[inline(always)]
    pub(super) fn sum(&self, row: usize, part: Option<usize>) -> i32 {
        self.of(part.map_or(1, |part| 3 + part), row).cast_signed()
    }

    /// That sum times the scale.
    #[inline(always)]
    pub(super) fn offset(&self, row: usize, part: Option<usize>) -> f32 {
        f32::from_bits(self.of(part.map_or(2, |part| 5 + part), row))
    }

    /// A row's word of field number `field` after the codes.
    #[inline(always)]
    fn of(&self, field: usize, row: usize) -> u32 {
        self.word((CODE_WORDS + field) * self.rows + row)
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        debug_assert!(at < self.words.len());
        // SAFETY: a group has the words of 16 rows, as `QuantTile::group` checks, and no row is beyond that.
        unsafe { *self.words.get_unchecked(at) }
    }
}

/// The quantized rows of one matrix product.
pub(super) struct QuantRows {
    words: Buffer<u32>,
}

impl QuantRows {
    pub(super) fn new() -> Result<Self> {
        Ok(QuantRows { words: Buffer::zeros(0)? })
    }

    /// Quantizes the rows of `x [rows, cols]`, whose `cols` are whole groups.
    pub(super) fn quantize(&mut self, cpu: &CpuDevice, x: &[f32], cols: usize) -> Result<Quantized<'_>> {
        let (rows, groups) = (x.len() / cols, cols / GROUP);
        let (tiles, rest) = (rows / TILE_ROWS, rows % TILE_ROWS);
        let count = groups * (tiles * group_words(TILE_ROWS) + group_words(rest)) + TILE_ROWS * ROW_WORDS;
        if self.words.len() < count {
            self.words = Buffer::zeros(count.next_power_of_two())?;
        }
        let words = SharedSlice::new(&mut self.words[..count]);
        cpu.for_row_chunks(rows.div_ceil(TILE_ROWS) * groups, GROUP * rows.min(TILE_ROWS), &|range| {
            dispatch(cpu.isa, QuantizeGroups { x, cols, range, words: &words });
        });
        Ok(Quantized { words: &self.words[..count], rows, groups })
    }
}

/// Fills groups, tile by tile.
struct QuantizeGroups<'a> {
    x: &'a [f32],
    cols: usize,
    range: Range<usize>,
    words: &'a SharedSlice<'a, u32>,
}

impl Kernel for QuantizeGroups<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let groups = self.cols / GROUP;
        for at in self.range {
            let (tile, group) = (at / groups, at % groups);
            let x = self.x[tile * TILE_ROWS * self.cols..].chunks_exact(self.cols).take(TILE_ROWS);
            let rows = x.len();
            let first = tile * group_words(TILE_ROWS) * groups + group * group_words(rows);
            // SAFETY: each group is one task's.
            let to = unsafe { self.words.part(first..first + ROW_WORDS * rows) };
            for (row, x) in x.enumerate() {
                quantize_group(x[group * GROUP..].first_chunk().expect("whole groups"), row, rows, to);
            }
        }
    }
}

/// As [`QuantGroup::quad`] reads them.
#[inline(always)]
fn word([a, b, c, d]: [i8; 4]) -> u32 {
    u32::from_ne_bytes([a.cast_unsigned(), b.cast_unsigned(), c.cast_unsigned(), d.cast_unsigned()])
}

/// 1.5 * 2^23: added to a small number, it leaves the number's nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below this a group is zero; its inverse scale would leave the range of f32.
const AMAX_MIN: f32 = 1e-30;

/// As row `row` of `rows`, by plain loops that the compiler vectorizes at the level of its caller. A group with an infinity or a NaN
/// gets the scale NaN, so that it shows in the results instead of becoming some finite number.
#[inline(always)]
fn quantize_group(x: &[f32; GROUP], row: usize, rows: usize, to: &mut [u32]) {
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
    for (to, codes) in to[row * CODE_WORDS..][..CODE_WORDS].iter_mut().zip(codes.as_chunks::<4>().0) {
        *to = word(*codes);
    }
    let mut half_sums = [0i32; 2];
    for (sum, codes) in half_sums.iter_mut().zip(codes.as_chunks::<{ GROUP / 2 }>().0) {
        for &code in codes {
            *sum += i32::from(code);
        }
    }
    let sum = half_sums[0] + half_sums[1];
    let offset = |sum: i32| (scale * sum as f32).to_bits();
    let [low, high] = half_sums;
    let fields = [
        scale.to_bits(),
        sum.cast_unsigned(),
        offset(sum),
        low.cast_unsigned(),
        high.cast_unsigned(),
        offset(low),
        offset(high),
    ];
    for (field, value) in fields.into_iter().enumerate() {
        to[(CODE_WORDS + field) * rows + row] = value;
    }
}
