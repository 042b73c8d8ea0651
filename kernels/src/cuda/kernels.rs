//! The kernels that every model needs, by their names; those that depend on the size of a head are the attention plan's.

use super::driver::{Driver, Element, Kernel};
use crate::{Format, Result};

/// Formats whose blocks stay as they are on a device, and how kernels' names call them.
const BLOCK_FORMATS: [(Format, &str); 5] = [
    (Format::Q4_0, "q4_0"),
    (Format::Q4_1, "q4_1"),
    (Format::Q8_0, "q8_0"),
    (Format::Q4_K, "q4_k"),
    (Format::Q6_K, "q6_k"),
];
/// Rows that the kernels of [`Kernels::gemv`] and [`BlockKernels::gemv`] take at most.
pub(super) const GEMV_ROWS: [usize; 4] = [1, 2, 4, 8];
pub(super) const BLOCK_GEMV_ROWS: [usize; 3] = [1, 4, 8];

/// Kernels for activations of one type.
#[derive(Clone)]
pub(crate) struct Kernels {
    pub(super) gather: Kernel,
    pub(super) rms_norm: Kernel,
    pub(super) add_rms_norm: Kernel,
    pub(super) silu_mul: Kernel,
    pub(super) rope_store: Kernel,
    pub(super) fill: Kernel,
    pub(super) sample: SampleKernels,
    pub(super) step_inputs: Kernel,
    pub(super) gemv: [Kernel; 4],
    blocks: [BlockKernels; 5],
}

/// The launches of sampling, in their order; which of them a row takes part in is up to what it asks for.
#[derive(Clone, Copy)]
pub(super) struct SampleKernels {
    /// Every row.
    pub(super) best: Kernel,
    /// Rows with a temperature or log-probabilities.
    pub(super) weigh: Kernel,
    /// Rows with a temperature and top-k, top-p or min-p.
    pub(super) select: Kernel,
}

/// Kernels for weights of one quantized format.
#[derive(Clone, Copy)]
pub(super) struct BlockKernels {
    pub(super) gemv: [Kernel; 3],
    pub(super) dequantize: Kernel,
}

impl Kernels {
    pub(super) fn new(driver: &dyn Driver, element: Element) -> Result<Kernels> {
        let suffix = element.suffix();
        let find = |op: &str| driver.kernel(&format!("kvern_{op}_{suffix}"), 0);
        let gemv = |name: &str, rows: usize| driver.kernel(&format!("kvern_gemv_{name}{suffix}_r{rows}"), 0);
        let block = |(_, name): (Format, &str)| -> Result<BlockKernels> {
            let [one, four, eight] = BLOCK_GEMV_ROWS.map(|rows| gemv(&format!("{name}_"), rows));
            Ok(BlockKernels { gemv: [one?, four?, eight?], dequantize: find(&format!("dequantize_{name}"))? })
        };
        let [one, two, four, eight] = GEMV_ROWS.map(|rows| gemv("", rows));
        let [q4_0, q4_1, q8_0, q4_k, q6_k] = BLOCK_FORMATS.map(block);
        Ok(Kernels {
            gather: find("gather")?,
            rms_norm: find("rms_norm")?,
            add_rms_norm: find("add_rms_norm")?,
            silu_mul: find("silu_mul")?,
            rope_store: find("rope_store")?,
            fill: find("fill")?,
            sample: SampleKernels {
                best: driver.kernel("kvern_sample_best", 0)?,
                weigh: driver.kernel("kvern_sample_weigh", 0)?,
                select: driver.kernel("kvern_sample_select", 0)?,
            },
            step_inputs: driver.kernel("kvern_step_inputs", 0)?,
            gemv: [one?, two?, four?, eight?],
            blocks: [q4_0?, q4_1?, q8_0?, q4_k?, q6_k?],
        })
    }

    /// Kernels for blocks of this format; `None` where they are widened when they are loaded.
    pub(super) fn blocks(&self, format: Format) -> Option<&BlockKernels> {
        let at = BLOCK_FORMATS.iter().position(|(known, _)| *known == format)?;
        Some(&self.blocks[at])
    }
}
