//! Weight matrices: as they lie in a file, and packed for a device.

use crate::cpu::pack;
use crate::cpu::panel::Part;
use crate::device::Backend;
use crate::{Device, Format, KernelError, Result};

/// How the rows of a stored matrix map to the rows of the packed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    Natural,
    /// The rows of each of `heads` heads are stored for interleaved RoPE (GGUF's llama q and k) and are brought back to
    /// the order for split-half RoPE: of a head's `d` rows, stored row `2i + j` becomes row `i + j * d / 2`.
    UnpermuteRope {
        heads: usize,
    },
}

impl RowOrder {
    /// The stored row that becomes packed row `row` of `rows`.
    pub(crate) fn stored_row(self, row: usize, rows: usize) -> usize {
        match self {
            RowOrder::Natural => row,
            RowOrder::UnpermuteRope { heads } => {
                let head_rows = rows / heads;
                let (head, at) = (row / head_rows, row % head_rows);
                let half = head_rows / 2;
                head * head_rows + 2 * (at % half) + at / half
            }
        }
    }
}

/// A matrix in a file: `rows` (out features) by `cols` (in features), row-major, in whole blocks per row.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    /// Name for messages.
    pub name: &'a str,
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub bytes: &'a [u8],
    pub row_order: RowOrder,
}

impl MatrixView<'_> {
    /// Bytes per stored row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols / self.format.block_elements() * self.format.block_bytes()
    }

    /// The bytes of one stored row.
    pub(crate) fn row(&self, stored_row: usize) -> &[u8] {
        &self.bytes[stored_row * self.row_bytes()..][..self.row_bytes()]
    }

    /// Refuses what a hostile file could claim; after this, sizes fit together and do not overflow.
    fn check(&self, cols: usize) -> Result<()> {
        let MatrixView { name, format, rows, .. } = *self;
        let refuse = |expected: String, found: String| {
            Err(KernelError::shape("pack", format!("tensor {name:?} with {expected}"), found))
        };
        if self.cols != cols {
            return refuse(format!("{cols} columns as the matrices it is stacked with"), format!("{}", self.cols));
        }
        let block = format.block_elements();
        if rows == 0 || cols == 0 || !cols.is_multiple_of(block) {
            return refuse(format!("positive rows and columns in blocks of {block}"), format!("{rows} x {cols}"));
        }
        // Panels take whole groups of 16 rows and at most 4 bytes an element, at load and packed: both stay addressable.
        let elements = rows.checked_next_multiple_of(16).and_then(|rows| rows.checked_mul(cols));
        if elements.and_then(|n| n.checked_mul(8)).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return refuse("a size in range".into(), format!("{rows} x {cols}"));
        }
        let expected = rows * self.row_bytes();
        if self.bytes.len() != expected {
            return refuse(format!("{expected} bytes for {rows} x {cols} {format:?}"), format!("{}", self.bytes.len()));
        }
        match self.row_order {
            RowOrder::UnpermuteRope { heads } if heads == 0 || !rows.is_multiple_of(heads) || rows / heads % 2 != 0 => {
                refuse(format!("an even number of rows in each of {heads} heads"), format!("{rows} rows"))
            }
            _ => Ok(()),
        }
    }
}

/// What a packed weight computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// As stored: quantized formats keep their quantization (activations are quantized per 32 to int8); BF16 is multiplied
    /// with activations rounded to BF16; F16 stays 16-bit in memory and is widened in registers.
    #[default]
    AsStored,
    /// Dequantized to F32 at load; the oracle.
    F32,
    /// Rounded to BF16 at load, as are activations in each product.
    BF16,
}

/// A weight matrix in the layout that the device's kernels want. Several stored matrices of equal `cols` may be stacked
/// along the out features (q, k, v; gate, up), each keeping its own format.
pub struct Weight {
    pub(crate) parts: Vec<Part>,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// Packs the matrices, one under the other, with all threads of the device. Sizes that do not fit are
    /// [`Shape`](KernelError::Shape) and name the tensor. Time: about that of reading the bytes once.
    pub fn pack(device: &Device, parts: &[MatrixView<'_>], precision: Precision) -> Result<Weight> {
        let Backend::Cpu(cpu) = &device.backend else { return Err(KernelError::BuiltWithoutCuda) };
        let Some(cols) = parts.first().map(|part| part.cols) else {
            return Err(KernelError::shape("pack", "at least one matrix", "none"));
        };
        let mut rows = 0usize;
        for part in parts {
            part.check(cols)?;
            rows = rows.checked_add(part.rows).filter(|&rows| u32::try_from(rows).is_ok()).ok_or_else(|| {
                KernelError::shape("pack", "less than 2^32 stacked rows", format!("tensor {:?} beyond them", part.name))
            })?;
        }
        let mut first_row = 0;
        let mut packed = Vec::with_capacity(parts.len());
        for part in parts {
            packed.push(pack::pack(cpu, part, precision, first_row)?);
            first_row += part.rows;
        }
        Ok(Weight { parts: packed, rows, cols })
    }

    /// Out features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// In features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.panels.bytes()).sum()
    }
}
