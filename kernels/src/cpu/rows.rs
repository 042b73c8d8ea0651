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
        for (sum, delta) in residual.iter_mut().zip(&delta[range]) {
            *sum += delta;
        }
        dispatch(cpu.isa, Norm { x: residual, weight, eps, out });
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
            let scale = inverse_rms(s, x, self.eps);
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
            let (out, out_tail) = out.as_chunks_mut::<LANES>();
            for ((x, weight), out) in x.iter().zip(weight).zip(out) {
                s.store(out, s.mul(s.mul(s.load(x), s.splat(scale)), s.load(weight)));
            }
            for ((x, weight), out) in x_tail.iter().zip(weight_tail).zip(out_tail) {
                *out = x * scale * weight;
            }
        }
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
    let (lanes, tail) = x.as_chunks::<LANES>();
    let mut squares = s.splat(0.0);
    for lanes in lanes {
        let lanes = s.load(lanes);
        squares = s.fma(lanes, lanes, squares);
    }
    if !tail.is_empty() {
        let lanes = s.load_partial(tail);
        squares = s.fma(lanes, lanes, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
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
                if let (Some(gate), Some(up), Some(out)) = (gate.as_array(), up.as_array(), out.as_mut_array()) {
                    s.store(out, silu_mul_lanes(s, s.load(gate), s.load(up)));
                } else {
                    s.store_partial(out, silu_mul_lanes(s, s.load_partial(gate), s.load_partial(up)));
                }
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
