//! Integer panels: how their bytes lie. Each format keeps the bits that it has in the file, in an order that vectors like.
//!
//! A record is 32 in features of 16 out features: planes of codes, then what scales them. With K-quants eight records share a
//! head, as 256 in features share a block in the file.
//!
//! ```text
//! head     units of scales [16] f16; units of minimums [16] f16, where there are any       K-quants only
//! record   planes, in the order of the table of `Codes`
//!            byte    [8 quads][16 out features][4]
//!            nibble  [4][16][4]  low half: quad j, high half: quad j + 4
//!            pair    [2][16][4]  bits 2j and 2j + 1 of vector v: quad 4v + j
//!            bit        [16][4]  bit j: quad j
//!          scales   [16] f16; minimums [16] f16                                             not K-quants
//!                   [1 or 2][16] i8 in units; minimums as the scales                        K-quants
//!                   [2][16] of a nibble each: scales low, minimums high                     Q2_K
//! ```
//!
//! A quad is four consecutive in features: the 32 bits of a lane that one integer product takes.

use super::simd::LANES;
use crate::Format;

/// In features per record, and per scale of the activations.
pub(crate) const GROUP: usize = 32;
/// Bytes of one vector of codes.
pub(super) const VECTOR: usize = 4 * LANES;
/// Records under one head.
const BLOCK_RECORDS: usize = 8;

/// The planes that make up a code, lowest bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    /// 2 bits: pair.
    Two,
    /// 3 bits: pair, bit.
    Three,
    /// 4 bits: nibble.
    Four,
    /// 5 bits: nibble, bit.
    Five,
    /// 6 bits: nibble, pair.
    Six,
    /// 8 bits: byte.
    Eight,
}

/// What turns codes into values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// f16, one per record.
    Half,
    /// f16, a scale and a minimum per record.
    HalfMin,
    /// i8 times the head's unit, two per record.
    Halves,
    /// i8 times the head's units, a scale and a minimum per record.
    UnitsMin,
    /// Nibbles times the head's units, two scales and two minimums per record.
    HalvesMin,
}

/// The layout of a format's integer panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) codes: Codes,
    pub(crate) scales: Scales,
    /// The code that stands for zero.
    pub(crate) zero: i32,
}

impl Layout {
    /// That of a quantized format.
    pub(crate) fn of(format: Format) -> Self {
        let (codes, scales) = match format {
            Format::Q4_0 => (Codes::Four, Scales::Half),
            Format::Q4_1 => (Codes::Four, Scales::HalfMin),
            Format::Q5_0 => (Codes::Five, Scales::Half),
            Format::Q5_1 => (Codes::Five, Scales::HalfMin),
            Format::Q8_0 => (Codes::Eight, Scales::Half),
            Format::Q2_K => (Codes::Two, Scales::HalvesMin),
            Format::Q3_K => (Codes::Three, Scales::Halves),
            Format::Q4_K => (Codes::Four, Scales::UnitsMin),
            Format::Q5_K => (Codes::Five, Scales::UnitsMin),
            Format::Q6_K => (Codes::Six, Scales::Halves),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("float formats have no codes"),
        };
        Layout { codes, scales, zero: format.zero_point() }
    }

    /// Whether there are minimums.
    #[inline(always)]
    pub(crate) fn min(self) -> bool {
        matches!(self.scales, Scales::HalfMin | Scales::UnitsMin | Scales::HalvesMin)
    }

    /// Bytes before the records of a block.
    #[inline(always)]
    pub(crate) fn head_bytes(self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfMin => 0,
            Scales::Halves => 2 * LANES,
            Scales::UnitsMin | Scales::HalvesMin => 4 * LANES,
        }
    }

    /// Bytes of a record's planes.
    #[inline(always)]
    pub(crate) fn code_bytes(self) -> usize {
        VECTOR
            * match self.codes {
                Codes::Two => 2,
                Codes::Three => 3,
                Codes::Four => 4,
                Codes::Five => 5,
                Codes::Six => 6,
                Codes::Eight => 8,
            }
    }

    /// Bytes per record.
    #[inline(always)]
    pub(crate) fn record_bytes(self) -> usize {
        self.code_bytes()
            + LANES
                * match self.scales {
                    Scales::Half | Scales::Halves | Scales::UnitsMin | Scales::HalvesMin => 2,
                    Scales::HalfMin => 4,
                }
    }

    /// Records per block: those under one head.
    #[inline(always)]
    pub(crate) fn block_records(self) -> usize {
        if self.head_bytes() == 0 { 1 } else { BLOCK_RECORDS }
    }

    /// Bytes per block.
    #[inline(always)]
    pub(crate) fn block_bytes(self) -> usize {
        self.head_bytes() + self.block_records() * self.record_bytes()
    }

    /// Bytes of a panel of `cols` in features, a whole number of blocks.
    #[inline(always)]
    pub(crate) fn panel_bytes(self, cols: usize) -> usize {
        cols / GROUP / self.block_records() * self.block_bytes()
    }

    /// The records of a panel, each with its head.
    #[inline(always)]
    pub(crate) fn records(self, panel: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
        panel.chunks_exact(self.block_bytes()).flat_map(move |block| {
            let (head, records) = block.split_at(self.head_bytes());
            records.chunks_exact(self.record_bytes()).map(move |record| (head, record))
        })
    }
}
