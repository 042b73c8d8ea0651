//! Rows of a packed weight, widened: the embedding of tokens, tied to the head or not.

use half::f16;

use super::CpuDevice;
use super::panel::{GROUP, Panels, Part, QuantLayout};
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
    match &part.panels {
        Panels::F32(data) => gather(data, part.cols, row, out, |x| [x]),
        Panels::F16(data) => gather(data, part.cols, row, out, |x| [f16::from_bits(x).to_f32()]),
        Panels::BF16(data) => gather(data, part.cols, row, out, |x| [x.even(), x.odd()]),
        Panels::Quant(layout, data) => {
            let panel_bytes = part.panel_bytes();
            let records = data[panel * panel_bytes..][..panel_bytes].chunks_exact(layout.record_bytes());
            for (record, out) in records.zip(out.as_chunks_mut::<GROUP>().0) {
                widen_group(*layout, record, lane, out);
            }
        }
    }
}

/// One row of float panels, `cols` values in elements of `N`.
fn gather<T: Copy, const N: usize>(
    data: &[T],
    cols: usize,
    row: usize,
    out: &mut [f32],
    widen: impl Fn(T) -> [f32; N],
) {
    let elements = cols.div_ceil(N);
    let panel = &data[row / LANES * elements * LANES..][..elements * LANES];
    for (out, lanes) in out.chunks_mut(N).zip(panel.as_chunks::<LANES>().0) {
        out.copy_from_slice(&widen(lanes[row % LANES])[..out.len()]);
    }
}

/// One lane of a record, with the values that [`dequantize`](crate::dequantize) gives.
fn widen_group(layout: QuantLayout, record: &[u8], lane: usize, out: &mut [f32; GROUP]) {
    let (codes, rest) = record.split_at(layout.code_bytes());
    let (scales, mins) = rest.split_at(layout.scale_bytes());
    for (k, value) in out.iter_mut().enumerate() {
        let code = if layout.nibbles {
            codes[k % 16 / 4 * 4 * LANES + 4 * lane + k % 4] >> (4 * (k / 16)) & 15
        } else {
            codes[k / 4 * 4 * LANES + 4 * lane + k % 4]
        };
        let at = if layout.halves { k / 16 * LANES + lane } else { lane };
        let min = if layout.min { get(layout.wide, mins, at) } else { 0.0 };
        *value = affine(layout.min, get(layout.wide, scales, at), i32::from(code) - layout.zero, min);
    }
}

fn get(wide: bool, from: &[u8], at: usize) -> f32 {
    if wide {
        f32::from_ne_bytes([from[4 * at], from[4 * at + 1], from[4 * at + 2], from[4 * at + 3]])
    } else {
        f16::from_ne_bytes([from[2 * at], from[2 * at + 1]]).to_f32()
    }
}
