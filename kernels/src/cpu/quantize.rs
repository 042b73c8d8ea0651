//! Activations quantized to int8 per row and group of 32, once per matrix product.
//!
//! `x ~ scale * code` with `scale = amax / 127` and codes rounded half to even in -127..=127. The sums of codes that zero
//! points and minimums of the weights need are taken here, once for all out features.

use super::CpuDevice;
use super::panel::GROUP;
use super::shared::SharedSlice;
use super::simd::{Kernel, Simd, dispatch};
use crate::Result;
use crate::buffer::{Buffer, Plain};

/// One group of one row, on its own cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct QuantGroup {
    /// Four in features each.
    pub(crate) codes: [[i8; 4]; GROUP / 4],
    pub(crate) scale: f32,
    /// `scale * sum(codes)`: over the group, and over its two halves.
    pub(crate) offset: f32,
    pub(crate) half_offsets: [f32; 2],
    /// `sum(codes)`, likewise.
    pub(crate) sum: i32,
    pub(crate) half_sums: [i32; 2],
    unused: i32,
}

// SAFETY: 64 bytes of integers and floats without padding.
unsafe impl Plain for QuantGroup {}

/// The quantized rows of one matrix product.
pub(crate) struct QuantRows {
    groups: Buffer<QuantGroup>,
}

impl QuantRows {
    pub(crate) fn new() -> Result<Self> {
        Ok(QuantRows { groups: Buffer::zeros(0)? })
    }

    /// Quantizes the rows of `x [rows, cols]`, whose `cols` are whole groups; returns them as `[rows][cols / 32]`.
    pub(crate) fn quantize(&mut self, cpu: &CpuDevice, x: &[f32], cols: usize) -> Result<&[QuantGroup]> {
        let count = x.len() / GROUP;
        if self.groups.len() < count {
            self.groups = Buffer::zeros(count.next_power_of_two())?;
        }
        let groups = SharedSlice::new(&mut self.groups[..count]);
        cpu.for_row_chunks(x.len() / cols, cols, &|rows| {
            // SAFETY: each row is one task's.
            let to = unsafe { groups.part(rows.start * cols / GROUP..rows.end * cols / GROUP) };
            dispatch(cpu.isa, QuantizeGroups { x: x[rows.start * cols..rows.end * cols].as_chunks().0, to });
        });
        Ok(&self.groups[..count])
    }
}

struct QuantizeGroups<'a> {
    x: &'a [[f32; GROUP]],
    to: &'a mut [QuantGroup],
}

impl Kernel for QuantizeGroups<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, to) in self.x.iter().zip(self.to) {
            *to = quantize_group(x);
        }
    }
}

/// 1.5 * 2^23: added to a small number, it leaves the number's nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below this a group is zero; its inverse scale would leave the range of f32.
const AMAX_MIN: f32 = 1e-30;

/// Plain loops that the compiler vectorizes at the level of its caller. A group with an infinity or a NaN gets the scale NaN,
/// so that it shows in the results instead of becoming some finite number.
#[inline(always)]
pub(crate) fn quantize_group(x: &[f32; GROUP]) -> QuantGroup {
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
    let half_sums = [0, 16].map(|half: usize| codes[half..half + 16].iter().map(|&code| i32::from(code)).sum::<i32>());
    let sum = half_sums[0] + half_sums[1];
    QuantGroup {
        codes: std::array::from_fn(|quad| std::array::from_fn(|i| codes[4 * quad + i])),
        scale,
        offset: scale * sum as f32,
        half_offsets: half_sums.map(|sum| scale * sum as f32),
        sum,
        half_sums,
        unused: 0,
    }
}
