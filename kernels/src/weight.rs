//! Weight matrices: as they lie in a file, and packed for a device.

use crate::cpu::pack;
use crate::cpu::panel::Part;
use crate::cuda::weights::DeviceWeight;
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
    /// Rounded to F16 at load; on the CPU widened in registers and multiplied with F32 activations.
    F16,
}

/// A weight matrix in the layout that the device's kernels want. Several stored matrices of equal `cols` may be stacked
/// along the out features (q, k, v; gate, up), each keeping its own format.
pub struct Weight {
    /// Of the CPU; none on a GPU.
    pub(crate) parts: Vec<Part>,
    device: Option<DeviceWeight>,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// Packs the matrices, one under the other, with all threads of the device. Sizes that do not fit are
    /// [`Shape`](KernelError::Shape) and name the tensor. Time: about that of reading the bytes once.
    pub fn pack(device: &Device, parts: &[MatrixView<'_>], precision: Precision) -> Result<Weight> {
        Weight::pack_as(device, parts, precision, false)
    }

    /// As [`pack`](Self::pack), for a table whose rows are looked up, and perhaps a product too: a GPU widens it.
    pub fn table(device: &Device, table: MatrixView<'_>, precision: Precision) -> Result<Weight> {
        Weight::pack_as(device, &[table], precision, true)
    }

    /// `rows x cols` values that depend on the seed alone, uniform in `[-limit, limit)`, of the type that products on the device
    /// take without widening: for measuring. On the CPU they are BF16.
    pub fn random(device: &Device, rows: usize, cols: usize, seed: u64, limit: f32) -> Result<Weight> {
        let empty =
            MatrixView { name: "random", format: Format::BF16, rows, cols, bytes: &[], row_order: RowOrder::Natural };
        if rows.checked_mul(cols).and_then(|n| n.checked_mul(8)).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(KernelError::shape("random weights", "a size in range", format!("{rows} x {cols}")));
        }
        if let Backend::Cuda(gpu) = &device.backend {
            let device = Some(DeviceWeight::random(gpu, rows, cols, seed, limit)?);
            return Ok(Weight { parts: Vec::new(), device, rows, cols });
        }
        let value = |at: usize| half::bf16::from_f32(random_unit(seed, at as u64) * limit).to_le_bytes();
        let bytes: Vec<u8> = (0..rows * cols).flat_map(value).collect();
        Weight::pack(device, &[MatrixView { bytes: &bytes, ..empty }], Precision::AsStored)
    }

    fn pack_as(device: &Device, parts: &[MatrixView<'_>], precision: Precision, table: bool) -> Result<Weight> {
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
        let cpu = match &device.backend {
            Backend::Cpu(cpu) => cpu,
            Backend::Cuda(gpu) => {
                let device = Some(DeviceWeight::pack(gpu, parts, precision, table)?);
                return Ok(Weight { parts: Vec::new(), device, rows, cols });
            }
        };
        let mut first_row = 0;
        let mut packed = Vec::with_capacity(parts.len());
        for part in parts {
            packed.push(pack::pack(cpu, part, precision, first_row)?);
            first_row += part.rows;
        }
        Ok(Weight { parts: packed, device: None, rows, cols })
    }

    /// The weight on a GPU.
    pub(crate) fn on_device(&self) -> Result<&DeviceWeight> {
        let missing = || KernelError::shape("matmul", "a weight on the GPU", "one on the CPU");
        self.device.as_ref().ok_or_else(missing)
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
        let packed: usize = self.parts.iter().map(|part| part.panels.bytes()).sum();
        packed + self.device.as_ref().map_or(0, DeviceWeight::bytes)
    }
}

/// Number `at` of a seed's, uniform in [-1, 1): 24 bits of SplitMix64's finalizer (Steele, Lea and Flood, 2014), as the kernels
/// make them.
fn random_unit(seed: u64, at: u64) -> f32 {
    let mut z = seed.wrapping_add((at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f32 / (1 << 23) as f32 - 1.0
}
