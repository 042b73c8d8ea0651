//! Packed weights: panels of 16 out features, interleaved so that each SIMD lane is one feature's dot product.
//!
//! A lane then runs over the in features in order, without a sum across lanes, which is what makes results independent of
//! the instruction set and of the other rows. Features missing in the last panel are zeros.
//!
//! ```text
//! float panel    [cols][16], of bf16 [cols / 2][16][2] with odd cols rounded up
//! integer panel  [cols / 32] records of
//!                  codes   4 bits: [4][16 features][4]  low nibbles: in features 4j..4j+4, high nibbles: 16 on
//!                          8 bits: [8][16 features][4]
//!                  scales  [1 or 2][16] f16 or f32, per group of 32 or of 16
//!                  mins    as the scales, where the format has them
//! ```
//!
//! Four consecutive in features of one out feature are the 32 bits that `vpdpbusd` multiplies in a lane.

use super::pair::Pair;
use super::simd::LANES;
use crate::Format;
use crate::buffer::Buffer;

/// In features per record of an integer panel, and per scale of the activations.
pub(crate) const GROUP: usize = 32;

/// One stored matrix of a weight, packed.
pub(crate) struct Part {
    pub(crate) panels: Panels,
    /// Out features.
    pub(crate) rows: usize,
    /// Where they begin in the stacked weight.
    pub(crate) first_row: usize,
    pub(crate) cols: usize,
}

impl Part {
    /// Panels, the last one perhaps partly empty.
    pub(crate) fn panel_count(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Live out features of a panel.
    pub(crate) fn live(&self, panel: usize) -> usize {
        (self.rows - panel * LANES).min(LANES)
    }

    /// Bytes of one panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panels.bytes() / self.panel_count()
    }
}

/// The elements of a part's panels.
pub(crate) enum Panels {
    F32(Buffer<f32>),
    F16(Buffer<u16>),
    BF16(Buffer<Pair>),
    Quant(QuantLayout, Buffer<u8>),
}

impl Panels {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Panels::F32(data) => data.bytes(),
            Panels::F16(data) => data.bytes(),
            Panels::BF16(data) => data.bytes(),
            Panels::Quant(_, data) => data.bytes(),
        }
    }
}

/// The shape of an integer panel's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuantLayout {
    /// Codes take 4 bits, else 8.
    pub(crate) nibbles: bool,
    /// Scales and minimums are f32, else f16.
    pub(crate) wide: bool,
    /// There are minimums.
    pub(crate) min: bool,
    /// A scale covers 16 in features, else 32.
    pub(crate) halves: bool,
    /// The code that stands for zero.
    pub(crate) zero: i32,
}

impl QuantLayout {
    pub(crate) fn of(format: Format) -> Self {
        QuantLayout {
            nibbles: format.fits_nibbles(),
            wide: !format.has_half_scales(),
            min: format.has_min(),
            halves: format.group() == 16,
            zero: format.zero_point(),
        }
    }

    /// Bytes of codes per record.
    pub(crate) fn code_bytes(self) -> usize {
        if self.nibbles { LANES * GROUP / 2 } else { LANES * GROUP }
    }

    /// Bytes of scales per record; of minimums, where there are any.
    pub(crate) fn scale_bytes(self) -> usize {
        LANES * if self.wide { 4 } else { 2 } * if self.halves { 2 } else { 1 }
    }

    /// Bytes per record.
    pub(crate) fn record_bytes(self) -> usize {
        self.code_bytes() + self.scale_bytes() * if self.min { 2 } else { 1 }
    }
}
