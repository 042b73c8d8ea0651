//! Products of activations with weights: kernels of our own for few rows, cuBLASLt for many.

use kvern_cuda_abi::{DequantizeParams, GemvParams, Ptr, launch};

use super::driver::{Element, Gemm};
use super::kernels::{BLOCK_GEMV_ROWS, BlockKernels, GEMV_ROWS};
use super::weights::{DevicePart, Stored};
use super::{CudaDevice, shape};
use crate::{KernelError, Result, Tensor, Weight};

/// Most rows for which the product of few rows is taken with dense weights. With more, cuBLASLt's tiles waste less.
const DENSE_GEMV_ROWS_MAX: usize = 4;
/// As above with quantized weights, which otherwise are widened first: twice the reads and a write.
const BLOCK_GEMV_ROWS_MAX: usize = 8;
/// The kernels take in features in packs of so many.
const GEMV_VALUES: usize = 8;
const DEQUANTIZE_THREADS: usize = 256;

/// A product's other side: rows of x, where the results go, and what is added.
struct Sides {
    x: Ptr,
    rows: usize,
    inner: usize,
    bias: Option<Ptr>,
    out: Ptr,
    out_element: Element,
    out_stride: usize,
}

pub(crate) fn matmul(gpu: &CudaDevice, x: &Tensor, w: &Weight, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    if x.rows() == 0 {
        return Ok(());
    }
    let weight = w.on_device()?;
    let sides = Sides {
        x: x.ptr(),
        rows: x.rows(),
        inner: x.cols(),
        bias: bias.map(Tensor::ptr),
        out: out.ptr(),
        out_element: out.element(),
        out_stride: out.cols(),
    };
    for part in &weight.parts {
        match &part.stored {
            Stored::Dense => dense(gpu, &sides, part)?,
            Stored::Blocks(format) => {
                let kernels = gpu.kernels.blocks(*format).ok_or_else(|| no_kernels(*format))?;
                if sides.rows <= BLOCK_GEMV_ROWS_MAX {
                    blocks_of_few_rows(gpu, &sides, part, kernels)?;
                } else {
                    widened(gpu, &sides, part, kernels)?;
                }
            }
        }
    }
    Ok(())
}

fn no_kernels(format: crate::Format) -> KernelError {
    KernelError::Unsupported(format!("no kernels for {format:?} blocks"))
}

/// The product of few rows, by the kernel that takes the fewest of those that take all.
fn gemv(gpu: &CudaDevice, sides: &Sides, part: &DevicePart, kernel: super::Kernel) -> Result<()> {
    let params = GemvParams {
        x: sides.x,
        w: part.memory.ptr(),
        bias: sides.bias.map_or(Ptr::NULL, |bias| offset(bias, part.first_row * gpu.element.bytes())),
        out: offset(sides.out, part.first_row * sides.out_element.bytes()),
        rows: sides.rows as u32,
        inner: sides.inner as u32,
        outputs: part.rows as u32,
        out_f32: u32::from(sides.out_element == Element::F32),
        out_stride: sides.out_stride as u32,
        prefetch: u32::from(gpu.early),
    };
    let shape = shape([part.rows.div_ceil(launch::GEMV_OUTPUTS), 1], launch::GEMV_THREADS);
    // SAFETY: x has `rows` rows of `inner`, out as many of `out_stride`, of which the part's are the columns from its first.
    unsafe { gpu.launch(kernel, shape, &params) }
}

fn dense(gpu: &CudaDevice, sides: &Sides, part: &DevicePart) -> Result<()> {
    let few = sides.rows <= DENSE_GEMV_ROWS_MAX && sides.inner.is_multiple_of(GEMV_VALUES);
    // With one element for all, results of that element are meant where it is F32 too.
    if few {
        let at = GEMV_ROWS.iter().position(|&most| sides.rows <= most).expect("more rows than that are not few");
        return gemv(gpu, sides, part, gpu.kernels.gemv[at]);
    }
    product(gpu, sides, part.memory.ptr(), part.first_row, part.rows)
}

fn blocks_of_few_rows(gpu: &CudaDevice, sides: &Sides, part: &DevicePart, kernels: &BlockKernels) -> Result<()> {
    let at = BLOCK_GEMV_ROWS.iter().position(|&most| sides.rows <= most).expect("more rows than that are not few");
    gemv(gpu, sides, part, kernels.gemv[at])
}

/// Widens as many rows of the weight at a time as there is room for, and multiplies with those.
fn widened(gpu: &CudaDevice, sides: &Sides, part: &DevicePart, kernels: &BlockKernels) -> Result<()> {
    let Stored::Blocks(format) = part.stored else { return Ok(()) };
    let (elements, row_elements) = (gpu.widened.bytes() / gpu.element.bytes(), sides.inner);
    let row_bytes = row_elements / format.block_elements() * format.block_bytes();
    // Kernels take whole runs of 256 elements.
    let rows_at_once = (elements / row_elements) / 256 * 256;
    if rows_at_once == 0 {
        let expected = format!("room for 256 widened rows of {row_elements}");
        return Err(KernelError::shape("matmul", expected, format!("{elements} elements")));
    }
    for first in (0..part.rows).step_by(rows_at_once) {
        let rows = rows_at_once.min(part.rows - first);
        let count = rows * row_elements;
        let params = DequantizeParams {
            blocks: part.memory.at(first * row_bytes),
            out: gpu.widened.ptr(),
            elements: count as u64,
        };
        let blocks = count.div_ceil(8 * DEQUANTIZE_THREADS).clamp(1, 1 << 16);
        // SAFETY: so many elements lie there, and there is room for as many.
        unsafe { gpu.launch(kernels.dequantize, shape([blocks, 1], DEQUANTIZE_THREADS), &params)? };
        product(gpu, sides, gpu.widened.ptr(), part.first_row + first, rows)?;
    }
    Ok(())
}

/// By cuBLASLt, with the dense weights of output features `first..first + rows`.
fn product(gpu: &CudaDevice, sides: &Sides, w: Ptr, first: usize, rows: usize) -> Result<()> {
    let gemm = Gemm {
        element: gpu.element,
        out_element: sides.out_element,
        x: sides.x,
        w,
        bias: sides.bias.map_or(Ptr::NULL, |bias| offset(bias, first * gpu.element.bytes())),
        out: offset(sides.out, first * sides.out_element.bytes()),
        m: sides.rows,
        n: rows,
        k: sides.inner,
        out_stride: sides.out_stride,
        multiprocessors: gpu.part().map_or(0, |part| part.multiprocessors),
        workspace: gpu.workspace.ptr(),
        workspace_bytes: gpu.workspace.bytes(),
    };
    // SAFETY: as of the product of few rows.
    unsafe { gpu.driver.gemm(gpu.stream(), &gemm) }
}

fn offset(at: Ptr, bytes: usize) -> Ptr {
    Ptr(at.0 + bytes as u64)
}
