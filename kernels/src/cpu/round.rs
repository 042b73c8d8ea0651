//! Activations rounded to pairs of bf16, once per matrix product.

use super::CpuDevice;
use super::element::Cell;
use super::pair::Pair;
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use crate::Result;
use crate::buffer::Buffer;

/// Pairs that there is room for from the start, 2,048 rows of 16,384 values: memory is touched as it is used, and a step
/// allocates nothing.
const PAIRS: usize = 16 << 20;

/// The rounded rows of one matrix product.
pub(crate) struct PairRows {
    pairs: Buffer<Pair>,
}

impl PairRows {
    pub(crate) fn new() -> Result<Self> {
        Ok(PairRows { pairs: Buffer::zeros(PAIRS)? })
    }

    /// Rounds the rows of `x [rows, cols]`; returns them as `[rows][cols / 2]`, odd `cols` rounded up with a zero.
    pub(crate) fn round(&mut self, cpu: &CpuDevice, x: &[f32], cols: usize) -> Result<&[Pair]> {
        let (rows, cells) = (x.len() / cols, cols.div_ceil(2));
        if self.pairs.len() < rows * cells {
            self.pairs = Buffer::zeros((rows * cells).next_power_of_two())?;
        }
        let pairs = SharedSlice::new(&mut self.pairs[..rows * cells]);
        cpu.for_row_chunks(rows, cols, &|rows| {
            // SAFETY: each row is one task's.
            let to = unsafe { pairs.part(rows.start * cells..rows.end * cells) };
            dispatch(cpu.isa, RoundRows { x: &x[rows.start * cols..rows.end * cols], cols, to });
        });
        Ok(&self.pairs[..rows * cells])
    }
}

struct RoundRows<'a> {
    x: &'a [f32],
    cols: usize,
    to: &'a mut [Pair],
}

impl Kernel for RoundRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, to) in self.x.chunks_exact(self.cols).zip(self.to.chunks_exact_mut(self.cols.div_ceil(2))) {
            round_row(s, x, s.splat(1.0), to);
        }
    }
}

/// The values of `x`, times the factor, as cells; missing ones are zero.
#[inline(always)]
pub(super) fn round_row<S: Simd, C: Cell>(s: S, x: &[f32], factor: S::F, to: &mut [C]) {
    for (x, to) in x.chunks(LANES).zip(to.chunks_mut(LANES / C::VALUES)) {
        let values = s.mul(s.load_partial(x), factor);
        if to.len() == LANES / C::VALUES {
            C::round(s, values, to);
        } else {
            let mut lanes = [0.0; LANES];
            s.store(&mut lanes, values);
            for (values, to) in lanes.chunks(C::VALUES).zip(to) {
                *to = C::of(values);
            }
        }
    }
}
