//! Rows of a packed weight, widened: the embedding of tokens, tied to the head or not.

use half::{bf16, f16};

use super::CpuDevice;
use super::panel::{Panels, Part};
use super::record::{Codes, GROUP, Layout, Scales, VECTOR};
use super::shared::SharedSlice;
use super::simd::LANES;
use crate::Weight;
use crate::format::affine;

/// `out[t] = table[ids[t]]`.
pub(crate) fn embed(cpu: &CpuDevice, table: &Weight, ids: &[u32], out: &mut [f32]) {
    let cols = table.cols();
    let out = SharedSlice::new(out);
    cpu.for_row_chunks(ids.len(), cols, &|rows| {
        for row in rows {
            // SAFETY: each row is one task's.
            let out = unsafe { out.part(row * cols..(row + 1) * cols) };
            let id = ids[row] as usize;
            let part = table.parts.iter().rfind(|part| part.first_row <= id).expect("part 0 begins at row 0");
            widen_row(part, id - part.first_row, out);
        }
    });
}

fn widen_row(part: &Part, row: usize, out: &mut [f32]) {
    let (panel, lane) = (row / LANES, row % LANES);
    let floats = panel * part.cols * LANES;
    match &part.panels {
        Panels::F32(data) => gather(&data[floats..], lane, out, |x| x),
        Panels::F16(data) => gather(&data[floats..], lane, out, |x| f16::from_bits(x).to_f32()),
        Panels::BF16(data) => gather(&data[floats..], lane, out, |x| bf16::from_bits(x).to_f32()),
        Panels::Quant(layout, data) => {
            let panel = &data[panel * part.panel_bytes()..][..part.panel_bytes()];
            for ((head, record), out) in layout.records(panel).zip(out.as_chunks_mut::<GROUP>().0) {
                widen_group(*layout, head, record, lane, out);
            }
        }
    }
}

fn gather<T: Copy>(panel: &[T], lane: usize, out: &mut [f32], widen: impl Fn(T) -> f32) {
    for (value, lanes) in out.iter_mut().zip(panel.as_chunks::<LANES>().0) {
        *value = widen(lanes[lane]);
    }
}

/// One lane of a record, with the values that [`dequantize`](crate::dequantize) gives.
fn widen_group(layout: Layout, head: &[u8], record: &[u8], lane: usize, out: &mut [f32; GROUP]) {
    let (planes, scales) = record.split_at(layout.code_bytes());
    let planes = planes.as_chunks::<VECTOR>().0;
    for (half, out) in out.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(layout.scales, head, scales, half, lane);
        for (i, value) in out.iter_mut().enumerate() {
            let k = half * GROUP / 2 + i;
            let code = code(layout.codes, planes, k / 4, 4 * lane + k % 4);
            *value = affine(layout.min(), scale, i32::from(code) - layout.zero, min);
        }
    }
}

/// The code at byte `at` of a quad's vector.
fn code(codes: Codes, planes: &[[u8; VECTOR]], quad: usize, at: usize) -> u8 {
    let nibble = |first: usize| planes[first + quad % 4][at] >> (4 * (quad / 4)) & 15;
    let pair = |first: usize| planes[first + quad / 4][at] >> (2 * (quad % 4)) & 3;
    let bit = |plane: usize| planes[plane][at] >> quad & 1;
    match codes {
        Codes::Two => pair(0),
        Codes::Three => pair(0) | bit(2) << 2,
        Codes::Four => nibble(0),
        Codes::Five => nibble(0) | bit(4) << 4,
        Codes::Six => nibble(0) | pair(4) << 4,
        Codes::Eight => planes[quad][at],
    }
}

/// The scale and the minimum of a half of a record; the minimum is meaningless where there is none.
fn scale_and_min(scales: Scales, head: &[u8], bytes: &[u8], half: usize, lane: usize) -> (f32, f32) {
    let units = |at: usize, count: u8| half_at(head, at) * f32::from(count.cast_signed());
    match scales {
        Scales::Half => (half_at(bytes, lane), 0.0),
        Scales::HalfMin => (half_at(bytes, lane), half_at(bytes, LANES + lane)),
        Scales::Halves => (units(lane, bytes[half * LANES + lane]), 0.0),
        Scales::UnitsMin => (units(lane, bytes[lane]), units(LANES + lane, bytes[LANES + lane])),
        Scales::HalvesMin => {
            let both = bytes[half * LANES + lane];
            (units(lane, both & 15), units(LANES + lane, both >> 4))
        }
    }
}

/// f16 number `at`, widened.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32()
}
