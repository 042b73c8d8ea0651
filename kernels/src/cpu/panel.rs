//! Packed weights: panels of 16 out features, interleaved so that each SIMD lane is one feature's dot product.
//!
//! A lane then runs over the in features in order, without a sum across lanes, which is what makes results independent of
//! the instruction set and of the other rows. Features missing in the last panel are zeros.
//!
//! ```text
//! float panel    [cols][16]
//! integer panel  [cols / 32] records of 32 in features, laid out by `record.rs`
//! ```

use super::record::Layout;
use super::simd::LANES;
use crate::buffer::Buffer;

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
    BF16(Buffer<u16>),
    Quant(Layout, Buffer<u8>),
}

impl Panels {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Panels::F32(data) => data.bytes(),
            Panels::F16(data) | Panels::BF16(data) => data.bytes(),
            Panels::Quant(_, data) => data.bytes(),
        }
    }
}
