//! Ops on rows of activations: norms, the gated activation, gathering.

use super::CpuDevice;
use super::exp::exp;
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// `out = x / sqrt(mean(x^2) + eps) * weight` per row of `weight.len()`.
pub(crate) fn rms_norm(cpu: &CpuDevice, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let cols = weight.len();
    let out = SharedSlice::new(out);
    cpu.for_row_chunks(x.len() / cols, cols, &|rows| {
        let range = rows.start * cols..rows.end * cols;
        // SAFETY: each row is one task's.
        let out = unsafe { out.part(range.clone()) };
        dispatch(cpu.isa, Norm { x: &x[range], weight, eps, out });
    });
}

/// `residual += delta; out = rms_norm(residual)`.
pub(crate) fn add_rms_norm(
    cpu: &CpuDevice,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let cols = weight.len();
    let (residual, out) = (SharedSlice::new(residual), SharedSlice::new(out));
    cpu.for_row_chunks(delta.len() / cols, cols, &|rows| {
        let range = rows.start * cols..rows.end * cols;
        // SAFETY: each row is one task's.
        let (residual, out) = unsafe { (residual.part(range.clone()), out.part(range.clone())) };
        dispatch(cpu.isa, AddNorm { residual, delta: &delta[range], weight, eps, out });
    });
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            scale_row(s, x, inverse_rms(s, x, self.eps), self.weight, out);
        }
    }
}

struct AddNorm<'a> {
    residual: &'a mut [f32],
    delta: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for AddNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        let rows = self.residual.chunks_exact_mut(cols).zip(self.delta.chunks_exact(cols));
        for ((x, delta), out) in rows.zip(self.out.chunks_exact_mut(cols)) {
            let mut squares = s.splat(0.0);
            for (x, delta) in x.chunks_mut(LANES).zip(delta.chunks(LANES)) {
                let sum = s.add(s.load_partial(x), s.load_partial(delta));
                s.store_partial(x, sum);
                squares = s.fma(sum, sum, squares);
            }
            scale_row(s, x, inverse_root(s, squares, cols, self.eps), self.weight, out);
        }
    }
}

/// `out = x * scale * weight`.
#[inline(always)]
fn scale_row<S: Simd>(s: S, x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) {
    for ((x, weight), out) in x.chunks(LANES).zip(weight.chunks(LANES)).zip(out.chunks_mut(LANES)) {
        s.store_partial(out, s.mul(s.mul(s.load_partial(x), s.splat(scale)), s.load_partial(weight)));
    }
}

/// `x = x / sqrt(mean(x^2) + eps) * weight`, in place.
#[inline(always)]
pub(super) fn norm_in_place<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(s, x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// `1 / sqrt(mean(x^2) + eps)`: squares are summed in 16 lanes, which are then folded.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut squares = s.splat(0.0);
    for lanes in x.chunks(LANES) {
        let lanes = s.load_partial(lanes);
        squares = s.fma(lanes, lanes, squares);
    }
    inverse_root(s, squares, x.len(), eps)
}

/// `1 / sqrt(mean + eps)` of squares summed in lanes.
#[inline(always)]
fn inverse_root<S: Simd>(s: S, squares: S::F, count: usize, eps: f32) -> f32 {
    1.0 / (s.sum(squares) / count as f32 + eps).sqrt()
}

/// `out[t, i] = silu(x[t, i]) * x[t, cols + i]`, `out [rows, cols]`.
pub(crate) fn silu_mul(cpu: &CpuDevice, x: &[f32], cols: usize, out: &mut [f32]) {
    let rows = out.len() / cols;
    let out = SharedSlice::new(out);
    cpu.for_row_chunks(rows, 2 * cols, &|rows| {
        // SAFETY: each row is one task's.
        let out = unsafe { out.part(rows.start * cols..rows.end * cols) };
        dispatch(cpu.isa, SiluMul { x: &x[2 * rows.start * cols..2 * rows.end * cols], cols, out });
    });
}

struct SiluMul<'a> {
    x: &'a [f32],
    cols: usize,
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, out) in self.x.chunks_exact(2 * self.cols).zip(self.out.chunks_exact_mut(self.cols)) {
            let (gate, up) = x.split_at(self.cols);
            for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                s.store_partial(out, silu_mul_lanes(s, s.load_partial(gate), s.load_partial(up)));
            }
        }
    }
}

/// `gate / (1 + e^-gate) * up`.
#[inline(always)]
fn silu_mul_lanes<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
    let denominator = s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), gate)));
    s.mul(s.div(gate, denominator), up)
}

/// `out[i] = x[rows[i]]`, rows of `cols`.
pub(crate) fn gather_rows(cpu: &CpuDevice, x: &[f32], rows: &[u32], cols: usize, out: &mut [f32]) {
    let out = SharedSlice::new(out);
    cpu.for_row_chunks(rows.len(), cols, &|range| {
        for to in range {
            let from = rows[to] as usize;
            // SAFETY: each row is one task's.
            unsafe { out.part(to * cols..(to + 1) * cols) }.copy_from_slice(&x[from * cols..(from + 1) * cols]);
        }
    });
}
