//! Products of matrices as plain loops, in place of the vendor's library: f32 sums in the order of k, one rounding at
//! the end.

use half::{bf16, f16};
use kvern_kernels::cuda::driver::{Element, Gemm};

use super::access::{Access, Extent, Kind, Place};

/// Outputs that are summed side by side, so that their sums share what is loaded of x.
const TILE: usize = 16;

/// Operands; none where a pointer is null.
///
/// # Errors
/// For a product of nothing, rows that overlap, and missing matrices.
pub(super) fn accesses(gemm: &Gemm) -> Result<Vec<Access>, String> {
    let Gemm { m, n, k, out_stride, .. } = *gemm;
    if m == 0 || n == 0 || k == 0 {
        return Err(format!("expected sizes of at least 1, found {m}x{n}x{k}"));
    }
    if out_stride < n {
        return Err(format!("expected rows at least {n} elements apart, found {out_stride}"));
    }
    if gemm.out_element != gemm.element && gemm.out_element != Element::F32 {
        return Err(format!("expected results of {} or f32, found {}", gemm.element, gemm.out_element));
    }
    let operands = [
        ("x", gemm.x.0, m * k * gemm.element.bytes(), Kind::Read),
        ("w", gemm.w.0, n * k * gemm.element.bytes(), Kind::Read),
        ("out", gemm.out.0, ((m - 1) * out_stride + n) * gemm.out_element.bytes(), Kind::Write),
        ("bias", gemm.bias.0, n * gemm.element.bytes(), Kind::Read),
        ("workspace", gemm.workspace.0, gemm.workspace_bytes, Kind::Write),
    ];
    if let Some((name, ..)) = operands[..3].iter().find(|(_, at, ..)| *at == 0) {
        return Err(format!("{name}: expected a matrix, found null"));
    }
    let access = |(name, at, bytes, kind)| {
        let extent = Extent::Bytes(bytes as u64);
        (at != 0).then_some(Access { name, at, extent, kind, place: Place::Device })
    };
    Ok(operands.into_iter().filter_map(access).collect())
}

/// # Safety
/// Matrices lie within memory that nothing else uses now.
pub(super) unsafe fn run(gemm: &Gemm) {
    let Gemm { m, n, k, .. } = *gemm;
    let mut x = vec![0.0; m * k];
    // SAFETY: as the caller promises, here and below: x is as large.
    unsafe { widen(gemm.element, gemm.x.0, 0, &mut x) };
    let (mut row, mut tile) = (vec![0.0; k], vec![[0.0; TILE]; k]);
    let mut bias = [0.0; TILE];
    for first in (0..n).step_by(TILE) {
        let columns = TILE.min(n - first);
        for column in 0..columns {
            // SAFETY: the row is one of w's n.
            unsafe { widen(gemm.element, gemm.w.0, (first + column) * k, &mut row) };
            tile.iter_mut().zip(&row).for_each(|(tile, value)| tile[column] = *value);
        }
        if gemm.bias.0 != 0 {
            // SAFETY: the bias has n elements.
            unsafe { widen(gemm.element, gemm.bias.0, first, &mut bias[..columns]) };
        }
        for (at, x) in x.chunks_exact(k).enumerate() {
            let mut sums = [0.0f32; TILE];
            for (x, w) in x.iter().zip(&tile) {
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum += x * w;
                }
            }
            if gemm.bias.0 != 0 {
                sums.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += bias);
            }
            // SAFETY: these are elements of one of out's m rows.
            unsafe { narrow(gemm.out_element, gemm.out.0, at * gemm.out_stride + first, &sums[..columns]) };
        }
    }
}

/// Reads elements from the `first` on.
///
/// # Safety
/// They are there.
unsafe fn widen(element: Element, at: u64, first: usize, values: &mut [f32]) {
    for (i, value) in values.iter_mut().enumerate() {
        // SAFETY: as the caller promises; an address of any alignment will do.
        unsafe {
            *value = match element {
                Element::F32 => (at as *const f32).add(first + i).read_unaligned(),
                Element::F16 => (at as *const f16).add(first + i).read_unaligned().to_f32(),
                Element::BF16 => (at as *const bf16).add(first + i).read_unaligned().to_f32(),
            }
        }
    }
}

/// Writes elements from the `first` on, rounded to nearest, ties to even.
///
/// # Safety
/// They may be written.
unsafe fn narrow(element: Element, at: u64, first: usize, values: &[f32]) {
    for (i, value) in values.iter().enumerate() {
        // SAFETY: as the caller promises; an address of any alignment will do.
        unsafe {
            match element {
                Element::F32 => (at as *mut f32).add(first + i).write_unaligned(*value),
                Element::F16 => (at as *mut f16).add(first + i).write_unaligned(f16::from_f32(*value)),
                Element::BF16 => (at as *mut bf16).add(first + i).write_unaligned(bf16::from_f32(*value)),
            }
        }
    }
}
