//! How weights are stored in files, and the values that the stored bytes mean.
//!
//! Every format but the three float ones is a sequence of blocks, and every block comes apart into the same thing: integer
//! codes, and per group of 16 or 32 of them a scale and sometimes a minimum, so that
//! `value = scale * (code - zero point) + minimum`. The layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`).
//! Both the reference [`dequantize`] and the packing of weights read blocks through [`Format::unpack`].

mod k_quants;

use half::{bf16, f16};

use crate::{KernelError, Result};

/// How weights are stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Elements of the largest block.
pub(crate) const BLOCK_ELEMENTS_MAX: usize = 256;

/// One block of a quantized format, taken apart. Only the first `block_elements` codes and their groups are meaningful.
pub(crate) struct Unpacked {
    pub(crate) codes: [u8; BLOCK_ELEMENTS_MAX],
    /// What the scales, and the minimums, of the block's groups are multiples of; f16 values, the second one perhaps negated.
    pub(crate) scale_unit: f32,
    pub(crate) min_unit: f32,
    /// Per group of [`Format::group`] codes: its scale in units, 1 where a block is one group.
    pub(crate) scales: [i8; BLOCK_ELEMENTS_MAX / 16],
    /// As `scales`; below 64. Meaningless where the format has no minimums.
    pub(crate) mins: [i8; BLOCK_ELEMENTS_MAX / 16],
}

impl Unpacked {
    pub(crate) fn new() -> Self {
        Unpacked { codes: [0; BLOCK_ELEMENTS_MAX], scale_unit: 0.0, min_unit: 0.0, scales: [1; 16], mins: [1; 16] }
    }

    /// The scale of a group. The product is exact: 11 bits by at most 8.
    pub(crate) fn scale(&self, group: usize) -> f32 {
        self.scale_unit * f32::from(self.scales[group])
    }

    /// The minimum of a group; exact as the scale is.
    pub(crate) fn min(&self, group: usize) -> f32 {
        self.min_unit * f32::from(self.mins[group])
    }
}

impl Format {
    /// Elements per block: 1, 32 or 256.
    #[must_use]
    pub fn block_elements(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
        }
    }

    /// Bytes per block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q2_K => 84,
            Format::Q3_K => 110,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
        }
    }

    /// Codes that share a scale: 16 or 32.
    pub(crate) fn group(self) -> usize {
        match self {
            Format::Q2_K | Format::Q3_K | Format::Q6_K => 16,
            _ => 32,
        }
    }

    /// The code that stands for zero, where there is no minimum.
    pub(crate) fn zero_point(self) -> i32 {
        match self {
            Format::Q3_K => 4,
            Format::Q4_0 => 8,
            Format::Q5_0 => 16,
            Format::Q6_K => 32,
            Format::Q8_0 => 128,
            _ => 0,
        }
    }

    /// Whether groups have a minimum beside their scale.
    pub(crate) fn has_min(self) -> bool {
        matches!(self, Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K)
    }

    /// Takes one block of a quantized format apart.
    pub(crate) fn unpack(self, block: &[u8], out: &mut Unpacked) {
        assert_eq!(block.len(), self.block_bytes(), "a block of {self:?}");
        match self {
            Format::Q4_0 => {
                out.scale_unit = half_at(block, 0);
                unpack_nibbles(&block[2..18], &mut out.codes);
            }
            Format::Q4_1 => {
                (out.scale_unit, out.min_unit) = (half_at(block, 0), half_at(block, 2));
                unpack_nibbles(&block[4..20], &mut out.codes);
            }
            Format::Q5_0 => {
                out.scale_unit = half_at(block, 0);
                unpack_nibbles(&block[6..22], &mut out.codes);
                add_fifth_bits(&block[2..6], &mut out.codes);
            }
            Format::Q5_1 => {
                (out.scale_unit, out.min_unit) = (half_at(block, 0), half_at(block, 2));
                unpack_nibbles(&block[8..24], &mut out.codes);
                add_fifth_bits(&block[4..8], &mut out.codes);
            }
            Format::Q8_0 => {
                out.scale_unit = half_at(block, 0);
                for (code, &byte) in out.codes.iter_mut().zip(&block[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            Format::Q2_K => k_quants::q2(block, out),
            Format::Q3_K => k_quants::q3(block, out),
            Format::Q4_K => k_quants::q4(block, out),
            Format::Q5_K => k_quants::q5(block, out),
            Format::Q6_K => k_quants::q6(block, out),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("float formats have no blocks"),
        }
    }
}

/// The little-endian f16 at byte `at`, widened.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 16 bytes to 32 codes: low nibbles first, then high ones.
fn unpack_nibbles(bytes: &[u8], codes: &mut [u8; BLOCK_ELEMENTS_MAX]) {
    for (i, &byte) in bytes.iter().enumerate() {
        (codes[i], codes[i + 16]) = (byte & 15, byte >> 4);
    }
}

/// Bit `i` of the four bytes is bit 4 of code `i`.
fn add_fifth_bits(bytes: &[u8], codes: &mut [u8; BLOCK_ELEMENTS_MAX]) {
    for (i, code) in codes.iter_mut().take(32).enumerate() {
        *code |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Widens stored elements to f32: the readable scalar reference of every format. `bytes` holds whole blocks and
/// `out.len()` is their number of elements; anything else is [`KernelError::Shape`]. Layouts as in ggml's `ggml-quants.c`.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let (elements, block_bytes) = (format.block_elements(), format.block_bytes());
    let blocks = out.len() / elements;
    if !out.len().is_multiple_of(elements) || blocks.checked_mul(block_bytes) != Some(bytes.len()) {
        let expected = format!("whole {format:?} blocks of {block_bytes} bytes for {elements} elements each");
        return Err(KernelError::shape("dequantize", expected, format!("{} bytes for {}", bytes.len(), out.len())));
    }
    match format {
        Format::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Format::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        Format::BF16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => {
            let mut unpacked = Unpacked::new();
            for (values, block) in out.chunks_exact_mut(elements).zip(bytes.chunks_exact(block_bytes)) {
                format.unpack(block, &mut unpacked);
                for (i, value) in values.iter_mut().enumerate() {
                    let group = i / format.group();
                    let code = i32::from(unpacked.codes[i]) - format.zero_point();
                    *value = affine(format.has_min(), unpacked.scale(group), code, unpacked.min(group));
                }
            }
        }
    }
    Ok(())
}

/// `scale * code + min`. The product is exact wherever there is a minimum, so that one rounding is all there is.
pub(crate) fn affine(has_min: bool, scale: f32, code: i32, min: f32) -> f32 {
    let product = scale * code as f32;
    if has_min { product + min } else { product }
}
